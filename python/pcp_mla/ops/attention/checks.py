"""The checks of pcp_attention's arguments, with the errors that its docstring names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...checks import check_apart, check_last_dim, check_list, check_no_gradients, check_not_expanded, check_tensor, dtype_name
from ...plan.metadata import PCPMetadata, check_meta
from ...plan.slots import KeyChunk
from ..checks import check_ragged
from ..merge_states_checks import check_lse

OP = "pcp_attention"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check_keys(k: Any, v: Any, k_pe: Any, kv_rows: Any, q: torch.Tensor, meta: PCPMetadata, rows: int) -> None:
    check_ragged(OP, "k", k, meta, q.dtype)
    check_ragged(OP, "v", v, meta, q.dtype)
    heads, width = q.shape[1:]
    rope = 0
    if k_pe is not None:
        check_tensor(OP, "k_pe", k_pe, (len(k), None), "[keys, rope]", meta.device)
        rope = k_pe.shape[1]
        if k_pe.dtype != q.dtype:
            raise TypeError(f"{OP}: k_pe must be {dtype_name(q.dtype)} as q, got {dtype_name(k_pe.dtype)}")
        check_last_dim(OP, "k_pe", k_pe)
        check_no_gradients(OP, "k_pe", k_pe)
        if not 0 < rope < width:
            raise ValueError(f"{OP}: k_pe must be narrower than q, which is {width} wide, got {rope}")
    if k.shape[1:] != (heads, width - rope):
        wanted = f"the heads and the width of q{' less that of k_pe' if rope else ''}, {(heads, width - rope)}"
        raise ValueError(f"{OP}: k must have {wanted}, got {tuple(k.shape[1:])}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{OP}: v must have the rows and heads of k, {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    if kv_rows is None:
        if len(k) < rows:
            raise ValueError(f"{OP}: k must have at least the {rows} keys of the call, got {len(k)}")
        return
    check_list(OP, "kv_rows", kv_rows, (None,), "[keys]", torch.int32, meta.device)
    for name, x in (("k", k), ("v", v), ("k_pe", k_pe)):
        if x is not None and x.stride(0) * x.element_size() >= 2**32:  # the kernel's multiplication of a row's number
            raise ValueError(f"{OP}: {name} must have rows less than 2**32 bytes apart with kv_rows, got strides {x.stride()}")
    if len(kv_rows) < rows:
        raise ValueError(f"{OP}: kv_rows must list at least the {rows} keys of the call, got {len(kv_rows)}")


def _check_memory(given: Any, lse: Any, prev: Any, inputs: Mapping[str, Any]) -> None:
    """Raise unless results have their memory to themselves, or are ``prev``'s."""
    prev_out, prev_lse = prev if prev is not None else (None, None)
    check_apart(OP, "out", given, {**inputs, "prev's LSE": prev_lse}, {"prev": prev_out})
    check_apart(OP, "out's LSE", lse, {**inputs, "out": given, "prev": prev_out}, {"prev's LSE": prev_lse})


def _check_result(name: str, out: Any, lse: Any, q: torch.Tensor, v: torch.Tensor, written: bool) -> None:
    check_tensor(OP, name, out, (*q.shape[:2], v.shape[2]), "[tokens, heads, v]", q.device)
    if out.dtype != q.dtype:
        raise TypeError(f"{OP}: {name} must be {dtype_name(q.dtype)} as q, got {dtype_name(out.dtype)}")
    check_last_dim(OP, name, out)
    if lse is not None:
        check_lse(OP, f"{name}'s LSE", lse, tuple(q.shape[:2]), "[tokens, heads]", q)
    for label, x in ((name, out), (f"{name}'s LSE", lse)) if written else ():
        if x is not None:
            check_not_expanded(OP, label, x)
            check_no_gradients(OP, label, x)


def _check_chunk(chunk: Any, meta: PCPMetadata) -> None:
    if not isinstance(chunk, KeyChunk):
        raise TypeError(f"{OP}: chunk must be a KeyChunk of meta.key_chunks, got {type(chunk).__name__}")
    for name, x, length in (
        ("cu_seqlens_k", chunk.cu_seqlens_k, len(meta.cu_seqlens_k)),
        ("seqused_k", chunk.seqused_k, len(meta.seqused_k)),
    ):
        check_tensor(OP, f"chunk.{name}", x, (length,), "[rows]", meta.device)


def check_scale(op: str, scale: Any) -> None:
    """Raise unless it can be a factor of scores."""
    if not isinstance(scale, float | int) or isinstance(scale, bool):
        raise TypeError(f"{op}: softmax_scale must be a float, got {type(scale).__name__}")
    if not (0 < scale < math.inf):
        raise ValueError(f"{op}: softmax_scale must be positive and finite, got {scale}")


def check_attention(
    q: Any, k: Any, v: Any, meta: Any, scale: Any, k_pe: Any, kv_rows: Any, prev: Any, chunk: Any, out: Any, return_lse: bool
) -> None:
    """Raise unless the arguments of ``pcp_attention`` fit each other."""
    check_meta(OP, meta)
    check_ragged(OP, "q", q, meta, None)
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"{OP}: q must be bfloat16, float16, float32 or float64, got {dtype_name(q.dtype)}")
    if len(q) not in (meta.num_tokens, meta.num_tokens_padded):
        wanted = f"{meta.num_tokens} local tokens of the metadata (or {meta.num_tokens_padded} with pads)"
        raise ValueError(f"{OP}: q must have the {wanted}, got {len(q)}")
    check_scale(OP, scale)
    if chunk is not None:
        _check_chunk(chunk, meta)
    _check_keys(k, v, k_pe, kv_rows, q, meta, meta.num_kv_tokens if chunk is None else chunk.num_rows)
    if prev is not None:
        if not isinstance(prev, tuple) or len(prev) != 2:
            raise TypeError(f"{OP}: prev must be a tuple (out, lse), got {type(prev).__name__}")
        if prev[1] is None:
            raise TypeError(f"{OP}: prev's LSE must be a torch.Tensor, got NoneType")
        _check_result("prev", *prev, q, v, written=False)
        check_no_gradients(OP, "prev", prev[0])
        check_no_gradients(OP, "prev's LSE", prev[1])
    if out is None:
        return
    if isinstance(out, tuple) != return_lse or (return_lse and len(out) != 2):
        wanted = "a tuple (out, lse) with return_lse" if return_lse else "a tensor without return_lse"
        raise TypeError(f"{OP}: out must be {wanted}, got {type(out).__name__}")
    given, lse = out if return_lse else (out, None)
    if return_lse and lse is None:
        raise TypeError(f"{OP}: out's LSE must be a torch.Tensor, got NoneType")
    _check_result("out", given, lse, q, v, written=True)
    _check_memory(given, lse, prev, {"q": q, "k": k, "v": v, "k_pe": k_pe, "kv_rows": kv_rows})
    if prev is not None and lse is not None and (given.data_ptr() == prev[0].data_ptr()) != (lse.data_ptr() == prev[1].data_ptr()):
        raise ValueError(f"{OP}: out must be both of prev's tensors or neither: rows without keys are left as they are in both")
