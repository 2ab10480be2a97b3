"""Which kernel of kv_up_project takes which tensors, each reason against the Hopper kernel apart from the others, and what that
kernel says itself where it is called by name: results against float64."""

import math

import pytest
import torch

from pcp_mla import kv_up_project
from pcp_mla.ops import kv_up_project as module
from pcp_mla.ops import native
from pcp_mla.plan.dims import MLADims

PLAIN = MLADims(2, 64, 64, 64, 128)
ROWS, BLOCK = 70, 5
NAMES = ("latents", "rows", "weight", "scale", "k", "v", "k_pe")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
on_hopper = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="the CUDA kernel is for Hopper")

with_direct = pytest.mark.skipif(native.direct is None, reason="no calls past the dispatcher here")

# Widths, dtype and what is odd about a tensor: numbers between its rows, between its heads (or blocks), before its first. Where
# there is something of k_pe it goes apart; where there is something of a scale latents are float8.
CASES = {
    "plain": ({}, torch.bfloat16, {}, "cuda"),
    "float16": ({}, torch.float16, {}, "cuda"),
    "multiples of 16 bytes": (
        {},
        torch.bfloat16,
        {"latents": (8, 16, 8), "weight": (8, 0, 8), "k": (8, 8, 8), "v": (8, 8, 8)},
        "cuda",
    ),
    "widest rank": ({"kv_lora_rank": 512}, torch.bfloat16, {}, "cuda"),
    "rank above 512": ({"kv_lora_rank": 576}, torch.bfloat16, {}, "triton"),
    "odd rank": ({"kv_lora_rank": 80}, torch.bfloat16, {}, "triton"),
    "odd nope": ({"qk_nope_head_dim": 96}, torch.bfloat16, {}, "triton"),
    "odd v": ({"v_head_dim": 72}, torch.bfloat16, {}, "triton"),
    "odd rope": ({"qk_rope_head_dim": 60}, torch.bfloat16, {"latents": (4, 0, 0), "k": (0, 4, 0)}, "triton"),
    "wide rope": ({"qk_rope_head_dim": 72}, torch.bfloat16, {}, "triton"),
    "float32": ({}, torch.float32, {}, "triton"),
    "float64": ({}, torch.float64, {}, "reference"),
    "row stride of the latents": ({}, torch.bfloat16, {"latents": (4, 4, 0)}, "triton"),
    "block stride of the latents": ({}, torch.bfloat16, {"latents": (0, 4, 0)}, "triton"),
    "address of the latents": ({}, torch.bfloat16, {"latents": (0, 0, 4)}, "triton"),
    "row stride of the weight": ({}, torch.bfloat16, {"weight": (4, 0, 0)}, "triton"),
    "address of the weight": ({}, torch.bfloat16, {"weight": (0, 0, 4)}, "triton"),
    "row stride of K": ({}, torch.bfloat16, {"k": (4, 0, 0)}, "triton"),
    "head stride of K": ({}, torch.bfloat16, {"k": (0, 4, 0)}, "triton"),
    "address of K": ({}, torch.bfloat16, {"k": (0, 0, 4)}, "triton"),
    "row stride of V": ({}, torch.float16, {"v": (4, 0, 0)}, "triton"),
    "head stride of V": ({}, torch.float16, {"v": (0, 4, 0)}, "triton"),
    "address of V": ({}, torch.float16, {"v": (0, 0, 4)}, "triton"),
    "apart": ({}, torch.bfloat16, {"k_pe": (0, 0, 0)}, "cuda"),
    "apart at multiples of 16 bytes": ({}, torch.float16, {"k": (8, 8, 8), "k_pe": (8, 0, 8)}, "cuda"),
    "narrow rope apart": ({"qk_rope_head_dim": 32}, torch.bfloat16, {"k_pe": (0, 0, 0)}, "cuda"),
    "no rope apart": ({"qk_rope_head_dim": 0}, torch.bfloat16, {"k_pe": (0, 0, 1)}, "cuda"),
    "odd nope apart": ({"qk_nope_head_dim": 96, "qk_rope_head_dim": 32}, torch.bfloat16, {"k_pe": (0, 0, 0)}, "triton"),
    "odd rope apart": ({"qk_rope_head_dim": 60}, torch.bfloat16, {"latents": (4, 0, 0), "k_pe": (4, 0, 0)}, "triton"),
    "row stride of k_pe": ({}, torch.bfloat16, {"k_pe": (4, 0, 0)}, "triton"),
    "address of k_pe": ({}, torch.bfloat16, {"k_pe": (0, 0, 4)}, "triton"),
    "head stride of K apart": ({}, torch.bfloat16, {"k": (0, 4, 0), "k_pe": (0, 0, 0)}, "triton"),
    "float8 latents": ({}, torch.bfloat16, {"scale": 0.02}, "cuda"),
    "float8 latents, float16": ({"qk_rope_head_dim": 8}, torch.float16, {"scale": 0.3, "k_pe": (0, 0, 0)}, "cuda"),
    "float8 latents at multiples of 8 bytes": ({}, torch.bfloat16, {"latents": (8, 8, 8), "scale": 0.02}, "cuda"),
    "row stride of float8 latents": ({}, torch.bfloat16, {"latents": (4, 4, 0), "scale": 0.02}, "triton"),
    "block stride of float8 latents": ({}, torch.bfloat16, {"latents": (0, 4, 0), "scale": 0.02}, "triton"),
    "address of float8 latents": ({}, torch.bfloat16, {"latents": (0, 0, 4), "scale": 0.02}, "triton"),
    "float8 latents, float32": ({}, torch.float32, {"scale": 0.02}, "triton"),
}


