"""write_latent_cache, gather_latents and concat_k, row by row."""

from __future__ import annotations

import torch

from pcp_mla import concat_k, gather_latents, write_latent_cache
from stress.compare import EPS32, close, same_bits
from stress.draw import Draw
from stress.expected import refused
from stress.families import DEVICE, Arguments, Family, backends
from stress.memory import bits, blank, dtype_of, outside_untouched, place, put, random_bytes, random_numbers
from stress.rows import DTYPES

FLOAT8 = torch.float8_e4m3fn
BACKENDS = backends("write_latent_cache")
FLOATS = ["bfloat16", "float16", "float32"]


def draw_cache(draw: Draw, backend: str) -> Arguments:
    small = backend == "triton" and DEVICE == "cpu"
    block = draw.choice([None, 1, 2, 4, 7, 16])
    return {
        "device": DEVICE,
        "backend": backend,
        "blocks": draw.int(1, 8 if block else 60),
        "block_size": block,
        "width": draw.choice([1, 2, 5, 8, 24] if small else [1, 2, 5, 8, 24, 64, 72, 576]),
        "scale": draw.choice([None, None, 0.01, 0.5, 3.0]),
        "dtype": draw.choice(DTYPES),
        "scaled_dtype": draw.choice(FLOATS),
        "seed": draw.seed(),
        "cache_view": draw.view(3 if block else 2),
    }


def slots_of(case_blocks: int, block_size: int | None) -> int:
    return case_blocks * (block_size or 1)


def outside(draw: Draw, slots: int, bits_wide: int) -> int:
    """A slot that is none."""
    return draw.choice([-1, -1, slots, slots + 1, -(2**31), 2 ** (bits_wide - 1) - 1, -slots])


def draw_write(draw: Draw) -> Arguments:
    case = draw_cache(draw, draw.choice(BACKENDS))
    slots = slots_of(case["blocks"], case["block_size"])
    rows = draw.int(0, slots)
    wanted = draw.shuffled(slots)[:rows]
    wanted = [outside(draw, slots, 64) if draw.chance(0.15) else slot for slot in wanted]
    wanted += [outside(draw, slots, 64) for _ in range(draw.choice([0, 0, 3]))]
    return case | {"slot_mapping": wanted, "view": draw.view(2)}


def check_write_latent_cache(
    device, backend, blocks, block_size, width, scale, dtype, scaled_dtype, seed, cache_view, slot_mapping, view
) -> None:
    kind = dtype_of(scaled_dtype if scale is not None else dtype)
    rows = len(slot_mapping)
    if scale is None:
        latents = random_bytes((rows, width), kind, seed)
    else:
        latents = random_numbers((rows, width), kind, seed, 3.0)
        latents[:, ::7] *= 1000  # past what float8 holds
        latents[torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.02] = -torch.inf
    shape = (blocks, width) if block_size is None else (blocks, block_size, width)
    cache = blank(shape, FLOAT8 if scale is not None else kind, device, cache_view)
    start = random_bytes(shape, cache.tensor.dtype, seed + 1)
    put(cache.tensor, start.to(device))
    write_latent_cache(
        place(latents, view, device),
        cache.tensor,
        torch.tensor(slot_mapping, dtype=torch.int64, device=device),
        scale=None if scale is None else torch.tensor(scale, device=device),
        backend=backend,
    )
    got, before = bits(cache.tensor).flatten(0, -2), bits(start).flatten(0, -2)
    written = {slot: n for n, slot in enumerate(slot_mapping) if 0 <= slot < len(before)}
    others = [slot for slot in range(len(before)) if slot not in written]
    assert torch.equal(got[others], before[others]), "slots that nobody names changed"
    rows_in = latents[list(written.values())]
    result = got[list(written)].view(cache.tensor.dtype)
    if scale is None:
        same_bits("cache", result, rows_in)
    else:
        exact = (rows_in.double() / torch.tensor(scale).double()).clamp(-448, 448)
        close("cache", result, exact, exact.abs() * 2 * EPS32)
    assert outside_untouched(cache)


def draw_gather(draw: Draw) -> Arguments:
    case = draw_cache(draw, draw.choice(BACKENDS))
    slots, block = slots_of(case["blocks"], case["block_size"]), case["block_size"] or 1
    rows = table = starts = None
    sequences: list[int] = []
    if draw.chance(0.5):
        rows = [outside(draw, slots, 32) if draw.chance(0.15) else draw.int(0, slots - 1) for _ in range(draw.size(80))]
        count = len(rows)
    else:
        number, columns = draw.int(0, 4), draw.int(0, 5)
        table = [
            [draw.choice([-1, case["blocks"]]) if draw.chance(0.1) else draw.int(0, case["blocks"] - 1) for _ in range(columns)]
            for _ in range(number)
        ]
        lengths = [draw.int(0, block * (columns + 1)) for _ in range(number)]
        sequences = [draw.choice([0, 0, 2])]
        for length in lengths:
            sequences.append(sequences[-1] + length)
        starts = [draw.int(0, block * (columns + 1)) for _ in range(number)] if draw.chance(0.6) else None
        count = max(0, sequences[-1] + draw.choice([-1, 0, 0, 2]))
    return case | {
        "rows": rows,
        "table": table,
        "table_gap": draw.choice([0, 0, 3]),
        "cu_seqlens": sequences,
        "starts": starts,
        "count": count,
        "out": draw.chance(0.5),
        "out_view": draw.view(2),
    }


