"""pcp_attention: the whole attention of a rank in one call; and the same by gathers and two calls."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...plan.metadata import PCPMetadata
from ...plan.rank_rows import RankRows
from ...plan.slots import KeyChunk
from ...reference.fused_gather import gathered_shapes
from ..concat_k import concat_k
from ..fused_gather import GatheredRows, pcp_fused_gather
from ..fused_restore import pcp_fused_restore
from ..merge_states import merge_attn_states
from ..registry import HAS_TRITON
from . import support
from .checks import check_attention
from .kernels import by_wgmma, kernel
from .libraries import LIBRARIES, Library, Rows, call, check_placement, find, prepared
from .rows import attend_rows

State = tuple[torch.Tensor, torch.Tensor]  # an output and its LSE
Result = tuple[torch.Tensor, torch.Tensor | None]


def _library(name: str) -> Library | None:
    """Of a backend that was chosen, so that it is there; None for our own."""
    found = find(name) if name in LIBRARIES else None
    assert not isinstance(found, str)
    return found


def _by_library(
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    scale: float,
    prev: State | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> Result:
    part, part_lse = call(library, q, k, v, rows, scale, out if prev is None else None)
    if prev is not None:
        row_op = cu_seqlens = None
        if out is not None and out.data_ptr() == prev[0].data_ptr():  # rows without keys stay as they are
            row_op, cu_seqlens = rows.seqused_k.clamp(max=1) * 3, rows.cu_seqlens_q
        return merge_attn_states(*prev, part, part_lse, out=out, lse_out=lse, row_op=row_op, cu_seqlens=cu_seqlens)
    if out is not None and part.data_ptr() != out.data_ptr():
        out.copy_(part)
    if lse is not None:
        lse.copy_(part_lse)
    return part if out is None else out, part_lse if lse is None else lse


def run_rows(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    scale: float,
    return_lse: bool,
    k_pe: torch.Tensor | None = None,
    kv_rows: torch.Tensor | None = None,
    prev: State | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> Result:
    """One call of the backend; outputs in ``out`` and ``lse`` where given."""
    library = _library(name)
    if library is not None and q.shape[0] and k.shape[0]:
        return _by_library(library, q, k if k_pe is None else concat_k(k, k_pe), v, rows, scale, prev, out, lse)
    if library is not None:  # it refuses empty tensors
        name = "triton" if HAS_TRITON else "torch"
    if out is None:
        out = q.new_empty(*q.shape[:2], v.shape[2])
    if lse is None and return_lse:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lengths = (rows.cu_seqlens_q, rows.cu_seqlens_k, rows.seqused_k)
    if name == "torch" and lse is None and prev is None and kv_rows is None and not torch.compiler.is_compiling():
        attend_rows(q, k if k_pe is None else concat_k(k, k_pe), v, *lengths, float(scale), rows.causal, out)
        return out, None
    kernel(name)(q, k, v, k_pe, kv_rows, *lengths, *(prev or (None, None)), float(scale), rows.causal, out, lse)
    return out, lse


def _gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata) -> GatheredRows:
    counts = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    if counts[0] + counts[1] == meta.num_tokens:
        return pcp_fused_gather(q, k, v, meta)
    # In a padded plan these are limits. A library reads whole tiles, and 0 * NaN is NaN: zeros behind the last key.
    room = GatheredRows(*(q.new_zeros(shape) for shape in gathered_shapes(q, k, v, counts)))
    return pcp_fused_gather(q, k, v, meta, out=room)


def _by_two_calls(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    meta: PCPMetadata,
    scale: float,
    return_lse: bool,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> Result:
    """q, K and V of the heads and of the tails gathered, a call for each, and the outputs restored to local order.

    The restore writes contiguous rows of heads and tails, in a padded plan more than there are of q, pads included: into ``out``
    where that is what it has, else to be copied, but for what lies behind the last row.
    """
    rows = _gather(q, k, v, meta)
    halves = (
        (rows.q_head, rows.k_head, rows.v_head, meta.cu_seqlens_q_head, meta.cu_seqlens_k_head),
        (rows.q_tail, rows.k_tail, rows.v_tail, meta.cu_seqlens_q_tail, meta.cu_seqlens_k_tail),
    )
    states = []
    for q_part, k_part, v_part, cu_seqlens_q, cu_seqlens_k in halves:
        lengths = Rows(cu_seqlens_q, cu_seqlens_k, cu_seqlens_k.diff(), meta.max_seqlen_q, meta.max_seqlen_k, True)
        states.append(run_rows(name, q_part, k_part, v_part, lengths, scale, return_lse))
    (head, head_lse), (tail, tail_lse) = states
    lses = (head_lse, tail_lse) if return_lse else (None, None)
    fits = out is not None and len(out) == len(head) + len(tail) and out.is_contiguous() and (lse is None or lse.is_contiguous())
    if out is not None and fits:
        return pcp_fused_restore(head, tail, *lses, meta, out=(out, lse))
    restored, restored_lse = pcp_fused_restore(head, tail, *lses, meta)
    restored, restored_lse = restored[: len(q)], None if restored_lse is None else restored_lse[: len(q)]
    if out is None:
        return restored, restored_lse
    real = torch.arange(len(q), device=q.device) < meta.cu_seqlens_q[-1]
    out.copy_(torch.where(real[:, None, None], restored, out))
    if lse is not None and restored_lse is not None:
        lse.copy_(torch.where(real[:, None], restored_lse, lse))
    return out, lse


def shares_starts(name: str) -> bool:
    """Whether the backend, which was chosen, takes rows over keys that others have, too: what keys in chunks, an earlier result and
    the rows of all ranks need."""
    library = _library(name)
    return library is None or library.shares_starts


def check_library(name: str, beyond: str = "") -> None:
    """Raise NotImplementedError if the chosen backend's library cannot be called, or what is ``beyond`` one whose rows cannot share
    keys is asked of it: before anything is gathered, exchanged or launched for it."""
    library = _library(name)
    if library is None:
        return
    check_placement(library)
    if beyond and not library.shares_starts:
        raise NotImplementedError(f"pcp_attention: {beyond} need seqused_k, which this version of {name} lacks; triton does")


def _rows(of_queries: PCPMetadata | RankRows, chunk: KeyChunk | None) -> Rows:
    """Of one call over the keys of a chunk, without one over all."""
    of = of_queries if chunk is None else chunk
    queries, longest = of_queries.cu_seqlens_q, of_queries.max_seqlen_q
    return Rows(queries, of.cu_seqlens_k, of.seqused_k, longest, of.max_seqlen_k, chunk is None or chunk.causal)


def _by_wgmma_over(rows: Rows, scale: float) -> Callable[..., None]:
    lengths = (rows.cu_seqlens_q, rows.cu_seqlens_k, rows.seqused_k)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, k_pe: torch.Tensor | None = None) -> None:
        by_wgmma(q, k, v, k_pe, None, *lengths, None, None, scale, rows.causal, out, None)

    return run


def prepared_rows(name: str, rows: Rows, softmax_scale: float) -> Callable[..., None] | None:
    """What :func:`run_rows` does with a backend that was chosen, for many layers of a step: a function of q, K, V and ``out``, and
    of ``k_pe`` where the backend takes it apart, for tensors that :func:`libraries.apart` has nothing against. None where the
    backend has no such form."""
    if name == "cuda":
        return _by_wgmma_over(rows, float(softmax_scale))
    library = _library(name)
    return None if library is None else prepared(library, rows, float(softmax_scale))


def prepared_call(name: str, of: PCPMetadata | RankRows, softmax_scale: float) -> Callable[..., None] | None:
    """:func:`prepared_rows` of a step or of all its ranks, for all keys at once."""
    return prepared_rows(name, _rows(of, None), softmax_scale)


def _without_rest(
    name: str, count: int, k: torch.Tensor, v: torch.Tensor, k_pe: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a library may see of the keys, of which ``count`` are there: it reads whole tiles, but nothing outside of a tensor."""
    if name not in LIBRARIES or k.shape[0] <= count:
        return k, v, k_pe
    return k[:count], v[:count], None if k_pe is None else k_pe[:count]


