"""In which steps the plug-in's parts run, and what they hand to vLLM."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fake_vllm import modules
from pcp_mla.integrations.vllm import hooks, parts, prefill, register, switch
from pcp_mla.integrations.vllm.prefill import FIELD
from pcp_mla.integrations.vllm.state import State

# The part prefill: rows.


def batch_of(rows, decodes):
    """Rows as (tokens, end), the first ones decodes."""
    tokens, ends = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    return SimpleNamespace(
        num_reqs=len(rows),
        num_decodes=decodes,
        query_start_loc_cpu=torch.cat((torch.zeros(1, dtype=torch.int32), tokens.cumsum(0).int())),
        seq_lens_cpu_upper_bound=ends,
        block_table=torch.arange(3 * (len(rows) - decodes), dtype=torch.int32).view(-1, 3),
    )


ROWS = [(1, 30), (1, 7), (2, 8), (2, 2), (3, 5)]  # two decodes, head and tail of a request in the middle, one more


def partitioned(manager, rows, requests):
    batch = SimpleNamespace(
        query_start_loc_np=np.cumsum([0, *(tokens for tokens, _ in rows)]), idx_mapping_np=np.array(requests), name="local"
    )
    assert manager.PCPManager().partition_batch(batch, "graphs") is batch


def test_a_step_is_planned_in_place_of_context_chunks(vllm):
    vllm()
    register()
    attention, manager = modules()
    attention.MLAAttention()
    partitioned(manager, ROWS, [5, 0, 2, 2, 1])
    metadata = attention.MLACommonMetadataBuilder().build(0, batch_of(ROWS, 2))
    assert metadata.prefill.chunked_context is None
    assert attention.CALLS == []
    (chunk,) = getattr(metadata.prefill, FIELD).chunks
    assert chunk.rows.cu_seqlens_q.tolist() == [0, 2, 4, 7]
    assert chunk.rows.cu_seqlens_k.tolist() == [0, 0, 8, 13]  # rows of one request share its keys
    assert chunk.rows.seqused_k.tolist() == [8, 2, 5]
    assert getattr(metadata.prefill, FIELD).kv_rows.tolist() == [*range(8), *range(24, 29)]
    assert parts.counts["rows"] == 1


@pytest.mark.parametrize(
    ("length", "heads", "rows"), [(50, 2, 100), (5000, 2, 5000), (10**7, 2, 2**31 // 288), (10**7, 2**20, 100)]
)
def test_small_keys_of_a_longest_prompt_are_all_there_at_once(vllm, length, heads, rows):
    """As long as K and V of them are small; else vLLM's own limit holds."""
    vllm()
    register()
    attention, _ = modules()
    attention.CONFIG.model_config.max_model_len = length
    impl = attention.Impl()
    impl.num_heads = heads
    attention.MLAAttention(impl=impl)
    assert State.workspace_rows == rows


def test_a_batch_that_was_not_partitioned_has_rows_of_requests_of_their_own(vllm):
    vllm()
    register()
    attention, manager = modules()
    attention.MLAAttention()
    partitioned(manager, ROWS[:-1], [5, 0, 2, 2])  # another one
    metadata = attention.MLACommonMetadataBuilder().build(0, batch_of(ROWS, 2))
    (chunk,) = getattr(metadata.prefill, FIELD).chunks
    assert chunk.rows.cu_seqlens_k.tolist() == [0, 8, 10, 15]


def test_the_workspace_of_vllm_is_kept_to(vllm):
    vllm()
    register()
    attention, _ = modules()
    attention.MLAAttention()
    builder = attention.MLACommonMetadataBuilder()
    State.workspace_rows = 4
    metadata = builder.build(0, batch_of(ROWS, 2))
    assert [chunk.num_keys for chunk in getattr(metadata.prefill, FIELD).chunks] == [4, 4, 7]


@pytest.mark.parametrize("case", ["switched off", "a layer refused", "no layer yet", "no PCP", "decodes alone"])
def test_steps_that_are_vllms(case, vllm):
    vllm()
    register()
    attention, _ = modules()
    if case != "no layer yet":
        attention.MLAAttention()
    if case == "a layer refused":
        parts.made("prefill", "other", "LoRA")
    if case == "switched off":
        switch(["exchange"])
    builder = attention.MLACommonMetadataBuilder()
    builder.use_pcp = case != "no PCP"
    metadata = builder.build(0, batch_of(ROWS, len(ROWS) - 1 if case != "decodes alone" else len(ROWS)))
    assert not hasattr(metadata.prefill, FIELD)
    assert metadata.prefill.chunked_context == "chunks" or case == "decodes alone"


def test_a_build_that_fails_leaves_the_next_one_alone(vllm):
    vllm()
    register()
    attention, _ = modules()
    attention.MLAAttention()
    with pytest.raises(AttributeError):
        attention.MLACommonMetadataBuilder().build(0, object())
    switch([])
    assert attention.build_mla_chunked_context_metadata(context_lens_cpu=None) == "chunks"


# The part exchange: latents.


class Pynccl:
    """Rank 0's end of a communicator whose other rank sends the negative of what this one does."""

    disabled = False

    def all_gather(self, gathered, rows):
        count = len(rows)
        mine = rows.clone()
        gathered[:count], gathered[count:] = mine, -mine


GROUP = SimpleNamespace(rank_in_group=0, world_size=2, device_communicator=SimpleNamespace(pynccl_comm=Pynccl()), device_group=None)


@pytest.fixture
def exchanging(vllm, monkeypatch):
    def start(sharded=True):
        vllm(sharded=sharded)
        register()
        attention, _ = modules()
        importlib.import_module("vllm.distributed.parallel_state").GROUP = GROUP
        return attention, attention.MLAAttention().impl

    return start


