"""Results that reach into what is read, or into each other: refused by name, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import pcp_mla
from pcp_mla import GatheredRows, PCPMetadata
from pcp_mla.plan.dims import MLADims
from stress.draw import Draw
from stress.expected import refused
from stress.families import DEVICE, Arguments, Family, backends
from stress.memory import size_of


class Call(NamedTuple):
    """An op's call, given the tensors by their names; their shapes and types: those that are read, and those that are written."""

    call: Callable[..., Any]
    read: dict[str, tuple[tuple[int, ...], torch.dtype]]
    written: dict[str, tuple[tuple[int, ...], torch.dtype]]


def calls(tokens: int, heads: int, dim: int, device: str) -> dict[str, Call]:
    meta = PCPMetadata.build([tokens], [2], world_size=2, rank=0, device=device)
    local, keys, kind = meta.num_tokens, meta.num_kv_tokens, torch.float32
    state, lse = ((tokens, heads, dim), kind), ((tokens, heads), kind)
    rows = ((tokens,), torch.int32)
    dims = MLADims(heads, dim, 4, dim, 8)
    head, tail = meta.num_head_tokens, meta.num_tail_tokens
    gathered = [
        (head, dim),
        (meta.num_head_kv, dim),
        (meta.num_head_kv, 3),
        (tail, dim),
        (meta.num_tail_kv, dim),
        (meta.num_tail_kv, 3),
    ]
    return {
        "merge_attn_states": Call(
            lambda **x: pcp_mla.merge_attn_states(**x),
            {"out_a": state, "lse_a": lse, "out_b": state, "lse_b": lse, "row_op": rows, "out_rows": rows},
            {"out": state, "lse_out": lse},
        ),
        "merge_n_attn_states": Call(
            lambda a, b, c, a_lse, b_lse, c_lse, **x: pcp_mla.merge_n_attn_states([a, b, c], [a_lse, b_lse, c_lse], **x),
            {"a": state, "b": state, "c": state, "a_lse": lse, "b_lse": lse, "c_lse": lse},
            {"out": state, "lse_out": lse},
        ),
        "cp_correct_out": Call(
            lambda **x: pcp_mla.cp_correct_out(rank=1, **x),
            {"out": state, "lses": ((2, tokens, heads), kind), "seqused_k": ((2, tokens), torch.int32)},
            {"corrected": state, "lse_out": lse},
        ),
        "write_latent_cache": Call(
            lambda **x: pcp_mla.write_latent_cache(**x),
            {"latents": ((tokens, dim), kind), "slot_mapping": ((tokens,), torch.int64)},
            {"cache": ((tokens, 2, dim), kind)},
        ),
        "gather_latents": Call(
            lambda **x: pcp_mla.gather_latents(**x),
            {"cache": ((tokens, 2, dim), kind), "rows": rows},
            {"out": ((tokens, dim), kind)},
        ),
        "concat_k": Call(
            lambda **x: pcp_mla.concat_k(**x),
            {"k_nope": state, "k_pe": ((tokens, 4), kind)},
            {"out": ((tokens, heads, dim + 4), kind)},
        ),
        "kv_up_project": Call(
            lambda **x: pcp_mla.kv_up_project(dims=dims, **x),
            {"latents": ((tokens, 12), kind), "rows": rows, "weight": ((heads * 2 * dim, 8), kind)},
            {"k_out": ((tokens, heads, dim + 4), kind), "v_out": state},
        ),
        "pcp_attention": Call(
            lambda out, lse, **x: pcp_mla.pcp_attention(**x, meta=meta, softmax_scale=0.1, return_lse=True, out=(out, lse)),
            {"q": ((local, heads, dim), kind), "k": ((keys, heads, dim), kind), "v": ((keys, heads, 3), kind)},
            {"out": ((local, heads, 3), kind), "lse": ((local, heads), kind)},
        ),
        "pcp_fused_gather": Call(
            lambda q, k, v, backend, **x: pcp_mla.pcp_fused_gather(q, k, v, meta, out=GatheredRows(**x), backend=backend),
            {"q": ((local, heads, dim), kind), "k": ((keys, heads, dim), kind), "v": ((keys, heads, 3), kind)},
            {name: ((n, heads, width), kind) for name, (n, width) in zip(GatheredRows._fields, gathered, strict=True)},
        ),
        "pcp_fused_restore": Call(
            lambda out, lse, **x: pcp_mla.pcp_fused_restore(**x, meta=meta, out=(out, lse)),
            {
                "out_head": ((head, heads, dim), kind),
                "out_tail": ((tail, heads, dim), kind),
                "lse_head": ((head, heads), kind),
                "lse_tail": ((tail, heads), kind),
            },
            {"out": ((local, heads, dim), kind), "lse": ((local, heads), kind)},
        ),
    }


SHAPES = calls(4, 2, 2, DEVICE)


def draw_overlaps(draw: Draw) -> Arguments:
    op = draw.choice(sorted(SHAPES))
    written = draw.choice(sorted(SHAPES[op].written))
    others = {*SHAPES[op].read, *SHAPES[op].written} - {written}
    named = ["auto", "torch"] if op == "pcp_attention" else backends(op.removeprefix("pcp_"))
    return {
        "device": DEVICE,
        "backend": draw.choice(named),
        "op": op,
        "written": written,
        "read": draw.choice(sorted(others)),
        "tokens": draw.int(4, 20),
        "heads": draw.int(1, 3),
        "dim": draw.choice([1, 2, 8]),
        "shift": draw.int(0, 7) / 8,
    }


def check_overlaps(device, backend, op, written, read, tokens, heads, dim, shift) -> None:
    """The result begins at ``shift`` of the other tensor's memory, but never where that begins."""
    call = calls(tokens, heads, dim, device)[op]
    tensors = {}
    for name, (shape, dtype) in (call.read | call.written).items():
        tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    (shape, dtype), other = call.written[written], tensors[read]
    size, room = math.prod(shape) * size_of(dtype), other.numel() * other.element_size()
    step = 8
    start = max(step, int(room * shift) // step * step)
    if start >= room or not size or (read == "lses" and start % size == 0):  # one of the LSEs is what may be written to
        return
    buffer = torch.zeros(max(room, start + size), dtype=torch.uint8, device=device)
    tensors[read] = buffer[:room].view(other.dtype).view(other.shape)
    tensors[written] = buffer[start : start + size].view(dtype).view(shape)
    before = {name: x.clone() for name, x in tensors.items()}
    refused(lambda: call.call(**tensors, backend=backend), op)
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), f"{name} was written"


FAMILIES = [Family(draw_overlaps, check_overlaps)]
