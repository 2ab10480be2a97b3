"""From latents to K and V: the up-projection that gathers, multiplies and concatenates in one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import reference
from ..checks import check_apart, check_list, check_no_gradients, check_tensor, dtype_name
from ..plan.dims import MLADims
from ..reference.kv_up_project import UP_PROJECT_TILE, zero_tail
from . import native
from .checks import FLOATS, check_input, check_out, check_scaled
from .concat_k import concat_k
from .kv_up_project_checks import check_expanded
from .latent_cache import gather_latents
from .registry import HAS_TRITON, direct, fake_in_place, register_composed, select

__all__ = ["UP_PROJECT_TILE", "kv_up_project"]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _fits_wgmma(
    latents: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    k_pe_out: torch.Tensor | None,
) -> bool:
    """Whether csrc/cuda/kv_up_project.cu takes these tensors; its own checks say why not. Its direct call chooses by itself, the
    same."""
    rank, rope = weight.shape[1], latents.shape[-1] - weight.shape[1]
    nope = weight.shape[0] // k_out.shape[1] - v_out.shape[2]
    widths = rank % 64 == 0 and rank <= 512 and nope > 0 and nope % 64 == 0 and v_out.shape[2] % 64 == 0
    if not (widths and rope % 8 == 0 and rope <= 64 and weight.dtype in FLOATS[:2] and _is_hopper(weight.device)):
        return False
    if latents.data_ptr() % (8 * latents.element_size()) != 0:
        return False
    strides, addresses = latents.stride(0) | latents.stride(-2) | weight.stride(0), weight.data_ptr()
    for out in (k_out, v_out):
        strides |= out.stride(0) | out.stride(1)
        addresses |= out.data_ptr()
    if k_pe_out is not None and rope > 0:
        strides |= k_pe_out.stride(0)
        addresses |= k_pe_out.data_ptr()
    return strides % 8 == 0 and addresses % 16 == 0


def _on_cuda(
    latents: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    k_pe_out: torch.Tensor | None,
) -> None:
    """The CUDA kernel if it takes these tensors, else Triton's (at a few hundred rows some 3 us faster, which is not looked at)."""
    if not native.status["_native_cuda"] and _fits_wgmma(latents, weight, scale, k_out, v_out, k_pe_out):
        _wgmma(latents, rows, weight, scale, k_out, v_out, k_pe_out)
    elif HAS_TRITON and weight.dtype in FLOATS:
        select("kv_up_project", "triton", "cuda")(latents, rows, weight, scale, k_out, v_out, k_pe_out)
    else:
        reference.kv_up_project(latents, rows, weight, scale, k_out, v_out, k_pe_out)


_up_project = register_composed("kv_up_project", fake_in_place, cpu=reference.kv_up_project, cuda=_on_cuda)
_wgmma = torch.ops.pcp_mla.kv_up_project_wgmma.default


def _check_latents(op: str, latents: Any, rows: Any, dims: MLADims) -> int:
    """Raise unless these are latents of ``dims`` and rows of them; how many."""
    if not hasattr(dims, "latent_dim"):
        raise TypeError(f"{op}: dims must be MLADims, got {type(dims).__name__}")
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"{op}: latents must be a torch.Tensor, got {type(latents).__name__}")
    if latents.dim() not in (2, 3) or latents.shape[-1] != dims.latent_dim:
        wanted = f"[rows, {dims.latent_dim}] or [num_blocks, block_size, {dims.latent_dim}]"
        raise ValueError(f"{op}: latents must be {wanted}, got {tuple(latents.shape)}")
    check_input(op, "latents", latents)
    if rows is None:
        return latents.shape[:-1].numel()
    check_list(op, "rows", rows, (None,), "[rows]", torch.int32, latents.device)
    return len(rows)