def check_gather_latents(
    device, backend, blocks, block_size, width, scale, dtype, scaled_dtype, seed, cache_view, rows, table, table_gap, cu_seqlens,
    starts, count, out, out_view,
) -> None:  # fmt: skip
    shape = (blocks, width) if block_size is None else (blocks, block_size, width)
    kind = dtype_of(scaled_dtype if scale is not None else dtype)
    values = random_bytes(shape, FLOAT8 if scale is not None else kind, seed)
    if scale is not None:
        values = random_numbers(shape, FLOAT8, seed, 20.0)
    flat, block = values.flatten(0, -2), block_size or 1
    slots = [-1] * count if rows is None else list(rows)
    for r, places in enumerate(table or []):
        for n in range(cu_seqlens[r], min(cu_seqlens[r + 1], count)):
            token = (0 if starts is None else starts[r]) + n - cu_seqlens[r]
            if token // block < len(places) and places[token // block] >= 0:
                slots[n] = places[token // block] * block + token % block
    target = blank((count, width), kind, device, out_view)

    def numbers(given: list[int] | None) -> torch.Tensor | None:
        return None if given is None else torch.tensor(given, dtype=torch.int32, device=device)

    given_table = None
    if table is not None:
        columns = len(table[0]) if table else 0
        wide = torch.full((len(table), columns + table_gap), 0, dtype=torch.int32)
        wide[:, :columns] = torch.tensor(table, dtype=torch.int32).view(len(table), columns)
        given_table = wide.to(device)[:, :columns]
    got = gather_latents(
        place(values, cache_view, device),
        numbers(rows),
        block_table=given_table,
        cu_seqlens=numbers(cu_seqlens) if table is not None else None,
        starts=numbers(starts),
        num_rows=count if table is not None else None,
        scale=None if scale is None else torch.tensor(scale, device=device),
        dtype=kind if scale is not None and not out else None,
        out=target.tensor if out else None,
        backend=backend,
    )
    found = [0 <= slot < len(flat) for slot in slots]
    index = [slot if there else 0 for slot, there in zip(slots, found, strict=True)]
    nothing = ~torch.tensor(found, dtype=torch.bool)
    if scale is None:
        wanted = torch.zeros(count, width, dtype=kind)
        put(wanted, torch.where(nothing[:, None], 0, bits(flat)[index]).view(kind))
        same_bits("out", got, wanted)
    else:
        exact = torch.where(nothing[:, None], 0, flat[index].double() * torch.tensor(scale).double())
        close("out", got, exact, exact.abs() * 2 * EPS32)
    if out:
        assert outside_untouched(target)


def draw_concat(draw: Draw) -> Arguments:
    backend = draw.choice(BACKENDS)
    small = backend == "triton" and DEVICE == "cpu"
    return {
        "device": DEVICE,
        "backend": backend,
        "tokens": draw.size(10 if small else 120),
        "heads": draw.int(1, 5),
        "nope": draw.choice([1, 3, 8, 16, 33] if small else [1, 3, 8, 16, 33, 64, 128]),
        "rope": draw.choice([1, 2, 8, 16] if small else [1, 2, 8, 16, 64]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.seed(),
        "views": [draw.view(3), draw.view(2), draw.view(3)],
        "middle": draw.chance(0.3),
        "out": draw.choice([None, "new", "new", "around"]),
    }


def check_concat_k(device, backend, tokens, heads, nope, rope, dtype, seed, views, middle, out) -> None:
    kind = dtype_of(dtype)
    k_nope, k_pe = random_bytes((tokens, heads, nope), kind, seed), random_bytes((tokens, rope), kind, seed + 1)
    wanted = blank((tokens, heads, nope + rope), kind, "cpu").tensor
    for n in range(tokens):
        for head in range(heads):
            put(wanted[n, head, :nope], k_nope[n, head])
            put(wanted[n, head, nope:], k_pe[n])
    target = blank(tuple(wanted.shape), kind, device, views[2])
    pe = place(k_pe, views[1], device)
    if out == "around":  # the result's own memory is k_nope
        inside = target.tensor[..., :nope]
        if tokens:
            refused(lambda: concat_k(inside, pe, out=target.tensor, backend=backend), "concat_k", "out")
        return
    nope_given = place(k_nope, views[0], device)
    got = concat_k(nope_given, pe[:, None] if middle else pe, out=None if out is None else target.tensor, backend=backend)
    same_bits("out", got, wanted)
    assert outside_untouched(target)


FAMILIES = [
    Family(draw_write, check_write_latent_cache),
    Family(draw_gather, check_gather_latents),
    Family(draw_concat, check_concat_k),
]
