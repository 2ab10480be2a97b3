"""pcp_fused_restore: bit-equal to concatenation and index_select, on every backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import DTYPES, IMPLEMENTATIONS, as_bytes, batches, poison, random_bytes, same_bits
from pcp_mla import PCPMetadata, pcp_fused_gather, pcp_fused_restore


def inputs(meta, dtype, device, seed, heads=3, dim=16):
    """Outputs of two calls: the heads' gapless, the tails' cut out of wider rows (as a backend with padded V leaves them); the
    heads' LSE [H, tokens] transposed as FlashAttention returns it, the tails' [tokens, H]."""
    generator = torch.Generator().manual_seed(seed)
    out_head = random_bytes((meta.num_head_tokens, heads, dim), dtype, device, generator)
    out_tail = random_bytes((meta.num_tail_tokens, heads, dim + 8), dtype, device, generator)[..., :dim]
    lse_head = random_bytes((heads, meta.num_head_tokens), torch.float32, device, generator).T
    lse_tail = random_bytes((meta.num_tail_tokens, heads), torch.float32, device, generator)
    return out_head, out_tail, lse_head, lse_tail


def check(meta, backend, out_head, out_tail, lse_head, lse_tail):
    index = meta.output_restore_idx
    out = torch.cat([as_bytes(out_head), as_bytes(out_tail)])[index].view(out_head.dtype).unflatten(1, out_head.shape[1:])
    lse = torch.cat([lse_head, lse_tail])[index]
    poison([out.shape], out.dtype, out.device)
    poison([lse.shape], lse.dtype, lse.device)
    got, got_lse = pcp_fused_restore(out_head, out_tail, lse_head, lse_tail, meta, backend=backend)
    assert same_bits(got, out)
    assert same_bits(got_lse, lse)
    assert got.is_contiguous()
    assert got_lse.is_contiguous()
    poison([out.shape], out.dtype, out.device)
    got, got_lse = pcp_fused_restore(out_head, out_tail, None, None, meta, backend=backend)
    assert same_bits(got, out)
    assert got_lse is None
    generator = torch.Generator().manual_seed(9)
    given = (random_bytes(out.shape, out.dtype, out.device, generator), random_bytes(lse.shape, lse.dtype, lse.device, generator))
    assert pcp_fused_restore(out_head, out_tail, lse_head, lse_tail, meta, out=given, backend=backend) is given
    assert same_bits(given[0], out)
    assert same_bits(given[1], lse)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
@given(batches(), st.sampled_from(DTYPES), st.sampled_from([16, 5, 1]), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, batch, dtype, dim, seed):
    meta = PCPMetadata.build(**batch, device=device)
    check(meta, backend, *inputs(meta, dtype, meta.device, seed, dim=dim))


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [1, 16, 130])
def test_mla_widths(device, backend, heads):
    lengths = [20, 3, 9] if (device, backend) == ("cpu", "triton") else [300, 3, 90]
    meta = PCPMetadata.build(lengths, [0, 40, 5], world_size=2, rank=1, device=device)
    check(meta, backend, *inputs(meta, torch.bfloat16, meta.device, 1, heads, 128))


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_gather_then_restore_is_the_identity(device, backend):
    meta = PCPMetadata.build([65, 1, 7, 0], [3, 9, 0, 2], [True, False, True, True], world_size=3, rank=2, device=device)
    q = torch.randn(meta.num_tokens, 2, 24, device=device)
    keys = torch.randn(meta.num_kv_tokens, 2, 24, device=device)
    rows = pcp_fused_gather(q, keys, keys, meta, backend=backend)
    assert torch.equal(pcp_fused_restore(rows.q_head, rows.q_tail, None, None, meta, backend=backend)[0], q)


@pytest.fixture
def good():
    meta = PCPMetadata.build([9, 4], world_size=2, rank=0)
    names = ("out_head", "out_tail", "lse_head", "lse_tail")
    return {**dict(zip(names, inputs(meta, torch.bfloat16, meta.device, 0), strict=True)), "meta": meta}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: {"out_head": g["out_head"][0]}, ValueError, "out_head must have 3 dimensions .* got 2"),
        (lambda g: {"out_tail": g["out_tail"].half()}, TypeError, "out_tail must have dtype bfloat16 .* got float16"),
        (lambda g: {"out_tail": g["out_tail"][:, :2]}, ValueError, r"out_tail must have the heads and width .* got \(2, 16\)"),
        (lambda g: {"out_tail": g["out_tail"].transpose(1, 2)}, ValueError, "out_tail must have a contiguous last dimension"),
        (lambda g: {"out_head": g["out_head"][1:]}, ValueError, "out_head must have the 4 rows of the metadata, got 3"),
        (lambda g: {"out_tail": g["out_tail"].to("meta")}, ValueError, "out_tail must be on cpu.* got meta"),
        (
            lambda g: {"out_tail": g["out_tail"].clone().requires_grad_()},
            NotImplementedError,
            "out_tail must not require gradients",
        ),
        (lambda g: {"lse_head": None}, ValueError, "must both be given or both be None"),
        (lambda g: {"lse_tail": g["lse_tail"].double()}, TypeError, "lse_tail must be float32, got float64"),
        (
            lambda g: {"lse_head": g["lse_head"].T},
            ValueError,
            r"lse_head must have shape \[tokens, heads\] = \(4, 3\), got \(3, 4\)",
        ),
        (lambda g: {"lse_tail": g["lse_tail"].to("meta")}, ValueError, "lse_tail must be on cpu, got meta"),
        (lambda g: {"lse_head": 1.0}, TypeError, "lse_head must be a torch.Tensor, got float"),
        (lambda g: {"meta": "rank 0"}, TypeError, "meta must be a PCPMetadata, got str"),
    ],
)
def test_bad_arguments(good, change, error, words):
    pcp_fused_restore(**good)
    with pytest.raises(error, match=words):
        pcp_fused_restore(**{**good, **change(good)})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda out, lse: (out[1:], lse), ValueError, r"out\[0\] must have shape \(5, 3, 16\), got \(4, 3, 16\)"),
        (lambda out, lse: (out.float(), lse), TypeError, r"out\[0\] must have dtype bfloat16, got float32"),
        (lambda out, lse: (out, lse.T.contiguous().T), ValueError, r"out\[1\] must be contiguous, got strides"),
        (lambda out, lse: (out, lse.double()), TypeError, r"out\[1\] must have dtype float32, got float64"),
        (lambda out, lse: (out, None), TypeError, "out must be a pair"),
        (lambda out, lse: out, TypeError, "out must be a pair"),
    ],
)
def test_bad_outputs_are_not_touched(good, change, error, words):
    out, lse = pcp_fused_restore(**good)
    out.zero_()
    lse.zero_()
    with pytest.raises(error, match=words):
        pcp_fused_restore(**good, out=change(out, lse))
    assert not out.any()
    assert not lse.any()


def test_the_native_op_refuses_a_wrong_table(good):
    meta = good["meta"]
    tensors = [good[name] for name in ("out_head", "out_tail", "lse_head", "lse_tail")]
    wrong = meta.row_table.clone()
    wrong[0, 1] -= 100
    with pytest.raises(RuntimeError, match="row_table must hold queries of heads that rise from 0 to at most 4"):
        torch.ops.pcp_mla.fused_restore(*tensors, wrong)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    meta = PCPMetadata.build([9, 4], world_size=2, rank=0, device=device)
    out_head, out_tail = (torch.randn(n, 3, 16, device=device) for n in (meta.num_head_tokens, meta.num_tail_tokens))
    lse_head, lse_tail = (torch.randn(3, n, device=device).T for n in (meta.num_head_tokens, meta.num_tail_tokens))
    for lses in ((lse_head, lse_tail), (None, None)):
        inputs_ = (out_head, out_tail, *lses, meta.row_table)
        torch.library.opcheck(torch.ops.pcp_mla.fused_restore.default, inputs_)
        out = pcp_fused_restore(out_head, out_tail, *lses, meta)
        torch.library.opcheck(torch.ops.pcp_mla.fused_restore_out.default, (*inputs_, *out))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(q, keys, meta):
        rows = pcp_fused_gather(q * 2, keys, keys, meta)
        return pcp_fused_restore(rows.q_head, rows.q_tail, None, None, meta)[0]

    for lengths in ([9, 4], [30, 2], [5, 5, 70]):
        meta = PCPMetadata.build(lengths, world_size=2, rank=1, device=device)
        q = torch.randn(meta.num_tokens, 2, 24, device=device)
        keys = torch.randn(meta.num_kv_tokens, 2, 24, device=device)
        assert torch.equal(there_and_back(q, keys, meta), q * 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_with_given_outputs(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(q, keys, meta, rows, out):
        pcp_fused_gather(q * 2, keys, keys, meta, out=rows)
        return pcp_fused_restore(rows.q_head, rows.q_tail, None, None, meta, out=(out, None))[0] + 1

    meta = PCPMetadata.build([9, 4], world_size=2, rank=1, device=device)
    q = torch.randn(meta.num_tokens, 2, 24, device=device)
    keys = torch.randn(meta.num_kv_tokens, 2, 24, device=device)
    rows, out = pcp_fused_gather(q, keys, keys, meta), torch.empty_like(q)
    assert torch.equal(there_and_back(q, keys, meta, rows, out), q * 2 + 1)
    assert torch.equal(out, q * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replay_on_a_side_stream_with_another_batch(backend):
    first = PCPMetadata.build([40, 24], world_size=2, rank=0, device="cuda")
    second = PCPMetadata.build([24, 40], world_size=2, rank=0, device="cuda")
    static = inputs(first, torch.bfloat16, first.device, 1)
    pcp_fused_restore(*static, first, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        got, got_lse = pcp_fused_restore(*static, first, backend=backend)
    fresh = inputs(second, torch.bfloat16, first.device, 2)
    for a, b in zip(static, fresh, strict=True):
        a.copy_(b)
    wanted = pcp_fused_restore(*fresh, second, backend="reference")
    first.row_table.copy_(second.row_table)
    graph.replay()
    assert same_bits(got, wanted[0])
    assert same_bits(got_lse, wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31(backend):
    tokens, heads, dim = 88_000, 128, 192
    meta = PCPMetadata.build([tokens], world_size=1, rank=0, device="cuda")
    out = torch.randint(-(2**15), 2**15, (tokens, heads, dim), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    assert out.numel() > 2**31
    cut = meta.num_head_tokens
    got, _ = pcp_fused_restore(out[:cut], out[cut:], None, None, meta, backend=backend)
    assert torch.equal(got.view(torch.int16), out.view(torch.int16))