def latents(count):
    return torch.randn(count, 12), torch.randn(count, 1, 4)


@pytest.mark.parametrize("sharded", [False, True])
def test_latents_are_gathered_and_written_packed(sharded, exchanging):
    attention, impl = exchanging(sharded)
    kv_c, k_pe = latents(3)
    slots = torch.tensor([5, 1, -1, 0, -1, 7, 99])
    named = {"pcp_shard_decode_requests": False} if sharded else {}
    got = attention.maybe_gather_mla_latent_cache_inputs(kv_c, k_pe, slots, 1, True, **named)
    assert torch.equal(got[0], torch.cat((kv_c, -kv_c)))
    assert torch.equal(got[1], torch.cat((k_pe, -k_pe)))
    assert torch.equal(got[2], slots[:6])
    cache = torch.zeros(2, 4, 16)
    impl.do_kv_cache_update(got[0], got[1], cache, got[2], "auto", torch.ones(1))
    assert attention.CALLS == []
    wanted = torch.zeros(8, 16)
    wanted[[5, 1, 0, 7]] = torch.cat((kv_c, k_pe[:, 0]), 1)[[0, 1, 0, 2]] * torch.tensor([1, 1, -1, -1])[:, None]
    assert torch.equal(cache.flatten(0, 1), wanted)
    assert dict(parts.counts) == {"exchange": 1, "cache_write": 1}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("slots", "decodes", "shard", "use_pcp", "ours"),
    [
        (6, 0, False, True, True),
        (6, 3, True, True, True),  # decodes of other ranks
        (6, 3, False, True, False),  # every rank has all of them
        (3, 0, False, True, False),  # a draft's, which are replicated
        (6, 0, False, False, False),
        (None, 0, False, True, False),
    ],
)
def test_which_latents_are_gathered(named, slots, decodes, shard, use_pcp, ours, exchanging):
    attention, _ = exchanging()
    slots = None if slots is None else torch.arange(slots)
    last = {"pcp_shard_decode_requests": shard} if named else {}
    args = (*latents(3), slots, decodes, use_pcp, *(() if named else (shard,)))
    attention.maybe_gather_mla_latent_cache_inputs(*args, **last)
    assert ([] if ours else ["gather"]) == attention.CALLS


@pytest.mark.parametrize("names", [["exchange", "prefill"], ["exchange"], ["prefill"]])
def test_the_profile_run_allocates_what_a_step_needs(names, exchanging, monkeypatch):
    """vLLM's profile run has no metadata and no slots; what lives or lived then is not given to the cache."""
    attention, _ = exchanging()
    monkeypatch.setattr(prefill, "WORKSPACE", prefill.Workspace())
    monkeypatch.setattr(hooks, "WORKSPACE", prefill.WORKSPACE)
    switch(names)
    layer, other = attention.MLAAttention("one"), attention.MLAAttention("two")
    made = []

    class Latents(torch.Tensor):
        def new_empty(self, *shape):
            made.append(shape)
            return torch.empty(*shape)

    kv_c, k_pe = latents(50)
    for one in (layer, other, layer):
        one.forward_impl(torch.zeros(50), kv_c.as_subclass(Latents), k_pe, None, None, output=torch.zeros(50))
    assert attention.CALLS == ["layer"] * 3
    assert not hasattr(layer.forward_impl, "__wrapped__")
    # 100 rows for 2 heads: K of 12 and V of 8, what kv_b_proj gives of K besides, 8, as it is no plain one, and latents of 16
    width = 2 * (12 + 8 + 8) + 16
    assert made == ([(100 * width + 3 * 128,), (100, width)] if "prefill" in names else [])
    if "exchange" not in names:
        assert State.exchange is None
        return
    exchange = State.exchange.of(*latents(20))
    assert exchange.max_tokens == 64  # max_num_batched_tokens
    assert State.exchange.of(*latents(64)) is exchange
    assert State.exchange.of(*latents(65)).max_tokens == 65
    assert State.exchange._outgrown == [exchange]


@pytest.mark.parametrize("case", ["switched off", "a sparse layer", "no layer yet"])
def test_latents_that_are_vllms(case, exchanging):
    attention, impl = exchanging()
    if case == "switched off":
        switch(["prefill"])
    elif case == "a sparse layer":
        parts.made("exchange", "other", "sparse MLA")
    else:
        parts.layers.clear()
        switch(["exchange"])
    attention.maybe_gather_mla_latent_cache_inputs(*latents(3), torch.arange(6), 0, True)
    impl.do_kv_cache_update(*latents(6), torch.zeros(2, 4, 16), torch.arange(6), "auto", torch.ones(1))
    assert attention.CALLS == ["gather", "write"]


@pytest.mark.parametrize("case", ["another tensor", "another dtype", "no cache yet", "switched off"])
def test_writes_that_are_vllms(case, exchanging):
    attention, impl = exchanging()
    kv_c, k_pe, slots = attention.maybe_gather_mla_latent_cache_inputs(*latents(3), torch.arange(6), 0, True)
    cache = torch.zeros(2, 4, 16, dtype=torch.bfloat16 if case == "another dtype" else torch.float32)
    if case == "switched off":
        switch([])
    if case == "no cache yet":
        cache = torch.zeros(0)
    impl.do_kv_cache_update(kv_c[:] if case == "another tensor" else kv_c, k_pe, cache, slots, "auto", torch.ones(1))
    assert attention.CALLS == ["write"]
    assert parts.counts["cache_write"] == 0
    assert not cache.any()
