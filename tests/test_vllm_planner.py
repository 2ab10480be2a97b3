"""The planner behind vLLM's manager: a step of prefills, against where every token belongs by the definition of the split."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcp_mla.integrations.vllm.planner import StepPlanner, refusal
from pcp_mla.ops.attention.call import run_rows

BLOCK, BLOCKS, REQUESTS, TOKENS = 4, 40, 6, 200


@dataclasses.dataclass
class Batch:
    """The fields of vLLM's InputBatch that a plan reads or writes."""

    req_ids: list
    num_reqs: int
    num_reqs_after_padding: int
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    num_scheduled_tokens: np.ndarray
    num_tokens: int
    num_tokens_after_padding: int
    num_draft_tokens: int
    query_start_loc: torch.Tensor
    query_start_loc_np: np.ndarray
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    dcp_local_seq_lens: object
    num_computed_tokens_np: np.ndarray
    prefill_len_np: np.ndarray
    num_computed_prefill_tokens_np: np.ndarray
    is_prefilling_np: np.ndarray
    max_seq_len_np: object
    input_ids: torch.Tensor
    positions: torch.Tensor
    is_padding: torch.Tensor
    prompt_lens: object
    has_prefill: bool = False


class Tables:
    """Block tables by the number of a request's state, as the engine keeps them."""

    num_kv_cache_groups = 1
    block_sizes = (BLOCK,)

    def __init__(self):
        numbers = np.random.default_rng(0).permutation(REQUESTS * BLOCKS).reshape(REQUESTS, BLOCKS)
        self.block_tables = [SimpleNamespace(gpu=torch.tensor(numbers, dtype=torch.int32))]

    def gather_block_tables(self, idx_mapping, count):
        return (self.block_tables[0].gpu[idx_mapping.long()][:count],)


def manager(world, rank):
    buffers = SimpleNamespace(
        max_num_reqs=2 * REQUESTS,
        max_num_tokens=TOKENS,
        input_ids=torch.full((TOKENS,), -7, dtype=torch.int32),
        positions=torch.full((TOKENS,), -7, dtype=torch.int64),
        is_padding=torch.zeros(TOKENS, dtype=torch.bool),
    )
    return SimpleNamespace(
        pcp_world_size=world,
        pcp_rank=rank,
        dcp_world_size=1,
        device=torch.device("cpu"),
        _input_buffers=buffers,
        _block_tables=Tables(),
    )


def batch_of(new, computed, states):
    new, computed = np.array(new, np.int32), np.array(computed, np.int32)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    return Batch(
        req_ids=[f"r{state}" for state in states],
        num_reqs=len(new),
        num_reqs_after_padding=len(new),
        idx_mapping=torch.tensor(states, dtype=torch.int32),
        idx_mapping_np=np.array(states, np.int32),
        num_scheduled_tokens=new,
        num_tokens=int(new.sum()),
        num_tokens_after_padding=int(new.sum()),
        num_draft_tokens=0,
        query_start_loc=torch.tensor(starts),
        query_start_loc_np=starts,
        seq_lens=torch.tensor(new + computed),
        seq_lens_cpu_upper_bound=torch.tensor(new + computed),
        dcp_local_seq_lens=None,
        num_computed_tokens_np=computed,
        prefill_len_np=new + computed,
        num_computed_prefill_tokens_np=computed,
        is_prefilling_np=np.ones(len(new), np.bool_),
        max_seq_len_np=None,
        input_ids=torch.arange(int(new.sum()), dtype=torch.int32) + 1000,
        positions=torch.zeros(int(new.sum()), dtype=torch.int64),
        is_padding=torch.zeros(int(new.sum()), dtype=torch.bool),
        prompt_lens=None,
    )


