"""Ten thousand random batches against the specification. `make test-asan` runs them under the address sanitizer, too."""

import numpy as np
import pytest

from pcp_mla import PCPPlanner, partition
from pcp_mla.plan.slots import PagedCache, key_chunks, kv_rows, slot_mapping
from pcp_mla.planner.step_buffer import fill
from plans import TOKEN_ARRAYS, assert_equal

PLANNERS, BATCHES = 50, 200
MAX_REQUESTS, MAX_TOKENS, MAX_CHUNKS = 12, 1500, 40


def random_planner(rng):
    world = int(rng.integers(1, 17))
    policy = rng.choice(["unpadded replicate", "unpadded round_robin", "padded replicate"]).split()
    shards = int(rng.integers(1, 5))
    cache = PagedCache(int(rng.choice([1, 3, 16, 64])), shards, int(rng.integers(shards)), int(rng.choice([1, 2, 16])))
    split = {"world_size": world, "rank": int(rng.integers(world)), "layout": policy[0], "decode_policy": policy[1]}
    return PCPPlanner(MAX_REQUESTS, MAX_TOKENS, **split, **vars(cache), max_context_chunks=MAX_CHUNKS), split, cache


def random_batch(rng, world):
    """Up to MAX_REQUESTS requests; lengths around the numbers where chunking changes, short ones, and a long one now and then."""
    count = int(rng.integers(0, MAX_REQUESTS + 1))
    edges = np.array([0, 1, 2 * world - 1, 2 * world, 2 * world + 1])
    kinds = rng.integers(0, 3, count)
    lengths = np.where(
        kinds == 0, rng.choice(edges, count), np.where(kinds == 1, rng.integers(0, 9, count), rng.integers(0, 80, count))
    )
    if count and rng.random() < 0.1:
        lengths[rng.integers(count)] = rng.integers(300, 600)
    contexts = np.where(rng.random(count) < 0.3, 0, rng.integers(0, 60, count))
    prompts = None if rng.random() < 0.5 else rng.integers(0, 120, count).astype(np.int32)
    return lengths.astype(np.int32), contexts.astype(np.int32), rng.random(count) < 0.6, prompts


@pytest.mark.parametrize("seed", range(PLANNERS))
def test_random_batches_agree_with_the_specification(seed):
    rng = np.random.default_rng(seed)
    planner, split, cache = random_planner(rng)
    wanted = planner.step.numpy().copy()
    for _ in range(BATCHES):
        lengths, contexts, prefill, prompts = random_batch(rng, split["world_size"])
        part = partition(lengths, contexts, prefill, prompt_lens=prompts, **split)
        columns = -(-int((lengths + contexts).max(initial=0)) // cache.block_size)
        tables = rng.integers(0, 2**20, (len(lengths), columns), dtype=np.int32)
        restored = int(part.padded_lens.sum())
        workspace = None if rng.random() < 0.5 else max(1, restored, part.num_kv_tokens // int(rng.integers(1, 9)))
        given = tables.copy()
        meta = planner.plan(lengths, contexts, prefill, given, workspace_tokens=workspace, prompt_lens=prompts)
        given[:] = -1
        fill(planner.step_layout, wanted, part, key_chunks(part, workspace), planner.cache)
        assert_equal(planner.step, wanted, "step")
        for name in TOKEN_ARRAYS:
            assert_equal(getattr(meta, name), getattr(part, name), name)
        assert_equal(meta.slot_mapping, slot_mapping(part, tables, cache), "slot_mapping")
        assert_equal(meta.kv_rows, kv_rows(part, tables, cache, workspace), "kv_rows")