def _check_weight(op: str, weight: Any, latents: torch.Tensor, dims: MLADims, scale: Any) -> None:
    shape = (dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
    check_tensor(op, "weight", weight, shape, "[heads * (nope + v), kv_lora_rank]", latents.device)
    if weight.dtype not in FLOATS and weight.dtype != torch.float64:
        raise NotImplementedError(
            f"{op}: weight must be bfloat16, float16 or float32, got {dtype_name(weight.dtype)}; pass linear="
        )
    if scale is not None and weight.dtype == torch.float64:
        raise TypeError(f"{op}: weight must be bfloat16, float16 or float32 with a scale, got float64")
    if scale is None and latents.dtype != weight.dtype:
        raise TypeError(
            f"{op}: latents must be {dtype_name(weight.dtype)} as weight, or come with a scale, got {dtype_name(latents.dtype)}"
        )
    check_input(op, "weight", weight)


def result_shapes(dims: MLADims, apart: bool) -> dict[str, tuple[int, ...]]:
    """Of a row of each result, in their order: K, V, and k_pe if it is ``apart``."""
    k_dim = dims.qk_nope_head_dim if apart else dims.qk_head_dim
    shapes: dict[str, tuple[int, ...]] = {"k_out": (dims.num_heads, k_dim), "v_out": (dims.num_heads, dims.v_head_dim)}
    if apart:
        shapes["k_pe_out"] = (dims.qk_rope_head_dim,)
    return shapes


def _check_outs(
    op: str,
    given: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    inputs: Mapping[str, Any],
    latents: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    for name, out in given.items():
        check_out(op, name, out, count, shapes[name], latents, dtype)
    first, rows = next((name, len(out)) for name, out in given.items())
    for name, out in given.items():
        if len(out) != rows:
            raise ValueError(f"{op}: {name} must have the {rows} rows of {first}, got {len(out)}")
    others = dict(inputs)
    for name, out in given.items():
        check_apart(op, name, out, others)
        others[name] = out


def _placed(x: torch.Tensor, out: torch.Tensor | None, room: int) -> torch.Tensor:
    """``x`` at the beginning of ``out``, or of a new tensor of ``room`` rows; itself if it has as many."""
    if out is None:
        if len(x) == room:
            return x
        out = x.new_empty(room, *x.shape[1:])
    out[: len(x)] = x
    zero_tail(out, len(x))
    return out


def _through_module(
    latents: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor], dims: MLADims, apart: bool, given: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Contiguous latents [N, W] through the engine's module; results as ``kv_up_project`` gives them."""
    count, op = len(latents), "kv_up_project"
    kv_c, k_pe = latents.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=1)
    expanded = check_expanded(op, "linear's result", linear(kv_c), count, dims, latents)
    check_no_gradients(op, "linear's result", expanded)
    k_nope, v = expanded.view(count, dims.num_heads, dims.expanded_dim).split([dims.qk_nope_head_dim, dims.v_head_dim], dim=2)
    room = next((len(out) for out in given.values()), count)
    v = _placed(v, given.get("v_out"), room)
    if apart:
        return _placed(k_nope, given.get("k_out"), room), v, _placed(k_pe.contiguous(), given.get("k_pe_out"), room)
    if dims.qk_rope_head_dim == 0:
        return _placed(k_nope, given.get("k_out"), room), v
    k = given.get("k_out")
    if k is None:
        k = k_nope.new_empty(room, dims.num_heads, dims.qk_head_dim)
    concat_k(k_nope, k_pe, out=k[:count])
    zero_tail(k, count)
    return k, v


def expand_into(
    latents: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
) -> None:
    """:func:`kv_up_project` into given tensors, for arguments that are known to fit."""
    calls = direct()
    if calls is not None and calls.kv_up_project(latents, rows, weight, scale, k, v, k_pe):
        return
    if latents.is_cuda and not torch.compiler.is_compiling():  # past the dispatcher, which costs more than the launch
        _on_cuda(latents, rows, weight, scale, k, v, k_pe)
    else:
        _up_project(latents, rows, weight, scale, k, v, k_pe)


def expand(
    latents: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    dims: MLADims,
    apart: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """:func:`kv_up_project` with ``k_pe_apart`` or without, for arguments that are known to fit."""
    results = [weight.new_empty(rows.shape[0], *shape) for shape in result_shapes(dims, apart).values()]
    expand_into(latents, rows, weight, *results, scale=scale)
    return tuple(results)


def kv_up_project(
    latents: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor | None,
    dims: MLADims,
    *,
    linear: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    k_out: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
    k_pe_apart: bool = False,
    k_pe_out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """K and V of all heads from latents anywhere: gather, ``kv_b_proj`` and the concat with ``k_pe`` in one launch.

    Args:
        latents: [S, W] or a paged cache [num_blocks, block_size, W], W = ``dims.latent_dim``: ``kv_c``, then ``k_pe``; any strides
            with a contiguous last dimension.
        rows: int32 [N] row (slot) of each key: the planner's ``kv_rows`` with the cache, or ``meta.allgather_restore_idx`` with the
            rank-major result of an exchange. A row outside of the latents (-1) gives zeros. None: all rows in their order.
        weight: [H * (nope + v), kv_lora_rank] of ``kv_b_proj``, in the layout of ``nn.Linear``; without bias.
        dims: of the layer.
        linear: in place of ``weight``, the module itself (one that is quantised, or has adapters): gather, module and
            :func:`concat_k` (or the copy of ``k_pe``) are then launches of their own.
        scale: float32 of one element, on the device: ``latents`` are float8_e4m3fn, and are multiplied by it and rounded once, to
            the dtype of the weight, as :func:`gather_latents` does; with ``linear`` in a launch of its own.
        dtype: of what ``linear`` is given, with ``scale``: by default that of a result that is given, else bf16.
        k_out, v_out: [M, H, nope + rope] and [M, H, v] with M >= N, to write and return; any strides with a contiguous last
            dimension. Rows from N to the next multiple of :data:`UP_PROJECT_TILE` (128) are zeroed, further ones are not touched.
            One that is not given has the rows of those that are. They must share no memory with the inputs or each other.
        k_pe_apart: leave ``k_pe`` out of K: ``k_out`` is [M, H, nope] then, and ``k_pe``, which all heads have in common, a result
            of its own.
        k_pe_out: [M, rope], with ``k_pe_apart``: as ``k_out`` and ``v_out``.
        backend: ``auto`` (on Hopper the CUDA kernel if widths are multiples of 64, else Triton), ``cuda``, ``triton`` or
            ``reference``.

    All of bf16, fp16 or fp32 (``reference``: also fp64, without a scale), one dtype but for latents with a scale; products are
    summed in float32 and rounded once.

    Returns:
        K [N, H, nope + rope] and V [N, H, v], or ``k_out`` and ``v_out``; with ``k_pe_apart`` K [N, H, nope], V and k_pe [N, rope],
        in the order of the rows. With ``linear``, V may be a view, and so may be K without ``k_pe``.

    Raises:
        ValueError, TypeError: an argument does not fit ``dims`` or the others, or ``k_pe_out`` is given without ``k_pe_apart``;
            before anything is written.
        NotImplementedError: a dtype that the kernels have not, or an input that requires gradients.
        RuntimeError: the named backend is not available, or does not support these widths.
    """
    op = "kv_up_project"
    if (weight is None) == (linear is None):
        raise ValueError(f"{op}: weight or linear must be given, and not both")
    if linear is not None and not callable(linear):
        raise TypeError(f"{op}: linear must be callable, got {type(linear).__name__}")
    count = _check_latents(op, latents, rows, dims)
    if weight is not None:
        _check_weight(op, weight, latents, dims, scale)
    if k_pe_out is not None and not k_pe_apart:
        raise ValueError(f"{op}: k_pe_out must come with k_pe_apart=True, got {k_pe_apart!r}")
    given = {name: x for name, x in (("k_out", k_out), ("v_out", v_out), ("k_pe_out", k_pe_out)) if x is not None}
    kind = latents.dtype
    if scale is not None:
        check_scaled(op, "latents", latents, scale)
        named = [x.dtype for x in (weight, *given.values()) if isinstance(x, torch.Tensor)]
        kind = named[0] if weight is not None else dtype or next(iter(named), torch.bfloat16)
    shapes = result_shapes(dims, k_pe_apart)
    if given:
        inputs = {"latents": latents, "rows": rows, "weight": weight, "scale": scale}
        _check_outs(op, given, shapes, count, inputs, latents, kind)
    if linear is not None:
        if rows is None:
            rows = torch.arange(count, dtype=torch.int32, device=latents.device)
        latents = gather_latents(latents, rows, scale=scale, dtype=kind)
        return _through_module(latents, linear, dims, k_pe_apart, given)
    assert weight is not None
    room = next((len(out) for out in given.values()), count)
    k, v, *pe = [given[name] if name in given else weight.new_empty(room, *shape) for name, shape in shapes.items()]
    if backend == "auto":
        expand_into(latents, rows, weight, k, v, *pe, scale=scale)
    else:
        select(op, backend, latents.device.type)(latents, rows, weight, scale, k, v, pe[0] if pe else None)
    return k, v, *pe
