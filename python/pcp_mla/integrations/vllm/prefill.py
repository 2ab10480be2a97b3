"""The part ``prefill``: attention of a layer's prefill rows, each key of a request expanded once and read in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops.attention.call import run_rows
from ...ops.attention.support import choose
from ...ops.kv_up_project import expand, kv_up_project
from ...plan.dims import MLADims
from . import parts
from .rows import RowChunk, StepRows

FIELD = "pcp_mla_rows"  # of vLLM's prefill metadata: the step's rows, where they are this part's
_E4M3 = ("fp8", "fp8_e4m3")
_Projection = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def refusal(layer: Any, config: Any) -> str:
    """Why a layer's prefill stays vLLM's; the empty string where this part takes it. ``layer`` is an ``MLAAttention`` just made."""
    impl = layer.impl
    if getattr(layer, "use_sparse", False) or getattr(impl, "is_sparse", False):
        return "sparse MLA"
    if config.parallel_config.decode_context_parallel_size > 1:
        return "decode context parallelism"
    if config.lora_config is not None:
        return "LoRA"
    if layer.kv_cache_dtype != "auto" and layer.kv_cache_dtype not in _E4M3:
        return f"a cache of {layer.kv_cache_dtype}"
    if config.attention_config.use_prefill_query_quantization:
        return "quantised queries"
    if config.speculative_config is not None:
        return "speculative decoding"
    if type(impl).__dict__.get("forward_mha") is not None:
        return f"{type(impl).__name__} has a forward_mha of its own"
    return ""


def _is_plain(linear: Any) -> bool:
    """Whether a product with its weight is all that a module of vLLM's does."""
    method = getattr(linear, "quant_method", None)
    plain = type(linear).__name__ == "ColumnParallelLinear" and type(method).__name__ == "UnquantizedLinearMethod"
    return plain and linear.bias is None and not linear.gather_output and not (linear._forward_hooks or linear._forward_pre_hooks)


class LayerPrefill:
    """A layer's ``forward_mha``. Steps that this part did not plan, and all while it is switched off, are vLLM's own."""

    def __init__(self, impl: Any) -> None:
        self._own = impl.forward_mha
        self._linear = impl.kv_b_proj
        self._scale = impl.scale
        self._dims = MLADims(
            num_heads=impl.num_heads,
            qk_nope_head_dim=impl.qk_nope_head_dim,
            qk_rope_head_dim=impl.qk_rope_head_dim,
            v_head_dim=impl.v_head_dim,
            kv_lora_rank=impl.kv_lora_rank,
        )
        self._quantised = impl.kv_cache_dtype in _E4M3
        self._backend = ""

    def __call__(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        step: StepRows | None = attn_metadata.prefill.__dict__.get(FIELD)
        if step is None:
            self._own(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale)
            return
        if output_scale is not None:
            raise NotImplementedError("pcp_mla: prefill output must not be quantised, PCP_MLA_VLLM=exchange leaves it to vLLM")
        dims = self._dims
        out = output.view(-1, dims.num_heads, dims.v_head_dim)
        if not self._backend:
            self._backend = choose("auto", q.device, q.dtype, dims.qk_head_dim, dims.v_head_dim, False)
        parts.counts["prefill"] += 1
        scale = k_scale if self._quantised else None
        *context, new = step.chunks
        if not context:
            self._attend(q, kv_c_and_k_pe_cache, step, new, scale, out, None)
            return
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._attend(q, kv_c_and_k_pe_cache, step, new, scale, out, lse)
        for chunk in context:
            self._attend(q, kv_c_and_k_pe_cache, step, chunk, scale, out, lse, (out, lse))

    def _attend(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        step: StepRows,
        chunk: RowChunk,
        scale: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        prev: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Output over a chunk's keys in ``out`` and its LSE in ``lse`` if it is wanted, merged with ``prev``."""
        rows = step.kv_rows if len(step.chunks) == 1 else step.kv_rows[chunk.first : chunk.first + chunk.num_keys]
        k, v = self._expand(cache, rows, scale, q)
        run_rows(self._backend, q, k, v, chunk.rows, self._scale, lse is not None, prev=prev, out=out, lse=lse)

    def _expand(
        self, cache: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _is_plain(self._linear):
            return kv_up_project(cache, rows, None, self._dims, linear=self._through_module, scale=scale)
        weight = self._linear.weight.data  # looked up at every call: engines swap weights
        if scale is None:
            return expand(cache, rows, weight, self._dims)
        return kv_up_project(cache, rows, weight, self._dims, scale=scale)

    def _through_module(self, latents: torch.Tensor) -> torch.Tensor:
        return self._linear(latents)[0]
