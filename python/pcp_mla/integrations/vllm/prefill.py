"""The part ``prefill``: attention of a layer's prefill rows, each key of a request expanded once and read in one call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ...layer.projection import some_heads
from ...ops.attention.call import prepared_rows, run_rows
from ...ops.attention.libraries import Rows
from ...ops.attention.support import choose, wants_apart
from ...ops.kv_up_project import expand_into, kv_up_project, result_shapes
from ...plan.dims import MLADims
from . import parts
from .latents import E4M3
from .rows import HeadRows, RowChunk, StepRows

FIELD = "pcp_mla_rows"  # of vLLM's prefill metadata: the step's rows, where they are this part's
_BOUNDARY = 128  # numbers, of which tensors in a kept buffer begin at a multiple: tensor copies want 16 bytes
_KEPT_BYTES = 2**28  # K and V of smaller steps, whose host time counts, lie in a buffer that is kept


def is_sparse(layer: Any) -> bool:
    return getattr(layer, "use_sparse", False) or getattr(layer.impl, "is_sparse", False)


def refusal(layer: Any, config: Any) -> str:
    """Why a layer's prefill stays vLLM's; the empty string where this part takes it. ``layer`` is an ``MLAAttention`` just made."""
    impl = layer.impl
    if is_sparse(layer):
        return "sparse MLA"
    if config.parallel_config.decode_context_parallel_size > 1:
        return "decode context parallelism"
    if config.lora_config is not None:
        return "LoRA"
    if layer.kv_cache_dtype != "auto" and layer.kv_cache_dtype not in E4M3:
        return f"a cache of {layer.kv_cache_dtype}"
    if config.attention_config.use_prefill_query_quantization:
        return "quantised queries"
    if getattr(config.compilation_config.pass_config, "fuse_attn_quant", False):
        return "attention fused with the quantisation of its output"
    if config.speculative_config is not None:
        return "speculative decoding"
    owner = next(kind.__name__ for kind in type(impl).__mro__ if "forward_mha" in vars(kind))
    if owner != "MLACommonBaseImpl":
        return f"{owner} has a forward_mha of its own"
    return ""


def is_plain(linear: Any) -> bool:
    """Whether a product with its weight is all that a module of vLLM's does."""
    method = getattr(linear, "quant_method", None)
    plain = type(linear).__name__ == "ColumnParallelLinear" and type(method).__name__ == "UnquantizedLinearMethod"
    return plain and linear.bias is None and not linear.gather_output and not (linear._forward_hooks or linear._forward_pre_hooks)


