"""Numbers past the 2**31st, by size or by strides: what lies there is read and written, and what a kernel cannot reach is refused.
Small on the CPU."""

import math

import numpy as np
import pytest
import torch

from pcp_mla import (
    PCPMetadata,
    concat_k,
    cp_correct_out,
    gather_latents,
    kv_up_project,
    merge_attn_states,
    merge_n_attn_states,
    partition,
    pcp_attention,
    write_latent_cache,
)
from pcp_mla.ops.registry import select
from pcp_mla.plan.dims import MLADims
from pcp_mla.planner.step_buffer import request_table
from test_kv_up_project_choice import check, on_hopper

everywhere = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "cpu", id="cpu-native"),
        pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture(autouse=True)
def memory_goes_back():
    """Other processes test beside this one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random(shape, dtype, device, seed=0):
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


@everywhere
@pytest.mark.parametrize("scale", [None, 0.02])
def test_rows_beside_the_cache(device, backend, scale):
    """Latents and gathered rows far apart; the last of 70 begins at number 2.3e9."""
    stride, width, count = 2**25 if device == "cuda" else 2**10, 24, 70
    memory = torch.empty(count * stride, dtype=torch.bfloat16, device=device)
    far = memory.view(count, stride)
    latents, out = far[:, 8 : 8 + width], far[:, 64 : 64 + width]
    latents.copy_(random((count, width), torch.bfloat16, device))
    out.fill_(math.nan)
    kept = far[:, 64 + width]
    kept.fill_(5.0)
    cache = torch.zeros(20, 4, width, device=device).to(torch.bfloat16 if scale is None else torch.float8_e4m3fn)
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:count].to(device)
    factor = None if scale is None else torch.tensor([scale], device=device)
    write_latent_cache(latents, cache, slots, scale=factor, backend=backend)
    stored = cache.flatten(0, 1)[slots] if scale is None else cache.flatten(0, 1).float()[slots] * scale
    assert torch.allclose(stored.float(), latents.float(), rtol=2**-4 if scale else 0, atol=2**-9 * scale if scale else 0)
    gather_latents(cache, slots.int(), scale=factor, out=out, backend=backend)
    assert torch.equal(out, stored.to(out.dtype))
    assert bool((kept == 5).all())


@pytest.mark.gpu
def test_too_many_rows_to_gather():
    """2**31 of them by a block table, which need no list."""
    cache = torch.zeros(3, 4, 1, dtype=torch.uint8, device="cuda")
    table, ends = (torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in ((1, 1), (2,)))
    with pytest.raises(RuntimeError, match=r"gather_latents: there must be less than 2\*\*31 rows"):
        gather_latents(cache, block_table=table, cu_seqlens=ends, num_rows=2**31, backend="cuda")


@pytest.mark.gpu
def test_too_many_keys_to_concatenate():
    k_nope, k_pe = (torch.zeros(shape, dtype=torch.uint8, device="cuda") for shape in ((1, 1, 1), (1, 1)))
    with pytest.raises(RuntimeError, match=r"concat_k: there must be less than 2\*\*31 tokens"):
        concat_k(k_nope.expand(2**31, 1, 1), k_pe.expand(2**31, 1), backend="cuda")


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "reference", id="reference"),
        pytest.param("cuda", "cuda", id="cuda", marks=[pytest.mark.gpu, on_hopper]),
        pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    ],
)
def test_values_of_many_keys(device, backend):
    """V has 2.3e9 numbers; its 2**31st is in row 87381."""
    heads, count = (128, 95_000) if device == "cuda" else (3, 95)
    dims = MLADims(heads, 64, 64, 192, 512)
    latents = random((count, dims.latent_dim), torch.bfloat16, device)
    weight = random((heads * dims.expanded_dim, 512), torch.bfloat16, device, 1) / 16
    rows = torch.arange(count, dtype=torch.int32, device=device).flip(0)
    k, v = kv_up_project(latents, rows, weight, dims, backend=backend)
    assert device == "cpu" or v.numel() > 2**31
    first = count * 87_360 // 95_000
    for part in (slice(0, 20), slice(first, first + 40), slice(count - 20, count)):
        check(dims, latents[rows[part].long()].cpu(), torch.arange(len(k[part])), weight.cpu(), k[part], v[part])


@everywhere
@pytest.mark.parametrize("split", [False, True])
def test_key_rows_of_a_plan(device, backend, split):
    """2**31 - 1 of them, behind the gathered rows: threads are counted past 2**31. Blocks lie in reverse."""
    keys, block = (2**31 - 1, 2**16) if device == "cuda" else (2**11 - 1, 2**3)
    contexts = (keys // 2, keys - 14 - keys // 2)
    part = partition([9, 5], contexts, [True, True], world_size=2, rank=1)
    assert int(part.num_kv_tokens) == keys
    table = torch.from_numpy(request_table(part).reshape(-1)).to(device)
    columns = -(-(contexts[1] + 14) // block) + 1
    blocks = 2 * columns - 1 - torch.arange(2 * columns, dtype=torch.int32, device=device).view(2, columns)
    rows, room = part.num_tokens_padded, keys + 5
    small = [torch.empty(n, dtype=torch.int32, device=device) for n in (rows, rows, 2 * rows, 2 * rows)]
    slots = torch.empty(2 * rows, dtype=torch.int64, device=device)
    got = torch.empty(room, dtype=torch.int32, device=device)
    got[-5:] = -99
    call = select("plan_expand", backend, device)
    call(table, blocks, *small, slots, got, 2, 2, 1, rows, keys, split, block, 1, 0, 1)
    assert got[-5:].tolist() == [-99] * 5
    edges = [0, contexts[0], contexts[0] + 9, sum(contexts), keys, 2**30 % keys]
    looked = {n for edge in edges for n in range(edge - 300, edge + 300) if 0 <= n < keys}
    looked |= set(np.random.default_rng(0).integers(0, keys, 2000).tolist())

    def slot(n):
        if split:
            request = int(n >= contexts[0]) if n < sum(contexts) else int(n - sum(contexts) >= 9)
            position = n - request * contexts[0] if n < sum(contexts) else contexts[request] + n - sum(contexts) - request * 9
        else:
            request = int(n >= contexts[0] + 9)
            position = n - request * (contexts[0] + 9)
        number = 2 * columns - 1 - (request * columns + position // block)
        wanted = number * block + position % block
        return wanted if wanted < 2**31 else -1

    picked = torch.tensor(sorted(looked), device=device)
    assert got[picked].tolist() == [slot(n) for n in sorted(looked)]


FAR = 2**31 - 8  # numbers of two bytes: 16 bytes less than 2**32


def far_partials(memory, stride, by_heads):
    """A partial whose rows, or whose heads, are far apart, and room for a result between them."""
    shape, strides = ((2, 3, 16), (16, stride, 1)) if by_heads else ((3, 2, 16), (stride, 16, 1))
    out, result = (memory.as_strided(shape, strides, first) for first in (0, 64))
    out.copy_(random(shape, torch.bfloat16, memory.device))
    result.fill_(math.nan)
    return out, random(shape[:2], torch.float32, memory.device, 1), result


@everywhere
@pytest.mark.parametrize("by_heads", [False, True])
def test_merges_of_rows_far_apart(device, backend, by_heads):
    stride = FAR if device == "cuda" else 1024
    memory = torch.empty(2 * stride + 128, dtype=torch.bfloat16, device=device)
    a, lse_a, out = far_partials(memory, stride, by_heads)
    b, lse_b = random(a.shape, torch.bfloat16, device, 2), random(lse_a.shape, torch.float32, device, 3)
    lses = torch.stack([lse_a, lse_b]).double()
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    whole = weights[0] * a.double() + weights[1] * b.double()

    def assert_near(got, wanted):
        assert not ((got.double() - wanted).abs() > 2**-8 * wanted.abs() + 1e-5).any()

    merge_attn_states(a, lse_a, b, lse_b, out=out, backend=backend)
    assert_near(out, whole)
    merge_n_attn_states([b, a, b], [lse_b - math.log(2), lse_a, lse_b - math.log(2)], out=out.zero_(), backend=backend)
    assert_near(out, whole)
    cp_correct_out(a, torch.stack([lse_b, lse_a]), 1, corrected=out.zero_(), backend=backend)
    assert_near(out, weights[0] * a.double())


@pytest.mark.gpu
@pytest.mark.parametrize("by_heads", [False, True])
def test_merges_of_rows_too_far_apart(by_heads):
    """Refused by name, whatever the backend, and by the op itself; of the result any distance will do."""
    memory = torch.empty(2 * (FAR + 8) + 128, dtype=torch.bfloat16, device="cuda")
    a, lse_a, out = far_partials(memory, FAR + 8, by_heads)
    b, lse_b = a.contiguous(), lse_a.clone()
    words = "must have rows and heads less than 2..32 bytes apart"
    with torch.inference_mode():
        for backend in ("auto", "cuda", "triton"):
            with pytest.raises(ValueError, match=f"merge_attn_states: out_a {words}"):
                merge_attn_states(a, lse_a, b, lse_b, out=out, backend=backend)
            with pytest.raises(ValueError, match=f"merge_n_attn_states: outs.1. {words}"):
                merge_n_attn_states([b, a, b], [lse_a] * 3, out=out, backend=backend)
            with pytest.raises(ValueError, match=f"cp_correct_out: out {words}"):
                cp_correct_out(a, torch.stack([lse_a, lse_b]), 0, corrected=out, backend=backend)
        with pytest.raises(RuntimeError, match=r"strides of a partial must be from 0 to less than 2\*\*32 bytes"):
            torch.ops.pcp_mla.merge_attn_states_out(a, lse_a, b, lse_b, None, None, None, None, False, out, None)
        assert out.isnan().all()
        for backend in ("auto", "cuda", "triton"):
            merge_attn_states(b, lse_b, b, lse_b, out=out.zero_(), backend=backend)
            assert torch.equal(out, b)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "torch", id="torch"),
        pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_attention_over_a_projection(device, backend, listed):
    """K and V as slices of the up-projection's result, which has 2**32 numbers: those of V pass 2**31 halfway."""
    heads, keys, nope, rope = (128, 131_072 + 200, 128, 64) if device == "cuda" else (3, 250, 16, 16)
    queries, scale = 300 if device == "cuda" else 20, (nope + rope) ** -0.5
    meta = PCPMetadata.build([queries], [keys - queries], [True], world_size=1, rank=0, device=device)
    expanded = random((keys, heads, 2 * nope), torch.bfloat16, device)
    k_pe, q = random((keys, rope), torch.bfloat16, device, 1), random((queries, heads, nope + rope), torch.bfloat16, device, 2)
    rows = torch.arange(keys, device=device).flip(0).int() if listed else None
    out, lse = pcp_attention(
        q, expanded[..., :nope], expanded[..., nope:], meta, softmax_scale=scale, k_pe=k_pe, kv_rows=rows, return_lse=True,
        backend=backend,
    )  # fmt: skip
    for head in (0, heads // 2, heads - 1):
        one, pe = (x.flip(0).double() if listed else x.double() for x in (expanded[:, head], k_pe))
        scores = q[:, head].double() @ torch.cat([one[:, :nope], pe], dim=1).T * scale
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(keys - queries + 1), -torch.inf)
        wanted = scores.softmax(1) @ one[:, nope:]
        # Probabilities are rounded to bf16, each on its own: a share of the outputs' spread, which so many keys make small.
        allowed = 2**-8 * wanted.abs() + 2**-5 * wanted.std()
        assert not ((out[:, head].double() - wanted).abs() > allowed).any()
        assert torch.allclose(lse[:, head].double(), scores.logsumexp(1), rtol=1e-5)