def placed(shape, odd, dtype, device, fill=math.nan):
    """A tensor of two or three dimensions in a buffer that is full of ``fill``."""
    rows, outer, first = odd
    row = shape[-1] + (rows if len(shape) < 3 else 0)
    if len(shape) == 2:
        strides = (row, 1)
    else:  # K and V: heads have gaps of ``outer``, rows of ``rows`` behind the last head
        head = shape[2] + outer
        strides = (shape[1] * head + rows, head, 1)
    size = first + shape[0] * strides[0]
    return torch.full((size,), fill, dtype=dtype, device=device).as_strided(shape, strides, first)


def paged(slots, odd, dtype, device):
    """Latents in blocks, with gaps behind a row and behind a block."""
    rows, blocks, first = odd
    count, width = slots.shape
    row = width + rows
    block = BLOCK * row + blocks
    memory = torch.full((first + count // BLOCK * block,), math.nan, device=device).to(dtype)
    cache = memory.as_strided((count // BLOCK, BLOCK, width), (block, row, 1), first)
    cache.copy_(slots.view(count // BLOCK, BLOCK, width))
    return cache


def made(case, device):
    changes, dtype, odd, _ = CASES[case]
    dims = MLADims(**{**vars(PLAIN), **changes})
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2 * ROWS, dims.latent_dim, generator=generator).to(dtype)
    factors = (torch.randn(dims.num_heads * dims.expanded_dim, dims.kv_lora_rank, generator=generator) / 8).to(dtype)
    rows = torch.randint(-1, 2 * ROWS + 1, (ROWS,), generator=generator).int()
    none = (0, 0, 0)
    weight = placed(factors.shape, odd.get("weight", none), dtype, device)
    weight.copy_(factors)
    apart = "k_pe" in odd
    k_dim = dims.qk_nope_head_dim if apart else dims.qk_head_dim
    k = placed((ROWS, dims.num_heads, k_dim), odd.get("k", none), dtype, device)
    v = placed((ROWS, dims.num_heads, dims.v_head_dim), odd.get("v", none), dtype, device)
    k_pe = placed((ROWS, dims.qk_rope_head_dim), odd["k_pe"], dtype, device) if apart else None
    scale, held = None, values
    if "scale" in odd:
        scale, held = torch.tensor([odd["scale"]], device=device), (values.float() / odd["scale"]).to(torch.float8_e4m3fn)
        values = (held.float() * scale.cpu()).to(dtype)
    latents = paged(held, odd.get("latents", none), held.dtype, device)
    return dims, values, rows, factors, (latents, rows.to(device), weight, scale, k, v, k_pe)


def project(latents, listed, weight, scale, k, v, k_pe, dims, **options):
    """kv_up_project into these results."""
    options = {"scale": scale, "k_out": k, "v_out": v, "k_pe_apart": k_pe is not None, "k_pe_out": k_pe, **options}
    return kv_up_project(latents, listed, weight, dims, **options)


def check(dims, values, rows, factors, k, v, k_pe=None):
    """One rounding of float32 sums; k_pe to the bit, and zeros for rows that are none."""
    there = (rows >= 0) & (rows < len(values))
    x = values.double()[rows.clamp(0, len(values) - 1).long()] * there[:, None]
    rank, nope = dims.kv_lora_rank, dims.qk_nope_head_dim
    wanted = torch.einsum("nr,hdr->nhd", x[:, :rank], factors.double().view(dims.num_heads, -1, rank))
    size = torch.einsum("nr,hdr->nhd", x[:, :rank].abs(), factors.double().abs().view(dims.num_heads, -1, rank))
    got = torch.cat([k[..., :nope], v], dim=2).cpu()
    eps = torch.finfo(got.dtype).eps
    sums = 2**-52 if got.dtype == torch.float64 else 2**-23
    assert not ((got.double() - wanted).abs() > eps / 2 * wanted.abs() + rank**0.5 * sums * size).any()
    if k_pe is None:
        assert torch.equal(k[..., nope:].cpu().double(), x[:, None, rank:].expand(-1, dims.num_heads, -1))
    else:
        assert k.shape[2] == nope
        assert torch.equal(k_pe.cpu().double(), x[:, rank:])


@devices
@pytest.mark.parametrize("case", CASES)
def test_auto_takes(device, case, monkeypatch):
    """On the CPU as if it were a Hopper GPU, with the reference in the place of every kernel."""
    wanted = CASES[case][3]
    if device == "cuda" and not HOPPER:
        wanted = "triton" if wanted == "cuda" else wanted
    taken, stand_in = [], module.reference.kv_up_project

    def noted(name, call):
        def run(*arguments):
            taken.append(name)
            call(*arguments)

        return run

    if device == "cpu":
        monkeypatch.setattr(module, "_is_hopper", lambda device: True)
        monkeypatch.setattr(module, "HAS_TRITON", True)
        monkeypatch.setitem(native.status, "_native_cuda", "")
    wgmma, select = (stand_in, None) if device == "cpu" else (module._wgmma, module.select)
    monkeypatch.setattr(module, "_wgmma", noted("cuda", wgmma))
    monkeypatch.setattr(
        module, "select", lambda op, name, kind: noted(name, stand_in if select is None else select(op, name, kind))
    )
    monkeypatch.setattr(module.reference, "kv_up_project", noted("reference", stand_in))
    dims, values, rows, factors, tensors = made(case, device)
    module._on_cuda(*tensors)
    assert taken == [wanted]
    check(dims, values, rows, factors, *tensors[4:])
    if device == "cuda":  # the function, results allocated and given
        taken.clear()
        latents, listed, weight, scale, *outs = tensors
        for out in outs:
            if out is not None:
                out.fill_(math.nan)
        check(dims, values, rows, factors, *project(*tensors, dims))
        check(
            dims, values, rows, factors, *kv_up_project(latents, listed, weight, dims, scale=scale, k_pe_apart=outs[2] is not None)
        )
        assert taken[0] == wanted
        assert len(taken) == 2


@pytest.mark.gpu
@with_direct
@pytest.mark.parametrize("case", CASES)
def test_the_direct_call_takes_the_same(case, inference):
    dims, values, rows, factors, (latents, listed, weight, scale, *outs) = made(case, "cuda")
    taken = native.direct.kv_up_project(latents, listed, torch.nn.Parameter(weight, requires_grad=False), scale, *outs)
    assert taken == (HOPPER and CASES[case][3] == "cuda")
    if taken:
        check(dims, values, rows, factors, *outs)
    else:
        assert all(out.isnan().all() for out in outs if out is not None)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("rank", "wide"), [(576, 128), (640, 128), (640, 64)])
def test_more_of_a_rank_than_auto_gives_the_kernel(rank, wide, monkeypatch):
    """Down to three stages."""
    monkeypatch.setitem(
        CASES, "large", ({"qk_nope_head_dim": wide, "v_head_dim": wide, "kv_lora_rank": rank}, torch.bfloat16, {}, "")
    )
    dims, values, rows, factors, tensors = made("large", "cuda")
    check(dims, values, rows, factors, *project(*tensors, dims, backend="cuda"))


WIDTHS = "the CUDA kernel needs kv_lora_rank, nope and v in multiples of 64 and rope of 8, at most 64; got "
REFUSED = {
    "odd rank": WIDTHS + "80, 64, 64, 64",
    "odd nope": WIDTHS + "128, 96, 64, 64",
    "odd v": WIDTHS + "128, 64, 72, 64",
    "odd rope": WIDTHS + "128, 64, 64, 60",
    "wide rope": WIDTHS + "128, 64, 64, 72",
    "odd nope apart": WIDTHS + "128, 96, 64, 32",
    "odd rope apart": WIDTHS + "128, 64, 64, 60",
    "float32": "the CUDA kernel needs bfloat16 or float16",
    "float8 latents, float32": "the CUDA kernel needs bfloat16 or float16",
    "float64": "the CUDA kernel needs bfloat16 or float16",
    **{
        case: "the CUDA kernel needs rows at multiples of 16 bytes, float8 latents of 8"
        for case in CASES
        if " of " in case and "multiples" not in case
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", REFUSED)
def test_the_kernel_refuses(case):
    dims, *_, tensors = made(case, "cuda")
    with pytest.raises(RuntimeError, match=f"kv_up_project: {REFUSED[case]}"):
        project(*tensors, dims, backend="cuda")
    torch.cuda.synchronize()
    assert all(out.isnan().all() for out in tensors[4:] if out is not None)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("rank", "wide"), [(704, 128), (704, 64), (768, 64)])
def test_a_rank_that_needs_too_much_shared_memory(rank, wide, monkeypatch):
    monkeypatch.setitem(
        CASES, "large", ({"qk_nope_head_dim": wide, "v_head_dim": wide, "kv_lora_rank": rank}, torch.bfloat16, {}, "")
    )
    dims, *_, tensors = made("large", "cuda")
    with pytest.raises(RuntimeError, match=f"kv_up_project: kv_lora_rank {rank} needs more shared memory than there is"):
        project(*tensors, dims, backend="cuda")
    assert tensors[4].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": lambda x: x[0, 0]}, "latents must be .rows, width. or .num_blocks, block_size, width."),
        ({"weight": lambda x: x[None]}, "weight must have 2 dimensions, k_out and v_out 3"),
        ({"k": lambda x: x[0]}, "weight must have 2 dimensions, k_out and v_out 3"),
        ({"latents": lambda x: x.half()}, "all tensors must have one dtype and device, and a contiguous last dimension"),
        ({"v": lambda x: x.repeat(1, 1, 2)[..., ::2]}, "all tensors must have one dtype and device, and a contiguous last"),
        ({"weight": lambda x: x.T.contiguous().T}, "weight must have a contiguous last dimension"),
        ({"rows": lambda x: x.long()}, "rows must be a contiguous int32 list on the device of the latents"),
        ({"rows": lambda x: x.cpu()}, "rows must be a contiguous int32 list on the device of the latents"),
        ({"k": lambda x: x[:-1]}, "k_out must have at least as many rows as there are"),
        ({"v": lambda x: x[:-1]}, "v_out must have at least as many rows as there are"),
        ({"k": lambda x: x.repeat(2, 1, 1)}, "v_out must have as many rows as k_out"),
        ({"k_pe": lambda x: x[None]}, "k_pe_out must have 2 dimensions"),
        ({"k_pe": lambda x: x.half()}, "all tensors must have one dtype and device, and a contiguous last dimension"),
        ({"k_pe": lambda x: x.cpu()}, "all tensors must have one dtype and device, and a contiguous last dimension"),
        ({"k_pe": lambda x: x.repeat(1, 2)[:, ::2]}, "all tensors must have one dtype and device, and a contiguous last"),
        ({"k_pe": lambda x: x[:-1]}, "k_pe_out must have at least as many rows as there are"),
        ({"k_pe": lambda x: x.repeat(2, 1)}, "k_pe_out must have as many rows as k_out"),
        ({"k_pe": lambda x: x[:, :-8]}, "k_pe_out must be .rows, rope., with rope = width - kv_lora_rank"),
        ({"k_pe": lambda x: x.repeat(1, 2)}, "k_pe_out must be .rows, rope., with rope = width - kv_lora_rank"),
        ({"v": lambda x: x[:, :1]}, "k_out must be .rows, heads, nope . rope. and v_out .rows, heads, v."),
        ({"weight": lambda x: x[:-1]}, "weight must be .heads . .nope . v., kv_lora_rank., less than 2..31 rows"),
    ],
)
def test_the_native_op_refuses_what_does_not_fit(change, words):
    """torch.ops is open to anyone: what does not fit must not reach memory."""
    *_, tensors = made("apart" if "k_pe" in change else "plain", "cuda")
    given = dict(zip(NAMES, tensors, strict=True))
    for name, of in change.items():
        given[name] = of(given[name])
    with pytest.raises(RuntimeError, match=f"kv_up_project: {words}"):
        torch.ops.pcp_mla.kv_up_project_wgmma(*given.values())
    with torch.inference_mode():
        assert native.direct is None or not native.direct.kv_up_project(*given.values())
    torch.cuda.synchronize()
    assert all(given[name].isnan().all() for name in NAMES[4:] if given[name] is not None)


def test_every_reason_stands_alone(monkeypatch):
    """What makes a case odd is all that is odd about it: with it left out the kernel takes it."""
    monkeypatch.setattr(module, "_is_hopper", lambda device: True)
    for case, (changes, _, odd, wanted) in CASES.items():
        if wanted != "triton" or not odd or changes or "float32" in case:
            continue
        name = next(iter(odd))
        *_, tensors = made(case, "cpu")
        given = dict(zip(NAMES, tensors, strict=True))
        del given["rows"]
        assert not module._fits_wgmma(*given.values()), case
        given[name] = given[name].clone(memory_format=torch.contiguous_format)
        assert module._fits_wgmma(*given.values()), case
