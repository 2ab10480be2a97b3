"""Parts against vLLM's own functions, without an engine."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata, build_mla_chunked_context_metadata
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend
from vllm.v1.attention.ops import pcp
from vllm.v1.worker.gpu.pcp_manager import PCPManager

from pcp_mla.integrations.vllm.communicator import Communicator
from pcp_mla.integrations.vllm.latents import StepExchange
from pcp_mla.integrations.vllm.prefill import FIELD, LayerPrefill
from pcp_mla.integrations.vllm.rows import host_rows, step_rows
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
        exchange = StepExchange(Communicator(coordinator), 64)
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


@pytest.mark.parametrize("workspace", [32, 1000])
def test_attention_is_vllms_own(workspace):
    """Tails, heads and a continued prompt, as vLLM 0.26 and 0.33 order them, through forward_mha on one cache."""
    heads, nope, rope, v, rank, block = 4, 64, 64, 64, 512, 16
    tokens, ends = np.array([20, 9, 20, 9], np.int32), np.array([80, 59, 20, 32], np.int32)
    requests = np.array([1, 0, 1, 0])
    tables = torch.tensor([[9, 2, 7, 0, 5], [3, 8, 1, 6, 4]], dtype=torch.int32)[requests]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(heads * (nope + v), rank, generator=generator) / rank**0.5
    cache = torch.randn(10, block, rank + rope, generator=generator)
    q = torch.randn(int(tokens.sum()), heads, nope + rope, generator=generator)
    new = torch.cat([cache[tables[r].long()].flatten(0, 1)[ends[r] - tokens[r] : ends[r]] for r in range(4)])

    impl = CPUMLAImpl.__new__(CPUMLAImpl)
    vars(impl).update(num_heads=heads, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v, kv_lora_rank=rank, scale=0.1)
    vars(impl).update(kv_cache_dtype="auto", dcp_world_size=1, _use_flashinfer_concat_mla_k=False)
    impl.kv_b_proj = lambda latents: (latents @ weight.T, None)
    impl.kv_b_proj.weight = weight
    backend = CPUSDPAMLAPrefillBackend.__new__(CPUSDPAMLAPrefillBackend)
    backend.scale = impl.scale
    starts = torch.from_numpy(np.cumsum([0, *tokens], dtype=np.int32))
    chunked = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.from_numpy(ends - tokens),
        prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(workspace, rank + rope),
        chunked_prefill_workspace_size=workspace,
        block_size=block,
        align_chunk_to_block=True,
        device=torch.device("cpu"),
        dcp_world_size=1,
        dcp_local_block_size=1,
        dcp_virtual_block_size=1,
    )
    prefill = MLACommonPrefillMetadata(
        block_table=tables,
        query_start_loc=starts,
        max_query_len=int(tokens.max()),
        chunked_context=chunked,
        output_dtype=torch.float32,
        q_data_type=torch.float32,
        prefill_backend=backend,
    )
    backend._prefill_metadata = prefill
    metadata = SimpleNamespace(prefill=prefill)

    def run(forward):
        output = torch.full((len(q), heads * v), torch.nan)
        forward(q, new[:, :rank], new[:, None, rank:], cache, metadata, torch.ones(1), output=output)
        return output

    stock = run(impl.forward_mha)
    ours = LayerPrefill(SimpleNamespace(impl=impl, forward_impl=None)).forward_mha
    assert torch.equal(run(ours), stock)  # a step that was not planned
    setattr(prefill, FIELD, step_rows(host_rows(tokens, ends, requests, workspace), 4, tables, block))
    torch.testing.assert_close(run(ours), stock, rtol=1e-5, atol=1e-5)
