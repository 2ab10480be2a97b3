"""The checks of a layer's inputs, with the errors that its docstrings name: of all of them, of what is published, of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..checks import check_last_dim, check_no_gradients, check_not_expanded
from ..exchange.heads import HeadExchange
from ..exchange.inputs import check_step
from ..exchange.peer_heads import PeerHeadExchange
from ..ops.checks import FLOATS, check_scaled
from ..ops.kv_up_project_checks import check_projection
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata, check_meta
from .projection import KVProjection, weight_of
from .split import check_known


def _check_rows(
    op: str, tensors: Iterable[tuple[str, Any, tuple[int, ...]]], dtype: torch.dtype | None, of: str, meta: PCPMetadata
) -> None:
    """Raise unless these are tensors of such shapes, of one dtype, that of ``of``."""
    for name, tensor, shape in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, as {of}, got {tensor.dtype}")
        if tensor.device != meta.device:
            raise ValueError(f"{op}: {name} must be on {meta.device}, where the metadata is, got {tensor.device}")
        check_last_dim(op, name, tensor)


def _num_rows(first: Any, meta: PCPMetadata) -> int:
    """T, or of a padded plan Np, if that is what the first of the tensors has."""
    padded = isinstance(first, torch.Tensor) and first.shape[:1] == (meta.num_local_rows,)
    return meta.num_local_rows if padded else meta.num_tokens


def check_layer_inputs(
    op: str,
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    dims: MLADims,
    cache: torch.Tensor | None,
    scale: torch.Tensor | None = None,
) -> None:
    """Raise ValueError, TypeError or NotImplementedError unless shapes and dtypes are those of ``dims`` and ``meta``."""
    check_meta(op, meta)
    rows = _num_rows(q, meta)
    shapes = ((rows, dims.num_heads, dims.qk_head_dim), (rows, dims.kv_lora_rank), (rows, dims.qk_rope_head_dim))
    dtype = getattr(q, "dtype", None)
    _check_rows(op, zip(("q", "kv_c", "k_pe"), (q, kv_c, k_pe), shapes, strict=True), dtype, "q", meta)
    _check_weight(op, kv_b_proj, dims, q.dtype, "q", meta)
    _check_gradients(op, (q, kv_c, k_pe), kv_b_proj)
    _check_cache(op, kv_c, meta, dims, cache, scale)
    _check_module(op, kv_b_proj, dims, q)


def check_published(
    op: str,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    meta: PCPMetadata,
    dims: MLADims,
    cache: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """As :func:`check_layer_inputs`, for what is known before q is."""
    check_meta(op, meta)
    rows = _num_rows(kv_c, meta)
    tensors = (("kv_c", kv_c, (rows, dims.kv_lora_rank)), ("k_pe", k_pe, (rows, dims.qk_rope_head_dim)))
    _check_rows(op, tensors, getattr(kv_c, "dtype", None), "kv_c", meta)
    _check_gradients(op, (kv_c, k_pe), None)
    _check_cache(op, kv_c, meta, dims, cache, scale)


def check_rest(
    op: str, q: torch.Tensor, kv_b_proj: KVProjection, rows: int, dtype: torch.dtype, meta: PCPMetadata, dims: MLADims
) -> None:
    """As :func:`check_layer_inputs`, for the others, beside ``rows`` published latents of ``dtype``."""
    _check_rows(op, (("q", q, (rows, dims.num_heads, dims.qk_head_dim)),), dtype, "kv_c", meta)
    _check_weight(op, kv_b_proj, dims, dtype, "kv_c", meta)
    _check_gradients(op, (q,), kv_b_proj)
    _check_module(op, kv_b_proj, dims, q)


def check_stream(op: str, stream: Any, meta: PCPMetadata) -> None:
    """Raise unless ``stream`` is a CUDA stream where the metadata is."""
    if not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"{op}: stream must be a torch.cuda.Stream or None, got {type(stream).__name__}")
    if stream.device != meta.device:
        raise ValueError(f"{op}: stream must be on {meta.device}, where the metadata is, got {stream.device}")


def _check_weight(op: str, kv_b_proj: Any, dims: MLADims, dtype: torch.dtype, of: str, meta: PCPMetadata) -> None:
    if not isinstance(kv_b_proj, torch.Tensor | torch.nn.Module):
        raise TypeError(f"{op}: kv_b_proj must be a torch.Tensor or a torch.nn.Module, got {type(kv_b_proj).__name__}")
    weight, _ = weight_of(kv_b_proj)
    if weight is None:
        return
    shape = (dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
    if weight.shape != shape:
        raise ValueError(f"{op}: kv_b_proj must have a weight of shape {shape}, got {tuple(weight.shape)}")
    if weight.dtype != dtype:
        raise TypeError(f"{op}: kv_b_proj must have a weight of {dtype}, as {of}, got {weight.dtype}")
    if weight.device != meta.device:
        raise ValueError(f"{op}: kv_b_proj must be on {meta.device}, where the metadata is, got {weight.device}")
    if weight.stride(1) != 1 and shape[1] > 1:
        raise ValueError(f"{op}: kv_b_proj must have a weight with a contiguous last dimension, got strides {weight.stride()}")


def _check_gradients(op: str, tensors: tuple[torch.Tensor, ...], kv_b_proj: KVProjection | None) -> None:
    if not torch.is_grad_enabled():
        return
    weights: Iterable[torch.Tensor] = ()
    if kv_b_proj is not None:
        weights = [kv_b_proj] if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj.parameters()
    if any(x.requires_grad for x in (*tensors, *weights)):
        raise NotImplementedError(f"{op}: inputs must not require gradients, there is no backward: call under torch.no_grad()")


def _check_module(op: str, kv_b_proj: KVProjection, dims: MLADims, like: torch.Tensor) -> None:
    if isinstance(kv_b_proj, torch.nn.Module) and not weight_of(kv_b_proj)[1]:
        check_projection(op, kv_b_proj, dims, like)


def _check_cache(
    op: str,
    kv_c: torch.Tensor,
    meta: PCPMetadata,
    dims: MLADims,
    cache: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    if cache is not None and not isinstance(cache, torch.Tensor):
        raise TypeError(f"{op}: cache must be a torch.Tensor or None, got {type(cache).__name__}")
    if cache is None:
        if meta.num_context_tokens:
            raise ValueError(f"{op}: cache must be given, as meta has {meta.num_context_tokens} tokens of context, got None")
        if scale is not None:
            raise ValueError(f"{op}: scale must come with a cache, got a {type(scale).__name__} and cache None")
        return
    paged = meta.paged_cache
    if paged is None:
        raise ValueError(f"{op}: meta must have cache slots, as a cache is given: plan it with block tables, got none")
    shape = (paged.block_size, dims.latent_dim)
    if cache.dim() != 3 or tuple(cache.shape[1:]) != shape:
        raise ValueError(
            f"{op}: cache must be [num_blocks, block_size, width] = (any, {shape[0]}, {shape[1]}), got {tuple(cache.shape)}"
        )
    check_last_dim(op, "cache", cache)
    if cache.device != kv_c.device:
        raise ValueError(f"{op}: cache must be on {kv_c.device}, as kv_c, got {cache.device}")
    if scale is not None:
        check_scaled(op, "cache", cache, scale)
        if kv_c.dtype not in FLOATS:
            raise TypeError(f"{op}: kv_c must be bfloat16, float16 or float32 with a scale, got {kv_c.dtype}")
    elif cache.dtype != kv_c.dtype:
        raise TypeError(f"{op}: cache must be {kv_c.dtype}, as kv_c, or come with a scale, got {cache.dtype}")
    check_no_gradients(op, "cache", cache)
    check_not_expanded(op, "cache", cache)


def check_shards(op: str, sharded: bool, meta: PCPMetadata) -> None:
    """Raise NotImplementedError unless the exchange, one with other shards or not, is for the step's cache; ValueError where the
    shards are not the ranks."""
    paged = meta.paged_cache
    if paged is None or (paged.dcp_world_size == 1 and not sharded):
        return
    if not sharded:
        shards = f"got {paged.dcp_world_size} DCP shards, which take a ShardedExchange"
        raise NotImplementedError(f"{op}: meta must be for a cache that is not shared out, {shards}")
    if meta.shard_rows is None:
        got = f"shard {paged.dcp_rank} of {paged.dcp_world_size} on rank {meta.rank} of {meta.world_size}"
        raise ValueError(f"{op}: meta must be for a cache whose shards are the ranks of PCP x DCP, got {got}")


def check_split(op: str, split: Any, heads: Any, dims: MLADims) -> None:
    """Raise ValueError unless ``split`` is known and ``heads`` can do it: an exchange of the layer's heads. TypeError if it is
    something else."""
    check_known(op, split)
    if heads is None:
        if split == "heads":
            raise ValueError(f"{op}: heads must be a HeadExchange for split 'heads', got None")
        return
    form = getattr(heads, "form", None)
    if form is None:
        raise TypeError(f"{op}: heads must be a HeadExchange or a PeerHeadExchange, got {type(heads).__name__}")
    for name in ("num_heads", "qk_head_dim", "v_head_dim"):
        if getattr(form, name) != getattr(dims, name):
            raise ValueError(f"{op}: heads must have {name} {getattr(dims, name)}, as dims, got {getattr(form, name)}")


def check_head_exchange(op: str, heads: HeadExchange | PeerHeadExchange, dtype: torch.dtype, meta: PCPMetadata) -> None:
    """Raise ValueError or TypeError unless the exchange is for this rank's queries in this step, NotImplementedError under a
    compiler."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{op}: split must be tokens or auto under torch.compile, got 'heads'")
    check_step(op, heads.group, meta, heads.max_tokens)
    if heads.form.dtype != dtype:
        raise TypeError(f"{op}: heads must be an exchange of {dtype}, as q, got {heads.form.dtype}")
