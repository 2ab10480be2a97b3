"""Bad arguments of pcp_attention: the error, its words, and nothing written."""

import os

import numpy as np
import pytest
import torch

from pcp_mla import PCPMetadata, PCPPlanner, pcp_attention
from pcp_mla.plan.slots import KeyChunk

META = PCPMetadata.build([7, 2], [3, 0], [True, True], world_size=2, rank=0)
T, N = META.num_tokens, META.num_kv_tokens
STEP = PCPPlanner(4, 40, 2, 0, device="cpu").plan([7, 2], [3, 0], [True, True], workspace_tokens=9)


def rows(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


GOOD = {"q": rows(T, 2, 12), "k": rows(N, 2, 12), "v": rows(N, 2, 6), "meta": META, "softmax_scale": 0.3}
STATE = (rows(T, 2, 6), rows(T, 2))
BAD_CHUNK = KeyChunk(0, 4, True, 4, np.zeros(2), np.zeros(5, np.int32), np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"meta": 3}, TypeError, "meta must be a PCPMetadata, got int"),
        ({"q": 3}, TypeError, "q must be a torch.Tensor, got int"),
        ({"q": rows(T + 9, 2, 12)}, ValueError, f"q must have the {T} local tokens of the metadata .* got {T + 9}"),
        (
            {"q": rows(T, 2, 12, dtype=torch.int32)},
            NotImplementedError,
            "q must be bfloat16, float16, float32 or float64, got int32",
        ),
        ({"q": rows(T, 12, 2).transpose(1, 2)}, ValueError, "q must have a contiguous last dimension"),
        ({"q": rows(T, 2, 12).requires_grad_()}, NotImplementedError, "q must not require gradients"),
        ({"k": rows(N, 2, 11)}, ValueError, r"k must have the heads and the width of q, \(2, 12\), got \(2, 11\)"),
        ({"k": rows(N, 1, 12)}, ValueError, r"k must have the heads and the width of q, \(2, 12\), got \(1, 12\)"),
        ({"k": rows(N, 2, 12).half()}, TypeError, "k must have dtype float32 as the tensors before it, got float16"),
        (
            {"k": rows(N - 1, 2, 12), "v": rows(N - 1, 2, 6)},
            ValueError,
            f"k must have at least the {N} keys of the call, got {N - 1}",
        ),
        ({"v": rows(N + 1, 2, 6)}, ValueError, "v must have the rows and heads of k"),
        ({"v": rows(N, 2, 6, dtype=torch.float64)}, TypeError, "v must have dtype float32"),
        ({"v": torch.zeros(N, 2, 6, device="meta")}, ValueError, "v must be on cpu, where the metadata is, got meta"),
        ({"k_pe": rows(N, 4)}, ValueError, r"k must have the heads and the width of q less that of k_pe, \(2, 8\), got \(2, 12\)"),
        ({"k_pe": rows(N - 1, 4)}, ValueError, "k_pe must have shape"),
        ({"k_pe": rows(N, 12)}, ValueError, "k_pe must be narrower than q, which is 12 wide, got 12"),
        ({"k_pe": rows(N, 4).half()}, TypeError, "k_pe must be float32 as q, got float16"),
        ({"k_pe": rows(4, N).T}, ValueError, "k_pe must have a contiguous last dimension"),
        ({"kv_rows": rows(N)}, TypeError, "kv_rows must be int32, got float32"),
        (
            {"kv_rows": rows(N - 1, dtype=torch.int32)},
            ValueError,
            f"kv_rows must list at least the {N} keys of the call, got {N - 1}",
        ),
        ({"k": rows(N, 2, 8), "k_pe": rows(N, 4).requires_grad_()}, NotImplementedError, "k_pe must not require gradients"),
        ({"prev": (STATE[0], rows(T, 2).requires_grad_())}, NotImplementedError, "prev's LSE must not require gradients"),
        (
            {"prev": STATE, "out": (STATE[0], rows(T, 2)), "return_lse": True},
            ValueError,
            "out must be both of prev's tensors or neither",
        ),
        ({"kv_rows": rows(2 * N, dtype=torch.int32)[::2]}, ValueError, "kv_rows must be contiguous"),
        (
            {"kv_rows": rows(N, dtype=torch.int32), "k": rows(24).as_strided((1, 2, 12), (2**30, 12, 1)), "v": rows(1, 2, 6)},
            ValueError,
            r"k must have rows less than 2\*\*32 bytes apart with kv_rows, got strides \(1073741824, 12, 1\)",
        ),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float, got str"),
        ({"softmax_scale": -0.5}, ValueError, "softmax_scale must be positive and finite, got -0.5"),
        ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be positive and finite, got inf"),
        ({"prev": STATE[0]}, TypeError, r"prev must be a tuple \(out, lse\), got Tensor"),
        ({"prev": (STATE[0], None)}, TypeError, "prev's LSE must be a torch.Tensor, got NoneType"),
        ({"prev": (rows(T, 2, 5), STATE[1])}, ValueError, "prev must have shape"),
        ({"prev": (STATE[0].half(), STATE[1])}, TypeError, "prev must be float32 as q, got float16"),
        ({"prev": (STATE[0], STATE[1].half())}, TypeError, "prev's LSE must be float32, got float16"),
        ({"chunk": 1}, TypeError, "chunk must be a KeyChunk of meta.key_chunks, got int"),
        ({"chunk": BAD_CHUNK}, TypeError, "chunk.cu_seqlens_k must be a torch.Tensor, got ndarray"),
        ({"out": STATE[0]}, TypeError, r"out must be a tuple \(out, lse\) with return_lse, got Tensor"),
        ({"out": STATE, "return_lse": False}, TypeError, "out must be a tensor without return_lse, got tuple"),
        ({"out": (STATE[0], None)}, TypeError, "out's LSE must be a torch.Tensor, got NoneType"),
        ({"out": (rows(T, 2, 5), STATE[1])}, ValueError, "out must have shape"),
        ({"out": (rows(1, 2, 6).expand(T, -1, -1), STATE[1])}, ValueError, "out must not be expanded"),
        ({"out": (rows(T, 6, 2).transpose(1, 2), STATE[1])}, ValueError, "out must have a contiguous last dimension"),
        ({"backend": "wgmma"}, ValueError, "backend must be one of auto, cuda, fa3, fa4, fa2, triton, torch, got 'wgmma'"),
        ({"backend": "fa3"}, NotImplementedError, "backend 'fa3' does not support dtype float32; these do: triton, torch"),
    ],
)
def test_errors(change, error, words):
    out = torch.full((T, 2, 6), 7.0), torch.full((T, 2), 7.0)
    with pytest.raises(error, match=f"pcp_attention: {words}"):
        pcp_attention(**{**GOOD, "return_lse": True, "out": out, **change})
    assert out[0].eq(7).all()
    assert out[1].eq(7).all()