class Workspace:
    """Where K and V of a step's calls lie: for small steps a buffer that is kept, for all layers the same one."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], torch.Tensor] = {}
        self._last: tuple[tuple[Any, ...], tuple[torch.Tensor, ...]] | None = None

    def keep(self, like: torch.Tensor, numbers: int) -> None:
        """Allocate what is kept, for steps that never need more than so many numbers."""
        room = min(_KEPT_BYTES // like.element_size(), numbers + 3 * _BOUNDARY)
        self._kept[like.dtype, like.device] = like.new_empty(room)

    def of(self, count: int, dims: MLADims, apart: bool, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K [count, heads, nope + rope] and V [count, heads, v] to be written, of the dtype and on the device of ``like``; with
        ``apart`` K [count, heads, nope] and, last, k_pe [count, rope]."""
        key = (count, dims, apart, like.dtype, like.device)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        shapes = [(count, *shape) for shape in result_shapes(dims, apart).values()]
        rooms = [-(-math.prod(shape) // _BOUNDARY) * _BOUNDARY for shape in shapes]
        kept = self._kept.get(key[3:])
        if kept is None or sum(rooms) > kept.shape[0]:
            return tuple(like.new_empty(shape) for shape in shapes)
        places = zip(kept[: sum(rooms)].split(rooms), shapes, strict=True)
        self._last = key, tuple(place[: math.prod(shape)].view(shape) for place, shape in places)
        return self._last[1]


WORKSPACE = Workspace()


class _Heads(NamedTuple):
    """All heads of a layer, or those that this rank has of every token: the rows of ``kv_b_proj``'s weight then."""

    dims: MLADims
    weight_rows: slice | None


class LayerPrefill:
    """A layer's ``forward_mha``, and its ``forward_impl`` in steps without decodes. Steps that this part did not plan, and all
    while it is switched off, are vLLM's own."""

    def __init__(self, layer: Any) -> None:
        impl = layer.impl
        self._own, self._own_impl = impl.forward_mha, layer.forward_impl
        self._layer, self._linear, self._scale = layer, impl.kv_b_proj, impl.scale
        self.dims = MLADims(
            num_heads=impl.num_heads,
            qk_nope_head_dim=impl.qk_nope_head_dim,
            qk_rope_head_dim=impl.qk_rope_head_dim,
            v_head_dim=impl.v_head_dim,
            kv_lora_rank=impl.kv_lora_rank,
        )
        self._all = _Heads(self.dims, None)
        self._mine: tuple[slice, _Heads] | None = None  # of which of them
        self._quantised = impl.kv_cache_dtype in E4M3
        self._choice: tuple[tuple[int, int], tuple[str, bool]] | None = None  # for the last call's longest row and heads

    def workspace_width(self) -> int:
        """Numbers that a call needs at a time for each of its keys: K and V, what a module gives before K is put together, and
        latents that are gathered first."""
        dims, plain = self.dims, is_plain(self._linear)
        latents = dims.latent_dim if self._quantised or not plain else 0
        return dims.num_heads * (dims.qk_head_dim + dims.v_head_dim + (0 if plain else dims.qk_nope_head_dim)) + latents

    def forward_impl(
        self,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        """vLLM's own cuts the inputs to the tokens that are no pads, and these into decodes and prefills, in eleven views, for
        nothing where there are no decodes."""
        prefill = None if attn_metadata is None or attn_metadata.num_decode_tokens else attn_metadata.prefill
        step: StepRows | None = None if prefill is None else prefill.__dict__.get(FIELD)
        if step is None or output.dtype != q.dtype or any(value is not None for value in (*more, *named.values())):
            return self._own_impl(q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *more, **named)
        count, out = attn_metadata.num_actual_tokens, output
        if count < output.shape[0]:
            output[count:].zero_()
            if count == 0 and step.heads is None:  # a short prompt is all on other ranks
                return output
            q, out = q[:count], output[:count]
        cache = kv_cache.view(torch.float8_e4m3fn) if self._quantised else kv_cache
        out = out.view(count, self.dims.num_heads, self.dims.v_head_dim)
        if step.heads is None:
            self._forward(q, cache, step, self._layer._k_scale, out, self._all)
        else:
            self._by_heads(q, cache, step.heads, out)
        return output

    def _by_heads(self, q: torch.Tensor, cache: torch.Tensor, step: HeadRows, out: torch.Tensor) -> None:
        """[T, heads, nope + rope] to [T, heads, v] by way of the ranks that have the heads."""
        if not is_plain(self._linear):
            raise RuntimeError(f"pcp_mla: kv_b_proj must stay plain, as the layer was made: set {parts.VARIABLE} without heads")
        mine = self._heads(step.exchange.heads)
        whole = step.exchange.to_heads(q, step.meta)
        found = q.new_empty(whole.shape[0], mine.dims.num_heads, mine.dims.v_head_dim)
        self._forward(whole, cache, step.rows, self._layer._k_scale, found, mine)
        step.exchange.to_tokens(found, step.meta, out)
        parts.counts["heads"] += 1

    def _heads(self, heads: slice) -> _Heads:
        if self._mine is None or self._mine[0] != heads:
            self._mine = heads, _Heads(*some_heads(self.dims, heads))
        return self._mine[1]

    def forward_mha(
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
            raise NotImplementedError(f"pcp_mla: prefill output must not be quantised: set {parts.VARIABLE}=exchange")
        out = output.view(-1, self.dims.num_heads, self.dims.v_head_dim)
        self._forward(q, kv_c_and_k_pe_cache, step, k_scale, out, self._all)

    def _forward(
        self, q: torch.Tensor, cache: torch.Tensor, step: StepRows, k_scale: torch.Tensor, out: torch.Tensor, heads: _Heads
    ) -> None:
        """[T, heads, nope + rope] to ``out`` [T, heads, v] over the step's keys, which are all in the cache."""
        scale = k_scale if self._quantised else None
        parts.counts["prefill"] += 1
        *context, new = step.chunks
        if context:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            self._attend(q, cache, step, new, scale, heads, out, lse)
            for chunk in context:
                self._attend(q, cache, step, chunk, scale, heads, out, lse, (out, lse))
            return
        name, apart = self._chosen(q, new.rows)
        kind = name, self._scale
        call: Any = step.calls.get(kind)
        if call is None:  # False where the backend has no such form
            call = step.calls[kind] = prepared_rows(name, new.rows, self._scale) or False
        if call is False:
            self._attend(q, cache, step, new, scale, heads, out, None)
        else:
            k, v, *k_pe = self._expand(cache, step.kv_rows, scale, q, apart, heads)
            call(q, k, v, out, *k_pe)

    def _chosen(self, q: torch.Tensor, rows: Rows) -> tuple[str, bool]:
        """The backend for such rows, and whether it takes K in two parts."""
        dims, work, choice = self.dims, (rows.max_seqlen_q, q.shape[1]), self._choice
        if choice is None or choice[0] != work:
            concat = not is_plain(self._linear)
            name = choose("auto", q.device, q.dtype, dims.qk_head_dim, dims.v_head_dim, False, *work, concat)
            choice = self._choice = work, (name, wants_apart(name, dims.qk_nope_head_dim, dims.qk_rope_head_dim))
        return choice[1]

    def _attend(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        step: StepRows,
        chunk: RowChunk,
        scale: torch.Tensor | None,
        heads: _Heads,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        prev: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Output over a chunk's keys in ``out`` and its LSE in ``lse`` if it is wanted, merged with ``prev``."""
        name, apart = self._chosen(q, chunk.rows)
        k, v, *rest = self._expand(cache, step.kv_rows[chunk.first : chunk.first + chunk.num_keys], scale, q, apart, heads)
        k_pe = rest[0] if rest else None
        run_rows(name, q, k, v, chunk.rows, self._scale, lse is not None, k_pe, prev=prev, out=out, lse=lse)

    def _expand(
        self, cache: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None, q: torch.Tensor, apart: bool, heads: _Heads
    ) -> tuple[torch.Tensor, ...]:
        """K and V of the keys in these rows of the cache, and k_pe if it is to be ``apart``."""
        dims = heads.dims
        if not is_plain(self._linear):
            module = self._through_module
            return kv_up_project(cache, rows, None, dims, linear=module, scale=scale, dtype=q.dtype, k_pe_apart=apart)
        weight = self._linear.weight.data  # looked up at every call: engines swap weights
        if heads.weight_rows is not None:
            weight = weight[heads.weight_rows]
        results = WORKSPACE.of(rows.shape[0], dims, apart, q)
        if scale is None:
            expand_into(cache, rows, weight, *results)
        else:
            k, v, *k_pe = results
            k_pe_out = k_pe[0] if apart else None
            kv_up_project(cache, rows, weight, dims, scale=scale, k_out=k, v_out=v, k_pe_apart=apart, k_pe_out=k_pe_out)
        return results

    def _through_module(self, latents: torch.Tensor) -> torch.Tensor:
        return self._linear(latents)[0]
