"""MLAPrefill on played ranks against latents that are expanded and attended to in float64, sequence by sequence."""

from __future__ import annotations

import numpy as np
import torch

from pcp_mla import HeadExchange, LatentExchange, MLAPrefill
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.played import play
from stress.attention import backends, can
from stress.compare import EPS32, close, same_bits
from stress.draw import Draw
from stress.families import DEVICE, Arguments, Family
from stress.memory import blank, dtype_of, outside_untouched, place, put, random_numbers
from stress.plain_attention import plain_attention
from stress.plain_plan import Cache, PlainPlan
from stress.steps import draw_padding, draw_step, draw_workspace, metadata


def draw_layer(draw: Draw) -> Arguments:
    backend = draw.choice(backends()) if DEVICE == "cuda" or draw.chance(0.3) else "auto"  # the interpreter takes seconds
    slow = backend == "triton" and DEVICE == "cpu"
    world = draw.choice([1, 2, 3] if slow else [1, 2, 3, 4, 8])
    step = draw_step(draw, **({"most": 2, "high": 9} if slow else {"most": 5, "high": 30}), world=world)
    del step["rank"]
    cached = draw.chance(0.75)
    if not cached:
        step["context_lens"] = [0] * len(step["query_lens"])
    whole = step | {"rank": 0}
    if DEVICE == "cuda" and draw.chance(0.5):
        dims = draw.choice([(2, 128, 64, 128, 512), (3, 64, 64, 64, 128)])
    else:
        dims = (draw.int(1, 3), *(draw.choice([1, 2, 5, 8, 16]) for _ in range(4)))
    dtype = draw.choice(["float32", "float32", "float64", "bfloat16", "float16"])
    weight, split = draw.choice(["tensor", "linear", "hooked", "pre-hooked", "patched", "subclass"]), "tokens"
    if weight in ("tensor", "linear") and draw.chance(0.5):
        dims, split = (draw.int(world, world + 3), *dims[1:]), "heads"
    if not can(backend, dtype_of(dtype), dims[1] + dims[2], dims[3], False, shares_starts=True):
        backend = "auto"
    return {
        "device": DEVICE,
        "backend": backend,
        "step": step,
        "padding": draw_padding(draw, whole),
        "workspace": draw_workspace(draw, whole) if cached else None,
        "block_size": draw.choice([1, 4, 16]) if cached else None,
        "dims": dims,
        "dtype": dtype,
        "scale": draw.choice([0.1, 0.35]),
        "cache_scale": draw.choice([0.004, 0.3, 1.0]) if cached and dtype != "float64" and draw.chance(0.3) else None,
        "weight": weight,
        "split": split,
        "seed": draw.seed(),
        "views": [draw.view(3), draw.view(2), draw.view(2)],
        "cache_view": draw.view(3),
        "pads": draw.chance(0.5),
    }


class Projection(torch.nn.Linear):
    """A module that is not a plain one."""


