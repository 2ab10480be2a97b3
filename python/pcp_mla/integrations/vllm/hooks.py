"""What is changed of vLLM, by module; of its MLA layers and their metadata here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from . import heads, parts
from .latents import E4M3
from .manager import in_pcp_manager
from .planner import Plan
from .prefill import FIELD, WORKSPACE, LayerPrefill, is_sparse, refusal
from .rows import host_rows, step_rows
from .state import State, communicator, exchange_for

_SMALL_BYTES = 2**31  # K and V of one call


def _on_layer(layer: Any, config: Any) -> None:
    """Look at a layer that was just made, once."""
    world_size, scheduler = config.parallel_config.prefill_context_parallel_size, config.scheduler_config
    if world_size <= 1:
        return
    sparse = is_sparse(layer)
    parts.made("exchange", layer.layer_name, "sparse MLA" if sparse else "")
    why = refusal(layer, config)
    parts.made("prefill", layer.layer_name, why)
    State.max_tokens = scheduler.max_num_batched_tokens
    State.max_local_tokens = min(State.max_tokens, -(-State.max_tokens // world_size) + 2 * scheduler.max_num_seqs)
    exchanged = not sparse and "exchange" not in parts.refused
    attended = not why and "prefill" not in parts.refused
    if exchanged:
        State.by_peers &= layer.kv_cache_dtype in ("auto", *E4M3)
        _take_write(layer.impl)
    if attended:
        ours = LayerPrefill(layer)
        layer.impl.forward_mha, layer.forward_impl = ours.forward_mha, ours.forward_impl
        why = heads.refusal(ours, State.layers, layer.impl.kv_b_proj, world_size)
        State.layers.append(ours)
        State.workspace_rows = max(State.workspace_rows, _rows_at_a_time(layer, ours.workspace_width(), config.model_config))
    if "heads" not in parts.enabled:
        why = "its exchange is made when the engine starts"
    parts.made("heads", layer.layer_name, why)
    if exchanged or attended:
        _reserve_first(layer)


def _rows_at_a_time(layer: Any, width: int, model: Any) -> int:
    """Keys that a call may need: as many as vLLM's own calls may, a step's new tokens, or those of the longest prompt, if K and V
    of them are small."""
    small = _SMALL_BYTES // (width * model.dtype.itemsize)
    return max(layer.chunked_prefill_workspace_size, State.max_tokens, min(model.max_model_len, small))


def _reserve_first(layer: Any) -> None:
    """Let the layer's first call, which is in vLLM's profile run, allocate what a step needs: that run finds out how much memory is
    left for the cache. Weights are there by then."""
    forward = layer.forward_impl

    @functools.wraps(forward)
    def forward_impl(q: Any, k_c_normed: Any, k_pe: Any, *args: Any, **named: Any) -> Any:
        layer.forward_impl = forward
        if not State.reserved:
            State.reserved = True
            _reserve(k_c_normed, k_pe)
        return forward(q, k_c_normed, k_pe, *args, **named)

    layer.forward_impl = forward_impl


def _reserve(kv_c: Any, k_pe: Any) -> None:
    if "exchange" in parts.running:
        exchange_for(kv_c).of(kv_c, k_pe)
    if "prefill" in parts.running:
        width = max(layer.workspace_width() for layer in State.layers)
        WORKSPACE.keep(kv_c, State.workspace_rows * width)
        kv_c.new_empty(State.workspace_rows, width)
    if {"exchange", "prefill", "heads"} <= parts.running and "planner" in parts.enabled:
        State.heads = heads.StepHeads(communicator(), State.max_local_tokens, State.layers[0].dims, kv_c)


def _take_write(impl: Any) -> None:
    own = impl.do_kv_cache_update

    @functools.wraps(own)
    def do_kv_cache_update(
        kv_c_normed: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, k_scale: Any, *rest: Any
    ) -> None:
        exchange = State.exchange
        taken = exchange is not None and kv_cache.numel() and "exchange" in parts.running
        if not (taken and exchange.write(kv_c_normed, kv_cache, slot_mapping, kv_cache_dtype, k_scale)):  # type: ignore[union-attr]
            own(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *rest)

    impl.do_kv_cache_update = do_kv_cache_update


def _in_mla_attention(module: ModuleType) -> None:
    layer_class, builder = module.MLAAttention, module.MLACommonMetadataBuilder
    gather, chunks = module.maybe_gather_mla_latent_cache_inputs, module.build_mla_chunked_context_metadata
    latents = ("kv_c_normed", "k_pe", "slot_mapping", "num_decode_tokens", "use_pcp")
    parts.refuse(
        "exchange",
        parts.parameters_are(gather, *latents, more=("pcp_shard_decode_requests",))
        or parts.parameters_are(
            module.MLACommonBaseImpl.do_kv_cache_update,
            *("self", "kv_c_normed", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "k_scale"),
            more=("skip_scale",),
        ),
    )
    names = ("self", "q", "kv_c_normed", "k_pe", "kv_c_and_k_pe_cache", "attn_metadata", "k_scale", "output", "output_scale")
    parts.refuse(
        "prefill",
        parts.parameters_are(module.MLACommonBaseImpl.forward_mha, *names)
        or parts.parameters_are(builder.build, "self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    )

    made = layer_class.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _on_layer(self, module.get_current_vllm_config())

    layer_class.__init__ = __init__

    @functools.wraps(gather)
    def maybe_gather(
        kv_c_normed: Any, k_pe: Any, slot_mapping: Any, num_decode_tokens: int | None, use_pcp: bool, *rest: Any, **named: Any
    ) -> Any:
        if use_pcp and slot_mapping is not None and num_decode_tokens is not None and "exchange" in parts.running:
            count = kv_c_normed.shape[0]
            sharded = named.get("pcp_shard_decode_requests", rest[0] if rest else False)
            if slot_mapping.shape[0] > count and (sharded or num_decode_tokens < count):
                return exchange_for(kv_c_normed).gather(kv_c_normed, k_pe, slot_mapping)
        return gather(kv_c_normed, k_pe, slot_mapping, num_decode_tokens, use_pcp, *rest, **named)

    @functools.wraps(chunks)
    def build_chunks(**named: Any) -> Any:
        return None if State.taking_rows else chunks(**named)

    if "exchange" not in parts.refused:
        module.maybe_gather_mla_latent_cache_inputs = maybe_gather  # type: ignore[attr-defined]
    if "prefill" not in parts.refused:
        module.build_mla_chunked_context_metadata = build_chunks  # type: ignore[attr-defined]
        builder.build = _build(module, builder.build)


def _build(module: ModuleType, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        mine = "prefill" in parts.running and self.use_pcp
        plan = None if State.planner is None else State.planner.plan
        if mine and plan is not None and plan.is_of(common_attn_metadata):
            return _planned_metadata(module, self, common_attn_metadata, plan)
        State.taking_rows = mine
        try:
            metadata = own(self, common_prefix_len, common_attn_metadata, fast_build)
        finally:
            State.taking_rows = False
        if mine and metadata.num_prefills > 0:
            _add_rows(self, common_attn_metadata, metadata)
        return metadata

    return build


def _planned_metadata(module: ModuleType, builder: Any, common: Any, plan: Plan) -> Any:
    """vLLM's metadata of a step without decodes, of which its own code reads no more than this."""
    prefill = module.MLACommonPrefillMetadata(
        block_table=common.block_table_tensor,
        query_start_loc=common.query_start_loc,
        max_query_len=common.max_query_len,
        output_dtype=builder.model_config.dtype,
        q_data_type=builder.q_data_type,
        prefill_backend=builder._prefill_backend,
    )
    setattr(prefill, FIELD, plan.rows)
    return builder.metadata_cls(
        num_reqs=common.num_reqs,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        num_actual_tokens=common.num_actual_tokens,
        query_start_loc=common.query_start_loc,
        slot_mapping=common.slot_mapping,
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=common.num_reqs,
        prefill=prefill,
    )


def _add_rows(builder: Any, common: Any, metadata: Any) -> None:
    first, last = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
    starts = common.query_start_loc_cpu[first : last + 1].numpy()
    ends = common.seq_lens_cpu_upper_bound[first:last].numpy()  # exact for prefill rows
    requests = np.arange(first, last)
    if State.batch is not None and np.array_equal(State.batch.query_start_loc_np, common.query_start_loc_cpu.numpy()):
        requests = State.batch.idx_mapping_np[first:last]
    host = host_rows(starts[1:] - starts[:-1], ends, requests, State.workspace_rows)
    rows = step_rows(host, last - first, metadata.prefill.block_table, builder.page_size)
    setattr(metadata.prefill, FIELD, rows)
    parts.counts["rows"] += 1


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "vllm.model_executor.layers.attention.mla_attention": _in_mla_attention,
    "vllm.v1.worker.gpu.pcp_manager": in_pcp_manager,
}
