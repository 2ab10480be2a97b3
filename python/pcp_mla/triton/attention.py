"""Varlen attention in Triton: what its kernel is launched with."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .attention_kernel import attention_kernel
from .rows import check_counts


def split_width(width: int) -> tuple[int, int]:
    """A width in two parts: the largest power of two in it, and the rest."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def configuration(major: int | None, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """What is fast on GPUs of compute capability ``major``.x, None being the interpreter, for K and V of ``width`` together.

    QUERIES and KEYS of a tile. HEADS: how many to take at a time, few enough for several tiles to read the same keys while these
    are in L2, and enough for the longest tiles of the last ones not to end after all others.
    """
    config = {"QUERIES": 64, "KEYS": 32, "HEADS": 16, "num_warps": 4, "num_stages": 2}
    if major is None:
        return config | {"QUERIES": 16, "KEYS": 16}
    wide = width > 320  # few queries, or registers spill: attention over latents has as many queries a row as heads anyway
    if dtype == torch.float32:
        return config | ({"QUERIES": 16, "KEYS": 16} if wide else {"QUERIES": 32}) | {"num_stages": 1}
    if wide:
        return config | {"QUERIES": 16}
    if major == 9:
        return config | {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
    return config | {"QUERIES": 128, "num_warps": 8}


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # tl.dot takes no less


def _head_group(heads: int, most: int) -> int:
    """A divisor of ``heads``, at most ``most`` where halving leads there."""
    while heads % 2 == 0 and heads > most:
        heads //= 2
    return heads


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    kv_rows: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor,
    prev_out: torch.Tensor | None,
    prev_lse: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    config: dict[str, Any] | None = None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.attention`; ``config`` in place of :func:`configuration`'s."""
    tokens, heads, width = q.shape
    rows = len(seqused_k)
    if tokens == 0 or rows == 0:
        return
    if k_pe is None:
        width_a, width_b = split_width(width)
        k_a, k_b = k[..., :width_a], k[..., width_a:]
    else:
        width_a, width_b = k.shape[2], k_pe.shape[1]
        k_a, k_b = k, k_pe[:, None].expand(-1, heads, -1)
    interpreted = not q.is_cuda
    if config is None:
        major = None if interpreted else torch.cuda.get_device_capability(q.device)[0]
        config = configuration(major, q.dtype, width + v.shape[2])
    config = dict(config)
    items = triton.cdiv(tokens, config["QUERIES"]) + rows  # no row has more than one tile that is not full
    keys = len(k) if kv_rows is None else len(kv_rows)
    check_counts("pcp_attention", queries=tokens, keys=keys, programs=items * heads)
    if kv_rows is None and keys > 1:  # a tile's rows are counted from its first in 32 bits
        check_counts("pcp_attention", numbers_between_keys_of_a_tile=config["KEYS"] * max(x.stride(0) for x in (k_a, k_b, v)))
    in_place = prev_out is not None and prev_out.data_ptr() == out.data_ptr()
    # The interpreter truncates to bfloat16: there torch rounds.
    given = out.float() if interpreted and out.dtype == torch.bfloat16 else out
    attention_kernel[(items * heads,)](
        q,
        k_a,
        k_b,
        v,
        kv_rows,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        prev_out,
        prev_lse,
        given,
        lse,
        softmax_scale * 1.4426950408889634,
        items,
        rows,
        _head_group(heads, config.pop("HEADS")),
        *q.stride()[:2],
        *k_a.stride()[:2],
        *k_b.stride()[:2],
        *v.stride()[:2],
        *((0, 0) if prev_out is None else prev_out.stride()[:2]),
        *((0, 0) if prev_lse is None else prev_lse.stride()),
        *given.stride()[:2],
        *((0, 0) if lse is None else lse.stride()),
        width_a,
        width_b,
        v.shape[2],
        _block(width_a),
        _block(width_b),
        _block(v.shape[2]),
        causal,
        in_place,
        max(128, triton.next_power_of_2(rows)),
        interpreted,
        **config,
    )
    if given is not out:
        out.copy_(given)