def attend_ranks(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranks: RankRows,
    num_keys: int,
    softmax_scale: float,
    return_lse: bool = False,
    k_pe: torch.Tensor | None = None,
    prev: State | None = None,
    chunk: KeyChunk | None = None,
    out: State | None = None,
) -> Result:
    """:func:`attend` for the queries of all ranks, [P * Np, H, D] in gathered order, with a ``chunk`` of ``ranks.key_chunks`` or
    over all ``num_keys``. Pads get 0 and -inf; where ``prev`` is ``out`` they stay as they are. By a backend that
    :func:`shares_starts`."""
    k, v, k_pe = _without_rest(name, num_keys if chunk is None else chunk.num_rows, k, v, k_pe)
    rows = _rows(ranks, chunk)
    return run_rows(name, q, k, v, rows, softmax_scale, return_lse, k_pe, None, prev, *(out or (None, None)))


def attend(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    meta: PCPMetadata,
    softmax_scale: float,
    return_lse: bool = False,
    k_pe: torch.Tensor | None = None,
    kv_rows: torch.Tensor | None = None,
    prev: State | None = None,
    chunk: KeyChunk | None = None,
    out: torch.Tensor | State | None = None,
) -> torch.Tensor | Result:
    """:func:`pcp_attention` by a backend that was chosen, for arguments that are known to fit."""
    given, lse = out if isinstance(out, tuple) else (out, None)
    library = _library(name)
    k, v, k_pe = _without_rest(name, meta.num_kv_tokens if chunk is None else chunk.num_rows, k, v, k_pe)
    if library is not None and q.shape[0] > meta.num_local_rows:  # of which a library would write all
        whole = q.new_empty(*q.shape[:2], v.shape[2]) if given is None else given
        whole_lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse and lse is None else lse
        real = slice(0, meta.num_local_rows)
        part = None if prev is None else (prev[0][real], prev[1][real])
        written = whole[real] if whole_lse is None else (whole[real], whole_lse[real])
        attend(name, q[real], k, v, meta, softmax_scale, return_lse, k_pe, kv_rows, part, chunk, written)
        return (whole, whole_lse) if return_lse else whole
    if library is not None and not library.shares_starts:
        k = k if k_pe is None else concat_k(k, k_pe)
        state = _by_two_calls(name, q, k, v, meta, softmax_scale, return_lse, given, lse)
        return state if return_lse else state[0]
    state = run_rows(name, q, k, v, _rows(meta, chunk), softmax_scale, return_lse, k_pe, kv_rows, prev, given, lse)
    return state if return_lse else state[0]


