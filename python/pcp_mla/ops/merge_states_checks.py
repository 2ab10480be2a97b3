"""The checks of the merges' arguments, with the errors that their docstrings name; see checks.py on when they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checks import check_apart, check_last_dim, check_list, check_no_gradients, check_not_expanded, check_tensor, dtype_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_PARTIALS = 64


def check_partial(op: str, name: str, x: Any, first: torch.Tensor | None) -> None:
    shape = (None, None, None) if first is None else tuple(first.shape)
    check_tensor(op, name, x, shape, "[tokens, heads, dim]", None if first is None else first.device)
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: {name} must be bfloat16, float16 or float32, got {dtype_name(x.dtype)}")
    if first is not None and x.dtype != first.dtype:
        raise TypeError(
            f"{op}: {name} must have dtype {dtype_name(first.dtype)} as the partial before it, got {dtype_name(x.dtype)}"
        )
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{op}: {name} must have at least one head and a width of at least 1, got {tuple(x.shape)}")
    check_last_dim(op, name, x)
    check_no_gradients(op, name, x)
    for size, stride in zip(x.shape[:2], x.stride(), strict=False):
        if size > 1 and x.is_cuda and stride * x.element_size() >= 2**32:  # the kernel's multiplication of a row's number
            raise ValueError(f"{op}: {name} must have rows and heads less than 2**32 bytes apart, got strides {x.stride()}")


def check_lse(op: str, name: str, x: Any, shape: Sequence[int], words: str, first: torch.Tensor) -> None:
    check_tensor(op, name, x, shape, words, first.device)
    if x.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {dtype_name(x.dtype)}")
    check_no_gradients(op, name, x)


def _check_results(
    op: str, names: tuple[str, str], out: Any, lse_out: Any, rows: int | None, first: torch.Tensor, scale: Any
) -> None:
    heads, dim = first.shape[-2:]
    if scale is not None:
        if not isinstance(scale, torch.Tensor):
            raise TypeError(f"{op}: scale must be a torch.Tensor, got {type(scale).__name__}")
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != first.device:
            got = f"{dtype_name(scale.dtype)} {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"{op}: scale must be one float32 on {first.device}, got {got}")
        check_no_gradients(op, "scale", scale)
    if out is not None:
        check_tensor(op, names[0], out, (rows, heads, dim), "[rows, heads, dim]", first.device)
        allowed = [torch.float8_e4m3fn] if scale is not None else [first.dtype, torch.float32]
        if out.dtype not in allowed:
            wanted = " or ".join(dict.fromkeys(dtype_name(dtype) for dtype in allowed))
            raise TypeError(
                f"{op}: {names[0]} must be {wanted}{' with a scale' if scale is not None else ''}, got {dtype_name(out.dtype)}"
            )
        check_last_dim(op, names[0], out)
        check_not_expanded(op, names[0], out)
        check_no_gradients(op, names[0], out)
        rows = out.shape[0]
    if lse_out is not None:
        check_lse(op, names[1], lse_out, (first.shape[0] if rows is None else rows, heads), "[rows, heads]", first)
        check_not_expanded(op, names[1], lse_out)


def _check_memory(
    op: str,
    names: tuple[str, str],
    out: Any,
    lse_out: Any,
    partials: Mapping[str, Any],
    lses: Mapping[str, Any],
    others: Mapping[str, Any],
    in_place: bool,
) -> None:
    """Raise unless results have their memory to themselves, or, ``in_place``, are inputs of their own kind."""
    apart = dict(others) if in_place else {**others, **partials, **lses}
    check_apart(op, names[0], out, {**apart, **(lses if in_place else {})}, partials if in_place else None)
    apart[names[0]] = out
    check_apart(op, names[1], lse_out, {**apart, **(partials if in_place else {})}, lses if in_place else None)


def check_merge(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, lse_out: Any, row_op: Any, cu_seqlens: Any, out_rows: Any, scale: Any
) -> None:
    """Raise unless the arguments of ``merge_attn_states`` fit each other."""
    op = "merge_attn_states"
    check_partial(op, "out_a", out_a, None)
    check_partial(op, "out_b", out_b, out_a)
    tokens, shape = out_a.shape[0], tuple(out_a.shape[:2])
    check_lse(op, "lse_a", lse_a, shape, "[tokens, heads]", out_a)
    check_lse(op, "lse_b", lse_b, shape, "[tokens, heads]", out_a)
    for name, given in (("row_op", row_op), ("out_rows", out_rows)):
        if given is not None and out is None:
            raise ValueError(f"{op}: out must be given with {name}: rows that are not written stay as they are")
    if cu_seqlens is not None:
        if row_op is None:
            raise ValueError(f"{op}: cu_seqlens must come with row_op, of one entry a request, got none")
        check_tensor(op, "row_op", row_op, (None,), "[requests]", out_a.device)
        check_list(op, "cu_seqlens", cu_seqlens, (len(row_op) + 1,), "[requests + 1]", torch.int32, out_a.device)
    if row_op is not None:
        check_list(op, "row_op", row_op, (tokens if cu_seqlens is None else len(row_op),), "[tokens]", torch.int32, out_a.device)
    if out_rows is not None:
        check_list(op, "out_rows", out_rows, (tokens,), "[tokens]", torch.int32, out_a.device)
    _check_results(op, ("out", "lse_out"), out, lse_out, None if out_rows is not None else tokens, out_a, scale)
    others = {"row_op": row_op, "cu_seqlens": cu_seqlens, "out_rows": out_rows, "scale": scale}
    partials, lses = {"out_a": out_a, "out_b": out_b}, {"lse_a": lse_a, "lse_b": lse_b}
    _check_memory(op, ("out", "lse_out"), out, lse_out, partials, lses, others, in_place=out_rows is None)


def check_merge_n(outs: Any, lses: Any, out: Any, lse_out: Any, scale: Any) -> None:
    """Raise unless the arguments of ``merge_n_attn_states`` fit each other."""
    op = "merge_n_attn_states"
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, torch.Tensor | Sequence):
            raise TypeError(f"{op}: {name} must be a tensor or a sequence of tensors, got {type(given).__name__}")
    if isinstance(outs, torch.Tensor) != isinstance(lses, torch.Tensor):
        raise TypeError(
            f"{op}: outs and lses must both be tensors or both sequences, got {type(outs).__name__}, {type(lses).__name__}"
        )
    if isinstance(outs, torch.Tensor):
        if outs.dim() != 4:
            raise ValueError(f"{op}: outs must have 4 dimensions [N, tokens, heads, dim], got {outs.dim()}: {tuple(outs.shape)}")
        if lses.dim() != 3:
            raise ValueError(f"{op}: lses must have 3 dimensions [N, tokens, heads], got {lses.dim()}: {tuple(lses.shape)}")
    if not 1 <= len(outs) <= MAX_PARTIALS:
        raise ValueError(f"{op}: outs must be 1 to {MAX_PARTIALS} partials, got {len(outs)}")
    if len(lses) != len(outs):
        raise ValueError(f"{op}: lses must be as many as outs, {len(outs)}, got {len(lses)}")
    for n, (x, lse) in enumerate(zip(outs, lses, strict=True)):
        check_partial(op, f"outs[{n}]", x, outs[0] if n else None)
        check_lse(op, f"lses[{n}]", lse, tuple(outs[0].shape[:2]), "[tokens, heads]", outs[0])
    _check_results(op, ("out", "lse_out"), out, lse_out, outs[0].shape[0], outs[0], scale)
    if out is not None or lse_out is not None:
        partials, scores = ({f"{name}[{n}]": x for n, x in enumerate(xs)} for name, xs in (("outs", outs), ("lses", lses)))
        _check_memory(op, ("out", "lse_out"), out, lse_out, partials, scores, {"scale": scale}, in_place=True)


def check_correct(out: Any, lses: Any, rank: Any, corrected: Any, lse_out: Any, seqused_k: Any) -> None:
    """Raise unless the arguments of ``cp_correct_out`` fit each other."""
    op = "cp_correct_out"
    check_partial(op, "out", out, None)
    tokens, heads, dim = out.shape
    check_lse(
        op,
        "lses",
        lses,
        (lses.shape[0] if isinstance(lses, torch.Tensor) and lses.dim() else 0, tokens, heads),
        "[ranks, tokens, heads]",
        out,
    )
    world = lses.shape[0]
    if not 1 <= world <= MAX_PARTIALS:
        raise ValueError(f"{op}: lses must be of 1 to {MAX_PARTIALS} ranks, got {world}")
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{op}: rank must be an int, got {rank!r}")
    if not 0 <= rank < world:
        raise ValueError(f"{op}: rank must be in 0..{world - 1}, got {rank}")
    if seqused_k is not None:
        check_list(op, "seqused_k", seqused_k, (world, tokens), "[ranks, tokens]", torch.int32, out.device)
    for name, given, last in (("corrected", corrected, (dim,)), ("lse_out", lse_out, ())):
        if given is None:
            continue
        whole: tuple[int, ...] = (tokens, heads, *last)
        words = "[tokens, heads, dim]" if last else "[tokens, heads]"
        if isinstance(given, torch.Tensor) and given.dim() == len(whole) + 1:
            shares = given.shape[0]
            if shares == 0 or heads % shares:
                raise ValueError(f"{op}: {name} must have a number of shares that divides the {heads} heads, got {shares}")
            whole, words = (
                (shares, tokens, heads // shares, *last),
                "[shares, tokens, heads of a share" + (", dim]" if last else "]"),
            )
        if not last:
            check_lse(op, name, given, whole, words, out)
            check_not_expanded(op, name, given)
            continue
        check_tensor(op, name, given, whole, words, out.device)
        if given.dtype not in (out.dtype, torch.float32):
            raise TypeError(f"{op}: {name} must be {dtype_name(out.dtype)} or float32, got {dtype_name(given.dtype)}")
        check_last_dim(op, name, given)
        check_not_expanded(op, name, given)
        check_no_gradients(op, name, given)
    scores = {f"lses[{n}]": x for n, x in enumerate(lses)}
    _check_memory(op, ("corrected", "lse_out"), corrected, lse_out, {"out": out}, scores, {"seqused_k": seqused_k}, in_place=True)
