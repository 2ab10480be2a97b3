"""The paged cache: bit-exact writes and gathers, whatever the strides, slots and block tables."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import EVERYWHERE, random_bytes, same_bits
from pcp_mla import PCPPlanner, gather_latents, write_latent_cache

everywhere = pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
COPIED = [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn, torch.float64]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def random_cache(form, blocks, block_size, width, dtype, device, generator):
    """Random bytes: gapless, a layer of a larger cache, rows with gaps that keep addresses aligned or not, or without blocks."""
    if form == "slots":
        return random_bytes((blocks * block_size, width), dtype, device, generator)
    if form == "layer":
        return random_bytes((blocks, 3, block_size, width), dtype, device, generator)[:, 1]
    gap = {"gaps": 8, "odd gaps": 3}.get(form, 0)
    return random_bytes((blocks, block_size, width + gap), dtype, device, generator)[..., :width]


def as_rows(cache):
    """[num_slots, bytes of a row], a copy."""
    return cache.contiguous().view(-1, cache.shape[-1]).view(torch.uint8).clone()


def random_slots(count, num_slots, generator):
    """Distinct slots, some of them none: -1, behind the end, far outside."""
    slots = torch.randperm(num_slots + count, generator=generator)[:count]
    outside = torch.tensor([-1, num_slots, -(2**40), 2**40])[torch.randint(0, 4, (count,), generator=generator)]
    return torch.where((slots >= num_slots) | (torch.rand(count, generator=generator) < 0.1), outside, slots)


@everywhere
@given(
    st.sampled_from(["slots", "layer", "gaps", "odd gaps", "gapless"]),
    st.sampled_from(COPIED),
    st.sampled_from([576, 64, 5, 1]),
    st.sampled_from([1, 3, 16]),
    st.integers(0, 40),
    st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_writes_and_gathers(device, backend, form, dtype, width, block_size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = random_cache(form, 7, block_size, width, dtype, device, generator)
    latents = random_bytes((count, width + 3), dtype, device, generator)[:, :width]
    num_slots = 7 * block_size
    slots = random_slots(count, num_slots, generator)
    wanted = as_rows(cache)
    for row, slot in zip(latents, slots.tolist(), strict=True):
        if 0 <= slot < num_slots:
            wanted[slot] = row.contiguous().view(torch.uint8)
    write_latent_cache(latents, cache, slots.to(device), backend=backend)
    assert torch.equal(as_rows(cache), wanted)

    rows = slots.clamp(-1, 2**31 - 1).int()[torch.randperm(count, generator=generator)]
    out = random_bytes((count, width + 3), dtype, device, generator)[:, :width]
    assert gather_latents(cache, rows.to(device), out=out, backend=backend) is out
    for row, slot in zip(out, rows.tolist(), strict=True):
        expected = wanted[slot] if 0 <= slot < num_slots else torch.zeros_like(wanted[0])
        assert torch.equal(row.contiguous().view(torch.uint8), expected)


@everywhere
def test_the_rest_of_a_larger_cache_stays(device, backend):
    whole = torch.zeros(4, 3, 5, 8, device=device)
    write_latent_cache(torch.ones(20, 8, device=device), whole[:, 1], torch.arange(20, device=device), backend=backend)
    assert torch.equal(whole[:, 1], torch.ones_like(whole[:, 1]))
    assert not whole[:, ::2].any()


@everywhere
@pytest.mark.parametrize("seed", range(6))
def test_sequences_by_block_table(device, backend, seed):
    """Blocks in any order and shared by sequences, starts inside of a block, empty sequences, rows before the first and behind the
    last, numbers of blocks that are none."""
    generator = torch.Generator().manual_seed(seed)
    cache = random_cache("gapless", 9, 4, 24, torch.bfloat16, device, generator)
    table = torch.randint(0, 9, (5, 6), generator=generator).int()
    table[:2, :3] = torch.tensor([8, 0, 4])  # a shared prefix
    table[4, 1], table[3, 5] = -1, 9
    lengths = torch.tensor([10, 0, 13, 2, 6])
    starts = torch.tensor([3, 3, 5, 19, 2]).int()
    ends = torch.tensor([0, *lengths.cumsum(0)]).int() + 2
    given = {"block_table": table.to(device), "cu_seqlens": ends.to(device)}
    for first in (starts, None):
        wanted = torch.zeros(37, 24, dtype=cache.dtype, device=device)
        for r in range(5):
            for j in range(lengths[r]):
                block, offset = divmod(j + (0 if first is None else int(first[r])), 4)
                if table[r, block] in range(9):
                    wanted[ends[r] + j] = cache[int(table[r, block]), offset]
        options = given if first is None else {**given, "starts": first.to(device)}
        got = gather_latents(cache, **options, out=torch.full_like(wanted, torch.nan), backend=backend)
        assert same_bits(got, wanted)
        assert same_bits(gather_latents(cache, **options, num_rows=37, backend=backend), wanted)


@everywhere
@pytest.mark.parametrize("start", [5, 8, 9, 2**31 - 9, -3, -(2**31)])
@pytest.mark.parametrize("second", [False, True])
def test_tokens_outside_of_the_columns(device, backend, start, second):
    """They have no block, whatever the next sequence's row of the table holds, or the one's before."""
    cache = torch.arange(1.0, 25.0, device=device).view(6, 4, 1)
    table = torch.tensor([[4, 5], [1, 2]] if second else [[1, 2], [4, 5]], dtype=torch.int32, device=device)
    ends = torch.tensor([0, 2, 9] if second else [0, 7, 9], dtype=torch.int32, device=device)
    starts = torch.tensor([1, start] if second else [start, 1], dtype=torch.int32, device=device)
    got = gather_latents(cache, block_table=table, cu_seqlens=ends, starts=starts, num_rows=9, backend=backend)
    tokens = [start + j for j in range(7)]
    wanted = [[1, 2][t // 4] * 4 + t % 4 + 1 if 0 <= t < 8 else 0 for t in tokens]
    assert got.flatten().tolist() == ([18, 19, *wanted] if second else [*wanted, 18, 19])


@everywhere
def test_no_sequences_and_no_rows(device, backend):
    cache = torch.ones(3, 4, 8, device=device)
    none = torch.zeros(0, 5, dtype=torch.int32, device=device)
    ends = torch.zeros(1, dtype=torch.int32, device=device)
    assert not gather_latents(cache, block_table=none, cu_seqlens=ends, num_rows=6, backend=backend).any()
    assert gather_latents(cache, ends[:0], backend=backend).shape == (0, 8)
    write_latent_cache(cache[0, :0], cache, ends[:0].long(), backend=backend)
    assert cache.eq(1).all()


@everywhere
@pytest.mark.parametrize(
    ("dtype", "form"), [*zip(FLOATS, ["gapless", "layer", "gaps"], strict=True), *((x, "odd gaps") for x in FLOATS)]
)
@pytest.mark.parametrize("width", [576, 5])
def test_float8_with_a_scale(device, backend, dtype, form, width):
    """In a cache of any strides; out of it by slots and by block table."""
    generator = torch.Generator().manual_seed(3)
    latents = (torch.randn(50, width + 3 * (form == "odd gaps"), generator=generator) * 3).to(dtype).to(device)[:, :width]
    latents[0, :4] = torch.tensor([torch.nan, 1e4, -1e4, 0.0])
    scale = torch.tensor([0.02], device=device)
    slots = torch.randperm(64, generator=generator)[:50].to(device)
    cache = random_cache(form, 16, 4, width, torch.float8_e4m3fn, device, generator)
    wanted = as_rows(cache)
    write_latent_cache(latents, cache, slots, scale=scale, backend=backend)
    stored = (latents.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    wanted[slots] = stored.view(torch.uint8)
    assert torch.equal(as_rows(cache), wanted)
    got = gather_latents(cache, slots.int(), scale=scale, dtype=dtype, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(torch.nan_to_num(got), torch.nan_to_num((stored.float() * scale).to(dtype)))
    assert got.isnan().sum() == 1
    assert gather_latents(cache, slots.int(), scale=scale, backend=backend).dtype == torch.bfloat16
    table, first = [[3, 0, 15], [7, 9, 2]], [2, 6]
    tokens = [(0, 2 + n) for n in range(9)] + [(1, 6 + n) for n in range(5)]
    rows = torch.tensor([table[r][t // 4] * 4 + t % 4 for r, t in tokens], device=device)
    exact = (wanted[rows].view(torch.float8_e4m3fn).float() * scale).to(dtype)
    lists = {"block_table": table, "cu_seqlens": [0, 9, 14], "starts": first}
    given = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in lists.items()}
    got = gather_latents(cache, **given, num_rows=16, scale=scale, dtype=dtype, backend=backend)
    assert torch.equal(torch.nan_to_num(got[:14], nan=7.0), torch.nan_to_num(exact, nan=7.0))
    assert not got[14:].any()


@everywhere
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_rank_major_rows_find_their_slots(device, backend, layout):
    """The planner's slots and key rows: two steps, the second on top of the first's tokens, P = 1, 2, 4."""
    texts = [torch.randn(n, 16, device=device) for n in (43, 8)]
    tables = torch.tensor([[5, 1, 9, 4, 12, 0], [3, 2, 7, 6, 8, 10]], dtype=torch.int32, device=device)
    for world in (1, 2, 4):
        planners = [PCPPlanner(2, 60, world, rank, layout=layout, block_size=8, device=device) for rank in range(world)]
        cache = torch.full((13, 8, 16), torch.nan, device=device)
        done = [0, 0]
        for lengths in ([20, 7], [23, 1]):
            metas = [planner.plan(lengths, done, [True, True], tables) for planner in planners]
            fresh = torch.cat([text[d : d + n] for text, d, n in zip(texts, done, lengths, strict=True)])
            gathered = torch.full((world, metas[0].num_tokens_padded, 16), torch.nan, device=device)
            for to, meta in zip(gathered, metas, strict=True):
                index = meta.local_token_indices.long()
                to[: len(index)] = torch.where((index >= 0)[:, None], fresh[index], torch.nan)
            write_latent_cache(gathered.flatten(0, 1), cache, metas[-1].slot_mapping, backend=backend)
            done = [d + n for d, n in zip(done, lengths, strict=True)]
            rows = metas[0].kv_rows
            got = gather_latents(cache, rows, backend=backend)
            assert not got.isnan().any()  # pads are zeros
            assert torch.equal(got[rows >= 0], torch.cat([text[:d] for text, d in zip(texts, done, strict=True)]))


GOOD_CACHE, GOOD_ROWS = torch.zeros(3, 4, 8), torch.zeros(5, 8)
TABLE = {"block_table": torch.zeros(2, 3, dtype=torch.int32), "cu_seqlens": torch.zeros(3, dtype=torch.int32), "num_rows": 5}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cache": 3}, TypeError, "cache must be a torch.Tensor, got int"),
        ({"cache": torch.zeros(8)}, ValueError, r"cache must be \[num_blocks, block_size, width\] or .* got \(8,\)"),
        ({"cache": torch.zeros(3, 0, 8)}, ValueError, r"cache must be .* got \(3, 0, 8\)"),
        ({"latents": torch.zeros(5, 9)}, ValueError, "latents must have shape"),
        ({"latents": torch.zeros(5, 8).half()}, TypeError, "cache must be float16 as latents, or come with a scale, got float32"),
        ({"latents": torch.zeros(8, 5).T}, ValueError, "latents must have a contiguous last dimension"),
        ({"latents": torch.zeros(5, 8, device="meta")}, ValueError, "latents must be on cpu"),
        ({"latents": torch.zeros(5, 8, requires_grad=True)}, NotImplementedError, "latents must not require gradients"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64)}, ValueError, "slot_mapping must have shape"),
        ({"slot_mapping": torch.zeros(5, dtype=torch.int32)}, TypeError, "slot_mapping must be int64, got int32"),
        ({"slot_mapping": torch.zeros(10, dtype=torch.int64)[::2]}, ValueError, "slot_mapping must be contiguous"),
        ({"scale": 0.5}, TypeError, "scale must be a torch.Tensor, got float"),
        ({"scale": torch.ones(2)}, ValueError, "scale must have shape"),
        ({"scale": torch.ones(1)}, TypeError, "cache must be float8_e4m3fn with a scale, got float32"),
    ],
)
def test_write_errors(backend, change, error, words):
    cache = GOOD_CACHE.clone()
    arguments = {"latents": GOOD_ROWS + 1, "cache": cache, "slot_mapping": torch.arange(5), **change}
    with pytest.raises(error, match=words):
        write_latent_cache(**arguments, backend=backend)
    assert not cache.any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "rows must be given, or else block_table and cu_seqlens"),
        ({**TABLE, "rows": torch.zeros(5, dtype=torch.int32)}, ValueError, "rows must be given, or else block_table"),
        ({"block_table": TABLE["block_table"]}, ValueError, "rows must be given, or else block_table and cu_seqlens"),
        ({"rows": torch.zeros(5, dtype=torch.int64)}, TypeError, "rows must be int32, got int64"),
        ({"rows": torch.zeros(5, dtype=torch.int32), "starts": TABLE["cu_seqlens"]}, ValueError, "starts must come with"),
        ({"rows": torch.zeros(5, dtype=torch.int32), "out": torch.zeros(4, 8)}, ValueError, "rows must have shape"),
        ({"rows": torch.zeros(5, dtype=torch.int32), "out": torch.zeros(5, 8).half()}, TypeError, "cache must be float16 as out"),
        ({**TABLE, "num_rows": None}, ValueError, "num_rows or out must be given with block_table"),
        ({**TABLE, "cu_seqlens": torch.zeros(2, dtype=torch.int32)}, ValueError, "cu_seqlens must have shape"),
        ({**TABLE, "starts": torch.zeros(2)}, TypeError, "starts must be int32, got float32"),
        ({**TABLE, "block_table": torch.zeros(2, 3)}, TypeError, "block_table must be int32, got float32"),
        ({**TABLE, "block_table": torch.zeros(3, 2, dtype=torch.int32).T}, ValueError, "block_table must have a contiguous"),
    ],
)
def test_gather_errors(backend, arguments, error, words):
    with pytest.raises(error, match=words):
        gather_latents(GOOD_CACHE, **arguments, backend=backend)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_and_compile(device):
    cache, latents = torch.zeros(3, 4, 8, device=device), torch.randn(5, 8, device=device)
    slots = torch.arange(5, device=device)
    out = torch.empty_like(latents)
    torch.library.opcheck(torch.ops.pcp_mla.write_latent_cache.default, (latents, cache, slots, None))
    torch.library.opcheck(torch.ops.pcp_mla.gather_latents.default, (cache, slots.int(), None, None, None, None, out))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(latents, cache, slots):
        write_latent_cache(latents * 2, cache, slots)
        return gather_latents(cache, slots.int()) + 1

    assert torch.equal(there_and_back(latents, cache, slots), latents * 2 + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replay_with_other_slots(backend):
    cache, latents = torch.zeros(9, 4, 576, device="cuda"), torch.randn(20, 576, device="cuda")
    slots, rows = torch.arange(20, device="cuda"), torch.arange(20, device="cuda").int()
    write_latent_cache(latents, cache, slots, backend=backend)  # compiles
    out = gather_latents(cache, rows, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        write_latent_cache(latents, cache, slots, backend=backend)
        gather_latents(cache, rows, out=out, backend=backend)
    slots.copy_(torch.randperm(36, device="cuda")[:20])
    rows.copy_(slots.flip(0))
    latents.mul_(3)
    graph.replay()
    assert torch.equal(out, latents.flip(0))


@everywhere
def test_rows_outside_past_two_to_the_31(device, backend):
    """Rows so far apart that the last ones lie behind the 2^31st number; memory between them is never touched."""
    cache = torch.arange(20 * 8, dtype=torch.uint8, device=device).view(20, 8)
    room = torch.empty(2**31 + 17 * 2**27 + 8, dtype=torch.uint8, device=device)  # a number that wrapped around is in there, too
    far = room[2**31 :].as_strided((18, 8), (2**27, 1))
    rows = torch.arange(19, 1, -1, dtype=torch.int32, device=device)
    gather_latents(cache, rows, out=far, backend=backend)
    assert torch.equal(far, cache[2:].flip(0))
    other = torch.zeros_like(cache)
    write_latent_cache(far, other, rows.long(), backend=backend)
    assert torch.equal(other[2:], cache[2:])
    assert not other[:2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31(backend):
    cache = torch.zeros(60000, 64, 576, dtype=torch.bfloat16, device="cuda")
    latents = torch.randn(100, 576, device="cuda").bfloat16()
    slots = torch.arange(60000 * 64 - 100, 60000 * 64, device="cuda")
    write_latent_cache(latents, cache, slots, backend=backend)
    assert torch.equal(cache.view(-1, 576)[-100:], latents)
    assert torch.equal(gather_latents(cache, slots.int(), backend=backend), latents)
    apart = torch.empty(100 * 2**25, dtype=torch.bfloat16, device="cuda").view(100, -1)[:, :576]  # rows that lie far apart
    assert gather_latents(cache, slots.int(), out=apart, backend=backend) is apart
    assert torch.equal(apart, latents)
    cache.zero_()
    write_latent_cache(apart, cache, slots, backend=backend)
    assert torch.equal(cache.view(-1, 576)[-100:], latents)


@pytest.mark.gpu
def test_rows_of_more_accesses_than_a_kernel_counts():
    """Of one byte each, as an odd width wants."""
    for width, fits in ((2**25 - 1, True), (2**25 + 1, False)):
        cache = torch.zeros(2, width, dtype=torch.uint8, device="cuda")
        row, slot = torch.randint(256, (1, width), device="cuda").byte(), torch.ones(1, dtype=torch.int64, device="cuda")
        if fits:
            write_latent_cache(row, cache, slot, backend="cuda")
            assert torch.equal(gather_latents(cache, slot.int(), backend="cuda"), row)
            continue
        with pytest.raises(RuntimeError, match=r"write_latent_cache: a row must be smaller than 2\*\*25 accesses"):
            write_latent_cache(row, cache, slot, backend="cuda")
        with pytest.raises(RuntimeError, match=r"gather_latents: a row must be smaller than 2\*\*25 accesses"):
            gather_latents(cache, slot.int(), backend="cuda")
        assert not cache.any()
