"""Ranks that plan different steps find out on every rank, before a collective hangs."""

import pytest
import torch

from pcp_mla import PCPPlanner
from pcp_mla.launch import run_distributed

GOOD = {"query_lens": [9, 1, 4], "context_lens": [3, 8, 0], "is_prefill": [True, False, True]}
OPTIONS = {"max_requests": 8, "max_tokens": 100}


def outcomes_of_plans(group, steps, switch):
    """For each step plan, with what it says for this rank, and keep the error's message, the empty string if there is none. With
    the switch on, plan() alone compares."""
    rank = torch.distributed.get_rank(group)
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCP_MLA_CHECK", str(int(switch)))
        for changes in steps:
            options, arguments = changes.get(rank, ({}, {}))
            world = torch.distributed.get_world_size(group)
            planner = PCPPlanner(**OPTIONS, world_size=world, rank=rank, group=group, **options)
            try:
                planner.plan(**{**GOOD, **arguments})
                if not switch:
                    planner.check_consistency()
                outcomes.append("")
            except (RuntimeError, ValueError, TypeError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


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
