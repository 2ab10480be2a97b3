"""Merges of every input and result dtype, in rows that can be read 16 bytes at a time and in rows that cannot, with every way to
pick rows: against the formula in float64."""

import itertools
import math

import pytest
import torch

from pcp_mla.ops.merge_states import cp_correct_out, merge_attn_states, merge_n_attn_states

F8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Triton knows nothing of accesses, and would be compiled for every form: tests of single forms have it.
everywhere = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "cpu", id="cpu-native"),
        pytest.param("cpu", "reference", id="reference"),
        *(pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in ("auto", "cuda")),
    ],
)
# Width, numbers before and behind a row of the inputs, and behind a row of the result.
FORMS = {
    "aligned": (16, 0, 0, 0),
    "aligned with gaps": (16, 16, 16, 16),
    "odd width": (5, 0, 0, 0),
    "odd width with gaps": (7, 1, 2, 3),
    "odd width, more than a warp": (67, 0, 0, 0),
    "odd strides": (16, 0, 1, 0),
    "odd addresses": (16, 1, 15, 0),
    "odd strides of the result": (16, 0, 0, 1),
}
TOKENS, HEADS = 9, 3
SCALE = 0.02


def forms(device):
    """On the CPU, which reads every row alike, fewer."""
    return [form for form in FORMS if device == "cuda" or "gaps" in form or "result" in form]


def part(form, dtype, device, seed, first_is_nan=False):
    """An output in a buffer of NaN, and its LSE."""
    width, before, behind, _ = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((TOKENS, HEADS, before + width + behind), math.nan)
    whole[..., before : before + width] = torch.randn(TOKENS, HEADS, width, generator=generator) * 4
    lse = torch.randn(TOKENS, HEADS, generator=generator) * 2
    if first_is_nan:
        whole[1], lse[1] = math.nan, -math.inf
    return whole.to(dtype).to(device)[..., before : before + width], lse.to(device)


def result(form, dtype, device, rows=TOKENS):
    """The buffer of a result, every byte 0xFF, and the result in it."""
    width, _, _, gap = FORMS[form]
    whole = torch.full((rows, HEADS, (width + gap) * dtype.itemsize), 255, dtype=torch.uint8, device=device).view(dtype)
    return whole, whole[..., :width]


def exact(outs, lses, counted, base2):
    """In float64 each partial with its weight, and the LSE. ``counted`` [N, T]: which partials have a share in a row."""
    factor = math.log(2) if base2 else 1.0
    scores = torch.stack([lse.cpu().double() * factor for lse in lses])
    scores[~counted] = -math.inf
    total = scores.exp().sum(0)  # LSEs are small
    terms = []
    for score, out in zip(scores, outs, strict=True):
        weight = torch.where(total > 0, score.exp() / total.clamp(min=1e-300), 0.0)[..., None]
        terms.append(torch.where(weight > 0, weight * out.cpu().double(), 0.0))
    return terms, total.log() / factor


def assert_rounded(got, wanted, size, what):
    """One rounding of what float32 sums: of a float8 result, between those of the limits of that sum's error."""
    got, error = got.cpu(), 3e-6 * size
    assert got.shape == wanted.shape
    if got.dtype == F8:
        low, high = (
            ((wanted + side * error) / SCALE).clamp(-448, 448).float().to(F8).float() for side in (-1, 1)
        )  # rounding keeps the order
        assert bool(((low <= got.float()) & (got.float() <= high)).all()), what
    else:
        eps = torch.finfo(got.dtype).eps
        allowed = wanted.abs() * eps / 2 + torch.finfo(got.dtype).smallest_normal * eps + error
        assert bool(((got.double() - wanted).abs() <= allowed).all()), what


def assert_kept(whole, written, width, what):
    """Bytes of rows that are not ``written``, and of gaps, are 0xFF."""
    data = whole.cpu().view(torch.uint8)
    assert bool((data[..., width * whole.dtype.itemsize :] == 255).all()), what
    others = [row for row in range(len(data)) if row not in written]
    assert bool((data[others] == 255).all()), what


def results_of(dtype):
    return [dtype] if dtype == torch.float32 else [dtype, torch.float32]


# What is merged in each row, and where it goes: rows 2 and 5 are written nowhere.
OPS = [3, 3, 0, 1, 2, 3, 2, 1, 3]
REQUESTS = ([3, 0, 1, 2], [0, 2, 3, 4, 7])  # of 9 rows, the last two behind all requests
PLACES = [4, 0, -1, 7, 2, 99, 8, 3, 1]
PICKED = {
    "all rows": {},
    "row_op": {"row_op": OPS},
    "row_op of requests": {"row_op": REQUESTS[0], "cu_seqlens": REQUESTS[1]},
    "out_rows": {"out_rows": PLACES},
    "row_op and out_rows": {"row_op": OPS, "out_rows": PLACES},
}


