"""Merges of partial attention outputs by their log-sum-exps: two, N, and one rank's share of a context-parallel merge."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from .merge_states_checks import check_correct, check_merge, check_merge_n
from .registry import ALL_NATIVE, direct, register, select


class RowOp(IntEnum):
    """What :func:`merge_attn_states` does with a row: bit 0 takes partial a in, bit 1 partial b."""

    SKIP = 0
    COPY_A = 1
    COPY_B = 2
    MERGE = 3


def _base2(op: str, lse_base: str) -> bool:
    if lse_base == "e" or lse_base == "2":
        return lse_base == "2"
    raise ValueError(f"{op}: lse_base must be 'e' or '2', got {lse_base!r}")


def _check_devices(*tensors: torch.Tensor | None) -> None:
    """A meta tensor among others leads to the fake kernel: it must refuse, or the call would pass and do nothing."""
    if len({x.device for x in tensors if x is not None}) > 1:
        raise RuntimeError("pcp_mla: all tensors must be on one device")


def _merged_fake(out: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = out.dtype if scale is None else torch.float8_e4m3fn
    return out.new_empty(out.shape[-3:], dtype=dtype), lse.new_empty(out.shape[-3:-1], dtype=torch.float32)


def _merge_fake(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(out_a, lse_a, out_b, lse_b, scale)
    return _merged_fake(out_a, lse_a, scale)


def _merge_n_fake(
    outs: list[torch.Tensor], lses: list[torch.Tensor], scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(*outs, *lses, scale)
    return _merged_fake(outs[0], lses[0], scale)


def _merge_out_fake(*args: torch.Tensor | bool | None) -> None:
    _check_devices(*(x for x in args if isinstance(x, torch.Tensor)))


def _merge_n_out_fake(outs: list[torch.Tensor], lses: list[torch.Tensor], *args: torch.Tensor | bool | None) -> None:
    _check_devices(*outs, *lses, *(x for x in args if isinstance(x, torch.Tensor)))


_merge = register("merge_attn_states", _merge_fake)
_merge_out = register("merge_attn_states_out", _merge_out_fake)
_merge_n = register("merge_n_attn_states", _merge_n_fake)
_merge_n_out = register("merge_n_attn_states_out", _merge_n_out_fake)
_correct_out = register("cp_correct_out", _merge_out_fake)


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def merge_attn_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    lse_base: str = "e",
    row_op: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    out_rows: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge two partial attention outputs over disjoint keys into the output over both: one launch.

    With s the log-sum-exp over both, ``out = exp(lse_a - s) out_a + exp(lse_b - s) out_b``, in float32 with one rounding at the
    end; definition and source are in ``pcp_mla/reference/merge_states.py``. A partial with an LSE of -inf or +inf attended to
    nothing: its output is not read, it may hold NaN. Where both are empty, ``out`` is 0 and the LSE -inf.

    Args:
        out_a, out_b: [T, H, D] bf16, fp16 or fp32, one dtype, any row and head strides with a contiguous last dimension (V that was
            padded to another width is passed as a slice).
        lse_a, lse_b: float32 [T, H], any strides (FlashAttention's [H, T] is passed as ``lse.T``).
        out, lse_out: tensors to write and return. ``out`` [rows, H, D] with a contiguous last dimension, of the inputs' dtype,
            float32 or, with ``scale``, float8_e4m3fn; ``lse_out`` float32 [rows, H]. Without ``out_rows`` ``out`` may be one of
            ``out_a`` and ``out_b``, and ``lse_out`` one of the LSEs: the very tensor, with its strides and dtype. Otherwise they
            must share no memory with each other or any input. Where ``out`` is given and ``lse_out`` is not, no LSE is written.
        lse_base: ``"e"`` (FlashAttention) or ``"2"`` (FlashInfer, TensorRT-LLM), of all LSEs, that of the result included.
        row_op: int32 :class:`RowOp` of each row [T], or with ``cu_seqlens`` of each request [R], read on the device. A copy gives
            the numbers that it takes. Rows that are skipped stay as they are, so ``out`` must be given.
        cu_seqlens: int32 [R + 1] first row of each request. Rows behind the last request are skipped.
        out_rows: int32 [T] row of ``out``, which must be given, for each row; one outside of it (-1) is not written. Two rows must
            not have one row of ``out``.
        scale: float32 tensor of one element, on the device: ``out`` is float8_e4m3fn, the result divided by ``scale``, at most 448.
        backend: as :func:`pcp_fused_gather`.

    Returns:
        out [T, H, D] contiguous unless given, and the merged LSE float32 [T, H] (None if ``out`` was given without ``lse_out``).

    Raises:
        ValueError, TypeError: an argument does not fit the others; before any launch.
        NotImplementedError: a tensor requires gradients, or has a dtype that is not supported.
        RuntimeError: the named backend is not available.
    """
    base2 = _base2("merge_attn_states", lse_base)
    calls = direct() if backend == "auto" else None
    if out is not None and calls is not None:
        call = calls.merge_attn_states
        if call(out_a, lse_a, out_b, lse_b, scale, row_op, cu_seqlens, out_rows, base2, out, lse_out):
            return out, lse_out
    allocates = out is None and lse_out is None and row_op is None and cu_seqlens is None and out_rows is None
    try:
        if backend != "auto" or not ALL_NATIVE or _requires_grad(out_a, lse_a, out_b, lse_b, scale, out, lse_out):
            check_merge(out_a, lse_a, out_b, lse_b, out, lse_out, row_op, cu_seqlens, out_rows, scale)
        if allocates:
            call = _merge if backend == "auto" else select("merge_attn_states", backend, out_a.device.type)
            return call(out_a, lse_a, out_b, lse_b, scale, base2)
        if out is None:
            check_merge(out_a, lse_a, out_b, lse_b, out, lse_out, row_op, cu_seqlens, out_rows, scale)
            out = _allocated(out_a, scale)
        call = _merge_out if backend == "auto" else select("merge_attn_states_out", backend, out_a.device.type)
        call(out_a, lse_a, out_b, lse_b, scale, row_op, cu_seqlens, out_rows, base2, out, lse_out)
        return out, lse_out
    except (RuntimeError, AttributeError):
        check_merge(out_a, lse_a, out_b, lse_b, out, lse_out, row_op, cu_seqlens, out_rows, scale)
        raise