def projection(kind: str, weight: torch.Tensor) -> torch.Tensor | torch.nn.Module:
    """kv_b_proj in one of the forms that callers have."""
    if kind == "tensor":
        return weight
    rows, columns = weight.shape
    of = Projection if kind == "subclass" else torch.nn.Linear
    module = of(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
    module.weight.data = weight if kind in ("linear", "subclass") else weight / 2  # halves are exact, and so is what doubles them
    if kind == "hooked":
        module.register_forward_hook(lambda _, inputs, output: output * 2)
    elif kind == "pre-hooked":
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    elif kind == "patched":
        module.forward = lambda x: torch.nn.functional.linear(x, weight)
    return module.requires_grad_(False)


def check_MLAPrefill(
    device,
    backend,
    step,
    padding,
    workspace,
    block_size,
    dims,
    dtype,
    scale,
    cache_scale,
    weight,
    split,
    seed,
    views,
    cache_view,
    pads,
) -> None:
    """``cache_scale``: of a float8 cache, as which every token is attended to."""
    sizes, kind = MLADims(*dims), dtype_of(dtype)
    heads, nope, rope, v_dim, lora = dims
    world, lengths, contexts = step["world_size"], step["query_lens"], step["context_lens"]
    new = random_numbers((sum(lengths), lora + rope), kind, seed)
    old = random_numbers((sum(contexts), lora + rope), kind, seed + 1)
    queries = random_numbers((sum(lengths), heads, nope + rope), kind, seed + 2)
    matrix = random_numbers((heads * (nope + v_dim), lora), kind, seed + 3, lora**-0.5)

    # Every sequence on its own: its tokens, the queries that see them, and where the tokens lie.
    columns = max([1, *(-(-(a + b) // (block_size or 1)) + 1 for a, b in zip(contexts, lengths, strict=True))])
    tables = np.random.default_rng(seed).permutation(max(1, len(lengths)) * columns).reshape(-1, columns).astype(np.int32)
    paged = Cache(block_size or 1, 1, 0, 1)
    factor = None if cache_scale is None else torch.tensor([cache_scale])
    cache_kind = kind if factor is None else torch.float8_e4m3fn
    exact = torch.zeros(sum(lengths), heads, v_dim, dtype=torch.float64)
    slack = torch.zeros_like(exact)
    stored: dict[int, torch.Tensor] = {}
    before: dict[int, torch.Tensor] = {}
    first = cached = 0
    for request, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        tokens = held = torch.cat([old[cached : cached + context], new[first : first + length]])
        if factor is not None:
            held = (tokens.float() / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
            tokens = (held.float() * factor).to(kind)
        seen = [list(range(context + i + 1)) for i in range(length)]
        mine = slice(first, first + length)
        exact[mine], slack[mine] = expanded_attention(queries[mine], tokens, matrix, seen, dims, scale, kind, workspace is not None)
        for position, token in enumerate(held):
            slot = paged.slot(tables[request].tolist(), position)
            stored[slot] = token
            if position < context:
                before[slot] = token
        first, cached = first + length, cached + context

    def rank(group) -> None:
        plan = PlainPlan(**step, rank=group.rank)
        shape = (tables.size, block_size or 1, lora + rope)
        cache = blank(shape, cache_kind, device, cache_view)
        flat = blank((tables.size * (block_size or 1), lora + rope), cache_kind, "cpu").tensor
        for slot, token in before.items():
            put(flat[slot], token)
        put(cache.tensor, flat.view(shape).to(device))
        given_tables = None if block_size is None else tables[: len(lengths)]
        meta = metadata(step | {"rank": group.rank}, device, padding, workspace, given_tables, block_size or 1)
        local = plan.local_token_indices()
        room = len(local) if padding is None or not pads else padding["num_tokens_padded"]

        def laid(values: torch.Tensor, view) -> torch.Tensor:
            wide = torch.full((room, *values.shape[1:]), 30.0, dtype=kind)  # of pads: a token that sees one shows it
            for i, token in enumerate(local):
                if token >= 0:
                    wide[i] = values[token]
            return place(wide, view, device)

        form = (group, meta.num_tokens_padded, sizes, kind, device)
        by_heads = HeadExchange(*form) if split == "heads" else None
        layer = MLAPrefill(sizes, scale, LatentExchange(*form), backend, by_heads, split)
        latents = laid(new, views[1])
        got = layer(
            laid(queries, views[0]),
            latents[:, :lora],
            latents[:, lora:],
            projection(weight, matrix.to(device)),
            meta,
            None if block_size is None else cache.tensor,
            scale=None if factor is None else factor.to(device),
        )
        assert len(got) == room
        real = [i for i, token in enumerate(local) if token >= 0]
        tokens = [local[i] for i in real]
        close(f"out of rank {group.rank}", got[real], exact[tokens], slack[tokens])
        if block_size is None:
            return
        wanted = flat.clone()
        for slot, token in stored.items():
            put(wanted[slot], token)
        same_bits(f"cache of rank {group.rank}", cache.tensor.flatten(0, 1).cpu(), wanted)
        assert outside_untouched(cache)

    with torch.no_grad():
        play(world, rank)


def expanded_attention(
    queries: torch.Tensor,
    latents: torch.Tensor,
    matrix: torch.Tensor,
    seen: list[list[int]],
    dims: tuple[int, ...],
    scale: float,
    kind: torch.dtype,
    chunked: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and what it may be off by: K and V are rounded to ``kind`` once, which shifts a score by at most that rounding times
    the sizes of its terms, and an output by it times the largest value. Each merge of chunks rounds once more and weighs by LSEs
    in float32."""
    heads, nope, _, v_dim, lora = dims
    both = torch.einsum("nc,hoc->nho", latents[:, :lora].double(), matrix.double().view(heads, nope + v_dim, lora))
    sizes = torch.einsum("nc,hoc->nho", latents[:, :lora].double().abs(), matrix.double().abs().view(heads, nope + v_dim, lora))
    keys = torch.cat([both[..., :nope], latents[:, None, lora:].double().expand(-1, heads, -1)], dim=2)
    values = both[..., nope:]
    out, _, slack, _ = plain_attention(queries, keys, values, seen, scale, kind)
    rounded = torch.finfo(kind).eps / 2
    sums = (2.0**-52 if kind == torch.float64 else EPS32) * (lora + 2) ** 0.5
    for t, rows in enumerate(seen):
        q = queries[t, :, :nope].double().abs()
        terms = keys[rows][..., :nope].abs() * rounded + sizes[rows][..., :nope] * sums
        shift = torch.einsum("hd,mhd->hm", q, terms).amax(1) * scale
        weight = values[rows].abs().amax(0)
        slack[t] += weight * (2 * shift[:, None] + rounded) + sums * sizes[rows][..., nope:].amax(0)
        if chunked:
            slack[t] += weight * (2 * rounded + 16 * EPS32)
    return out, slack


FAMILIES = [Family(draw_layer, check_MLAPrefill)]