def ops_and_places(picked):
    ops = PICKED[picked].get("row_op", [3] * TOKENS)
    if "cu_seqlens" in PICKED[picked]:
        ends = REQUESTS[1]
        ops = [next((op for op, a, b in zip(ops, ends, ends[1:], strict=False) if a <= row < b), 0) for row in range(TOKENS)]
    places = PICKED[picked].get("out_rows", list(range(TOKENS)))
    return ops, {row: place for row, place in enumerate(places) if ops[row] and 0 <= place < TOKENS}


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("picked", PICKED)
def test_two(device, backend, dtype, picked):
    ops, places = ops_and_places(picked)
    counted = torch.tensor([[op & 1 > 0 for op in ops], [op & 2 > 0 for op in ops]])
    options = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in PICKED[picked].items()}
    scale = torch.tensor([SCALE], device=device)
    for form, kind, base in itertools.product(forms(device), [*results_of(dtype), F8], "e2"):
        what = (form, kind, base)
        a, lse_a = part(form, dtype, device, 1, first_is_nan=True)
        b, lse_b = part(form, dtype, device, 2)
        terms, lse = exact([a, b], [lse_a, lse_b], counted, base == "2")
        whole, out = result(form, kind, device)
        lse_out = torch.full((TOKENS, HEADS), 77.0, device=device)
        merge_attn_states(
            a, lse_a, b, lse_b, out=out, lse_out=lse_out, lse_base=base, scale=scale if kind == F8 else None, backend=backend,
            **options,
        )  # fmt: skip
        rows, to = list(places), list(places.values())
        size = sum(term.abs() for term in terms)
        assert_rounded(out.cpu()[to], sum(terms)[rows], size[rows], what)
        assert torch.allclose(lse_out[to].cpu().double(), lse[rows], rtol=2e-6, atol=4e-6), what
        assert bool((lse_out[[row for row in range(TOKENS) if row not in to]] == 77).all()), what
        assert_kept(whole, to, out.shape[2], what)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_many(device, backend, dtype, count):
    """Groups of partials that are full and not, listed and stacked."""
    scale = torch.tensor([SCALE], device=device)
    for form, kind in itertools.product(forms(device), [*results_of(dtype), F8]):
        pairs = [part(form, dtype, device, seed, first_is_nan=seed % 2 == 0) for seed in range(count)]
        outs, lses = [out for out, _ in pairs], [lse for _, lse in pairs]
        terms, lse = exact(outs, lses, torch.ones(count, TOKENS).bool(), False)
        for stacked in (False, True) if count == 3 else (count == 8,):
            given = (torch.stack(outs), torch.stack(lses)) if stacked else (outs, lses)
            whole, out = result(form, kind, device)
            lse_out = torch.empty(TOKENS, HEADS, device=device)
            merge_n_attn_states(*given, out=out, lse_out=lse_out, scale=scale if kind == F8 else None, backend=backend)
            assert_rounded(out, sum(terms), sum(term.abs() for term in terms), (form, kind))
            assert torch.allclose(lse_out.cpu().double(), lse, rtol=2e-6, atol=4e-6)
            assert_kept(whole, range(TOKENS), out.shape[2], (form, kind))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1), (5, 3), (64, 63)])
def test_a_ranks_share(device, backend, dtype, world, rank):
    """Whole, in shares of heads, and with rows of which ranks have no key."""
    used = torch.ones(world, TOKENS, dtype=torch.int32)
    used[rank, 4] = used[0, 6] = used[:, 7] = 0
    cases = [("e", None, None), ("2", used, None), ("e", used, HEADS)]
    for form, (base, keys, shares) in itertools.product(forms(device), cases):
        lses = [part(form, dtype, device, seed, first_is_nan=seed == rank)[1] for seed in range(world)]
        out, _ = part(form, dtype, device, rank, first_is_nan=True)
        counted = torch.ones(world, TOKENS).bool() if keys is None else keys > 0
        terms, lse = exact([out] * world, lses, counted, base == "2")
        for kind in results_of(dtype):
            what = (form, kind, base, shares)
            options = {"seqused_k": None if keys is None else keys.to(device), "lse_base": base, "backend": backend}
            check_share(out, lses, rank, shares, options, result(form, kind, device), terms[rank], lse, what)


def check_share(out, lses, rank, shares, options, results, wanted, lse, what):
    whole, corrected = results
    lse_out = torch.empty(TOKENS, HEADS, device=out.device)
    if shares is None:
        cp_correct_out(out, torch.stack(lses), rank, corrected=corrected, lse_out=lse_out, **options)
    else:
        cut, lse_cut = (
            torch.empty(shares, TOKENS, HEADS // shares, *x.shape[2:], dtype=x.dtype, device=out.device)
            for x in (corrected, lse_out)
        )
        cp_correct_out(out, torch.stack(lses), rank, corrected=cut, lse_out=lse_cut, **options)
        corrected.copy_(cut.transpose(0, 1).flatten(1, 2))
        lse_out.copy_(lse_cut.transpose(0, 1).flatten(1, 2))
    assert_rounded(corrected, wanted, wanted.abs(), what)
    assert torch.allclose(lse_out.cpu().double(), lse, rtol=2e-6, atol=4e-6), what
    assert_kept(whole, range(TOKENS), out.shape[2], what)