def chunks(length, world, rank):
    """Offsets of the tokens of a rank's head and of its tail."""
    size = -(-length // (2 * world))
    return [list(range(length))[at * size : (at + 1) * size] for at in (rank, 2 * world - 1 - rank)]


BATCHES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.integers(1, 4), st.sampled_from([16, 64, 1000]), st.integers(0, 5))
def test_a_step_of_prefills(requests, world, limit, turn):
    new, computed = zip(*requests, strict=True)
    states = [(turn + i) % REQUESTS for i in range(len(new))]
    planners = [StepPlanner(manager(world, rank), max(limit, sum(new)), None) for rank in range(world)]
    batch = batch_of(new, computed, states)
    locals_ = [planner.partition(batch) for planner in planners]
    padded = max(sum(len(part) for n in new for part in chunks(n, world, r)) for r in range(world))
    table = Tables().block_tables[0].gpu
    gathered = torch.full((world * padded, 1), -1.0)
    for rank, (planner, local) in enumerate(zip(planners, locals_, strict=True)):
        plan = planner.plan
        assert plan is not None
        rows = [(i, part) for i, n in enumerate(new) for part in chunks(n, world, rank)]
        tokens = [batch.query_start_loc_np[i] + offset for i, part in rows for offset in part]
        assert (local.num_reqs, local.num_tokens, local.num_tokens_after_padding) == (len(rows), len(tokens), padded)
        assert local.req_ids == [batch.req_ids[i] for i, _ in rows]
        assert local.idx_mapping_np.tolist() == [states[i] for i, _ in rows]
        assert local.num_scheduled_tokens.tolist() == [len(part) for _, part in rows]
        assert local.input_ids.tolist() == [1000 + t for t in tokens] + [0] * (padded - len(tokens))
        positions = [computed[i] + offset for i, part in rows for offset in part]
        assert local.positions.tolist() == positions + [0] * (padded - len(tokens))
        assert local.is_padding.tolist() == [False] * len(tokens) + [True] * (padded - len(tokens))
        ends = [computed[i] + part[-1] + 1 for i, part in rows if part]
        assert [
            end for end, length in zip(local.seq_lens_cpu_upper_bound.tolist(), local.num_scheduled_tokens, strict=True) if length
        ] == ends
        assert local.query_start_loc_np.tolist() == local.query_start_loc.tolist()
        assert local.has_prefill
        assert local.is_prefilling_np.all()
        gathered[rank * padded : rank * padded + len(tokens), 0] = torch.tensor(tokens, dtype=torch.float32)
        mine = plan.slots[rank * padded : (rank + 1) * padded].tolist()
        slots = [int(table[states[i], p // BLOCK]) * BLOCK + p % BLOCK for i, part in rows for p in (computed[i] + o for o in part)]
        assert mine == slots + [-1] * (padded - len(tokens))
    for planner in planners:
        planner._communicator = SimpleNamespace(all_gather=lambda states: gathered)
        assert planner.restore(gathered[:padded])[:, 0].tolist() == list(range(sum(new)))


@pytest.mark.parametrize("limit", [44, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_attention_sees_all_keys_up_to_a_query(world, limit):
    new, computed, states = [13, 1, 30], [5, 0, 37], [4, 0, 2]
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(REQUESTS * BLOCKS * BLOCK, 2, 16, generator=generator, dtype=torch.float64)
    table = Tables().block_tables[0].gpu
    for rank in range(world):
        planner = StepPlanner(manager(world, rank), limit, None)
        local = planner.partition(batch_of(new, computed, states))
        assert planner.plan is not None
        rows, q = planner.plan.rows, torch.randn(local.num_tokens, 2, 16, generator=generator, dtype=torch.float64)
        assert (len(rows.chunks) > 1) == (limit == 44)
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        *context, last = rows.chunks
        for chunk in (last, *context):
            kv = cache[rows.kv_rows[chunk.first : chunk.first + chunk.num_keys].long()]
            prev = None if chunk is last else (out, lse)
            run_rows("torch", q, kv, kv, chunk.rows, 0.3, True, prev=prev, out=out, lse=lse)
        at = 0
        for i, n in enumerate(new):
            for part in chunks(n, world, rank):
                for offset in part:
                    p = torch.arange(computed[i] + offset + 1)
                    kv = cache[table[states[i]][p // BLOCK].long() * BLOCK + p % BLOCK]
                    weights = torch.softmax(torch.einsum("hd,nhd->hn", q[at], kv) * 0.3, 1)
                    torch.testing.assert_close(out[at], torch.einsum("hn,nhd->hd", weights, kv), rtol=1e-6, atol=1e-6)
                    at += 1
        assert at == local.num_tokens


def test_what_is_left_to_vllm():
    planner = StepPlanner(manager(2, 0), 1000, None)
    mixed = batch_of([1, 8], [9, 0], [0, 1])
    mixed.is_prefilling_np[0] = False
    assert planner.partition(mixed) is None
    assert planner.plan is None
    drafted = batch_of([8], [0], [1])
    drafted.num_draft_tokens = 1
    assert planner.partition(drafted) is None
    assert refusal(manager(2, 0)) == ""
    shared = manager(2, 0)
    shared.dcp_world_size = 2
    assert refusal(shared) == "decode context parallelism"
    hybrid = manager(2, 0)
    hybrid._block_tables.num_kv_cache_groups = 2
    assert refusal(hybrid) == "2 groups of caches"
    bare = manager(2, 0)
    bare._block_tables = None
    assert refusal(bare) == "a manager without block tables"
