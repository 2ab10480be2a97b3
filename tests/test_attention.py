"""Attention of ragged batches in one call, on every backend, against the formula in float64."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from batches import batches, poison, same_bits
from bench import peers
from pcp_mla import PCPMetadata, PCPPlanner, pcp_attention
from pcp_mla.ops.attention import support
from pcp_mla.ops.attention.call import _by_two_calls
from pcp_mla.ops.attention.rows import attend_row

peers.load_fa3()

OURS = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param(
        "cpu",
        "triton",
        id="triton-interpreted",
        marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here"),
    ),
    pytest.param("cuda", "torch", id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
ALL = [*OURS, *(pytest.param("cuda", name, id=name, marks=pytest.mark.gpu) for name in ("fa2", "fa3", "fa4"))]
ours = pytest.mark.parametrize(("device", "backend"), OURS)
everywhere = pytest.mark.parametrize(("device", "backend"), ALL)

NOPE, ROPE, V = (32, 16, 32) if not torch.cuda.is_available() else (128, 64, 128)
SCALE = 0.2 if NOPE == 32 else 192**-0.5

# Query lengths, context lengths, prefills, ranks. Chunks are no multiples of a tile (16 in the interpreter, 64 or 128 on a GPU).
BATCHES = {
    "one prompt": ([83], [0], [True], 2),
    "context": ([37, 20], [45, 3], [True, True], 2),
    "edges": ([0, 1, 3, 4, 5], [0, 7, 0, 2, 30], [True] * 5, 2),
    "shorter than the ranks": ([1, 5, 7, 2], [0] * 4, [True] * 4, 4),
    "decodes among prefills": ([21, 1, 1, 9, 2], [0, 20, 17, 5, 9], [True, False, False, True, False], 2),
    "nothing": ([0, 0], [5, 0], [True, True], 2),
    "no requests": ([], [], [], 3),
}


def available(device, backend, dtype=torch.bfloat16, widths=(NOPE + ROPE, V)):
    """Skip where the library is missing or does not take the dtype or the widths."""
    reason = support.missing(backend, torch.device(device, 0) if device == "cuda" else torch.device(device))
    reason = reason or support.refusal(backend, dtype, *widths, False)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def meta_of(batch, rank, device, longer=1):
    lengths, contexts, prefills, world = batch
    scaled = [n if n < 6 else n * longer for n in lengths]
    return PCPMetadata.build(scaled, [c * longer for c in contexts], prefills, world_size=world, rank=rank, device=device)


def inputs(meta, dtype, seed=0, heads=2, strided=True):
    """q with gaps, k_nope and v as slices of one projection, k_pe; and K in one piece. Rows of K and V past the last are NaN."""
    generator = torch.Generator().manual_seed(seed)
    keys = meta.num_kv_tokens + 3
    q = torch.randn(meta.num_tokens, heads, NOPE + ROPE + 8 * strided, generator=generator)[..., : NOPE + ROPE]
    expanded = torch.randn(keys, heads, NOPE + V, generator=generator)
    k_pe = torch.randn(keys, ROPE, generator=generator)
    expanded[meta.num_kv_tokens :] = k_pe[meta.num_kv_tokens :] = torch.nan
    q, expanded, k_pe = (x.to(dtype).to(meta.device) for x in (q, expanded, k_pe))
    k_nope, v = expanded[..., :NOPE], expanded[..., NOPE:]
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, heads, -1)], dim=-1)
    return q, k, v, k_nope, k_pe


def exact(q, k, v, meta):
    """Output and LSE in float64, and the output of torch's own attention in the inputs' dtype."""
    part = meta.partition
    out, own = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float64), q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for row, used in enumerate(part.seqused_k.tolist()):
        rows = slice(*part.cu_seqlens_q[row : row + 2].tolist())
        count = rows.stop - rows.start
        if count == 0 or used == 0:
            continue
        keys = slice(part.cu_seqlens_k[row], part.cu_seqlens_k[row] + used)
        scores = torch.einsum("nhd,mhd->hnm", q[rows].double(), k[keys].double()) * SCALE
        scores = scores.masked_fill(torch.ones_like(scores).triu(used - count + 1).bool(), -torch.inf)
        out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[keys].double())
        lse[rows] = scores.logsumexp(-1).T
        own[rows] = attend_row(q[rows], k[keys], v[keys], SCALE)
    return out, lse, own


def check(got, wanted):
    """At most twice the error of torch's own attention, and one rounding."""
    (got, got_lse), (out, lse, own) = got, wanted
    assert got.shape == out.shape
    assert got_lse.dtype == torch.float32
    assert not got.isnan().any()
    assert torch.equal(got_lse.isinf(), lse.isinf())
    assert not (got_lse[lse.isinf()] > 0).any()
    worst = (own - out).abs().max() if out.numel() else 0.0
    kind = torch.finfo(got.dtype)
    assert not ((got - out).abs() > 2 * worst + out.abs() * kind.eps / 2 + 1e-6).any()
    assert not ((got_lse - lse).abs() > 2e-5 * lse.abs().clamp(min=1))[lse.isfinite()].any()


