"""What is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Whether outputs that overlap inputs in a way that the docs do not allow are refused.
OVERLAPS_ARE_REFUSED = False
# Whether a plan keeps the block tables that it was made with, whatever their owner does to them.
PLANS_ARE_OF_ONE_MOMENT = False
# Whether the cache that a caller of the model made is the model's own in every respect.
CACHES_ARE_WHOLE = False
# Whether block numbers and slots past int32 are refused.
VALUES_ARE_REFUSED = False


def refused(call: Callable[[], Any], *words: str) -> None:
    """The call must be a ValueError with these words, its op and argument, in this order."""
    message = ""
    try:
        call()
    except ValueError as error:
        message = str(error)
    assert message, f"a ValueError naming {' and '.join(words)} was expected, the call passed"
    assert re.search(".*".join(map(re.escape, words)), message), f"the error must name {' and '.join(words)}, got: {message}"
