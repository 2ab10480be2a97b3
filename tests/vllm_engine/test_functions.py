"""Parts against vLLM's own functions, without an engine."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.ops import pcp
from vllm.v1.worker.gpu.pcp_manager import PCPManager

from pcp_mla.integrations.vllm.latents import PackedExchange
from pcp_mla.integrations.vllm.rows import host_rows
from pcp_mla.testing.played import play

RANK, ROPE = 12, 4


@pytest.mark.parametrize(
    ("decodes", "sharded", "slots"),
    [
        (0, False, [4, 0, 7, 1, 2, 9, 3, 8, 5, -1]),
        (2, False, [4, 0, 7, 1, 2, -1, -1, 8, 5, -1]),  # rank 0 writes what every rank has
        (2, True, [4, 0, 7, 1, 2, 9, 3, 8, 5, -1]),
        (5, True, [4, 0, 7, 1, 2, 9, 3, 8, 5, -1]),
    ],
)
def test_the_cache_is_vllms_own(decodes, sharded, slots, monkeypatch):
    here = threading.local()
    monkeypatch.setattr(pcp, "get_pcp_group", lambda: here.group)

    def rank(group):
        generator = torch.Generator().manual_seed(group.rank)
        kv_c, k_pe = torch.randn(5, RANK, generator=generator), torch.randn(5, 1, ROPE, generator=generator)
        if not sharded:  # every rank has the same decodes
            kv_c[:decodes], k_pe[:decodes] = 1.5, -1.5
        slot_mapping, stock, ours = torch.tensor(slots), torch.zeros(3, 4, RANK + ROPE), torch.zeros(3, 4, RANK + ROPE)
        here.group = SimpleNamespace(world_size=2, all_gather=lambda rows, dim: group.all_gather(rows))
        got = pcp.maybe_gather_mla_latent_cache_inputs(kv_c, k_pe, slot_mapping, decodes, True, sharded)
        CPUMLAImpl.do_kv_cache_update(None, got[0], got[1], stock, got[2], "auto", torch.ones(1))

        pynccl = SimpleNamespace(disabled=False, all_gather=lambda gathered, rows: gathered.copy_(group.all_gather(rows)))
        coordinator = SimpleNamespace(
            rank_in_group=group.rank,
            world_size=2,
            device_communicator=SimpleNamespace(pynccl_comm=pynccl),
            device_group=None,
        )
        exchange = PackedExchange(coordinator)
        got = exchange.gather(kv_c, k_pe, slot_mapping)
        assert exchange.write(got[0], ours, got[2], "auto", torch.ones(1))
        assert torch.equal(ours, stock)
        return ours

    caches = play(2, rank)
    assert torch.equal(caches[0], caches[1])
    assert caches[0].any(-1).sum() == sum(slot >= 0 for slot in slots)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_of_vllms_layout(world):
    """Rows of one request start at the same key, each sees all up to its end, and all ranks' queries are all new tokens."""
    lengths, computed = np.array([1, 1, 3, 50, 17, 2 * world + 1]), np.array([30, 9, 0, 0, 16, 5])
    prefilling = np.array([False, False, True, True, True, True])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    manager = PCPManager.__new__(PCPManager)
    manager.pcp_world_size, manager.dcp_world_size, manager.shard_decode_requests = world, 1, True
    manager.pcp_rank, manager.device = 0, torch.device("cpu")
    by_rank, _ = manager._build_batch_layout(lengths, computed, prefilling, starts)
    seen = []
    for segments in by_rank:
        segments = [segment for segment in segments if prefilling[segment.global_batch_req_idx]]
        requests = np.array([segment.global_batch_req_idx for segment in segments])
        tokens = np.array([segment.num_tokens for segment in segments])
        firsts = np.array([segment.global_batch_slice.start for segment in segments]) - starts[requests] + computed[requests]
        host = host_rows(tokens, firsts + tokens, requests, 10_000)
        ((_, num_keys, _, causal, where, what),) = host.chunks
        used, at = host.buffer[what : what + len(tokens)], host.buffer[where : where + len(tokens)]
        assert causal
        assert used.tolist() == (firsts + tokens).tolist()
        ends = {request: max(used[requests == request]) for request in set(requests.tolist())}
        assert num_keys == sum(ends.values())
        for request in ends:
            assert len(set(at[requests == request].tolist())) == 1
        ranges = sorted((int(at[requests == request][0]), int(end)) for request, end in ends.items())
        assert [first for first, _ in ranges] == np.cumsum([0, *(end for _, end in ranges)])[:-1].tolist()
        rows = zip(requests, firsts, tokens, strict=True)
        seen += [(request, position) for request, first, count in rows for position in range(first, first + count)]
    wanted = [(r, computed[r] + n) for r in range(len(lengths)) if prefilling[r] for n in range(lengths[r])]
    assert sorted(seen) == wanted