def attend(q, k, v, meta, **options):
    """With freed memory full of NaN where the results may come to lie."""
    poison([(*q.shape[:2], v.shape[2])], q.dtype, q.device)
    poison([q.shape[:2]], torch.float32, q.device)
    return pcp_attention(q, k, v, meta, softmax_scale=SCALE, return_lse=True, **options)


def length_factor(device):
    return 23 if device == "cuda" else 1


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(device, backend, dtype, name):
    available(device, backend, dtype)
    for rank in (0, BATCHES[name][3] - 1):
        meta = meta_of(BATCHES[name], rank, device, length_factor(device))
        q, k, v, k_nope, k_pe = inputs(meta, dtype)
        got = attend(q, k_nope, v, meta, k_pe=k_pe, backend=backend) if rank else attend(q, k, v, meta, backend=backend)
        check(got, exact(q, k, v, meta))


@everywhere
@given(batches(max_requests=4, max_len=40, max_context=30))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, batch):
    available(device, backend)
    meta = PCPMetadata.build(**batch, device=device)
    q, k, v, k_nope, k_pe = inputs(meta, torch.bfloat16, strided=False)
    check(attend(q, k_nope, v, meta, k_pe=k_pe, backend=backend), exact(q, k, v, meta))


@ours
@pytest.mark.parametrize("order", ["random", "contiguous", "runs", "blocks", "broken", "repeated"])
@pytest.mark.parametrize("separate", [False, True])
def test_listed_rows(device, backend, order, separate):
    meta = meta_of(([9, 20], [110, 3], [True, True], 2), 0, device, length_factor(device))
    q, k, v, k_nope, k_pe = inputs(meta, torch.bfloat16, heads=1)
    count = meta.num_kv_tokens
    index = torch.arange(count)
    if order == "random":
        index = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    elif order == "runs":
        index = torch.cat(index.split(37)[::-1])
    elif order == "blocks":  # of a cache: whole tiles
        index = index.roll(64)
    elif order == "broken":  # runs first, then none
        index[count // 2 :] = index[count // 2 :].flip(0)
    elif order == "repeated":
        index = index // 2
    index = index.to(device)
    spread = [torch.full((count + 9, *x.shape[1:]), torch.nan, dtype=x.dtype, device=device) for x in (k, v, k_nope, k_pe)]
    for to, x in zip(spread, (k, v, k_nope, k_pe), strict=True):
        to[index + 9] = x[:count] if order != "repeated" else x[index]
    k, v = (x[9:][index] for x in spread[:2])
    rows = (index + 9).int()
    keys = {"k_pe": spread[3]} if separate else {}
    got = attend(q, spread[2] if separate else spread[0], spread[1], meta, kv_rows=rows, backend=backend, **keys)
    check(got, exact(q, k, v, meta))


@everywhere
@pytest.mark.parametrize("workspace", [40, 90])
def test_key_chunks_are_merged_in_place(device, backend, workspace):
    available(device, backend)
    planner = PCPPlanner(8, 4000, 2, 1, device=device)
    lengths, contexts = [21, 0, 1, 9], [67, 30, 55, 0]
    meta = planner.plan(lengths, contexts, [True, True, False, True], workspace_tokens=workspace)
    q, k, v, k_nope, k_pe = inputs(meta, torch.bfloat16)
    assert len(meta.key_chunks) > 2
    starts, part = meta.partition.cu_seqlens_kv.tolist(), meta.partition
    is_context = [torch.arange(starts[r + 1] - starts[r]) < contexts[r] for r in range(4)]
    cached = torch.cat(is_context).to(device)
    order = torch.cat([cached.nonzero()[:, 0], (~cached).nonzero()[:, 0]])  # all context, then all new tokens
    state = None
    for chunk in reversed(meta.key_chunks):
        rows = order[chunk.first_row : chunk.first_row + chunk.num_rows]
        options = {"chunk": chunk, "k_pe": k_pe[rows], "backend": backend}
        if state is None:
            state = attend(q, k_nope[rows], v[rows], meta, **options)
            state = (state[0].contiguous(), state[1])
            continue
        before = [x.clone() for x in state]
        got = attend(q, k_nope[rows], v[rows], meta, prev=state, out=state, **options)
        assert got[0] is state[0]
        assert got[1] is state[1]
        elsewhere = attend(q, k_nope[rows], v[rows], meta, prev=tuple(before), **options)
        assert torch.allclose(elsewhere[0], got[0], atol=2**-8)
        for row in (chunk.seqused_k == 0).nonzero()[:, 0].tolist():
            tokens = slice(*meta.cu_seqlens_q[row : row + 2].tolist())
            assert same_bits(got[0][tokens], before[0][tokens])
            assert same_bits(elsewhere[0][tokens], before[0][tokens])
    out, lse, own = exact(q, k, v, meta)
    assert part.num_tokens == len(out)
    rounded = out + 2**-(8) * len(meta.key_chunks) * out.abs()  # each merge rounds
    assert not ((state[0] - out).abs() > 2 * (own - out).abs().max() + (rounded - out).abs()).any()
    assert torch.equal(state[1].isinf(), lse.isinf())
    assert torch.allclose(state[1][lse.isfinite()].double(), lse[lse.isfinite()], rtol=2e-5, atol=2e-5)


@everywhere
def test_rows_without_keys_stay_in_place(device, backend):
    """They cost nothing: what is there is not even made 0, as an LSE of -inf would make it."""
    available(device, backend)
    meta = PCPPlanner(4, 400, 2, 0, device=device).plan([12, 12], [30, 30], [True, True], workspace_tokens=30)
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    out, lse = torch.full((len(q), 2, V), 7.0, dtype=q.dtype, device=device), torch.full((len(q), 2), -torch.inf, device=device)
    first, second, _ = meta.key_chunks
    assert first.seqused_k.tolist() == [30, 30, 0, 0]
    attend(q, k, v, meta, chunk=first, prev=(out, lse), out=(out, lse), backend=backend)
    begin = int(meta.cu_seqlens_q[2])
    alone = attend(q, k, v, meta, chunk=first, backend=backend)
    assert not alone[0][begin:].any()
    assert alone[1][begin:].eq(-torch.inf).all()
    assert out[begin:].eq(7).all()
    assert lse[begin:].isinf().all()
    wanted = out[:begin].clone()
    attend(q, k, v, meta, chunk=second, prev=(out, lse), out=(out, lse), backend=backend)
    assert torch.equal(out[:begin], wanted)
    assert not out[begin:].eq(7).any()


@ours
def test_prev_of_empty_rows_is_not_read(device, backend):
    meta = meta_of(BATCHES["one prompt"], 0, device)
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    wanted = attend(q, k, v, meta, backend=backend)
    for empty in (-torch.inf, torch.inf):
        prev = torch.full_like(wanted[0], torch.nan), torch.full_like(wanted[1], empty)
        got = attend(q, k, v, meta, prev=prev, backend=backend)
        assert torch.allclose(got[0], wanted[0], atol=2**-8)
        assert torch.allclose(got[1], wanted[1], rtol=1e-5)


@everywhere
@pytest.mark.parametrize("name", ["context", "edges", "decodes among prefills"])
def test_one_call_equals_gathers_and_two_calls(device, backend, name):
    available(device, backend)
    for rank in range(BATCHES[name][3]):
        meta = meta_of(BATCHES[name], rank, device, length_factor(device))
        q, k, v, *_ = inputs(meta, torch.bfloat16, heads=1)
        k, v = k[: meta.num_kv_tokens], v[: meta.num_kv_tokens]
        out, lse = attend(q, k, v, meta, backend=backend)
        other, other_lse = _by_two_calls(backend, q, k, v, meta, SCALE, True)
        assert torch.equal(out, other)
        assert torch.equal(lse, other_lse)


@everywhere
def test_given_results(device, backend):
    available(device, backend)
    meta = meta_of(BATCHES["context"], 1, device)
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    wanted = attend(q, k, v, meta, backend=backend)
    out = torch.full((len(q), 2, V + 8), torch.nan, dtype=q.dtype, device=device)[..., :V]
    lse = torch.full((2, len(q)), torch.nan, device=device).T
    got = attend(q, k, v, meta, out=(out, lse), backend=backend)
    assert got[0] is out
    assert got[1] is lse
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    out.fill_(torch.nan)
    assert pcp_attention(q, k, v, meta, softmax_scale=SCALE, out=out, backend=backend) is out
    assert torch.equal(pcp_attention(q, k, v, meta, softmax_scale=SCALE, backend=backend), out)
    if backend == "torch":  # has another way to an output without an LSE
        torch.testing.assert_close(out, wanted[0], rtol=2**-6, atol=2**-8)
    else:
        assert torch.equal(out, wanted[0])


@everywhere
def test_addresses_that_are_no_multiples_of_16(device, backend):
    available(device, backend)
    meta = meta_of(BATCHES["context"], 1, device)
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    wanted = attend(q, k, v, meta, backend=backend)

    def shifted(x):
        room = torch.zeros(x.numel() + 3 * len(x) + 1, dtype=x.dtype, device=device)
        return room[1:].as_strided(x.shape, (x.shape[1] * x.shape[2] + 3, x.shape[2], 1)).copy_(x)

    out = shifted(torch.zeros_like(wanted[0]))
    if backend == "cuda":  # does not reach them; auto takes Triton then
        with pytest.raises(NotImplementedError, match="a tensor q whose rows and heads are not at multiples of 16 bytes"):
            attend(shifted(q), shifted(k), shifted(v), meta, backend=backend)
        with pytest.raises(NotImplementedError, match="a tensor out whose rows"):
            attend(q, k, v, meta, backend=backend, out=(out, torch.zeros_like(wanted[1])))
        backend = "auto"
    for got in (
        attend(shifted(q), shifted(k), shifted(v), meta, backend=backend),
        attend(q, k, v, meta, backend=backend, out=(out, torch.zeros_like(wanted[1]))),
    ):
        torch.testing.assert_close(got[0], wanted[0], rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)


@ours
@pytest.mark.parametrize("padded", [False, True])
def test_pads_of_q_are_not_written(device, backend, padded):
    meta = meta_of(([7, 3], [0, 4], [True, True], 4), 3, device)
    assert meta.num_tokens < meta.num_tokens_padded
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    wanted = pcp_attention(q, k, v, meta, softmax_scale=SCALE, backend=backend)
    if padded:
        q = torch.cat([q, torch.full_like(q[:1], torch.nan).expand(meta.num_tokens_padded - len(q), -1, -1)])
    out = torch.full((len(q), 2, V), 7.0, dtype=q.dtype, device=device)
    pcp_attention(q, k, v, meta, softmax_scale=SCALE, out=out, backend=backend)
    assert torch.equal(out[: meta.num_tokens], wanted)
    assert out[meta.num_tokens :].eq(7).all()


@ours
@pytest.mark.parametrize(("width", "v_width"), [(16, 16), (24, 8), (80, 48), (5, 3), (192, 96)])
def test_other_widths(device, backend, width, v_width):
    available(device, backend, torch.half, (width, v_width))
    meta = meta_of(BATCHES["context"], 0, device)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(n, 1, d, generator=generator).half().to(device)
        for n, d in ((meta.num_tokens, width), (meta.num_kv_tokens, width), (meta.num_kv_tokens, v_width))
    )
    got = attend(q, k, v, meta, backend=backend)
    check(got, exact(q, k, v, meta))
    rope = width // 3
    if rope:  # any split gives the same
        k_pe = k[:, 0, width - rope :]
        check(attend(q, k[..., : width - rope], v, meta, k_pe=k_pe, backend=backend), exact(q, k, v, meta))


