"""Ranks that plan different steps find out on every rank, before a collective hangs."""

import threading

import numpy as np
import pytest

from pcp_mla import PCPPlanner
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.planner import planner as module
from pcp_mla.planner.consistency import FIELDS
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

GOOD = {"query_lens": [9, 1, 4], "context_lens": [3, 8, 0], "is_prefill": [True, False, True]}
OPTIONS = {"max_requests": 8, "max_tokens": 100}


def outcomes_of_plans(group, steps, switch):
    """For each step plan, with what it says for this rank, and keep the error's message, the empty string if there is none. With
    the switch on, plan() alone compares."""
    rank, world = group_rank(group), group_world_size(group)
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCP_MLA_CHECK", str(int(switch)))
        for changes in steps:
            options, arguments = changes.get(rank, ({}, {}))
            planner = PCPPlanner(**{**OPTIONS, "world_size": world, "rank": rank, "group": group, **options})
            assert (planner._comparison is not None) == switch
            try:
                planner.plan(**{**GOOD, **arguments})
                if not switch:
                    planner.check_consistency()
                outcomes.append("")
            except (RuntimeError, ValueError, TypeError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


class _Stop(BaseException):
    """None of the exceptions that anybody expects."""


ERRORS = {error.__name__: error for error in (MemoryError, RuntimeError, KeyboardInterrupt, OSError, SystemExit, _Stop)}
# Where in plan() a rank fails: before, in and after the host's part.
PLACES = {
    "block tables": (module, "check_tables"),
    "host plan": (module.PCPPlanner, "_plan"),
    "metadata": (module, "PlannedMetadata"),
    "buffers": (module.PlanBuffers, "hold"),
    "digests": (module, "digests"),
}


def failing_here(usual, error):
    """Ranks that are played are threads that share the module: only this one fails."""
    here = threading.get_ident()

    def call(*args):
        if threading.get_ident() == here:
            raise error("injected")
        return usual(*args)

    return call


def outcomes_of_failures(group, place, names):
    """For each error its name and text on a rank that meets it in plan(), on the others what they are told; then a good plan."""
    rank, world = group_rank(group), group_world_size(group)
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCP_MLA_CHECK", "1")
        made = PCPPlanner(**OPTIONS, world_size=world, rank=rank, group=group)
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            if rank == world - 1:
                patch.setattr(*PLACES[place], failing_here(getattr(*PLACES[place]), ERRORS[name]))
            try:
                made.plan(**GOOD, block_tables=np.zeros((3, 20), np.int32))
                outcomes.append("")
            except BaseException as error:
                if type(error).__name__ not in ERRORS:
                    raise
                outcomes.append(f"{type(error).__name__}: {error}")
    outcomes.append(made.plan(**GOOD).num_tokens)
    return outcomes


def assert_all_learn_of_it(results):
    *others, failed = results
    assert failed[:-1] == [f"{name}: injected" for name in ERRORS]
    told = f"RuntimeError: PCPPlanner.check_consistency: plan() failed on rank {len(others)}"
    assert all(result[:-1] == [told] * len(ERRORS) for result in others)
    assert all(result[-1] > 0 for result in results)


def test_every_rank_names_the_field_and_the_ranks():
    cases = [
        ({}, None),
        ({1: ({}, {"query_lens": [9, 1, 5]})}, "query_lens of ranks 0, 2, 3 and of rank 1"),
        ({0: ({}, {"context_lens": [3, 9, 0]})}, "context_lens of rank 0 and of ranks 1, 2, 3"),
        ({3: ({}, {"is_prefill": [True, True, True]})}, "is_prefill of ranks 0, 1, 2 and of rank 3"),
        ({1: ({"layout": "padded"}, {}), 2: ({"layout": "padded"}, {})}, "layout of ranks 0, 3 and of ranks 1, 2"),
        (
            {1: ({"cp_interleave": 4}, {"prompt_lens": [9, 9, 9], "num_tokens_padded": 50})},
            "prompt_lens of ranks 0, 2, 3 and of rank 1; cp_interleave of ranks 0, 2, 3 and of rank 1; "
            "num_tokens_padded of ranks 0, 2, 3 and of rank 1",
        ),
        ({}, None),
    ]
    outcomes = run_distributed(4, outcomes_of_plans, [changes for changes, _ in cases], False)
    start = "RuntimeError: PCPPlanner.check_consistency: plans must be equal on all ranks, but these differ: "
    assert outcomes == [["" if words is None else start + words for _, words in cases]] * 4


def test_the_switch_finds_a_difference_in_plan_itself():
    """A plan that fails on one rank fails on all: the others do not go on to a collective without it."""
    steps = [
        {},
        {1: ({"decode_policy": "round_robin"}, {})},
        {1: ({}, {"query_lens": [9, 1, 400]})},
        {1: ({}, {"block_tables": [[0]]})},
        {1: ({}, {"block_tables": [[0.5] * 20] * 3})},
        {},
    ]
    first, second = run_distributed(2, outcomes_of_plans, steps, True)
    assert first[0] == second[0] == first[5] == second[5] == ""
    assert "decode_policy of rank 0 and of rank 1" in first[1]
    assert first[1] == second[1]
    assert first[2] == first[3] == first[4] == "RuntimeError: PCPPlanner.check_consistency: plan() failed on rank 1"
    assert second[2].startswith("ValueError: PCPPlanner.plan: query_lens must add up to at most 100 tokens")
    assert second[3].startswith("ValueError: PCPPlanner.plan: block_tables must have a row for each of the 3 requests")
    assert second[4].startswith("TypeError: PCPPlanner.plan: block_tables must be integers")


def test_wrong_group():
    planner = PCPPlanner(**OPTIONS, world_size=2, rank=1)
    with pytest.raises(ValueError, match="group must have this process as rank 1 of 2, as the planner, got rank 0 of 1"):
        planner.check_consistency()
    with pytest.raises(ValueError, match="there must be a plan to compare, got none"):
        PCPPlanner(**OPTIONS, world_size=1, rank=0).check_consistency()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place", ["host plan", "metadata"])
def test_every_exception_reaches_the_others(world, place):
    assert_all_learn_of_it(run_distributed(world, outcomes_of_failures, place, list(ERRORS)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_every_exception_reaches_ranks_that_are_played(world, place):
    assert_all_learn_of_it(play(world, lambda group: outcomes_of_failures(group, place, list(ERRORS))))


def test_a_rank_whose_comparison_fails_raises_its_own_error(monkeypatch):
    """The others cannot be told then; what went wrong first is still what this rank says."""
    monkeypatch.setenv("PCP_MLA_CHECK", "1")
    made = PCPPlanner(**OPTIONS, world_size=1, rank=0, group=play(1, lambda group: group)[0])
    with pytest.raises(ValueError, match="query_lens must not be negative"):
        made.plan([-1])  # its group is over


# For each field what one rank has otherwise: options of its planner, arguments of its plan.
DIFFERENCES = {
    "query_lens": ({}, {"query_lens": [9, 1, 3]}),
    "context_lens": ({}, {"context_lens": [3, 7, 0]}),
    "is_prefill": ({}, {"is_prefill": [True, False, False]}),
    "prompt_lens": ({}, {"prompt_lens": [0, 0, 0]}),
    "world_size": ({"world_size": 5}, {}),
    "layout": ({"layout": "padded"}, {}),
    "decode_policy": ({"decode_policy": "round_robin"}, {}),
    "block_size": ({"block_size": 2}, {}),
    "dcp_world_size": ({"dcp_world_size": 2}, {}),
    "cp_interleave": ({"cp_interleave": 2}, {}),
    "num_tokens_padded": ({}, {"num_tokens_padded": 30}),
    "workspace_tokens": ({}, {"workspace_tokens": 20}),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("switch", [False, True])
def test_each_field_is_named(name, switch):
    first, second, third = play(3, lambda group: outcomes_of_plans(group, [{1: DIFFERENCES[name]}], switch))
    words = f"these differ: {name} of ranks 0, 2 and of rank 1"
    assert first[0].endswith(words)
    assert first == second == third


def test_all_shards_of_a_cache():
    """Two ranks of PCP, two shards on each: differences between any of the four, and one in another's place."""

    def outcomes(group, changes, options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PCP_MLA_CHECK", "1")
            places = {"world_size": 2, "rank": group.rank // 2, "dcp_world_size": 4, "dcp_rank": group.rank, "group": group}
            made = PCPPlanner(**{**OPTIONS, **places, **options.get(group.rank, {})})
            try:
                made.plan(**{**GOOD, **changes.get(group.rank, {})}, block_tables=np.zeros((3, 20), np.int32))
                return ""
            except (RuntimeError, ValueError) as error:
                return str(error)

    assert play(4, lambda group: outcomes(group, {}, {})) == [""] * 4
    told = play(4, lambda group: outcomes(group, {3: {"context_lens": [3, 9, 0]}}, {}))
    assert all(words.endswith("these differ: context_lens of ranks 0, 1, 2 and of rank 3") for words in told)
    told = play(4, lambda group: outcomes(group, {}, {1: {"cp_interleave": 4}}))
    assert all(words.endswith("these differ: cp_interleave of ranks 0, 2, 3 and of rank 1") for words in told)
    *others, wrong = play(4, lambda group: outcomes(group, {}, {3: {"dcp_rank": 2}}))
    assert others == ["PCPPlanner.check_consistency: plan() failed on rank 3"] * 3
    assert wrong.endswith("group must have this process as rank 2 of 4, as the planner, got rank 3 of 4")


def test_equal_numbers_of_other_types_do_not_differ():
    sizes = [
        {"num_tokens_padded": 30, "workspace_tokens": 50},
        {"num_tokens_padded": np.int64(30), "workspace_tokens": np.int32(50), "query_lens": np.array([9, 1, 4], np.int64)},
    ]
    assert play(2, lambda group: outcomes_of_plans(group, [{group.rank: ({}, sizes[group.rank])}], True)) == [[""], [""]]


def test_a_rank_in_the_wrong_place_or_without_a_plan_does_not_leave_the_others_waiting():
    told = "RuntimeError: PCPPlanner.check_consistency: plan() failed on rank 1"
    wrong = "ValueError: PCPPlanner.check_consistency: group must have this process as rank 0 of"
    # All of them equally wrong: nothing differs, and each says so.
    both = {rank: ({"rank": 0, "world_size": 3}, {}) for rank in range(2)}
    for switch in (False, True):
        assert play(2, lambda group, on=switch: outcomes_of_plans(group, [{1: ({"rank": 0}, {})}], on)) == [
            [told],
            [f"{wrong} 2, as the planner, got rank 1 of 2"],
        ]
        assert play(2, lambda group, on=switch: outcomes_of_plans(group, [both], on)) == [
            [f"{wrong} 3, as the planner, got rank {rank} of 2"] for rank in range(2)
        ]

    def one_has_no_plan(group):
        made = PCPPlanner(**OPTIONS, world_size=2, rank=group.rank)
        if group.rank == 0:
            made.plan(**GOOD)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            made.check_consistency(group)
        return f"{raised.type.__name__}: {raised.value}"

    assert play(2, one_has_no_plan) == [told, "ValueError: PCPPlanner.check_consistency: there must be a plan to compare, got none"]