def _allocated(of: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(of.shape[-3:], dtype=of.dtype if scale is None else torch.float8_e4m3fn, device=of.device)


def merge_n_attn_states(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor],
    *,
    out: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    lse_base: str = "e",
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge N partial attention outputs over disjoint keys, 1 to 64 of them, in one launch: as :func:`merge_attn_states`, but each
    partial is read once, whatever N is.

    Args:
        outs: [N, T, H, D], or N tensors [T, H, D] of one dtype, each with strides of its own.
        lses: float32 [N, T, H] or N tensors [T, H], likewise; stacked if ``outs`` are.
        out, lse_out, lse_base, scale, backend: as :func:`merge_attn_states`. ``out`` may be one of the partials, ``lse_out`` one of
            the LSEs.

    Returns:
        As :func:`merge_attn_states`.

    Raises:
        As :func:`merge_attn_states`.
    """
    base2 = _base2("merge_n_attn_states", lse_base)
    if not isinstance(outs, torch.Tensor | Sequence) or not isinstance(lses, torch.Tensor | Sequence):
        check_merge_n(outs, lses, out, lse_out, scale)
    out_list = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    lse_list = [lses] if isinstance(lses, torch.Tensor) else list(lses)
    if not _is_stacked(outs, lses) and not _is_listed(out_list, outs, lses):  # a list of one is a stack to the op
        check_merge_n(outs, lses, out, lse_out, scale)
    calls = direct() if backend == "auto" else None
    if out is not None and calls is not None and calls.merge_n_attn_states(out_list, lse_list, scale, base2, out, lse_out):
        return out, lse_out
    try:
        if backend != "auto" or not ALL_NATIVE or _requires_grad(*out_list, *lse_list, scale, out, lse_out):
            check_merge_n(outs, lses, out, lse_out, scale)
        if out is None and lse_out is None:
            call = _merge_n if backend == "auto" else select("merge_n_attn_states", backend, out_list[0].device.type)
            return call(out_list, lse_list, scale, base2)
        if out is None:
            check_merge_n(outs, lses, out, lse_out, scale)
            out = _allocated(out_list[0], scale)
        call = _merge_n_out if backend == "auto" else select("merge_n_attn_states_out", backend, out_list[0].device.type)
        call(out_list, lse_list, scale, base2, out, lse_out)
        return out, lse_out
    except (RuntimeError, AttributeError, IndexError):
        check_merge_n(outs, lses, out, lse_out, scale)
        raise


def _is_stacked(outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    return isinstance(outs, torch.Tensor) and isinstance(lses, torch.Tensor) and outs.dim() == 4 and lses.dim() == 3


def _is_listed(
    out_list: list[torch.Tensor], outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> bool:
    if isinstance(outs, torch.Tensor) or isinstance(lses, torch.Tensor):
        return False
    return len(out_list) != 1 or (isinstance(out_list[0], torch.Tensor) and out_list[0].dim() == 3)


def cp_correct_out(
    out: torch.Tensor,
    lses: torch.Tensor,
    rank: int,
    *,
    corrected: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    lse_base: str = "e",
    seqused_k: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale this rank's partial output so that the ranks' results add up to attention over all keys: one launch.

    ``corrected = exp(lses[rank] - s) out`` with s the log-sum-exp over all W ranks of ONE flat context-parallel group; see
    docs/merge_states.md on why it cannot be done in two stages. Empty ranks as in :func:`merge_attn_states`.

    Args:
        out: [T, H, D] of this rank, bf16, fp16 or fp32, any row and head strides with a contiguous last dimension.
        lses: float32 [W, T, H] of all ranks, rank-major as an all-gather leaves them, any strides; W is 1 to 64.
        rank: this rank, 0 to W - 1.
        corrected: tensor to write and return, of the dtype of ``out`` or float32, the last dimension contiguous: [T, H, D], which
            may be ``out`` itself, or [S, T, H / S, D], the heads in S shares as a reduce-scatter wants them. By default float32
            [T, H, D]: what is summed should not be rounded before.
        lse_out: float32 [T, H], which may be one of ``lses``, or [S, T, H / S]; written and returned. But for these two, results
            must share no memory with each other or any input.
        lse_base, backend: as :func:`merge_attn_states`.
        seqused_k: int32 [W, T] keys that each rank's shard has for each row: where 0 the rank counts as empty, whatever it left in
            its output and LSE.

    Returns:
        ``corrected`` and the merged LSE.

    Raises:
        As :func:`merge_attn_states`.
    """
    base2 = _base2("cp_correct_out", lse_base)
    try:
        is_number = isinstance(rank, int) and not isinstance(rank, bool)
        if backend != "auto" or not ALL_NATIVE or not is_number or _requires_grad(out, lses, corrected, lse_out):
            check_correct(out, lses, rank, corrected, lse_out, seqused_k)
        if corrected is None:
            corrected = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        if lse_out is None:
            lse_out = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        calls = direct() if backend == "auto" else None
        if calls is not None and calls.cp_correct_out(out, lses, seqused_k, rank, base2, corrected, lse_out):
            return corrected, lse_out
        call = _correct_out if backend == "auto" else select("cp_correct_out", backend, out.device.type)
        call(out, lses, seqused_k, rank, base2, corrected, lse_out)
        return corrected, lse_out
    except (RuntimeError, AttributeError, TypeError):
        check_correct(out, lses, rank, corrected, lse_out, seqused_k)
        raise
