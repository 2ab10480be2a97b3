"""One MLA layer under prefill context parallelism: latents of this rank in, attention output of this rank out.

Every stage is one small function, so that a fused kernel can take its place. Nothing is gathered or restored in between: rows are
written and read by their address, the head and the tail of a request are two rows over one K/V prefix, and q is in local order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.modules import module as _modules

from ..checks import check_last_dim, check_no_gradients, check_not_expanded
from ..exchange.latents import LatentExchange
from ..ops.attention.call import attend, check_library, choose
from ..ops.attention.checks import check_scale
from ..ops.kv_up_project import expand, kv_up_project
from ..ops.kv_up_project_checks import check_projection
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata, check_meta
from ..plan.slots import KeyChunk

KVProjection = torch.nn.Module | torch.Tensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _hooks_of_all() -> bool:
    """Whether there are hooks of every module."""
    return bool(_modules._global_forward_hooks or _modules._global_forward_pre_hooks)


def plain_weight(kv_b_proj: KVProjection) -> torch.Tensor | None:
    """[heads * (nope + v), kv_lora_rank] if a product with it is all that ``kv_b_proj`` does: subclasses of Linear and of Tensor
    may hold it quantised or in shards, and hooks and other forwards may move it or change what comes of it."""
    if not isinstance(kv_b_proj, torch.Tensor):
        if type(kv_b_proj) is not torch.nn.Linear or kv_b_proj.bias is not None or "forward" in kv_b_proj.__dict__:
            return None
        if kv_b_proj._forward_hooks or kv_b_proj._forward_pre_hooks or _hooks_of_all():
            return None
        kv_b_proj = kv_b_proj.weight
    return kv_b_proj if type(kv_b_proj) in _PLAIN else None


def _weight_in_place(kv_b_proj: KVProjection) -> torch.Tensor | None:
    """To be checked: the weight of what is called, but has the one that it says: with a bias, hooks behind it, or of another class
    and bare. None of a module that may put another one in its place."""
    if isinstance(kv_b_proj, torch.Tensor):
        return kv_b_proj
    if type(kv_b_proj) is not torch.nn.Linear or "forward" in kv_b_proj.__dict__ or kv_b_proj._forward_pre_hooks:
        return None
    if _modules._global_forward_pre_hooks:
        return None
    return kv_b_proj.weight if type(kv_b_proj.weight) in _PLAIN else None


def check_layer_inputs(
    op: str,
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    dims: MLADims,
    cache: torch.Tensor | None,
) -> None:
    """Raise ValueError, TypeError or NotImplementedError unless shapes and dtypes are those of ``dims`` and ``meta``."""
    check_meta(op, meta)
    rows = meta.num_tokens
    if isinstance(q, torch.Tensor) and q.shape[:1] == (meta.num_local_rows,):
        rows = meta.num_local_rows
    for name, tensor, shape in (
        ("q", q, (rows, dims.num_heads, dims.qk_head_dim)),
        ("kv_c", kv_c, (rows, dims.kv_lora_rank)),
        ("k_pe", k_pe, (rows, dims.qk_rope_head_dim)),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype}, as q, got {tensor.dtype}")
        if tensor.device != meta.device:
            raise ValueError(f"{op}: {name} must be on {meta.device}, where the metadata is, got {tensor.device}")
        check_last_dim(op, name, tensor)
    if not isinstance(kv_b_proj, torch.Tensor | torch.nn.Module):
        raise TypeError(f"{op}: kv_b_proj must be a torch.Tensor or a torch.nn.Module, got {type(kv_b_proj).__name__}")
    plain = plain_weight(kv_b_proj)
    weight = _weight_in_place(kv_b_proj) if plain is None else plain
    shape = (dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
    if weight is not None:
        if weight.shape != shape:
            raise ValueError(f"{op}: kv_b_proj must have a weight of shape {shape}, got {tuple(weight.shape)}")
        if weight.dtype != q.dtype:
            raise TypeError(f"{op}: kv_b_proj must have a weight of {q.dtype}, as q, got {weight.dtype}")
        if weight.device != meta.device:
            raise ValueError(f"{op}: kv_b_proj must be on {meta.device}, where the metadata is, got {weight.device}")
        if weight.stride(1) != 1 and shape[1] > 1:
            raise ValueError(f"{op}: kv_b_proj must have a weight with a contiguous last dimension, got strides {weight.stride()}")
    parameters = [kv_b_proj] if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj.parameters()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv_c, k_pe, *parameters)):
        raise NotImplementedError(f"{op}: inputs must not require gradients, there is no backward: call under torch.no_grad()")
    _check_cache(op, kv_c, meta, dims, cache)
    if plain is None and isinstance(kv_b_proj, torch.nn.Module):
        check_projection(op, kv_b_proj, dims, kv_c)


def _check_cache(op: str, kv_c: torch.Tensor, meta: PCPMetadata, dims: MLADims, cache: torch.Tensor | None) -> None:
    if cache is not None and not isinstance(cache, torch.Tensor):
        raise TypeError(f"{op}: cache must be a torch.Tensor or None, got {type(cache).__name__}")
    if cache is None:
        if meta.num_context_tokens:
            raise ValueError(f"{op}: cache must be given, as meta has {meta.num_context_tokens} tokens of context, got None")
        return
    paged = meta.paged_cache
    if paged is None:
        raise ValueError(f"{op}: meta must have cache slots, as a cache is given: plan it with block tables, got none")
    if paged.dcp_world_size > 1:
        raise NotImplementedError(f"{op}: meta must be for a cache that is not shared out, got {paged.dcp_world_size} DCP shards")
    shape = (paged.block_size, dims.latent_dim)
    if cache.dim() != 3 or tuple(cache.shape[1:]) != shape:
        raise ValueError(
            f"{op}: cache must be [num_blocks, block_size, width] = (any, {shape[0]}, {shape[1]}), got {tuple(cache.shape)}"
        )
    check_last_dim(op, "cache", cache)
    if cache.dtype != kv_c.dtype:
        raise TypeError(f"{op}: cache must be {kv_c.dtype}, as kv_c, got {cache.dtype}")
    if cache.device != kv_c.device:
        raise ValueError(f"{op}: cache must be on {kv_c.device}, as kv_c, got {cache.device}")
    check_no_gradients(op, "cache", cache)
    check_not_expanded(op, "cache", cache)


def _linear(weight: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(latents, weight)


def expand_rows(
    latents: torch.Tensor, rows: torch.Tensor, kv_b_proj: KVProjection, dims: MLADims
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [n, heads, nope + rope] and V [n, heads, v] of the latents at ``rows`` (int32 [n]), by a weight or a module."""
    weight = plain_weight(kv_b_proj)
    if weight is not None:
        return expand(latents, rows, weight, dims)
    linear = partial(_linear, kv_b_proj) if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj
    return kv_up_project(latents, rows, None, dims, linear=linear)


