"""Calls of a model under PCP: one at a time and, with ``PCP_MLA_CHECK=1``, the same on all ranks or an error on each of them.

A call is compared before its arguments are looked at: what one rank refuses and another does not is a difference already. From
then on a rank that fails tells the others, which are on their way to a comparison: of the next call within this one, of a step's
plan, or of the call's end. Only a rank that fails between the collectives of a step leaves the others there, as without the switch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .agreement import contents
from .context import PCPContext, context_of

F = TypeVar("F", bound=Callable[..., Any])


def _checked_call(
    op: str, context: PCPContext, held: Any, signature: inspect.Signature, fn: Callable[..., Any], args: Any, options: Any
) -> Any:
    context.in_collectives = False
    try:
        context.turns.check_user(op)
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        values = {name: contents(value) for name, value in [*bound.arguments.items()][1:]}
        context.compare(op, {"the call": op, "the requests in the cache": contents(held)} | values)
        result = fn(*args, **options)
        if context.turns.depth == 1:
            context.compare(op, {"the call": f"end of {op}"})
        return result
    except BaseException:
        context.tell_failure()
        raise
    finally:
        if context.turns.depth == 1:
            context.told = False


def in_turn(op: str, find: Callable[[str, Any], PCPContext] = context_of) -> Callable[[F], F]:
    """Makes a function of a model and more a call: see :class:`.turns.Turns` and the module's page. Or one of a
    cache and more, of whose model ``find`` finds the context."""

    def decorate(fn: F) -> F:
        signature = inspect.signature(fn)
        first = next(iter(signature.parameters))

        @functools.wraps(fn)
        def call(*args: Any, **options: Any) -> Any:
            if not args and first in options:
                args = (options.pop(first),)
            if not args:
                signature.bind(**options)  # Python's own error
            context = find(op, args[0])
            with context.turns.turn():
                if context.step is not None:
                    raise ValueError(f"{op}: must come between steps of the model, got a call from within one")
                if context.comparison is not None:
                    held = context.requests if find is context_of else args[0]
                    return _checked_call(op, context, held, signature, fn, args, options)
                context.turns.check_user(op)
                return fn(*args, **options)

        return cast(F, call)

    return decorate
