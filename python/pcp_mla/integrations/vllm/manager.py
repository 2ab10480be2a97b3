"""What is changed of vLLM's manager of prefill context parallelism: its steps are counted, and those of prefills planned here."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from . import parts
from .parts import logger
from .planner import Plan, StepPlanner, refusal
from .state import State, communicator, tell


def _look_at(manager: Any) -> None:
    """Look at a manager that was just made, once."""
    why = refusal(manager) if State.workspace_rows else "no layer whose prefill is taken"
    parts.made("planner", "manager", why)
    if parts.layers.get("exchange"):  # else there are no layers yet
        tell()


def _planner(manager: Any) -> StepPlanner | None:
    """The planner of a step that is to be planned here, made for the first one."""
    if not parts.runs("planner"):
        return None
    if State.planner is None:
        try:
            State.planner = StepPlanner(manager, State.workspace_rows, communicator())
        except AttributeError as error:
            parts.made("planner", "manager", f"a manager that is not known ({error})")
            logger.warning("pcp-mla: planner stays vLLM's own: a manager that is not known (%s)", error)
    return State.planner


def _share_out_heads(plan: Plan) -> None:
    """If that costs less."""
    if State.heads is not None and parts.runs("heads"):
        plan.rows = plan.rows._replace(heads=State.heads.of(plan.meta))


def _tell_later(manager: Any) -> None:
    own = manager.set_block_tables

    @functools.wraps(own)
    def set_block_tables(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        tell()
        return result

    manager.set_block_tables = set_block_tables


def _graphed(batch_desc: Any = None) -> bool:
    """Whether a graph of fixed sizes is replayed: its rows are vLLM's to pad."""
    return batch_desc is not None and bool(batch_desc.cg_mode.value)


def in_pcp_manager(module: ModuleType) -> None:
    manager = module.PCPManager
    made, partition, prepare = manager.__init__, manager.partition_batch, manager.prepare_attn
    restore = manager.restore_hidden_states
    if hasattr(manager, "set_block_tables"):
        parts.refuse("planner", "a manager that is made before the layers and their cache, as that of 0.33")
        _tell_later(manager)
    parts.refuse(
        "planner",
        parts.parameters_are(partition, "self", "input_batch", more=("batch_desc",))
        or parts.parameters_are(prepare, "self", "input_batch")
        or parts.parameters_are(restore, "self", "hidden_states"),
    )

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _look_at(self)

    @functools.wraps(partition)
    def partition_batch(self: Any, input_batch: Any, *rest: Any, **named: Any) -> Any:
        batch = None
        if State.exchange is not None:
            State.exchange.step += 1
        if State.planner is not None:
            State.planner.plan = None
        planner = _planner(self)
        if planner is not None and not _graphed(*rest, **named):
            batch = planner.partition(input_batch)
        if batch is None:
            batch = partition(self, input_batch, *rest, **named)
        else:
            self._global_batch = input_batch
            _share_out_heads(planner.plan)  # type: ignore[union-attr, arg-type]
        State.batch = batch
        return batch

    @functools.wraps(prepare)
    def prepare_attn(self: Any, input_batch: Any) -> Any:
        plan = None if State.planner is None else State.planner.plan
        if plan is None or input_batch is not plan.batch:
            return prepare(self, input_batch)
        return (plan.tables,), plan.slots.unsqueeze(0)

    @functools.wraps(restore)
    def restore_hidden_states(self: Any, hidden_states: Any) -> Any:
        planner = State.planner
        if planner is None or planner.plan is None:
            return restore(self, hidden_states)
        return planner.restore(hidden_states)

    manager.__init__ = __init__
    manager.partition_batch = partition_batch
    manager.prepare_attn = prepare_attn
    manager.restore_hidden_states = restore_hidden_states