class _Stage:
    """An NVTX range around a stage, for a profiler's timeline. torch's own context manager takes several times as long."""

    def __init__(self, name: str) -> None:
        self._name = f"pcp_mla.{name}"

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()


_STAGES = {name: _Stage(name) for name in ("exchange", "up_project", "attention")}


def _stage(name: str, q: torch.Tensor) -> AbstractContextManager[None]:
    """The range of a stage, where its work is a GPU's. Whether there is a GPU is not asked: that wakes the driver, and forks of a
    process whose driver is awake cannot use CUDA."""
    return _STAGES[name] if q.is_cuda and not torch.compiler.is_compiling() else nullcontext()


@dataclass(frozen=True)
class MLAPrefill:
    """MLA attention of a rank's tokens over all tokens of their requests: latents in, the output in local order out.

    One collective; rank-major rows to their slots; K and V of the keys' slots, in key order; one attention call. The order of the
    rows is restored by no op of its own. A step whose plan was given ``workspace_tokens`` never holds more rows of K and V at a
    time: the new tokens' call comes first, and each window of context is merged into its result.

    Decodes beside prefills are computed as any other row. An engine that has a decode kernel over latents keeps them out of the
    plan.

    Attributes:
        dims: of the layers that it serves.
        softmax_scale: factor of the scores.
        exchange: of the group, of these widths and this dtype; all layers can share one.
        backend: of :func:`pcp_mla.pcp_attention`.
    """

    dims: MLADims
    softmax_scale: float
    exchange: LatentExchange
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_scale("MLAPrefill", self.softmax_scale)
        if not isinstance(self.dims, MLADims):
            raise TypeError(f"MLAPrefill: dims must be MLADims, got {type(self.dims).__name__}")

    def __call__(
        self,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_b_proj: KVProjection,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer of a step.

        Args:
            q: [T, heads, nope + rope] in local order, rope applied; of a padded plan also [Np, ...], as the next two, whatever the
                pads hold.
            kv_c: [T, kv_lora_rank] normed latents in local order, same dtype.
            k_pe: [T, rope] rotated keys in local order, same dtype.
            kv_b_proj: linear module, or its weight [heads * (nope + v), kv_lora_rank].
            meta: the step, for this rank of the exchange's group; with a cache, from :meth:`PCPPlanner.plan` with block tables.
            cache: [num_blocks, block_size, kv_lora_rank + rope] this layer's paged latent cache, same dtype; the new tokens'
                latents are written to it. Not needed if no request has context.

        Returns:
            [T, heads, v] in local order.

        Raises:
            ValueError, TypeError: an argument does not fit ``dims``, ``meta`` or the exchange; the message has its name and value.
            NotImplementedError: a cache that decode context parallelism shares out, an input that requires gradients, or what the
                attention backend does not support.
            RuntimeError: the attention backend is not available.

            All before anything is exchanged or written.
        """
        check_layer_inputs("MLAPrefill", q, kv_c, k_pe, kv_b_proj, meta, self.dims, cache)
        backend = choose(self.backend, q.device, q.dtype, q.shape[2], self.dims.v_head_dim, False)
        check_library(backend, len(meta.key_chunks) > 1)
        with _stage("exchange", q):
            latents = self.exchange.publish(kv_c, k_pe, meta, cache)
        rows = meta.allgather_restore_idx if cache is None else meta.kv_rows
        assert rows is not None
        *context, new = meta.key_chunks or (None,)
        if not context:
            return self._attend(backend, q, latents, rows, kv_b_proj, meta, None, None)[0]
        state = self._attend(backend, q, latents, rows, kv_b_proj, meta, new, None)
        for chunk in context:
            self._attend(backend, q, latents, rows, kv_b_proj, meta, chunk, state)
        return state[0]

    def _attend(
        self,
        backend: str,
        q: torch.Tensor,
        latents: torch.Tensor,
        rows: torch.Tensor,
        kv_b_proj: KVProjection,
        meta: PCPMetadata,
        chunk: KeyChunk | None,
        prev: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE over the keys of a chunk, merged into ``prev`` in place; without a chunk over all keys, and no LSE."""
        if chunk is not None:
            rows = rows[chunk.first_row : chunk.first_row + chunk.num_rows]
        with _stage("up_project", q):
            k, v = expand_rows(latents, rows, kv_b_proj, self.dims)
        with _stage("attention", q):
            # Everything was checked, or made here.
            if chunk is None:
                out = attend(backend, q, k, v, meta, self.softmax_scale)
                assert isinstance(out, torch.Tensor)
                return out, out
            state = attend(backend, q, k, v, meta, self.softmax_scale, True, prev=prev, chunk=chunk, out=prev)
            assert isinstance(state, tuple)
            assert state[1] is not None
            return state[0], state[1]