def pcp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    meta: PCPMetadata,
    *,
    softmax_scale: float,
    return_lse: bool = False,
    k_pe: torch.Tensor | None = None,
    kv_rows: torch.Tensor | None = None,
    prev: State | None = None,
    chunk: KeyChunk | None = None,
    out: torch.Tensor | State | None = None,
    backend: str = "auto",
) -> torch.Tensor | Result:
    """Attention of this rank's tokens over all tokens of their requests, in one call: nothing is gathered before or restored after.

    A request's head and its tail are two rows over the same keys. See docs/attention.md for what each backend supports; what it has
    no kernel for but can be had from other ops here (``k_pe``, ``prev``) is composed.

    Args:
        q: [T or Np, H, D] in local order; rows past T = ``meta.num_tokens`` are neither read nor is their output written.
        k: [N, H, D] in key order, N at least ``meta.num_kv_tokens``, or ``chunk.num_rows``. With ``k_pe`` [N, H, D - rope].
        v: [N, H, Dv].
        meta: of this rank and step, on the same device.
        softmax_scale: factor of the scores, positive.
        return_lse: whether the LSE is wanted too.
        k_pe: [N, rope] the rest of K, shared by the heads. ``k`` and ``v`` can be the two slices of ``kv_b_proj``'s output.
        kv_rows: int32, for each key of the call its row in ``k``, ``v`` and ``k_pe``, which may be in any order and number then.
            Pads, which only pads among the queries see, may be -1. Rows are not checked.
        prev: an earlier result (out, lse) over other keys, [T, H, Dv] and float32 [T, H], merged in.
        chunk: of ``meta.key_chunks``, to attend to some of the keys: k, v and ``kv_rows`` begin with its first. None: all keys.
        out: what to write and return, a tensor or with ``return_lse`` a tuple, any row and head strides. It may be ``prev``, both
            very tensors: then a row that has no key in the chunk costs nothing. Otherwise they must share no memory with each other
            or an input.
        backend: ``cuda`` (our own, Hopper), ``fa3``, ``fa4``, ``fa2``, ``triton``, ``torch`` (the definition; any device), or
            ``auto``: the fastest, on Hopper cuda for the widths that it takes (for long rows fa3, if it is there), else triton, on
            the CPU torch. Under ``torch.compile`` ``auto`` on a GPU.

    All of bf16, fp16 or fp32 (``torch``: also fp64), one dtype; any row and head strides with a contiguous last dimension. Causal,
    aligned bottom-right; a chunk of context is seen by every query.

    Returns:
        out [T, H, Dv] in local order, and with ``return_lse`` the LSE, natural, float32 [T, H], of any strides. A token without
        keys has 0 and -inf.

    Raises:
        ValueError, TypeError: an argument does not fit the metadata or the others; before any launch.
        NotImplementedError: a tensor requires gradients, or the backend does not support this; the message names those that do.
        RuntimeError: the named backend is not available.
    """
    check_attention(q, k, v, meta, softmax_scale, k_pe, kv_rows, prev, chunk, out, return_lse)
    width, v_width, listed, apart = q.shape[2], v.shape[2], kv_rows is not None, k_pe is not None
    name = support.choose(backend, q.device, q.dtype, width, v_width, listed, meta.max_seqlen_q, q.shape[1], apart)
    if backend == name == "cuda":  # under a compiler, which has no addresses, it is not
        given = out[0] if isinstance(out, tuple) else out
        refused = support.out_of_reach(q, k, v, k_pe, given, None if prev is None else prev[0])
        if refused:
            raise NotImplementedError(f"pcp_attention: backend 'cuda' does not support {refused}; triton does")
    check_library(name, "chunk and prev" if chunk is not None or prev is not None else "")
    return attend(name, q, k, v, meta, softmax_scale, return_lse, k_pe, kv_rows, prev, chunk, out)
