"""kv_up_project against products in float64."""

from __future__ import annotations

import torch

from pcp_mla import kv_up_project
from pcp_mla.plan.dims import MLADims
from stress.compare import EPS32, close, same_bits
from stress.draw import Draw
from stress.families import DEVICE, Arguments, Family, backends
from stress.memory import Placed, bits, blank, dtype_of, outside_untouched, place, random_numbers

BACKENDS = backends("kv_up_project")
if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
    BACKENDS.remove("cuda")
WIDE = [(2, 128, 64, 128, 512), (5, 192, 64, 256, 512), (3, 64, 32, 64, 64), (1, 64, 64, 128, 128), (17, 128, 64, 128, 320)]
TILE = 128  # rows behind the last one are zeroed up to a multiple of this


def draw_dims(draw: Draw, backend: str) -> tuple[int, ...]:
    """heads, nope, rope, v, kv_lora_rank."""
    if backend == "cuda" or (DEVICE == "cuda" and draw.chance(0.5)):
        return draw.choice(WIDE)
    small = [draw.choice([1, 2, 5, 8, 16, 24]) for _ in range(4)]
    return (draw.int(1, 3), small[0], small[1], small[2], draw.choice([1, 3, 16, 40, small[3]]))


def draw_up_project(draw: Draw) -> Arguments:
    backend = draw.choice(BACKENDS)
    slots = draw.size(40) or 1
    block = draw.choice([None, 1, 4, 16])
    rows = None
    if draw.chance(0.8):
        total = slots * (block or 1)
        rows = [draw.choice([-1, -1, total, 2**31 - 1]) if draw.chance(0.15) else draw.int(0, total - 1)
                for _ in range(draw.size(150 if DEVICE == "cuda" else 40))]  # fmt: skip
    count = len(rows) if rows is not None else slots * (block or 1)
    scale = draw.choice([0.02, 1.5]) if draw.chance(0.15) else None
    linear = draw.choice(["module", "tuple", "view"]) if draw.chance(0.2) else None
    apart = (None if backend == "cuda" else draw.view(2),) if draw.chance(0.4) else None
    given = draw.choice(["none", "none", "k", "v", "all", *(["k_pe"] if apart else [])])
    dtype = draw.choice(["bfloat16", "float16"] if backend == "cuda" else ["bfloat16", "float16", "float32"])
    if scale is not None and linear and given == "none":
        dtype = "bfloat16"  # nothing says another one
    return {
        "device": DEVICE,
        "backend": backend,
        "dims": draw_dims(draw, backend),
        "blocks": slots,
        "block_size": block,
        "rows": rows,
        "dtype": dtype,
        "scale": scale,
        "linear": linear,
        "seed": draw.seed(),
        "view": None if backend == "cuda" else draw.view(3 if block else 2),
        "weight_view": None if backend == "cuda" else draw.choice([None, ((0,), 1, 0, 3, 0), ((0,), 2, 0, 0, 1)]),
        "k_out": (count + draw.choice([0, 0, 1, 130, 300]), None if backend == "cuda" else draw.view(3)),
        "given": given,
        "apart": apart,
        "together": draw.chance(0.5),
        "v_view": None if backend == "cuda" else draw.view(3),
    }


def check_kv_up_project(
    device,
    backend,
    dims,
    blocks,
    block_size,
    rows,
    dtype,
    scale,
    linear,
    seed,
    view,
    weight_view,
    k_out,
    given,
    apart,
    together,
    v_view,
) -> None:
    """``apart``: None, or how the k_pe that is given lies in memory, in a tuple of its own."""
    sizes, kind = MLADims(*dims), dtype_of(dtype)
    heads, nope, rope, v_dim, rank = dims
    shape = (blocks, rank + rope) if block_size is None else (blocks, block_size, rank + rope)
    latents = random_numbers(shape, kind if scale is None else torch.float8_e4m3fn, seed)
    weight = random_numbers((heads * (nope + v_dim), rank), kind, seed + 1, rank**-0.5)
    flat = latents.flatten(0, -2)
    index = list(range(len(flat))) if rows is None else rows
    found = torch.tensor([0 <= row < len(flat) for row in index], dtype=torch.bool)
    picked = flat[[row if there else 0 for row, there in zip(index, found.tolist(), strict=True)]]
    # With a scale the latents are rounded to their type first, as gather_latents would.
    used = picked if scale is None else (picked.float() * torch.tensor(scale)).to(kind)
    used = torch.where(found[:, None], used.double(), 0)
    exact = torch.einsum("nc,hoc->nho", used[:, :rank], weight.double().view(heads, nope + v_dim, rank))
    size = torch.einsum("nc,hoc->nho", used[:, :rank].abs(), weight.double().abs().view(heads, nope + v_dim, rank))
    slack = size * (rank + 2) ** 0.5 * EPS32  # of sums in float32, in any order

    room, k_dim = k_out[0], nope + rope if apart is None else nope
    k_target = blank((room, heads, k_dim), kind, device, k_out[1])
    v_target = blank((room, heads, v_dim), kind, device, v_view)
    pe_target = blank((room, rope), kind, device, apart and apart[0])
    whole = blank((room, heads, k_dim + v_dim), kind, device, k_out[1])
    if together and given == "all":  # K and V of a head side by side, as the projection has them
        k_target, v_target = (Placed(x, whole.buffer) for x in whole.tensor.split([k_dim, v_dim], dim=2))
    given_weight = place(weight, weight_view, device)

    def module(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        product = torch.nn.functional.linear(x, given_weight.contiguous())
        if linear == "view":
            wide = product.new_empty(len(product), product.shape[1] + 8)
            wide[:, 8:] = product
            return wide[:, 8:]
        return (product, None) if linear == "tuple" else product

    results = kv_up_project(
        place(latents, view, device),
        None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device),
        None if linear else given_weight,
        sizes,
        linear=module if linear else None,
        scale=None if scale is None else torch.tensor(scale, device=device),
        k_out=k_target.tensor if given in ("k", "all") else None,
        v_out=v_target.tensor if given in ("v", "all") else None,
        k_pe_apart=apart is not None,
        k_pe_out=pe_target.tensor if apart and given in ("k_pe", "all") else None,
        backend="auto" if linear else backend,
    )
    count = len(index)
    total = count if given == "none" else room
    k, v, k_pe = results if apart else (*results, None)
    for x in results:
        assert len(x) == total, f"K, V and k_pe have {[len(x) for x in results]} rows, not {total}"
        assert x.dtype == kind
    close("k", k[:count, :, :nope], exact[..., :nope], slack[..., :nope])
    close("v", v[:count], exact[..., nope:], slack[..., nope:])
    if k_pe is None:
        same_bits("k_pe", k[:count, :, nope:].cpu(), used[:, None, rank:].to(kind).expand(-1, heads, -1))
    else:
        assert k.shape[2] == nope
        same_bits("k_pe", k_pe[:count].cpu(), used[:, rank:].to(kind))
    zeroed = min(total, -(-count // TILE) * TILE)
    for name, got, target in zip(("k", "v", "k_pe"), results, (k_target, v_target, pe_target), strict=False):
        assert not got[count:zeroed].cpu().any(), f"{name}: rows behind the last one must be zeros up to a multiple of {TILE}"
        if got is target.tensor:
            assert (bits(got[zeroed:]) == -1).all(), f"{name}: rows behind the zeroed ones must stay as they are"
            assert outside_untouched(whole if target.buffer is whole.buffer else target)


FAMILIES = [Family(draw_up_project, check_kv_up_project)]
