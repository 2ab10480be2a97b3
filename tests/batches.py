"""Random ragged batches, and where an op can run."""

import math
import os

import pytest
import torch
from hypothesis import strategies as st

from pcp_mla import partition

# (device, backend) of every implementation of an op. The CPU form of the Triton kernels needs the interpreter.
IMPLEMENTATIONS = [
    pytest.param("cpu", "auto", id="cpu-auto"),
    pytest.param("cpu", "cpu", id="cpu-native"),
    pytest.param(
        "cpu",
        "triton",
        id="triton-interpreted",
        marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here"),
    ),
    pytest.param("cuda", "auto", id="cuda-auto", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "reference", id="reference-cuda", marks=pytest.mark.gpu),
]
# The definitions on the CPU, too.
EVERYWHERE = [*IMPLEMENTATIONS, pytest.param("cpu", "reference", id="reference")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


@st.composite
def batches(draw, max_requests=6, max_len=70, max_context=30):
    """Arguments of ``partition`` for one rank of 1 to 8 or 16, with the lengths where chunking changes over-represented."""
    world = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
    edges = st.sampled_from([0, 1, 2 * world - 1, 2 * world, 2 * world + 1])
    count = draw(st.integers(0, max_requests))
    requests = [
        (
            draw(st.one_of(edges, st.integers(0, max_len))),
            draw(st.one_of(st.just(0), st.integers(0, max_context))),
            draw(st.booleans()),
        )
        for _ in range(count)
    ]
    layout = draw(st.sampled_from(["unpadded", "padded"]))
    policy = draw(st.sampled_from(["replicate", "round_robin"])) if layout == "unpadded" else "replicate"
    return {
        "query_lens": [length for length, _, _ in requests],
        "context_lens": [context for _, context, _ in requests],
        "is_prefill": [prefill for _, _, prefill in requests],
        "world_size": world,
        "rank": draw(st.integers(0, world - 1)),
        "layout": layout,
        "decode_policy": policy,
    }


def every_rank(batch):
    """The partitions of all ranks of one batch."""
    return [partition(**{**batch, "rank": rank}) for rank in range(batch["world_size"])]


def random_bytes(shape, dtype, device, generator):
    """A tensor of random bytes, NaN patterns included: copies must not care."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return data.to(device).view(dtype)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def half_ulp(x, dtype):
    """Of numbers in float64: what rounding each to ``dtype`` may change it by."""
    kind = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent.clamp(min=math.frexp(kind.smallest_normal)[1])
    return torch.ldexp(torch.full_like(x, kind.eps / 4), exponent).masked_fill(x == 0, 0)


def as_bytes(x):
    """[rows, bytes of a row]"""
    if x.numel() == 0:
        return torch.empty(len(x), math.prod(x.shape[1:]) * x.element_size(), dtype=torch.uint8, device=x.device)
    return x.contiguous().view(len(x), -1).view(torch.uint8)


def poison(shapes, dtype, device):
    """Leave freed memory of these shapes full of 0xFF (NaN in every float type), so that an unwritten row shows."""
    size = torch.empty(0, dtype=dtype).element_size()
    blocks = [torch.full((*shape[:-1], shape[-1] * size), 255, dtype=torch.uint8, device=device) for shape in shapes]
    del blocks
