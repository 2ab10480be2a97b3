"""Ops that only copy keep every bit: -0, infinities, denormal numbers, and the payloads and signs of NaN, signalling ones too."""

import pytest
import torch

from batches import EVERYWHERE, same_bits
from pcp_mla import PCPMetadata, concat_k, gather_latents, pcp_fused_gather, pcp_fused_restore, write_latent_cache

everywhere = pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
formats = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
# Sign, exponent and mantissa of 0, the smallest and largest denormal, 1, infinity, a quiet and two signalling NaN, by dtype.
BITS = {
    torch.bfloat16: (torch.int16, [0x0000, 0x0001, 0x007F, 0x3F80, 0x7F80, 0x7FC5, 0x7F81, 0x7FBF], -(2**15)),
    torch.float16: (torch.int16, [0x0000, 0x0001, 0x03FF, 0x3C00, 0x7C00, 0x7E05, 0x7C01, 0x7DFF], -(2**15)),
    torch.float32: (torch.int32, [0, 1, 0x7FFFFF, 0x3F800000, 0x7F800000, 0x7FC00005, 0x7F800001, 0x7FBFFFFF], -(2**31)),
    torch.float64: (torch.int64, [0, 1, 2**52 - 1, 0x3FF << 52, 0x7FF << 52, 0x7FF8 << 48 | 5, 0x7FF << 52 | 1, 0], -(2**63)),
    torch.float8_e4m3fn: (torch.int8, [0x00, 0x01, 0x07, 0x38, 0x7E, 0x7F, 0x7D, 0x10], -(2**7)),
}


def special(shape, dtype, device, seed=0):
    integer, patterns, sign = BITS[dtype]
    values = torch.tensor([*patterns, *(p + sign for p in patterns)], dtype=torch.int64)
    picked = values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]
    return picked.to(integer).to(device).view(dtype)


@everywhere
@formats
def test_gathered_and_restored_rows(device, backend, dtype):
    meta = PCPMetadata.build([13, 5], [0, 3], [True, True], world_size=2, rank=1, device=device)
    q = special((meta.num_tokens, 2, 16), dtype, device)
    k, v = (special((meta.num_kv_tokens, 2, width), dtype, device, width) for width in (16, 8))
    rows = pcp_fused_gather(q, k, v, meta, backend=backend)
    for x, index, got in (
        (q, meta.query_head_indices, rows.q_head),
        (q, meta.query_tail_indices, rows.q_tail),
        (k, meta.kv_head_indices, rows.k_head),
        (k, meta.kv_tail_indices, rows.k_tail),
        (v, meta.kv_head_indices, rows.v_head),
        (v, meta.kv_tail_indices, rows.v_tail),
    ):
        assert same_bits(got, x.view(torch.uint8)[index.long()].view(dtype))
    lse = special((meta.num_tokens, 2), torch.float32, device)
    lses = [lse[index.long()] for index in (meta.query_head_indices, meta.query_tail_indices)]
    out, out_lse = pcp_fused_restore(rows.q_head, rows.q_tail, *lses, meta, backend=backend)
    assert same_bits(out, q)
    assert same_bits(out_lse, lse)


@everywhere
@formats
def test_cached_rows(device, backend, dtype):
    latents = special((20, 24), dtype, device)
    cache = torch.zeros(6, 4, 24, device=device).to(dtype)
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:20].to(device)
    write_latent_cache(latents, cache, slots, backend=backend)
    assert same_bits(cache.view(torch.uint8).view(24, -1)[slots], latents.view(torch.uint8))
    assert same_bits(gather_latents(cache, slots.int(), backend=backend), latents)


@everywhere
@formats
def test_concatenated_keys(device, backend, dtype):
    k_nope, k_pe = special((9, 3, 16), dtype, device), special((9, 8), dtype, device, 1)
    out = concat_k(k_nope, k_pe, backend=backend)
    assert same_bits(out[..., :16].contiguous(), k_nope)
    assert same_bits(out[..., 16:].contiguous(), k_pe[:, None].expand(9, 3, 8).contiguous())


@everywhere
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_of_one_number(device, backend, heads):
    """Sizes of 1 are constants to a compiler."""
    meta = PCPMetadata.build([13, 5], [0, 3], [True, True], world_size=2, rank=1, device=device)
    q = special((meta.num_tokens, heads, 1), torch.bfloat16, device)
    k, v = (special((meta.num_kv_tokens, heads, 1), torch.bfloat16, device, seed) for seed in (1, 2))
    rows = pcp_fused_gather(q, k, v, meta, backend=backend)
    assert same_bits(rows.v_tail, v.view(torch.int16)[meta.kv_tail_indices.long()].view(torch.bfloat16))
    lse = torch.zeros(meta.num_tokens, heads, device=device)
    out, _ = pcp_fused_restore(rows.q_head, rows.q_tail, lse[: len(rows.q_head)], lse[len(rows.q_head) :], meta, backend=backend)
    assert same_bits(out, q)
    latents = q[:, 0]
    slots = torch.arange(len(latents), device=device)
    cache = torch.zeros(len(latents), 1, 1, device=device).bfloat16()
    write_latent_cache(latents, cache, slots, backend=backend)
    assert same_bits(gather_latents(cache, slots.int(), backend=backend), latents)
    assert same_bits(
        concat_k(q, latents, backend=backend)[..., 1:].contiguous(), latents[:, None].expand(-1, heads, 1).contiguous()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_keys_past_two_to_the_31(backend):
    whole = torch.randint(-(2**15), 2**15, (90_000, 128, 192), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    k_pe = special((90_000, 64), torch.bfloat16, "cuda")
    out = concat_k(whole[..., :128], k_pe, backend=backend)
    assert out.numel() > 2**31
    assert torch.equal(out[..., :128].view(torch.int16), whole[..., :128].view(torch.int16))
    assert torch.equal(out[..., 128:].view(torch.int16), k_pe.view(torch.int16)[:, None].expand(-1, 128, 64))
