"""A float8 cache of any form, by slots and by block tables: written and read against the definition, in rows that can be converted
eight numbers at a time and in rows that cannot; and rows too large for the copies."""

import itertools
import math

import pytest
import torch

from pcp_mla import concat_k, gather_latents, write_latent_cache

F8 = torch.float8_e4m3fn
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
everywhere = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "cpu", id="cpu-native"),
        pytest.param("cpu", "reference", id="reference"),
        *(pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in ("auto", "cuda", "triton")),
    ],
)
BLOCKS, SIZE = 6, 4
SCALE = 0.02
# Strides of blocks and rows for a width, and where the first row begins, in numbers of one byte.
CACHES = {
    "gapless": lambda width: (SIZE * width, width, 0),
    "layer": lambda width: (3 * SIZE * width, width, SIZE * width),
    "rows with gaps of 8": lambda width: (SIZE * (width + 8), width + 8, 0),
    "rows with gaps of 3": lambda width: (SIZE * (width + 3), width + 3, 0),
    "blocks with gaps of 4": lambda width: (SIZE * width + 4, width, 0),
    "from an odd address on": lambda width: (SIZE * width, width, 1),
}
# Numbers before the first row of the other tensor and behind each of its rows.
OUTSIDE = {"gapless": (0, 0), "gaps of 16": (16, 16), "gaps of 1": (0, 1), "from the second number on": (1, 0)}


def cache_of(form, width, device, fill=0x7F):
    """The buffer's bytes, all NaN, and the cache in it."""
    block, row, first = CACHES[form](width)
    memory = torch.full((first + BLOCKS * block,), fill, dtype=torch.uint8, device=device)
    return memory, memory.view(F8).as_strided((BLOCKS, SIZE, width), (block, row, 1), first)


def outside_of(form, rows, width, dtype, device, fill=math.nan):
    before, gap = OUTSIDE[form]
    memory = torch.full((before + rows * (width + gap),), fill, dtype=dtype, device=device)
    return memory, memory.as_strided((rows, width), (width + gap, 1), before)


def forms():
    """Each form of one tensor with a plain other, and the odd ones together."""
    yield from ((cache, "gapless") for cache in CACHES)
    yield from (("gapless", outside) for outside in OUTSIDE)
    yield "rows with gaps of 3", "gaps of 1"
    yield "layer", "gaps of 16"


def as_float8(values):
    """Rounded to the nearest of all finite numbers of the format, by their table; ties to the even pattern."""
    table = torch.arange(127, dtype=torch.uint8).view(F8).double()
    size = values.abs().clamp(max=448)
    above = torch.searchsorted(table, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - size, size - table[below]
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    pattern = torch.where(values.signbit(), nearest + 128, nearest)
    return torch.where(values.isnan(), 0x7F, pattern).to(torch.uint8)


@everywhere
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 24, 5])
def test_written_rows(device, backend, dtype, width):
    generator = torch.Generator().manual_seed(width)
    values = (torch.randn(20, width, generator=generator) * 3).to(dtype)
    values[0, :5] = torch.tensor([math.nan, 1e4, -1e4, -0.0, 1e-5])
    slots = torch.randperm(BLOCKS * SIZE, generator=generator)[:20]
    slots[3], slots[7] = -1, BLOCKS * SIZE
    # A float32 quotient, as a scale is a float32 number, rounded once more.
    stored = as_float8((values.float() / torch.tensor(SCALE)).double())
    for cache_form, outside_form in forms():
        memory, cache = cache_of(cache_form, width, device)
        _, latents = outside_of(outside_form, 20, width, dtype, device)
        latents.copy_(values)
        wanted_memory, wanted = cache_of(cache_form, width, "cpu")
        for row, slot in enumerate(slots.tolist()):
            if 0 <= slot < BLOCKS * SIZE:
                wanted.view(torch.uint8)[slot // SIZE, slot % SIZE] = stored[row]
        write_latent_cache(latents, cache, slots.to(device), scale=torch.tensor([SCALE], device=device), backend=backend)
        got = memory.cpu()
        nan = (wanted_memory & 0x7F) == 0x7F  # of either sign
        assert torch.equal((got & 0x7F) == 0x7F, nan), (cache_form, outside_form)
        assert torch.equal(got[~nan], wanted_memory[~nan]), (cache_form, outside_form)


def by_slots(device):
    slots = [5, -1, 0, 23, 24, 2**31 - 1, 7, 7, -(2**31)]
    return slots, {"rows": torch.tensor(slots, dtype=torch.int32, device=device)}


def by_block_table(device):
    """Shared, missing and too large blocks, starts inside of a block, an empty sequence, positions behind the last column."""
    table, starts, ends = [[1, 4, 0], [1, -1, 5], [3, 9, 2]], [2, 0, 7], [1, 12, 12, 19]
    slots = []
    for row in range(21):
        sequence = next((n for n in range(3) if ends[n] <= row < ends[n + 1]), None)
        position = None if sequence is None else starts[sequence] + row - ends[sequence]
        known = position is not None and position // SIZE < 3
        block = table[sequence][position // SIZE] if known else -1
        slots.append(block * SIZE + position % SIZE if block >= 0 else -1)
    assert slots[11] == -1  # the first sequence's position 12
    assert sum(0 <= slot < BLOCKS * SIZE for slot in slots) > 8
    names = {"block_table": table, "cu_seqlens": ends, "starts": starts}
    return slots, {name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in names.items()}


@everywhere
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 24, 5])
@pytest.mark.parametrize("where", [by_slots, by_block_table])
def test_gathered_rows(device, backend, dtype, width, where):
    generator = torch.Generator().manual_seed(width)
    patterns = torch.randint(0, 256, (BLOCKS * SIZE, width), generator=generator).to(torch.uint8)
    table = torch.arange(256, dtype=torch.uint8).view(F8).float()
    values = (table[patterns.long()].double() * float(torch.tensor(SCALE))).float().to(dtype)  # exact but for the last rounding
    slots, options = where(device)
    wanted = torch.stack([values[slot] if 0 <= slot < len(values) else torch.zeros(width, dtype=dtype) for slot in slots])
    for cache_form, outside_form in forms():
        _, cache = cache_of(cache_form, width, device)
        cache.view(torch.uint8).copy_(patterns.view(BLOCKS, SIZE, width))
        memory, out = outside_of(outside_form, len(slots), width, dtype, device, fill=77.0)
        gather_latents(cache, **options, scale=torch.tensor([SCALE], device=device), out=out, backend=backend)
        assert torch.equal(out.cpu().nan_to_num(99.0), wanted.nan_to_num(99.0)), (cache_form, outside_form)
        assert int((memory == 77).sum()) == memory.numel() - out.numel(), (cache_form, outside_form)


