"""What is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def refused(call: Callable[[], Any], *words: str) -> None:
    """The call must be a ValueError with these words, its op and argument, in this order."""
    message = ""
    try:
        call()
    except ValueError as error:
        message = str(error)
    assert message, f"a ValueError naming {' and '.join(words)} was expected, the call passed"
    assert re.search(".*".join(map(re.escape, words)), message), f"the error must name {' and '.join(words)}, got: {message}"
