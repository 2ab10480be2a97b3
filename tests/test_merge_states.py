"""Merges by log-sum-exp, on every backend, against the formula in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import EVERYWHERE, half_ulp, poison, same_bits
from pcp_mla.ops.merge_states import RowOp, cp_correct_out, merge_attn_states, merge_n_attn_states

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
everywhere = pytest.mark.parametrize(("device", "backend"), EVERYWHERE)


def is_interpreted(device, backend):
    return (device, backend) == ("cpu", "triton")


def partial(tokens, heads, dim, dtype, device, seed, wider=0, offset=0.0):
    """An output, cut out of ``wider`` rows, and its LSE, a transposed one if so."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(tokens, heads, dim + wider, generator=generator).to(device, dtype)[..., :dim]
    lse = torch.randn(heads, tokens, generator=generator).to(device).T * 3 + offset
    return out, lse if wider else lse.contiguous()


def empties(out, lse, seed, chances=(0.15, 0.1, 0.03)):
    """-inf, +inf and NaN among the LSEs, and NaN in the outputs of the empty ones."""
    draw = torch.rand(lse.shape, generator=torch.Generator().manual_seed(seed)).to(lse.device)
    for value, chance in zip((-math.inf, math.inf, math.nan), chances, strict=True):
        lse[draw < chance] = value
        draw = torch.where(draw < chance, 1, draw - chance)
    out[lse.isinf()] = math.nan


def exact(outs, lses, base="e"):
    """The merged output and LSE in float64, and what float32 may change of each number before it is rounded.

    That is a share of the sizes of the terms: an ulp for each partial summed, for a handful of operations, and for each unit of an
    LSE, as exp takes them to the power of e.
    """
    scores = torch.stack(list(lses)).double()
    scores = scores.masked_fill(scores.isinf(), -math.inf) * (math.log(2) if base == "2" else 1)
    lse = scores.logsumexp(0)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)).exp()[..., None]
    terms = (weights * torch.stack(list(outs)).double()).masked_fill(weights == 0, 0)
    largest = scores.masked_fill(scores == -math.inf, 0).abs().amax(0)[..., None]
    change = terms.abs().sum(0) * (8 + len(scores) + 2 * largest) * 2**-23
    return terms.sum(0), lse / (math.log(2) if base == "2" else 1), change


def check(got, got_lse, outs, lses, base="e"):
    """Summed in float32 and rounded once."""
    wanted, lse, change = exact(outs, lses, base)
    for a, b in ((got, wanted), (got_lse, lse)):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
    assert not ((got - wanted).abs() > half_ulp(wanted, got.dtype) + change).any()
    assert torch.equal(got_lse.sign()[lse.isinf()], lse.sign()[lse.isinf()].float())
    assert not ((got_lse - lse).abs() > 1e-5 * lse.abs().clamp(min=1))[lse.isfinite()].any()


def merge(out_a, lse_a, out_b, lse_b, **options):
    """With freed memory full of NaN where the results may come to lie."""
    poison([out_a.shape], out_a.dtype, out_a.device)
    poison([lse_a.shape], lse_a.dtype, lse_a.device)
    return merge_attn_states(out_a, lse_a, out_b, lse_b, **options)


def pair(device, tokens=5, heads=3, dim=16, dtype=torch.bfloat16):
    a = partial(tokens, heads, dim, dtype, device, 1, wider=8)
    return *a, *partial(tokens, heads, dim, dtype, device, 2)