def half(width, v_width):
    shapes = ((T, width), (N, width), (N, v_width))
    return dict(zip("qkv", (torch.zeros(n, 2, d, dtype=torch.bfloat16) for n, d in shapes), strict=True))


@pytest.mark.parametrize(
    ("backend", "change", "words"),
    [
        ("fa3", half(192, 64), r"widths 192 of q and 64 of v \(it takes equal ones .*\); these do: fa2, triton, torch"),
        ("fa3", {**half(192, 128), "kv_rows": torch.zeros(N, dtype=torch.int32)}, "kv_rows; these do: cuda, triton, torch"),
        ("fa4", half(256, 256), "widths 256 of q and 256 of v .*; these do: cuda, fa3, fa2, triton, torch"),
        ("fa2", half(320, 64), "widths 320 of q and 64 of v .*; these do: triton, torch"),
        ("triton", {name: x.double() for name, x in half(32, 16).items()}, "dtype float64; these do: torch"),
    ],
)
def test_what_a_backend_lacks(backend, change, words):
    with pytest.raises(NotImplementedError, match=f"pcp_attention: backend '{backend}' does not support {words}$"):
        pcp_attention(**{**GOOD, **change}, backend=backend)


def test_a_missing_backend():
    if torch.cuda.is_available():
        words = "it needs tensors on a CUDA device, got cpu; available here: torch"
    else:
        words = "it needs tensors on a CUDA device, got cpu; available here: .*torch"
    with pytest.raises(RuntimeError, match=f"pcp_attention: backend 'fa3' is not available: {words}"):
        pcp_attention(**{**GOOD, **half(192, 128)}, backend="fa3")


def test_chunks_need_their_own_keys_only():
    chunk = STEP.key_chunks[0]
    q, k, v = rows(STEP.num_tokens, 2, 12), rows(chunk.num_rows, 2, 12), rows(chunk.num_rows, 2, 6)
    assert pcp_attention(q, k, v, STEP, softmax_scale=0.3, chunk=chunk).shape == (STEP.num_tokens, 2, 6)
    with pytest.raises(ValueError, match=f"k must have at least the {chunk.num_rows} keys of the call, got {chunk.num_rows - 1}"):
        pcp_attention(q, k[1:], v[1:], STEP, softmax_scale=0.3, chunk=chunk)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here")
def test_keys_too_far_apart_for_32_bits():
    """The kernel counts from the first key of a tile; other backends take any distance."""
    meta = PCPMetadata.build([2], world_size=1, rank=0)
    q, near, v = (torch.ones(2, 2, width, dtype=torch.float16) for width in (12, 12, 6))
    far = torch.empty(2**27 + 24, dtype=torch.float16).as_strided((2, 2, 12), (2**27, 12, 1))
    far.copy_(near)
    words = "numbers between keys of a tile of a Triton launch must be less than 2147418112, got 2147483648"
    with pytest.raises(ValueError, match=f"pcp_attention: {words}"):
        pcp_attention(q, far, v, meta, softmax_scale=0.3, backend="triton")
    got = pcp_attention(q, far, v, meta, softmax_scale=0.3, backend="torch")
    assert torch.equal(got, pcp_attention(q, near, v, meta, softmax_scale=0.3, backend="torch"))
