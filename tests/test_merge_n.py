"""Merges of N partials, and one rank's share of a context-parallel merge, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import poison, same_bits
from pcp_mla.ops.merge_states import cp_correct_out, merge_attn_states, merge_n_attn_states
from test_merge_states import DTYPES, check, empties, everywhere, is_interpreted, partial


def partials(count, tokens, heads, dim, dtype, device, seed=1):
    """Every second one cut out of wider rows with a transposed LSE."""
    pairs = [partial(tokens, heads, dim, dtype, device, seed + n, wider=8 * (n % 2)) for n in range(count)]
    for n, (out, lse) in enumerate(pairs):
        empties(out, lse, seed + n, (0.2, 0.1, 0.0))
    return [out for out, _ in pairs], [lse for _, lse in pairs]


def merge_n(outs, lses, **options):
    poison([outs[0].shape], outs[0].dtype, outs[0].device)
    poison([lses[0].shape], lses[0].dtype, lses[0].device)
    return merge_n_attn_states(outs, lses, **options)


def correct(out, lses, rank, **options):
    poison([out.shape], torch.float32, out.device)
    poison([lses[0].shape], torch.float32, out.device)
    return cp_correct_out(out, lses, rank, **options)


@everywhere
@given(
    st.integers(1, 64),
    st.integers(0, 20),
    st.sampled_from([1, 3, 16, 130]),
    st.sampled_from([64, 128, 192, 5, 1]),
    st.sampled_from(DTYPES),
    st.sampled_from("e2"),
    st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_shapes(device, backend, count, tokens, heads, dim, dtype, base, seed):
    if is_interpreted(device, backend):
        count, tokens, heads = count % 9 + 1, tokens % 3, min(heads, 16)
    outs, lses = partials(count, tokens, heads, dim, dtype, device, seed)
    got, lse = merge_n(outs, lses, lse_base=base, backend=backend)
    check(got, lse, outs, lses, base)
    stacked = merge_n(torch.stack(outs), torch.stack(lses), lse_base=base, backend=backend)
    assert same_bits(got, stacked[0])
    assert same_bits(lse, stacked[1])


@everywhere
@pytest.mark.parametrize("count", [1, 2, 3, 8, 32])
def test_equals_the_fold_of_twos(device, backend, count):
    outs, lses = partials(count, 3, 5, 16, torch.float32, device)
    out, lse = merge_n(outs, lses, backend=backend)
    fold, fold_lse = merge_attn_states(outs[0], lses[0], outs[0], torch.full_like(lses[0], -math.inf), backend=backend)
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        fold, fold_lse = merge_attn_states(fold, fold_lse, other, other_lse, backend=backend)
    torch.testing.assert_close(out, fold, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, fold_lse, rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_in_place_gives_the_same_bits(device, backend, stacked, place):
    outs, lses = partials(3, 3 if is_interpreted(device, backend) else 300, 17, 40, torch.bfloat16, device)
    if stacked:
        outs, lses = torch.stack(outs), torch.stack(lses)
    out, lse = merge_n(outs, lses, backend=backend)
    merge_n(outs, lses, out=outs[place], lse_out=lses[place], backend=backend)
    assert same_bits(outs[place], out)
    assert same_bits(lses[place], lse)


@everywhere
def test_strided_stack(device, backend):
    """Partials between the rows of each other."""
    outs, lses = partials(4, 3, 5, 16, torch.bfloat16, device)
    got = merge_n(torch.stack(outs, 1).transpose(0, 1), torch.stack(lses, 2).permute(2, 0, 1), backend=backend)
    wanted = merge_n(outs, lses, backend=backend)
    assert same_bits(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])


@everywhere
@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("base", ["e", "2"])
def test_corrected_outputs_add_up_to_the_merge(device, backend, world, base):
    outs, lses = partials(world, 3, 5, 16, torch.bfloat16, device)
    merged, lse = merge_n([x.float() for x in outs], lses, lse_base=base, backend=backend)
    shares = [correct(out, torch.stack(lses), rank, lse_base=base, backend=backend) for rank, out in enumerate(outs)]
    torch.testing.assert_close(sum(share for share, _ in shares), merged, rtol=1e-5, atol=1e-6)
    for share, share_lse in shares:
        assert share.dtype == torch.float32
        assert torch.allclose(share_lse, lse, rtol=1e-6, atol=1e-6)


@everywhere
def test_correction_in_place(device, backend):
    outs, lses = partials(3, 4, 5, 16, torch.bfloat16, device)
    shared = torch.stack(lses)
    wanted, lse = correct(outs[1], shared, 1, corrected=torch.empty_like(outs[1]), backend=backend)
    got, got_lse = correct(outs[1], shared, 1, corrected=outs[1], lse_out=shared[0], backend=backend)
    assert got is outs[1]
    assert same_bits(got, wanted)
    assert same_bits(got_lse, lse)


@everywhere
def test_a_rank_without_keys_is_empty_whatever_its_lse(device, backend):
    outs, lses = (torch.stack(x) for x in partials(3, 4, 5, 16, torch.bfloat16, device))
    used = torch.tensor([[3, 0, 0, 1], [0, 0, 9, 1], [2, 1, 0, 7]], dtype=torch.int32, device=device)
    outs[used == 0], lses[used == 0] = math.nan, 4.0
    lses[0, 1, 2] = math.nan
    masked = lses.masked_fill(used[..., None] == 0, -math.inf)
    for rank in range(3):
        wanted = correct(outs[rank], masked, rank, backend=backend)
        got = correct(outs[rank], lses, rank, seqused_k=used, backend=backend)
        assert not got[0].isnan().any()
        assert same_bits(got[0], wanted[0])
        assert same_bits(got[1], wanted[1])


@everywhere
@pytest.mark.parametrize(("shares", "lse_shares"), [(1, 1), (2, 2), (6, 3), (None, 2), (3, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_in_shares(device, backend, shares, lse_shares, dtype):
    outs, lses = partials(2, 4, 6, 16, torch.bfloat16, device)
    wanted = correct(outs[1], torch.stack(lses), 1, corrected=torch.empty_like(outs[1], dtype=dtype), backend=backend)

    def cut(x, count):
        return x if count is None else torch.stack(x.chunk(count, 1))

    cuts = cut(wanted[0], shares), cut(wanted[1], lse_shares)
    results = [torch.full_like(x, math.nan) for x in cuts]
    correct(outs[1], torch.stack(lses), 1, corrected=results[0], lse_out=results[1], backend=backend)
    assert same_bits(results[0], cuts[0])
    assert same_bits(results[1], cuts[1])


@everywhere
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_result(device, backend, stacked, dtype):
    """Three partials in float32, which no rounding to their own dtype comes before."""
    outs, lses = partials(3, 3 if is_interpreted(device, backend) else 40, 17, 40, dtype, device)
    if stacked:
        outs, lses = torch.stack(outs), torch.stack(lses)
    out = torch.full(outs[0].shape, math.nan, device=device)
    got, lse = merge_n(outs, lses, out=out, lse_out=torch.empty_like(lses[0]), backend=backend)
    assert got is out
    check(out, lse, outs, lses)


@everywhere
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_result(device, backend, stacked, dtype):
    """Three partials divided by the scale, saturated and rounded once."""
    if (device, backend) == ("cuda", "triton") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    outs, lses = partials(3, 3 if is_interpreted(device, backend) else 40, 17, 40, dtype, device)
    if stacked:
        outs, lses = torch.stack(outs), torch.stack(lses)
    whole, scale = torch.empty(outs[0].shape, device=device), torch.tensor([0.003], device=device)
    merge_n(outs, lses, out=whole, backend=backend)
    assert (whole / scale).abs().max() > 464
    wanted = (whole / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    given_out = torch.full_like(whole, math.nan).to(torch.float8_e4m3fn)
    merge_n(outs, lses, out=given_out, scale=scale, backend=backend)
    for got in (merge_n(outs, lses, scale=scale, backend=backend)[0], given_out):
        assert same_bits(got, wanted)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_alone_counts_keeps_its_bits(device, backend, dtype, count):
    """-0 too; where nothing counts there is 0, not -0."""
    outs, lses = (torch.stack(x) for x in partials(count, 3, 2, 16, dtype, device))
    outs[:, :, :, ::2] = -0.0
    outs[-1].nan_to_num_(1.0)
    lses[:] = -math.inf
    lses[count - 1, 1:] = 2.0
    outs[:-1] = math.nan
    for results in ({}, {"out": torch.ones_like(outs[0])}):
        out, _ = merge_n(outs, lses, **results, backend=backend)
        assert same_bits(out[1:], outs[-1][1:])
        assert same_bits(out[:1], torch.zeros_like(out[:1]))
    corrected, _ = correct(outs[-1], lses, count - 1, corrected=torch.ones_like(outs[-1]), backend=backend)
    assert same_bits(corrected[1:], outs[-1][1:])
    assert same_bits(corrected[:1], torch.zeros_like(corrected[:1]))