@everywhere
@given(
    st.integers(0, 40),
    st.sampled_from([1, 3, 16, 130, 256]),
    st.sampled_from([64, 80, 96, 128, 192, 512, 576, 5, 1]),
    st.sampled_from(DTYPES),
    st.sampled_from("e2"),
    st.sampled_from([0.0, 50.0, -300.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_shapes(device, backend, tokens, heads, dim, dtype, base, offset, seed):
    if is_interpreted(device, backend):
        tokens, heads = tokens % 4, min(heads, 16)
    out_a, lse_a = partial(tokens, heads, dim, dtype, device, seed, wider=64, offset=offset)
    out_b, lse_b = partial(tokens, heads, dim, dtype, device, seed + 1, offset=offset)
    empties(out_a, lse_a, seed + 2)
    empties(out_b, lse_b, seed + 3)
    got, lse = merge(out_a, lse_a, out_b, lse_b, lse_base=base, backend=backend)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert lse.is_contiguous()
    check(got, lse, [out_a, out_b], [lse_a, lse_b], base)


@everywhere
@pytest.mark.parametrize("infinities", [(-math.inf, -math.inf), (math.inf, -math.inf), (math.inf, math.inf)])
def test_both_empty_gives_zeros_and_minus_infinity(device, backend, infinities):
    out_a, lse_a, out_b, lse_b = pair(device)
    for x, value in zip((lse_a, lse_b), infinities, strict=True):
        x.fill_(value)
    got, lse = merge(out_a.fill_(math.nan), lse_a, out_b, lse_b, backend=backend)
    assert torch.equal(got, torch.zeros_like(got))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


@everywhere
@pytest.mark.parametrize("empty", [-math.inf, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_an_empty_partial_full_of_nan_is_not_read(device, backend, empty, side):
    inputs = pair(device)
    inputs[2 * side].fill_(math.nan)
    inputs[2 * side + 1].fill_(empty)
    got, lse = merge(*inputs, backend=backend)
    assert same_bits(got, inputs[2 - 2 * side])
    assert torch.allclose(lse, inputs[3 - 2 * side], rtol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_copied_rows_keep_their_bits(device, backend, dtype):
    """-0 too, whether the other partial is left out, empty or of no weight."""
    out_a, lse_a, out_b, lse_b = pair(device, 4, dtype=dtype)
    out_a[..., ::3] = -0.0
    lse_a[:], lse_b[0], lse_b[1:3], lse_b[3] = 1.0, 1.0, -math.inf, -1e4
    row_op = torch.tensor([1, 1, 3, 3], dtype=torch.int32, device=device)
    got = torch.full_like(out_a, math.nan)
    merge(out_a, lse_a, out_b, lse_b, out=got, row_op=row_op, backend=backend)
    assert same_bits(got, out_a)
    assert same_bits(merge(out_a, lse_a, out_b, lse_b, backend=backend)[0][1:], out_a[1:])
    row_op = torch.tensor([2, 2, 3, 3], dtype=torch.int32, device=device)
    merge(out_b, lse_b, out_a, lse_a, out=got, row_op=row_op, backend=backend)
    assert same_bits(got, out_a)
    nothing = merge(out_a, lse_b.fill_(-math.inf), out_b, lse_b, backend=backend)[0]
    assert same_bits(nothing, torch.zeros_like(nothing))


@everywhere
def test_nan_lse_gives_nan_in_its_row_and_head_only(device, backend):
    out_a, lse_a, out_b, lse_b = pair(device)
    lse_b[2, 1] = math.nan
    got, lse = merge(out_a, lse_a, out_b, lse_b, backend=backend)
    assert got[2, 1].isnan().all()
    assert got.isnan().sum() == 16
    assert lse.isnan().nonzero().tolist() == [[2, 1]]


@everywhere
def test_the_base_of_the_lse_matters(device, backend):
    inputs = pair(device, dtype=torch.float32)
    in_e, lse_e = merge(*inputs, backend=backend)
    in_2, lse_2 = merge(*inputs, lse_base="2", backend=backend)
    check(in_2, lse_2, inputs[::2], inputs[1::2], "2")
    assert (in_e - in_2).abs().max() > 0.1
    assert (lse_e - lse_2).abs().max() > 0.1


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_256_heads(device, backend, dtype):
    inputs = pair(device, 2, 256, 24, dtype)
    check(*merge(*inputs, backend=backend), inputs[::2], inputs[1::2])


@everywhere
def test_padded_values_and_transposed_lse_give_the_bits_of_gapless_ones(device, backend):
    out_a, lse_a = partial(4, 3, 128, torch.bfloat16, device, 1, wider=64)
    out_b, lse_b = partial(4, 3, 128, torch.bfloat16, device, 2, wider=64)
    assert out_a.stride() == (3 * 192, 192, 1)
    assert lse_a.stride() == (1, 4)
    got = merge(out_a, lse_a, out_b, lse_b, backend=backend)
    gapless = merge(*(x.contiguous() for x in (out_a, lse_a, out_b, lse_b)), backend=backend)
    assert same_bits(got[0], gapless[0])
    assert same_bits(got[1], gapless[1])


@everywhere
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits(device, backend, side, dtype):
    inputs = pair(device, 3 if is_interpreted(device, backend) else 300, 17, 40, dtype)
    wanted = merge(*inputs, backend=backend)
    out, lse = inputs[2 * side : 2 * side + 2]
    got = merge(*inputs, out=out, lse_out=lse, backend=backend)
    assert got[0] is out
    assert got[1] is lse
    assert same_bits(out, wanted[0])
    assert same_bits(lse, wanted[1])


def given_results(rows, heads, dim, dtype, device):
    """Full of 0xFF, a NaN in every type."""
    shapes = (rows, heads, dim * dtype.itemsize), (rows, heads * 4)
    out, lse = (torch.full(shape, 255, dtype=torch.uint8, device=device) for shape in shapes)
    return out.view(dtype), lse.view(torch.float32)


def check_row_ops(ops, got, lse, old, old_lse, inputs, merged):
    ops = torch.tensor(ops)
    out_a, lse_a, out_b, lse_b = inputs
    for op, out, state in ((0, old, old_lse), (1, out_a, lse_a), (2, out_b, lse_b), (3, *merged)):
        assert same_bits(got[ops == op], out[ops == op])
        assert torch.allclose(lse[ops == op], state[ops == op], rtol=1e-6, equal_nan=True)
    assert same_bits(lse[ops == 0], old_lse[ops == 0])


@everywhere
@pytest.mark.parametrize("base", ["e", "2"])
def test_row_ops(device, backend, base):
    ops = [3, RowOp.SKIP, RowOp.COPY_A, RowOp.COPY_B, RowOp.MERGE, 1, 0, 2]
    inputs = pair(device, len(ops))
    merged = merge(*inputs, lse_base=base, backend=backend)
    for other, copied in ((0, 2), (2, 1)):  # the side that a copy leaves out is NaN, with a finite LSE
        inputs[other][torch.tensor(ops) == copied] = math.nan
    old = given_results(len(ops), 3, 16, torch.bfloat16, device)
    got, lse = (x.clone() for x in old)
    row_op = torch.tensor(ops, dtype=torch.int32, device=device)
    merge(*inputs, out=got, lse_out=lse, row_op=row_op, lse_base=base, backend=backend)
    check_row_ops(ops, got, lse, *old, inputs, merged)


@everywhere
@pytest.mark.parametrize("lengths", [[2, 0, 3, 1, 0, 2], [1], [0, 0], [], [4, 4]])
def test_row_ops_of_requests(device, backend, lengths):
    request_ops = [3, 1, 0, 2, 1, 1][: len(lengths)]
    ops = [op for op, length in zip(request_ops, lengths, strict=True) for _ in range(length)]
    ops += [0] * (9 - len(ops))  # rows behind the last request
    inputs = pair(device, 9)
    merged = merge(*inputs, backend=backend)
    old = given_results(9, 3, 16, torch.bfloat16, device)
    got, lse = (x.clone() for x in old)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    row_op = torch.tensor(request_ops, dtype=torch.int32, device=device)
    merge(*inputs, out=got, lse_out=lse, row_op=row_op, cu_seqlens=starts, backend=backend)
    check_row_ops(ops, got, lse, *old, inputs, merged)


@everywhere
def test_rows_go_where_out_rows_says(device, backend):
    places = [4, -1, 0, 7, 2, 8, 2**31 - 1, -(2**31)]
    inputs = pair(device, len(places))
    merged = merge(
        *inputs, out=torch.empty_like(inputs[2], dtype=torch.float32), lse_out=torch.empty_like(inputs[3]), backend=backend
    )
    wanted = given_results(9, 3, 16, torch.float32, device)
    got = [x.clone() for x in wanted]
    for row, place in enumerate(places):
        if 0 <= place < 8:  # the results end before the last row
            wanted[0][place], wanted[1][place] = merged[0][row], merged[1][row]
    out_rows = torch.tensor(places, dtype=torch.int32, device=device)
    merge(*inputs, out=got[0][:8], lse_out=got[1][:8], out_rows=out_rows, backend=backend)
    assert same_bits(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_output_is_the_rounded_float32_output(device, backend, dtype):
    if (device, backend) == ("cuda", "triton") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    inputs = pair(device, dtype=dtype)
    exact_out = torch.full_like(inputs[2], math.nan, dtype=torch.float32)
    merge(*inputs, out=exact_out, backend=backend)
    scale = torch.tensor([0.003], device=device)
    quotient = exact_out / scale
    assert (quotient.abs() > 464).any()  # some releases of torch round these to NaN
    wanted = quotient.clamp(-448, 448).to(torch.float8_e4m3fn)
    given_out = torch.full_like(wanted, math.nan, dtype=torch.float32).to(torch.float8_e4m3fn)
    merge(*inputs, out=given_out, scale=scale, backend=backend)
    for got in (merge(*inputs, scale=scale, backend=backend)[0], given_out):
        assert same_bits(got, wanted)


@everywhere
def test_one_number_of_float8(device, backend):
    if (device, backend) == ("cuda", "triton") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    x, lse = torch.ones(1, 1, 1, device=device), torch.zeros(1, 1, device=device)
    out, _ = merge(x, lse, x, lse, scale=torch.tensor(0.5, device=device), backend=backend)
    assert out.float().tolist() == [[[2.0]]]


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_output(device, backend, dtype):
    inputs = pair(device, dtype=dtype)
    out, lse = given_results(5, 3, 16, torch.float32, device)
    merge(*inputs, out=out, lse_out=lse, backend=backend)
    check(out, lse, inputs[::2], inputs[1::2])


@everywhere
def test_strides_of_a_single_row_and_head_do_not_matter(device, backend):
    inputs = pair(device, 1, 1)
    wanted = merge(*inputs, backend=backend)
    far = [x.contiguous().as_strided(x.shape, (2**40, 2**35, *x.stride()[2:])) for x in inputs]
    got = merge(*far, out=far[0], lse_out=far[1], backend=backend)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@everywhere
def test_no_rows(device, backend):
    inputs = pair(device, 0)
    row_op = torch.zeros(0, dtype=torch.int32, device=device)
    assert merge(*inputs, backend=backend)[0].shape == (0, 3, 16)
    assert merge(*inputs, out=inputs[0], row_op=row_op, backend=backend)[0] is inputs[0]
    out, lse = given_results(5, 3, 16, torch.bfloat16, device)  # rows of which none is written
    before = out.clone()
    for options in ({}, {"row_op": row_op}, {"row_op": row_op, "cu_seqlens": torch.zeros(1, dtype=torch.int32, device=device)}):
        assert merge(*inputs, out=out, lse_out=lse, out_rows=row_op, **options, backend=backend)[0] is out
    assert same_bits(out, before)
    none = torch.zeros(1, 0, dtype=torch.int32, device=device)
    assert cp_correct_out(inputs[0], inputs[1][None], 0, seqused_k=none, backend=backend)[0].shape == (0, 3, 16)
    assert merge_n_attn_states(inputs[::2], inputs[1::2], backend=backend)[1].shape == (0, 3)
    assert cp_correct_out(inputs[0], inputs[1][None], 0, backend=backend)[0].shape == (0, 3, 16)
