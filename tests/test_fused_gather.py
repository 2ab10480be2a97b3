"""pcp_fused_gather: bit-equal to six index_selects, on every backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import DTYPES, IMPLEMENTATIONS, as_bytes, batches, poison, random_bytes, same_bits
from pcp_mla import GatheredRows, PCPMetadata, pcp_fused_gather

NAMES = ("q_head", "k_head", "v_head", "q_tail", "k_tail", "v_tail")


def inputs(meta, dtype, device, seed, heads=3, widths=(24, 24, 16), strided=True):
    """q gapless; k with gaps between tokens; v the second half of every head of a wider tensor, as kv_b_proj leaves it."""
    generator = torch.Generator().manual_seed(seed)
    dq, dk, dv = widths
    q = random_bytes((meta.num_tokens, heads, dq), dtype, device, generator)
    if not strided:
        return q, *(random_bytes((meta.num_kv_tokens, heads, d), dtype, device, generator) for d in (dk, dv))
    k = random_bytes((meta.num_kv_tokens, heads + 1, dk), dtype, device, generator)[:, :heads]
    v = random_bytes((meta.num_kv_tokens, heads, dk + dv), dtype, device, generator)[..., dk:]
    return q, k, v


def expected(q, k, v, meta):
    def rows(x, index):
        return as_bytes(x).index_select(0, index).view(x.dtype).unflatten(1, x.shape[1:]) if x.numel() else x

    return (
        rows(q, meta.query_head_indices),
        rows(k, meta.kv_head_indices),
        rows(v, meta.kv_head_indices),
        rows(q, meta.query_tail_indices),
        rows(k, meta.kv_tail_indices),
        rows(v, meta.kv_tail_indices),
    )


def check(q, k, v, meta, backend):
    wanted = expected(q, k, v, meta)
    poison([x.shape for x in wanted], q.dtype, q.device)
    got = pcp_fused_gather(q, k, v, meta, backend=backend)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert same_bits(a, b), name
        assert a.is_contiguous()
    given = GatheredRows(*(random_bytes(x.shape, x.dtype, x.device, torch.Generator().manual_seed(9)) for x in wanted))
    assert pcp_fused_gather(q, k, v, meta, out=given, backend=backend) is given
    for name, a, b in zip(NAMES, given, wanted, strict=True):
        assert same_bits(a, b), f"out.{name}"


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
@given(batches(), st.sampled_from(DTYPES), st.sampled_from([(24, 24, 16), (8, 5, 3), (1, 1, 1)]), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, batch, dtype, widths, seed):
    meta = PCPMetadata.build(**batch, device=device)
    check(*inputs(meta, dtype, meta.device, seed, widths=widths), meta, backend)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [1, 16])
def test_mla_widths(device, backend, heads):
    """192 beside 128, both gapless and with v inside [N, H, 256]; more than one tile of rows, more than one block of a row."""
    lengths = [20, 3, 9] if (device, backend) == ("cpu", "triton") else [700, 3, 90]
    meta = PCPMetadata.build(lengths, [0, 10, 5], world_size=2, rank=1, device=device)
    for strided in (False, True):
        check(*inputs(meta, torch.bfloat16, meta.device, 1, heads, (192, 192, 128), strided), meta, backend)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_unaligned_addresses(device, backend):
    """Tensors that start one element behind an aligned address, and odd strides: narrower accesses, the same bytes."""
    meta = PCPMetadata.build([37], world_size=2, rank=0, device=device)
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.bfloat16, torch.uint8):
        q, k, v = (random_bytes((n, 2, 33), dtype, meta.device, generator)[..., 1:] for n in (meta.num_tokens, 37, 37))
        check(q, k, v, meta, backend)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_pad_rows_of_q_are_not_read(device, backend):
    meta = PCPMetadata.build([7], world_size=2, rank=0, device=device)
    q, k, v = inputs(meta, torch.float32, meta.device, 5)
    padded = torch.cat([q, torch.full_like(q[:1], float("nan"))])
    assert len(padded) == meta.num_tokens_padded
    for a, b in zip(
        pcp_fused_gather(padded, k, v, meta, backend=backend), pcp_fused_gather(q, k, v, meta, backend=backend), strict=True
    ):
        assert same_bits(a, b)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_empty_batch(device, backend):
    meta = PCPMetadata.build([], world_size=2, rank=0, device=device)
    check(*inputs(meta, torch.bfloat16, meta.device, 0), meta, backend)


@pytest.fixture
def good():
    meta = PCPMetadata.build([9, 4], world_size=2, rank=0)
    return {**dict(zip("qkv", inputs(meta, torch.bfloat16, meta.device, 0), strict=True)), "meta": meta}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: {"q": g["q"][0]}, ValueError, "q must have 3 dimensions .* got 2"),
        (lambda g: {"k": g["k"][None]}, ValueError, "k must have 3 dimensions .* got 4"),
        (lambda g: {"v": g["v"].float()}, TypeError, "v must have dtype bfloat16 .* got float32"),
        (lambda g: {"q": g["q"].to(torch.complex128)}, TypeError, "q must have a dtype of at most 8 bytes, got complex128"),
        (lambda g: {"v": g["v"].transpose(1, 2)}, ValueError, "v must have a contiguous last dimension, got strides"),
        (lambda g: {"k": g["k"][:, :0]}, ValueError, "k must have at least one head"),
        (lambda g: {"q": g["q"][1:]}, ValueError, "q must have the 5 local tokens .* got 4"),
        (lambda g: {"k": g["k"][1:]}, ValueError, "k must have the 13 rows .* got 12"),
        (lambda g: {"v": g["v"][:5]}, ValueError, "v must have the 13 rows .* got 5"),
        (lambda g: {"v": g["v"].to("meta")}, ValueError, "v must be on cpu, where the metadata is, got meta"),
        (lambda g: {"k": g["k"].clone().requires_grad_()}, NotImplementedError, "k must not require gradients"),
        (lambda g: {"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        (lambda g: {"meta": None}, TypeError, "meta must be a PCPMetadata, got NoneType"),
        (lambda g: {"backend": "fast"}, ValueError, "backend must be one of auto, cuda, triton, cpu, reference, got 'fast'"),
    ],
)
def test_bad_arguments(good, change, error, words):
    pcp_fused_gather(**good)
    with pytest.raises(error, match=words):
        pcp_fused_gather(**{**good, **change(good)})


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda o: o._replace(q_tail=o.q_tail[1:]), ValueError, r"out.q_tail must have shape \(1, 3, 24\), got \(0, 3, 24\)"),
        (lambda o: o._replace(k_head=o.k_head.half()), TypeError, "out.k_head must have dtype bfloat16, got float16"),
        (lambda o: o._replace(v_head=o.v_head.repeat(1, 1, 2)[..., ::2]), ValueError, "out.v_head must be contiguous, got strides"),
        (lambda o: o._replace(v_tail=o.v_tail[:, :2]), ValueError, "out.v_tail must have shape"),
        (lambda o: tuple(o), TypeError, "out must be GatheredRows, got tuple"),
    ],
)
def test_bad_outputs_are_not_touched(good, backend, change, error, words):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    out = pcp_fused_gather(**good)
    for x in out:
        x.zero_()
    with pytest.raises(error, match=words):
        pcp_fused_gather(**good, out=change(out), backend=backend)
    assert not any(x.any() for x in out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend is there")
def test_missing_backend_says_why(good):
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: .*; available here: .*cpu, reference"):
        pcp_fused_gather(**good, backend="cuda")


@pytest.mark.gpu
def test_backend_of_another_device(good):
    with pytest.raises(ValueError, match="backend 'cuda' needs tensors on a cuda device, got cpu"):
        pcp_fused_gather(**good, backend="cuda")


def test_the_native_op_refuses_a_wrong_table(good):
    """torch.ops is open to anyone: a table that would send rows astray must not reach memory."""
    q, k, v, meta = good["q"], good["k"], good["v"], good["meta"]
    counts = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    op = torch.ops.pcp_mla.fused_gather
    op(q, k, v, meta.row_table, *counts)
    for row in range(5):
        wrong = meta.row_table.clone()
        wrong[row, 1] += 1000
        with pytest.raises(RuntimeError, match="row_table must"):
            op(q, k, v, wrong, *counts)
    with pytest.raises(RuntimeError, match="row_table must be a contiguous int32 tensor"):
        op(q, k, v, meta.row_table.long(), *counts)
    with pytest.raises(RuntimeError, match="q must have at least 5 rows, got 4"):
        op(q[1:], k, v, meta.row_table, *counts)
    with pytest.raises(RuntimeError, match="one dtype"):
        op(q, k.half(), v, meta.row_table, *counts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    meta = PCPMetadata.build([9, 4], world_size=2, rank=0, device=device)
    q, k, v = (torch.randn(n, 3, 16, device=device) for n in (meta.num_tokens, meta.num_kv_tokens, meta.num_kv_tokens))
    counts = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    torch.library.opcheck(torch.ops.pcp_mla.fused_gather.default, (q, k, v, meta.row_table, *counts))
    out = pcp_fused_gather(q, k, v, meta)
    torch.library.opcheck(torch.ops.pcp_mla.fused_gather_out.default, (q, k, v, meta.row_table, *counts, *out))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replay_with_another_batch(backend):
    """The row table and the tensors are read when the graph runs: a new batch of the same counts gives the new batch's rows."""
    first = PCPMetadata.build([40, 24], world_size=2, rank=0, device="cuda")
    second = PCPMetadata.build([24, 40], world_size=2, rank=0, device="cuda")
    static = inputs(first, torch.bfloat16, first.device, 1)
    pcp_fused_gather(*static, first, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pcp_fused_gather(*static, first, backend=backend)
    fresh = inputs(second, torch.bfloat16, first.device, 2)
    wanted = expected(*fresh, second)
    for a, b in zip(static, fresh, strict=True):
        a.copy_(b)
    first.row_table.copy_(second.row_table)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31(backend):
    tokens, heads = 88_000, 128
    assert tokens * heads * 192 > 2**31
    meta = PCPMetadata.build([tokens], world_size=2, rank=0, device="cuda")
    k = torch.randint(-(2**15), 2**15, (tokens, heads, 192), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    kv = torch.randint(-(2**15), 2**15, (tokens, heads, 128), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    q = k[: meta.num_tokens]
    got = pcp_fused_gather(q, k, kv[..., 64:], meta, backend=backend)
    head, tail = int(meta.seqused_k[0]), int(meta.seqused_k[1])
    for a, b in (
        (got.k_head, k[:head]),
        (got.k_tail, k[:tail]),
        (got.v_head, kv[:head, :, 64:]),
        (got.v_tail, kv[:tail, :, 64:]),
        (got.q_head, q[: meta.num_head_tokens]),
        (got.q_tail, q[meta.num_head_tokens :]),
    ):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_device_that_is_not_current(backend):
    meta = PCPMetadata.build([50], world_size=2, rank=1, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(*inputs(meta, torch.bfloat16, meta.device, 0), meta, backend)
    assert torch.cuda.current_device() == 0