@pytest.mark.parametrize(("device", "backend"), [p for p in OURS if p.values[1] == "triton"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("change", [{"HEADS": 1}, {"QUERIES": 32}, {"KEYS": 32, "num_stages": 4}])
def test_kernel_configurations(device, backend, listed, change):
    """Others give the same, whatever the GPU's own choice is."""
    from pcp_mla.triton import attention as launch

    meta = meta_of(BATCHES["context"], 1, device, length_factor(device) * 2)
    q, _, v, k_nope, k_pe = inputs(meta, torch.bfloat16, strided=False)
    out, lse = (
        torch.full((len(q), 2, V), torch.nan, dtype=q.dtype, device=device),
        torch.full((len(q), 2), torch.nan, device=device),
    )
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else None
    config = launch.configuration(major, q.dtype, NOPE + ROPE + V) | change
    rows = torch.arange(meta.num_kv_tokens, dtype=torch.int32, device=device) if listed else None
    lengths = (meta.cu_seqlens_q, meta.cu_seqlens_k, meta.seqused_k)
    launch.attention(q, k_nope, v, k_pe, rows, *lengths, None, None, SCALE, True, out, lse, config)
    check((out, lse), exact(q, torch.cat([k_nope, k_pe[:, None].expand(-1, 2, -1)], dim=-1), v, meta))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float64(device):
    meta = meta_of(BATCHES["decodes among prefills"], 0, device)
    q, k, v, *_ = inputs(meta, torch.float64)
    out, lse, _ = exact(q, k, v, meta)
    got, got_lse = attend(q, k, v, meta, backend="torch")
    assert torch.allclose(got, out, rtol=1e-12, atol=1e-12)
    assert torch.allclose(got_lse.double(), lse, rtol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_and_compile(device):
    meta = meta_of(BATCHES["context"], 0, device)
    q, k, v, k_nope, k_pe = inputs(meta, torch.bfloat16)
    out, lse = torch.empty(len(q), 2, V, dtype=q.dtype, device=device), torch.empty(len(q), 2, device=device)
    lengths = (meta.cu_seqlens_q, meta.cu_seqlens_k, meta.seqused_k)
    prev = (torch.randn_like(out), torch.randn_like(lse))
    op = torch.ops.pcp_mla.attention.default
    torch.library.opcheck(op, (q, k, v, None, None, *lengths, None, None, SCALE, True, out, lse))
    rows = torch.arange(len(k), dtype=torch.int32, device=device)
    torch.library.opcheck(op, (q, k_nope, v, k_pe, rows, *lengths, *prev, SCALE, False, out, None))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k_nope, v, k_pe):
        out, lse = pcp_attention(q * 2, k_nope, v, meta, softmax_scale=SCALE, return_lse=True, k_pe=k_pe)
        return out * 4, lse * 4

    check([x / 4 for x in layer(q, k_nope, v, k_pe)], exact(q * 2, k, v, meta))


def test_a_named_backend_under_a_compiler():
    """On a CPU there is one op, whatever the name: nothing asks for addresses, which a compiler has not."""
    meta = meta_of(BATCHES["context"], 0, "cpu")
    q, k, v, _, _ = inputs(meta, torch.bfloat16)
    torch.compiler.reset()
    for name in ("cuda", "fa3", "triton"):
        compiled = torch.compile(lambda *x, name=name: attend(*x, meta, backend=name), fullgraph=True, backend="eager")
        check(compiled(q, k, v), exact(q, k, v, meta))


@everywhere
def test_many_requests(device, backend):
    """Of mixed lengths, with and without context, some of one token, some shorter than the ranks."""
    available(device, backend)
    count = 40 if device == "cuda" else 9
    lengths, contexts = [7 * i % 23 for i in range(1, count + 1)], [max(11 * i % 61 - 20, 0) for i in range(count)]
    for rank in (0, 3):
        meta = meta_of((lengths, contexts, [True] * count, 4), rank, device, length_factor(device))
        q, k, v, k_nope, k_pe = inputs(meta, torch.bfloat16)
        check(attend(q, k_nope, v, meta, k_pe=k_pe, backend=backend), exact(q, k, v, meta))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "fa3", "fa2"])
