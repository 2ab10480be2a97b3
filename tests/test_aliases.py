"""Results that share memory with what is read or with each other: refused by name before a byte is written, but for those that may
be an input itself; and tensors that lie in one buffer without a byte in common."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import EVERYWHERE, same_bits
from pcp_mla import (
    GatheredRows,
    MLADims,
    PCPMetadata,
    concat_k,
    cp_correct_out,
    gather_latents,
    kv_up_project,
    merge_attn_states,
    merge_n_attn_states,
    pcp_attention,
    pcp_fused_gather,
    pcp_fused_restore,
    write_latent_cache,
)
from pcp_mla.checks import is_same_tensor, share_memory

everywhere = pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DIMS = MLADims(num_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=8, v_head_dim=64, kv_lora_rank=64)


def refuses(call, words, *touched):
    """ValueError of these words, and the bytes of ``touched`` as they were."""
    before = [x.clone() for x in touched]
    with pytest.raises(ValueError, match=words):
        call()
    assert all(same_bits(x, old) for x, old in zip(touched, before, strict=True))


# Memory.


@st.composite
def slices(draw):
    """Two views of one buffer of bytes: any offsets, and strides with which each has its elements apart."""
    shape = [draw(st.integers(1, 4)) for _ in range(3)]
    strides, step = [], 1
    for size in reversed(shape):
        step *= draw(st.integers(1, 3))
        strides.insert(0, step)
        step *= size
    views = []
    for _ in range(2):
        own = [max(1, size - draw(st.integers(0, 2))) for size in shape]
        own_strides = strides if draw(st.booleans()) else [stride + draw(st.integers(0, 1)) for stride in strides]
        views.append((own, own_strides, draw(st.integers(0, 40))))
    return views


@given(slices(), st.permutations([0, 1, 2]))
@settings(max_examples=300, deadline=None)
def test_shared_bytes_are_found(views, order):
    buffer = torch.zeros(2000, dtype=torch.uint8)
    x, y = (torch.as_strided(buffer, size, stride, offset) for size, stride, offset in views)
    buffer.zero_()
    x.fill_(1)
    truth = bool(y.any())
    assert share_memory(x.permute(order), y) >= truth
    if views[0][1] == views[1][1]:  # equal distances: nothing apart is taken for shared
        assert share_memory(x.permute(order), y) == truth
        assert share_memory(y, x) == truth


def test_slices_of_one_buffer_are_apart():
    rows = torch.zeros(7, 3, 256)
    row = torch.zeros(9, 576)
    layers = torch.zeros(5, 4, 16, 576)
    block = torch.zeros(4, 1024, dtype=torch.uint8)
    for x, y in (
        (rows[..., :128], rows[..., 128:]),
        (rows[:, :1], rows[:, 1:]),
        (rows[::2], rows[1::2]),
        (row[:, :512], row[:, 512:]),
        (row[:, :512], row[:, None, 512:]),
        (layers[:, 1], layers[:, 2]),
        (block[:, :640].view(torch.bfloat16), block[:, 640:960].view(torch.float32)),
        (rows[:0], rows),
        (rows[3:4].expand(7, 3, 256), rows[:3]),
    ):
        assert not share_memory(x, y)
        assert not share_memory(y, x)
    assert share_memory(rows[..., :129], rows[..., 128:])
    assert share_memory(rows[3:4].expand(7, 3, 256), rows[:4])
    assert share_memory(row[:, :512], row)
    assert is_same_tensor(rows[:1], rows[:1].as_strided((1, 3, 256), (5, 256, 1)))
    assert not is_same_tensor(rows, rows.view(torch.int32))


# Merges.


def states(device, count=2, tokens=6, heads=2, dim=16):
    generator = torch.Generator().manual_seed(count)
    outs = torch.randn(count, tokens, heads, dim, generator=generator).bfloat16().to(device)
    return list(outs.unbind()), list(torch.randn(count, tokens, heads, generator=generator).to(device).unbind())


@everywhere
def test_rows_scattered_over_an_input(device, backend):
    (a, b), (lse_a, lse_b) = states(device)
    to = torch.arange(5, -1, -1, dtype=torch.int32, device=device)
    options = {"out_rows": to, "backend": backend}
    spare, spare_lse = torch.zeros_like(a), torch.zeros_like(lse_a)
    for name, result in (("out_a", a), ("out_b", b)):
        refuses(
            lambda result=result: merge_attn_states(a, lse_a, b, lse_b, out=result, **options),
            f"merge_attn_states: out must not share memory with {name}, got",
            a, b,
        )  # fmt: skip
    for name, result in (("lse_a", lse_a), ("lse_b", lse_b)):
        refuses(
            lambda result=result: merge_attn_states(a, lse_a, b, lse_b, out=spare, lse_out=result, **options),
            f"lse_out must not share memory with {name}, got",
            lse_a, lse_b, spare,
        )  # fmt: skip
    merge_attn_states(a, lse_a, b, lse_b, out=spare, lse_out=spare_lse, **options)
    wanted, lse = merge_attn_states(a, lse_a, b, lse_b, backend=backend)
    assert same_bits(spare.flip(0), wanted)
    assert same_bits(spare_lse.flip(0), lse)


@everywhere
def test_two_way_merges_into_what_they_read(device, backend):
    whole, (lse_a, lse_b) = torch.randn(9, 2, 16, device=device).bfloat16(), states(device)[1]
    a, b = whole[:6], torch.randn(6, 2, 16, device=device).bfloat16()
    shared = torch.zeros(6, 2, 32, device=device).bfloat16()
    wide = torch.zeros(6, 2, 16, device=device)
    op = torch.full((6,), 3, dtype=torch.int32, device=device)
    lses = torch.zeros(13, 2, device=device)
    for change, words in (
        ({"out": whole[1:7]}, "out must not share memory with out_a unless it is out_a itself, got addresses \\+64 bytes apart"),
        ({"out_b": whole[3:], "out": whole[2:8]}, "out must not share memory with out_a unless"),
        ({"out": a, "out_a": a[:, :1].expand(6, 2, 16)}, "out must not share memory with out_a unless"),
        ({"out": wide, "lse_a": wide[..., 3]}, "out must not share memory with lse_a, got"),
        ({"out": shared[..., :16], "lse_out": shared.view(torch.float32)[..., 7]}, "lse_out must not share memory with out, got"),
        ({"out": b, "lse_out": b.view(torch.float32)[..., 0]}, "lse_out must not share memory with"),
        ({"out": shared[..., :16], "lse_a": lses[:6], "lse_out": lses[1:7]}, "lse_out must not share memory with lse_a unless"),
        ({"out": shared[..., :16], "row_op": op, "lse_out": op.view(torch.float32).as_strided((6, 2), (0, 1))}, "lse_out must not"),
    ):
        arguments = {"out_a": a, "lse_a": lse_a, "out_b": b, "lse_b": lse_b, **change}
        refuses(lambda arguments=arguments: merge_attn_states(**arguments, backend=backend), words, whole, b, shared, lses)
    # Interleaved, and in place through other strides of the same elements.
    wanted, lse = merge_attn_states(a, lse_a, b, lse_b, backend=backend)
    got, got_lse = merge_attn_states(
        a, lse_a, b, lse_b, out=shared[..., :16], lse_out=shared.view(torch.float32)[..., 9], backend=backend
    )
    assert same_bits(got.contiguous(), wanted)
    assert same_bits(got_lse.contiguous(), lse)
    merge_attn_states(a, lse_a, b, lse_b, out=a, lse_out=lse_b, backend=backend)
    assert same_bits(a, wanted)
    assert same_bits(lse_b, lse)


@everywhere
@pytest.mark.parametrize("stacked", [False, True])
def test_merges_of_n_into_what_they_read(device, backend, stacked):
    buffer = torch.randn(3 * 6 + 1, 2, 16, device=device).bfloat16()
    scores = torch.randn(3 * 6 + 1, 2, device=device)
    outs, lses = buffer[:18].view(3, 6, 2, 16), scores[:18].view(3, 6, 2)
    if not stacked:
        outs, lses = list(outs), list(lses)
    spare = torch.zeros(6, 2, 16, device=device).bfloat16()
    for change, words in (
        ({"out": buffer[3:9]}, r"out must not share memory with outs\[0\] unless it is outs\[0\] itself"),
        ({"out": buffer[13:]}, r"out must not share memory with outs\[2\] unless"),
        ({"out": spare, "lse_out": scores[13:]}, r"lse_out must not share memory with lses\[2\] unless"),
        ({"out": spare, "lse_out": buffer[0:6].view(torch.float32)[..., 0]}, r"lse_out must not share memory with outs\[0\]"),
    ):
        refuses(lambda change=change: merge_n_attn_states(outs, lses, **change, backend=backend), words, buffer, scores, spare)


@everywhere
def test_corrections_of_what_they_read(device, backend):
    buffer = torch.randn(9, 4, 16, device=device)
    out, lses = buffer[:6], torch.randn(2, 7, 4, device=device)
    used = torch.ones(2, 24, dtype=torch.int32, device=device)
    given = lses[:, :6]
    for change, words in (
        ({"corrected": buffer[2:8]}, "corrected must not share memory with out unless it is out itself"),
        ({"corrected": out.view(6, 2, 2, 16).transpose(0, 1)}, "corrected must not share memory with out unless"),
        ({"lse_out": lses[0, 1:]}, r"lse_out must not share memory with lses\[0\] unless"),
        ({"lse_out": buffer[:6, :, 0]}, "lse_out must not share memory with out, got"),
    ):
        refuses(lambda change=change: cp_correct_out(out, given, 1, **change, backend=backend), words, buffer, lses)
    refuses(
        lambda: cp_correct_out(
            out, given, 1, seqused_k=used.view(-1)[:12].view(2, 6), lse_out=used.view(torch.float32)[0].view(6, 4), backend=backend
        ),
        "lse_out must not share memory with seqused_k, got",
        used,
    )


# Copies.


@everywhere
def test_gathered_rows(device, backend):
    meta = PCPMetadata.build([9, 4], [0, 3], [True, True], world_size=2, rank=0, device=device)
    k, v = (torch.randn(meta.num_kv_tokens, 2, width, device=device) for width in (8, 4))
    q = torch.randn(meta.num_tokens, 2, 8, device=device)
    out = pcp_fused_gather(q, k, v, meta, backend=backend)
    many = torch.zeros(64, 2, 8, device=device)
    for change, words in (
        ({"q_head": q[: len(out.q_head)]}, "out.q_head must not share memory with q, got"),
        ({"k_tail": k[: len(out.k_tail)]}, "out.k_tail must not share memory with k, got"),
        (
            {"q_head": many[: len(out.q_head)], "k_tail": many[: len(out.k_tail)]},
            "out.k_tail must not share memory with out.q_head",
        ),
    ):
        given = out._replace(**change)
        refuses(lambda given=given: pcp_fused_gather(q, k, v, meta, out=given, backend=backend), words, q, k, v, many, *out)
    # Outputs that touch, and an input between the rows of which nothing lies.
    cuts = np.cumsum([0, len(out.q_head), len(out.k_head), len(out.q_tail), len(out.k_tail)])
    q_head, k_head, q_tail, k_tail = (torch.zeros(int(cuts[-1]), 2, 8, device=device)[a:b] for a, b in itertools.pairwise(cuts))
    given = GatheredRows(q_head, k_head, torch.zeros_like(out.v_head), q_tail, k_tail, torch.zeros_like(out.v_tail))
    pcp_fused_gather(q, k, v, meta, out=given, backend=backend)
    assert all(same_bits(x, y) for x, y in zip(given, out, strict=True))


@everywhere
def test_restored_rows(device, backend):
    meta = PCPMetadata.build([9, 4], None, [True, True], world_size=2, rank=0, device=device)
    rows = torch.randn(meta.num_tokens + 2, 2, 8, device=device)
    head, tail = rows[: meta.num_head_tokens], rows[meta.num_head_tokens : meta.num_tokens]
    lse = torch.randn(meta.num_tokens, 2, device=device)
    lses = lse[: meta.num_head_tokens], lse[meta.num_head_tokens :]
    spare, spare_lse = torch.zeros(meta.num_tokens, 2, 8, device=device), torch.zeros(meta.num_tokens, 2, device=device)
    for out, words in (
        ((rows[2:], spare_lse), r"out\[0\] must not share memory with out_(head|tail), got"),
        ((spare, lse), r"out\[1\] must not share memory with lse_(head|tail), got"),
        ((spare, spare.view(-1)[: spare_lse.numel()].view(spare_lse.shape)), r"out\[1\] must not share memory with out\[0\], got"),
        ((spare, rows.view(-1)[: spare_lse.numel()].view(spare_lse.shape)), r"out\[1\] must not share memory with out_head, got"),
    ):
        refuses(
            lambda out=out: pcp_fused_restore(head, tail, *lses, meta, out=out, backend=backend), words, rows, lse, spare, spare_lse
        )


@everywhere
def test_cached_rows(device, backend):
    cache = torch.randn(5, 4, 8, device=device)
    rows = torch.arange(6, dtype=torch.int32, device=device)
    flat = cache.view(20, 8)
    refuses(
        lambda: write_latent_cache(flat[2:8], cache, rows.long(), backend=backend),
        "write_latent_cache: cache must not share memory with latents, got",
        cache,
    )
    refuses(lambda: gather_latents(cache, rows, out=flat[2:8], backend=backend), "out must not share memory with cache, got", cache)
    numbers = torch.arange(48, dtype=torch.int32, device=device)
    refuses(
        lambda: gather_latents(cache.view(torch.int32), numbers[:6], out=numbers.view(6, 8), backend=backend),
        "out must not share memory with rows, got",
        numbers,
    )
    layers = torch.randn(5, 3, 4, 8, device=device)  # one layer's rows to another layer
    wanted = layers[:, 2].reshape(20, 8)[:4]
    write_latent_cache(layers[0, 2], layers[:, 1], torch.arange(4, device=device), backend=backend)
    assert torch.equal(layers[0, 1], wanted)


@everywhere
def test_concatenated_keys(device, backend):
    whole = torch.randn(6, 2, 24, device=device)
    k_pe = torch.randn(6, 8, device=device)
    refuses(
        lambda: concat_k(whole[..., :16], k_pe, out=whole, backend=backend),
        "concat_k: out must not share memory with k_nope",
        whole,
    )
    refuses(
        lambda: concat_k(whole[..., :8], whole[:, 0, 16:], out=whole[..., 8:], backend=backend),
        "out must not share memory with k_pe",
        whole,
    )
    out = concat_k(whole[..., :8], k_pe, out=whole[..., 8:], backend=backend)
    assert torch.equal(out[..., 8:], k_pe[:, None].expand(6, 2, 8))


UP_PROJECTIONS = [
    pytest.param("cpu", "auto", id="cpu"),
    pytest.param("cpu", "triton", id="triton-interpreted"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "auto", id="auto", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "backend"), UP_PROJECTIONS)
def test_projected_keys_and_values(device, backend):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * 128, 64, generator=generator).half().to(device) / 8
    latents = torch.randn(20, 72, generator=generator).half().to(device)
    rows = torch.arange(5, dtype=torch.int32, device=device)
    buffer = torch.zeros(5, 2, 136, device=device).half()
    kept = torch.zeros(4000, device=device).half()
    k_kept, v_kept = kept[:720].view(5, 2, 72), kept[712:1352].view(5, 2, 64)
    for change, words in (
        ({"k_out": latents.view(-1)[:720].view(5, 2, 72)}, "k_out must not share memory with latents, got"),
        ({"v_out": weight.view(-1)[:640].view(5, 2, 64)}, "v_out must not share memory with weight, got"),
        ({"k_out": k_kept, "v_out": v_kept}, "v_out must not share memory with k_out, got"),
        ({"k_pe_out": latents[:5, 64:]}, "k_pe_out must not share memory with latents, got"),
        ({"k_pe_out": weight.view(-1)[:40].view(5, 8)}, "k_pe_out must not share memory with weight, got"),
        (
            {"k_out": kept[:640].view(5, 2, 64), "k_pe_out": kept[632:672].view(5, 8)},
            "k_pe_out must not share memory with k_out, got",
        ),
        ({"v_out": v_kept, "k_pe_out": kept[704:744].view(5, 8)}, "k_pe_out must not share memory with v_out, got"),
    ):
        change = change | {"k_pe_apart": "k_pe_out" in change}
        call = lambda change=change: kv_up_project(latents, rows, weight, DIMS, **change, backend=backend)  # noqa: E731
        refuses(call, words, latents, weight, kept)
    wanted = kv_up_project(latents, rows, weight, DIMS, backend=backend)
    got = kv_up_project(latents, rows, weight, DIMS, k_out=buffer[..., :72], v_out=buffer[..., 72:], backend=backend)
    assert all(same_bits(x.contiguous(), y) for x, y in zip(got, wanted, strict=True))
    buffer = torch.zeros(5, 264, device=device).half()  # K, V and k_pe of a row side by side
    heads = buffer[:, :256].view(5, 2, 128)
    outs = {"k_out": heads[..., :64], "v_out": heads[..., 64:], "k_pe_out": buffer[:, 256:]}
    got = kv_up_project(latents, rows, weight, DIMS, **outs, k_pe_apart=True, backend=backend)
    apart = (wanted[0][..., :64], wanted[1], wanted[0][:, 0, 64:])
    assert all(same_bits(x.contiguous(), y.contiguous()) for x, y in zip(got, apart, strict=True))


@devices
def test_attention(device):
    meta = PCPMetadata.build([9, 4], [0, 3], [True, True], world_size=2, rank=0, device=device)
    q = torch.randn(meta.num_tokens, 2, 16, device=device)
    k = torch.randn(meta.num_kv_tokens, 2, 16, device=device)
    v = torch.randn(meta.num_kv_tokens, 2, 16, device=device)
    n, room = meta.num_tokens, torch.zeros(meta.num_tokens + 1, 2, 16, device=device)
    lse = torch.zeros(n + 1, 2, device=device)
    prev = (room[:n], lse[:n])
    for options, words in (
        ({"out": (q, lse[:n])}, "out must not share memory with q, got"),
        ({"out": (k[:n], lse[:n])}, "out must not share memory with k, got"),
        ({"out": (room[:n], room[:n, :, 0])}, "out's LSE must not share memory with out, got"),
        ({"prev": prev, "out": (room[1:], lse[1:])}, "out must not share memory with prev unless it is prev itself"),
        ({"prev": prev, "out": (q.clone(), lse[1:])}, "out's LSE must not share memory with prev's LSE unless"),
    ):
        call = lambda options=options: pcp_attention(q, k, v, meta, softmax_scale=1.0, return_lse=True, **options)  # noqa: E731
        refuses(call, words, q, k, v, room, lse)
    both = torch.zeros(n, 2, 32, device=device)
    got = pcp_attention(q, k, v, meta, softmax_scale=1.0, out=both[..., 16:], backend="torch")
    assert torch.equal(got, pcp_attention(q, k, v, meta, softmax_scale=1.0, backend="torch"))