@everywhere
@pytest.mark.parametrize("width", [2**25 - 1, 2**25 - 16, 2**25 + 16])
def test_rows_of_many_accesses(device, backend, width):
    """Bytes by ones, just fewer than there may be, and by sixteens; on the CPU, where there is no limit, fewer."""
    width -= 0 if device == "cuda" else 2**25 - 2**15
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randint(0, 256, (2, width), dtype=torch.uint8, device=device, generator=generator)
    cache = torch.zeros(3, width, dtype=torch.uint8, device=device)
    write_latent_cache(latents, cache, torch.tensor([2, 0], device=device), backend=backend)
    assert torch.equal(cache[[2, 0]], latents)
    assert not cache[1].any()
    got = gather_latents(cache, torch.tensor([0, 5, 2], dtype=torch.int32, device=device), backend=backend)
    assert torch.equal(got[[2, 0]], latents)
    assert not got[1].any()


@pytest.mark.gpu
def test_rows_of_too_many_accesses():
    """Refused before anything is launched; a kernel would divide by numbers that it has no room for."""
    width = 2**25 + 1
    cache, latents = (torch.zeros(2, width, dtype=torch.uint8, device="cuda") for _ in range(2))
    slots = torch.tensor([1, 0], device="cuda")
    latents += 1
    with pytest.raises(RuntimeError, match=r"write_latent_cache: a row must be smaller than 2\*\*25 accesses"):
        write_latent_cache(latents, cache, slots, backend="cuda")
    with pytest.raises(RuntimeError, match=r"gather_latents: a row must be smaller than 2\*\*25 accesses"):
        gather_latents(latents, slots.int(), out=cache, backend="cuda")
    small = torch.zeros(2, width, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match=r"gather_latents: a row must be smaller than 2\*\*25 accesses"):
        gather_latents(cache.view(F8), slots.int(), scale=torch.ones(1, device="cuda"), out=small, backend="cuda")
    with pytest.raises(RuntimeError, match=r"a row must be smaller than 2\*\*25 accesses, got 33554432 bytes"):
        concat_k(latents[:, None, 1:], latents[:, :1], out=cache[:, None], backend="cuda")
    assert not cache.any()
    assert not small.any()


def test_the_table_of_float8_is_the_format():
    """Halves between neighbours go to the even pattern, as conversions of torch do."""
    table = torch.arange(127, dtype=torch.uint8).view(F8).float()
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat([middles, -middles, table, middles * 1.001, middles * 0.999, torch.tensor([447.9, -0.0])])
    assert torch.equal(as_float8(values.double()), values.to(F8).view(torch.uint8))
    assert list(itertools.islice(as_float8(torch.tensor([1e9, -1e9, math.nan])).tolist(), 3)) == [0x7E, 0xFE, 0x7F]