def test_graph_replay_with_other_lengths(backend):
    available("cuda", backend)
    planner = PCPPlanner(4, 4000, 2, 0, device="cuda")
    meta = planner.plan([1000, 300], [0, 500], [True, True])
    q, k, v, *_ = inputs(meta, torch.bfloat16)
    out = torch.empty(len(q), 2, V, dtype=q.dtype, device="cuda")
    lse = torch.empty(len(q), 2, device="cuda")
    attend(q, k, v, meta, out=(out, lse), backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        pcp_attention(q, k, v, meta, softmax_scale=SCALE, return_lse=True, out=(out, lse), backend=backend)
    meta = planner.plan([800, 500], [200, 300], [True, True])  # as many tokens in all
    assert meta.num_tokens == len(q)
    out.fill_(torch.nan)
    graph.replay()
    check((out, lse), exact(q, k, v, meta))


@pytest.mark.parametrize(
    ("device", "backend", "keys", "heads"),
    [
        pytest.param("cpu", "triton", 90, 2, id="cpu", marks=next(p.marks for p in OURS if p.id == "triton-interpreted")),
        pytest.param("cuda", "triton", 135168, 128, id="triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", 135168, 128, id="cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_offsets_past_two_to_the_31(device, backend, keys, heads, listed):
    """Of K and of V, where there is memory for it."""
    new = min(300, keys // 3)
    meta = PCPMetadata.build([new], [keys - new], [True], world_size=1, rank=0, device=device)
    q, k, v = (
        torch.randn(n, heads, width, device=device, dtype=torch.bfloat16)
        for n, width in ((new, NOPE + ROPE), (keys, NOPE + ROPE), (keys, V))
    )
    q *= 3  # few keys have most of the weight: the outputs are not all close to 0
    assert device == "cpu" or min(k.numel(), v.numel()) > 2**31
    rows = torch.arange(keys, device=device).flip(0).int() if listed else None
    out, lse = attend(q, k, v, meta, kv_rows=rows, backend=backend)
    for head in (slice(0, 1), slice(heads - 1, heads)):
        one_k, one_v = (x[:, head].flip(0) if listed else x[:, head].contiguous() for x in (k, v))
        check((out[:, head], lse[:, head]), exact(q[:, head], one_k, one_v, meta))
