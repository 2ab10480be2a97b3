"""A wrong change: where, what is right, what is wrong instead, and the test that must fail."""

from typing import NamedTuple


class Change(NamedTuple):
    """``right`` stands once in ``file``; ``test`` is a pytest node."""

    what: str
    file: str
    right: str
    wrong: str
    test: str
