"""Forwards of modules, replaced and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

_NONE = object()


class ReplacedForward:
    """A module whose ``forward`` is another one until :meth:`put_back`.

    What stood in its place on the instance (of a user, of a compiler) is kept. Hooks of accelerate stay around the new one: they
    call ``_old_forward`` of the module, between moving weights and inputs to where they are needed.
    """

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward
        name = "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
        self._earlier = module.__dict__.get(name, _NONE)
        setattr(module, name, forward)

    def put_back(self) -> None:
        """What was put over the new forward since goes with it, unless it is a hook of accelerate."""
        _put(self.module, self._forward, self._earlier)

    def put_back_in_copy(self, memo: dict[int, Any]) -> None:
        """The same for the deep copy of the module that ``memo`` has."""
        _put(memo[id(self.module)], memo[id(self._forward)], copy.deepcopy(self._earlier, memo | {id(_NONE): _NONE}))


def _put(module: Any, forward: Any, earlier: Any) -> None:
    """``earlier`` in place of ``forward``, which may have hooks around it by now, or have lost them."""
    if module.__dict__.get("_old_forward") is forward:
        module._old_forward = MethodType(type(module).forward, module) if earlier is _NONE else earlier
    elif earlier is _NONE:
        module.__dict__.pop("forward", None)
    else:
        module.forward = earlier
