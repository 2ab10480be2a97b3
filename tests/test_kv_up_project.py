"""kv_up_project: errors against float64, rows from anywhere."""

import pytest
import torch

from batches import IMPLEMENTATIONS, half_ulp, same_bits
from pcp_mla import PCPPlanner, concat_k, kv_up_project, write_latent_cache
from pcp_mla.ops.kv_up_project import UP_PROJECT_TILE, expand, expand_into
from pcp_mla.plan.dims import MLADims

# The CPU has no C++ kernel of the product.
PROJECTIONS = [p for p in IMPLEMENTATIONS if p.id != "cpu-native"]
projects = pytest.mark.parametrize(("device", "backend"), PROJECTIONS)

# Widths that the CUDA kernel takes: DeepSeek's, GLM's, one slab of the rank, no rope.
WIDE = [
    MLADims(3, 128, 64, 128, 512),
    MLADims(5, 192, 64, 256, 512),
    MLADims(1, 64, 32, 64, 64),
    MLADims(2, 128, 0, 128, 256),
    MLADims(17, 64, 64, 128, 128),
    MLADims(3, 128, 64, 128, 320),
    MLADims(1, 192, 64, 64, 448),
]
# What models have, with numbers of heads that leave half a tile of the CUDA kernel at the end, and others. On a GPU.
GEOMETRIES = [
    MLADims(heads, *widths)
    for widths in ((128, 64, 128, 512), (192, 64, 256, 512), (64, 64, 128, 512), (256, 0, 256, 512), (64, 32, 64, 256))
    for heads in (5, 12, 20, 24, 40, 96)
]
# Widths for Triton and the reference only.
ODD = [MLADims(3, 24, 8, 40, 48), MLADims(2, 5, 3, 7, 9), MLADims(1, 100, 64, 72, 80)]


def make(dims, slots, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(slots, dims.latent_dim, generator=generator).to(dtype).to(device)
    weight = torch.randn(dims.num_heads * dims.expanded_dim, dims.kv_lora_rank, generator=generator) * dims.kv_lora_rank**-0.5
    return latents, weight.to(dtype).to(device)


def random_rows(count, slots, device, seed):
    """Any slots, some of them twice, some none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, slots, (count,), generator=generator)
    rows = torch.where(torch.rand(count, generator=generator) < 0.1, torch.tensor([-1, slots])[rows % 2], rows)
    return rows.int().to(device)


def outputs(dims, rows, dtype, device, apart=False):
    shapes = [(rows, dims.num_heads, dims.qk_head_dim), (rows, dims.num_heads, dims.v_head_dim)]
    if apart:
        shapes = [(rows, dims.num_heads, dims.qk_nope_head_dim), shapes[1], (rows, dims.qk_rope_head_dim)]
    return [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in shapes]


@pytest.fixture(autouse=True, scope="module")
def whole_sums():
    """torch's own products on a GPU may add up partial sums that were rounded: then their error has no bound of its own."""
    flags, names = torch.backends.cuda.matmul, ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(flags, name) for name in names]
    for name in names:
        setattr(flags, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(flags, name, value)


def check(dims, latents, rows, weight, k, v, k_pe=None):
    """Against the product in float64: summed in float32, rounded once; rope bits as they were, zeros for rows outside. With
    ``k_pe`` they are there, and not in ``k``."""
    heads, nope, rank = dims.num_heads, dims.qk_nope_head_dim, dims.kv_lora_rank
    flat = latents.flatten(0, -2).cpu()
    if rows is not None:
        places = rows.long().cpu()
        inside = (places >= 0) & (places < len(flat))
        flat = flat[places.clamp(0, len(flat) - 1)].masked_fill(~inside[:, None], 0)
    assert k.dtype == v.dtype == flat.dtype == weight.dtype
    if k_pe is None:
        assert same_bits(k[..., nope:].cpu(), flat[:, None, rank:].expand(-1, heads, -1))
    else:
        assert k.shape[2] == nope
        assert same_bits(k_pe.cpu(), flat[:, rank:])
    given, weight = flat[:, :rank].double(), weight.double().cpu()
    right = (given @ weight.T).view(-1, heads, dims.expanded_dim)
    sizes = (given.abs() @ weight.abs().T).view_as(right)
    change = sizes * 2.0 ** (-21 if k.dtype == torch.float32 else -17)  # tensor cores align terms before they add them
    got = torch.cat([k[..., :nope], v], dim=2).double().cpu()
    assert got.shape == right.shape
    assert ((got - right).abs() <= half_ulp(right, k.dtype) + change).all()


@projects
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [*WIDE, *ODD], ids=lambda d: f"{d.num_heads}x{d.qk_nope_head_dim}+{d.qk_rope_head_dim}")
def test_products_are_rounded_once(device, backend, dims, dtype):
    if backend == "cuda" and (dims in ODD or dtype == torch.float32):
        pytest.skip("not a shape of the CUDA kernel")
    if (device, backend) == ("cpu", "triton") and dims in WIDE and dims.num_heads > 1:
        pytest.skip("large shapes take the interpreter minutes")
    sizes = [1, 65, 300, 5000] if device == "cuda" else [1, 65]
    for count in sizes:
        latents, weight = make(dims, 2 * count, dtype, device, count)
        for rows in (random_rows(count, 2 * count, device, count), None):
            k, v = kv_up_project(latents, rows, weight, dims, backend=backend)
            check(dims, latents, rows, weight, k, v)
            k_nope, v_again, k_pe = kv_up_project(latents, rows, weight, dims, k_pe_apart=True, backend=backend)
            check(dims, latents, rows, weight, k_nope, v_again, k_pe)
            assert all(x.is_contiguous() for x in (k_nope, v_again, k_pe))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [None, 0.02], ids=["", "float8"])
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("dims", GEOMETRIES, ids=lambda d: "{}x{}+{}_{}_{}".format(*vars(d).values()))
def test_geometries_of_models(dims, apart, scale):
    """As the kernel that is chosen takes them, in strided results; also more tiles than a GPU has blocks for."""
    for dtype, count in ((torch.bfloat16, 200), (torch.float16, 17500 if dims.num_heads == 5 else 300)):
        given, weight = make(dims, 2 * count, dtype, "cuda", count)
        latents, by = given, None
        if scale is not None:
            by, latents = torch.tensor([scale], device="cuda"), (given.float() / scale).to(torch.float8_e4m3fn)
            given = (latents.float() * by).to(dtype)
        rows = random_rows(count, 2 * count, "cuda", count)
        wide = outputs(dims, count, dtype, "cuda", apart)
        outs = [torch.nn.functional.pad(x, (0, 8), value=torch.nan)[..., :-8] for x in wide]
        names = dict(zip(("k_out", "v_out", "k_pe_out"), outs, strict=False))
        results = kv_up_project(latents, rows, weight, dims, scale=by, k_pe_apart=apart, **names)
        check(dims, given, rows, weight, *results)
        assert all(x._base[..., -8:].isnan().all() for x in results)


@projects
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("dims", [WIDE[2], ODD[0]], ids=["wide", "odd"])
def test_rows_behind_the_last_one(device, backend, dims, apart):
    """Zeros up to the tile's end, nothing behind it, also where there is no row at all; results may be slices of larger ones."""
    if backend == "cuda" and dims in ODD:
        pytest.skip("not a shape of the CUDA kernel")
    for count, room in ((5, 300), (0, 140), (128, 200), (130, 140)):
        latents, weight = make(dims, 40, torch.bfloat16, device)
        rows = random_rows(count, 40, device, count)
        wholes = [
            torch.full((room, dims.num_heads + 1, width + 8), torch.nan, dtype=torch.bfloat16, device=device)
            for width in (dims.qk_nope_head_dim if apart else dims.qk_head_dim, dims.v_head_dim)
        ]
        outs = [x[:, 1:, : x.shape[2] - 8] for x in wholes]
        if apart:
            wholes.append(torch.full((room, 2, dims.qk_rope_head_dim + 8), torch.nan, dtype=torch.bfloat16, device=device))
            outs.append(wholes[2][:, 1, :-8])
        names = dict(zip(("k_out", "v_out", "k_pe_out"), outs, strict=False))
        given = kv_up_project(latents, rows, weight, dims, **names, k_pe_apart=apart, backend=backend)
        assert all(x is out for x, out in zip(given, outs, strict=True))
        check(dims, latents, rows, weight, *(out[:count] for out in outs))
        end = min(room, -(-count // UP_PROJECT_TILE) * UP_PROJECT_TILE)
        for whole, out in zip(wholes, outs, strict=True):
            assert not out[count:end].any()
            assert out[end:].isnan().all()
            assert whole[:, 0].isnan().all()
            assert whole[:, :, -8:].isnan().all()


@projects
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_one_given_result_sets_the_rows_of_the_others(device, backend, apart):
    dims = WIDE[2]
    latents, weight = make(dims, 40, torch.bfloat16, device)
    rows = random_rows(5, 40, device, 5)
    names = ("k_out", "v_out", "k_pe_out") if apart else ("k_out", "v_out")
    for name in names:
        given = dict(zip(names, outputs(dims, 150, torch.bfloat16, device, apart), strict=True))
        results = kv_up_project(latents, rows, weight, dims, **{name: given[name]}, k_pe_apart=apart, backend=backend)
        assert results[names.index(name)] is given[name]
        check(dims, latents, rows, weight, *(x[:5] for x in results))
        for x in results:
            assert len(x) == 150
            assert not x[5:128].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dims", [WIDE[0], ODD[0]], ids=["wide", "odd"])
def test_calls_for_arguments_that_are_known_to_fit(device, dims):
    latents, weight = make(dims, 40, torch.bfloat16, device)
    rows = random_rows(30, 40, device, 5)
    check(dims, latents, rows, weight, *expand(latents, rows, weight, dims))
    check(dims, latents, rows, weight, *expand(latents, rows, weight, dims, apart=True))
    for apart in (False, True):
        outs = outputs(dims, 30, torch.bfloat16, device, apart)
        expand_into(latents, rows, weight, *outs)
        check(dims, latents, rows, weight, *outs)


@projects
def test_slots_of_a_paged_cache(device, backend):
    """A layer of a larger cache, shuffled blocks, after two steps of a prompt on 2 ranks: natural order comes out."""
    dims, dtype = WIDE[2], torch.bfloat16
    latents, weight = make(dims, 43, dtype, device)
    cache = torch.full((9, 2, 8, dims.latent_dim), torch.nan, dtype=dtype, device=device)[:, 1]
    table = torch.tensor([[5, 1, 7, 4, 0, 8]], dtype=torch.int32, device=device)
    done = 0
    for length in (20, 23):
        metas = [PCPPlanner(1, 60, 2, rank, block_size=8, device=device).plan([length], [done], [True], table) for rank in (0, 1)]
        gathered = latents.new_full((2, metas[0].num_tokens_padded, dims.latent_dim), torch.nan)
        for to, meta in zip(gathered, metas, strict=True):
            to[: meta.num_tokens] = latents[done + meta.local_token_indices.long()]
        write_latent_cache(gathered.flatten(0, 1), cache, metas[0].slot_mapping)
        done += length
        k, v = kv_up_project(cache, metas[0].kv_rows, weight, dims, backend=backend)
        check(dims, latents[:done], None, weight, k, v)
    k, v = kv_up_project(gathered.flatten(0, 1), metas[0].allgather_restore_idx, weight, dims, backend=backend)
    check(dims, latents[20:], None, weight, k, v)


@projects
def test_float8_latents_with_a_scale(device, backend):
    dims = WIDE[2]
    latents, weight = make(dims, 50, torch.bfloat16, device)
    scale = torch.tensor([0.02], device=device)
    cache = torch.zeros(50, dims.latent_dim, device=device).to(torch.float8_e4m3fn)
    write_latent_cache(latents, cache, torch.arange(50, device=device), scale=scale)
    rows = random_rows(30, 50, device, 1)
    given = (cache.float() * scale).bfloat16()
    k, v = kv_up_project(cache, rows, weight, dims, scale=scale, backend=backend)
    check(dims, given, rows, weight, k, v)
    check(dims, given, rows, weight, *kv_up_project(cache, rows, weight, dims, scale=scale, k_pe_apart=True, backend=backend))
    linear = torch.nn.Linear(*weight.T.shape, bias=False, device=device, dtype=torch.float16).requires_grad_(False)
    linear.weight.copy_(weight)
    k_pe_out = torch.empty(30, 32, dtype=torch.float16, device=device)  # no other argument says what the latents become
    results = kv_up_project(cache, rows, None, dims, linear=linear, scale=scale, k_pe_apart=True, k_pe_out=k_pe_out)
    check(dims, (cache.float() * scale).half(), rows, linear.weight, *results)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("room", [None, 200])
@pytest.mark.parametrize("dims", [ODD[0], MLADims(3, 24, 0, 40, 48)], ids=["rope", "no rope"])
def test_linear_module_in_place_of_a_weight(device, room, dims):
    latents, weight = make(dims, 50, torch.float32, device)
    rows = random_rows(30, 50, device, 1)
    wanted = kv_up_project(latents, rows, weight, dims, backend="reference")
    linear = torch.nn.Linear(*weight.T.shape, bias=False, device=device).requires_grad_(False)
    linear.weight.copy_(weight)
    outs = (None, None) if room is None else outputs(dims, room, torch.float32, device)
    for module in (linear, lambda x: (linear(x), None)):
        k, v = kv_up_project(latents, rows, None, dims, linear=module, k_out=outs[0], v_out=outs[1])
        torch.testing.assert_close((k[:30], v[:30]), wanted)
        if room is not None:
            assert not k[30:128].any()
            assert not v[30:128].any()
            assert k[128:].isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("room", [None, 30, 200])
def test_linear_module_and_k_pe_apart(device, room):
    """Nothing is copied but k_pe where no result is given: K and V are the module's."""
    dims, made = ODD[0], []
    latents, weight = make(dims, 50, torch.float32, device)
    rows = random_rows(30, 50, device, 1)
    wanted = kv_up_project(latents, rows, weight, dims, k_pe_apart=True, backend="reference")

    def linear(x):
        made.append(torch.nn.functional.linear(x, weight))
        return made[-1]

    outs = (
        {}
        if room is None
        else dict(zip(("k_out", "v_out", "k_pe_out"), outputs(dims, room, torch.float32, device, True), strict=True))
    )
    results = kv_up_project(latents, rows, None, dims, linear=linear, k_pe_apart=True, **outs)
    torch.testing.assert_close(tuple(x[:30] for x in results), wanted)
    assert same_bits(results[2][:30], wanted[2])
    if room is None:
        assert results[0].untyped_storage().data_ptr() == results[1].untyped_storage().data_ptr() == made[0].data_ptr()
        assert results[2].is_contiguous()
        assert results[2].untyped_storage().nbytes() == 30 * 8 * 4
    else:
        assert all(x is out for x, out in zip(results, outs.values(), strict=True))
        for x in results:
            assert not x[30:128].any()
            assert x[128:].isnan().all()


def test_a_module_that_requires_gradients():
    """Refused before a result is written, which would require them then."""
    linear = torch.nn.Linear(32, 80)
    for apart in (False, True):
        v_out = torch.full((5, 2, 24), torch.nan)
        with pytest.raises(NotImplementedError, match="linear's result must not require gradients"):
            kv_up_project(GOOD["latents"], GOOD["rows"], None, DIMS, linear=linear, v_out=v_out, k_pe_apart=apart)
        assert v_out.isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("given_out", ["k_out", "v_out"])
@pytest.mark.parametrize("by_module", [False, True])
def test_a_result_that_is_not_given_has_the_rows_of_the_other(device, given_out, by_module):
    dims = ODD[0]
    latents, weight = make(dims, 50, torch.float32, device)
    linear = torch.nn.Linear(*weight.T.shape, bias=False, device=device).requires_grad_(False)
    linear.weight.copy_(weight)
    how = {"weight": None, "linear": linear} if by_module else {"weight": weight}
    rows = random_rows(30, 50, device, 1)
    wanted = kv_up_project(latents, rows, weight, dims)
    out = dict(zip(("k_out", "v_out"), outputs(dims, 150, torch.float32, device), strict=True))[given_out]
    k, v = kv_up_project(latents, rows, dims=dims, **how, **{given_out: out})
    assert (k if given_out == "k_out" else v) is out
    assert len(k) == len(v) == 150
    torch.testing.assert_close((k[:30], v[:30]), wanted)
    assert not k[30:128].any()
    assert not v[30:128].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_and_compile(device):
    dims = WIDE[2]
    latents, weight = make(dims, 40, torch.bfloat16, device)
    rows = random_rows(30, 40, device, 3)
    outs = outputs(dims, 30, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.pcp_mla.kv_up_project.default, (latents, rows, weight, None, *outs, None))
    three = outputs(dims, 30, torch.bfloat16, device, True)
    torch.library.opcheck(torch.ops.pcp_mla.kv_up_project.default, (latents, rows, weight, None, *three))
    k_nope, k_pe = outs[0][..., :64].clone(), latents[:30, 64:]
    torch.library.opcheck(torch.ops.pcp_mla.concat_k.default, (k_nope, k_pe, torch.empty_like(outs[0])))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(latents, rows, weight):
        k, v = kv_up_project(latents, rows, weight, dims)
        k_nope, v_again, k_pe = kv_up_project(latents, rows, weight, dims, k_pe_apart=True)
        return concat_k(k[..., :64], k[:, 0, 64:]) + 1, v + 1, concat_k(k_nope, k_pe) + 1, v_again + 1

    k, v = kv_up_project(latents, rows, weight, dims)
    for got, wanted in zip(compiled(latents, rows, weight), (k, v, k, v), strict=True):
        assert same_bits(got, wanted + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replay_with_other_rows(backend):
    dims = WIDE[0]
    latents, weight = make(dims, 400, torch.bfloat16, "cuda")
    rows = random_rows(300, 400, "cuda", 1)
    kv_up_project(latents, rows, weight, dims, k_pe_apart=True, backend=backend)  # compiles
    k, v = kv_up_project(latents, rows, weight, dims, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        kv_up_project(latents, rows, weight, dims, k_out=k, v_out=v, backend=backend)
        again = concat_k(k[..., :128], k[:, 0, 128:], backend=backend)
        apart = kv_up_project(latents, rows, weight, dims, k_pe_apart=True, backend=backend)
    rows.copy_(random_rows(300, 400, "cuda", 2))
    latents.mul_(2)
    graph.replay()
    check(dims, latents, rows, weight, k, v)
    check(dims, latents, rows, weight, *apart)
    assert same_bits(again, k)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31(backend):
    """K has 3.3e9 numbers, V 2.2e9; their last rows are checked, and what lies behind the cache's 2^31st number is read."""
    dims, count = MLADims(128, 128, 64, 128, 512), 135000
    latents, weight = make(dims, 4_000_000, torch.bfloat16, "cpu")
    latents, weight = latents.cuda(), weight.cuda()
    rows = torch.arange(4_000_000 - count, 4_000_000, dtype=torch.int32, device="cuda")
    k, v = kv_up_project(latents, rows, weight, dims, backend=backend)
    assert min(k.numel(), v.numel()) > 2**31
    for part in (slice(0, 200), slice(87300, 87500), slice(131000, 131200), slice(count - 200, count)):
        check(dims, latents, rows[part], weight, k[part], v[part])


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("dims", WIDE, ids=lambda d: f"{d.num_heads}x{d.qk_nope_head_dim}+{d.qk_rope_head_dim}")
def test_the_same_bits_every_time(dims, apart):
    """A missing wait shows as a result that moves: many runs, some beside another stream's work, into poisoned memory."""
    latents, weight = make(dims, 9000, torch.bfloat16, "cuda")
    side, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for count in (70, 1500, 9000):
        rows = random_rows(count, 9000, "cuda", count)
        wanted = kv_up_project(latents, rows, weight, dims, k_pe_apart=apart, backend="cuda")
        check(dims, latents, rows, weight, *wanted)
        for turn in range(30):
            if turn % 2:
                with torch.cuda.stream(side):
                    busy @ busy
            outs = outputs(dims, count, torch.bfloat16, "cuda", apart)
            names = dict(zip(("k_out", "v_out", "k_pe_out"), outs, strict=False))
            kv_up_project(latents, rows, weight, dims, **names, k_pe_apart=apart, backend="cuda")
            assert all(same_bits(out, x) for out, x in zip(outs, wanted, strict=True))


@pytest.mark.gpu
def test_kernel_for_each_shape():
    """On a Hopper GPU the CUDA kernel takes the widths of real models; auto finds Triton for the others."""
    for dims in (WIDE[0], ODD[0]):
        latents, weight = make(dims, 40, torch.bfloat16, "cuda")
        for apart in (False, True):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                kv_up_project(latents, None, weight, dims, k_pe_apart=apart)
                torch.cuda.synchronize()
            names = [event.name for event in profile.events() if "kv_up_project" in event.name]
            hopper = torch.cuda.get_device_capability()[0] == 9
            assert len(names) == 1, names
            assert ("cuda::" in names[0]) == (hopper and dims is WIDE[0]), names


DIMS = MLADims(2, 16, 8, 24, 32)
GOOD = {
    "latents": torch.zeros(9, 40),
    "rows": torch.zeros(5, dtype=torch.int32),
    "weight": torch.zeros(80, 32),
    "dims": DIMS,
}
APART = {"k_pe_apart": True}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latents": 3}, TypeError, "latents must be a torch.Tensor, got int"),
        ({"latents": torch.zeros(9, 41)}, ValueError, r"latents must be \[rows, 40\] or .* got \(9, 41\)"),
        ({"latents": torch.zeros(40, 9).T}, ValueError, "latents must have a contiguous last dimension"),
        ({"latents": torch.zeros(9, 40).half()}, TypeError, "latents must be float32 as weight, .* got float16"),
        ({"latents": torch.zeros(9, 40, requires_grad=True)}, NotImplementedError, "latents must not require gradients"),
        ({"rows": torch.zeros(5)}, TypeError, "rows must be int32, got float32"),
        ({"rows": torch.zeros(10, dtype=torch.int32)[::2]}, ValueError, "rows must be contiguous"),
        ({"rows": torch.zeros(5, 1, dtype=torch.int32)}, ValueError, "rows must have 1 dimensions"),
        ({"weight": torch.zeros(81, 32)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(80, 32).int()}, NotImplementedError, "weight must be bfloat16, float16 or float32, got int32"),
        ({"weight": None}, ValueError, "weight or linear must be given"),
        ({"linear": torch.nn.Identity()}, ValueError, "weight or linear must be given, and not both"),
        ({"k_out": torch.zeros(4, 2, 24)}, ValueError, "k_out must have at least 5 rows, got 4"),
        ({"k_out": torch.zeros(5, 2, 23)}, ValueError, "k_out must have shape"),
        ({"v_out": torch.zeros(5, 2, 24).half()}, TypeError, "v_out must be float32, got float16"),
        ({"v_out": torch.zeros(1, 2, 24).expand(5, 2, 24)}, ValueError, "v_out must not be expanded"),
        (
            {"k_out": torch.zeros(9, 2, 24), "v_out": torch.zeros(8, 2, 24)},
            ValueError,
            "v_out must have the 9 rows of k_out, got 8",
        ),
        ({"k_pe_out": torch.zeros(5, 8)}, ValueError, "k_pe_out must come with k_pe_apart=True, got False"),
        (APART | {"k_out": torch.zeros(5, 2, 24)}, ValueError, r"k_out must have shape .* = \(any, 2, 16\), got \(5, 2, 24\)"),
        (APART | {"k_pe_out": 3}, TypeError, "k_pe_out must be a torch.Tensor, got int"),
        (APART | {"k_pe_out": torch.zeros(4, 8)}, ValueError, "k_pe_out must have at least 5 rows, got 4"),
        (APART | {"k_pe_out": torch.zeros(5, 9)}, ValueError, r"k_pe_out must have shape \[rows, dim\] = \(any, 8\), got \(5, 9\)"),
        (APART | {"k_pe_out": torch.zeros(5, 1, 8)}, ValueError, "k_pe_out must have 2 dimensions"),
        (APART | {"k_pe_out": torch.zeros(5, 8).half()}, TypeError, "k_pe_out must be float32, got float16"),
        (APART | {"k_pe_out": torch.zeros(8, 5).T}, ValueError, "k_pe_out must have a contiguous last dimension"),
        (APART | {"k_pe_out": torch.zeros(1, 8).expand(5, 8)}, ValueError, "k_pe_out must not be expanded"),
        (APART | {"k_pe_out": torch.zeros(5, 8, requires_grad=True)}, NotImplementedError, "k_pe_out must not require gradients"),
        (
            APART | {"v_out": torch.zeros(9, 2, 24), "k_pe_out": torch.zeros(8, 8)},
            ValueError,
            "k_pe_out must have the 9 rows of v_out, got 8",
        ),
        ({"weight": 3, "scale": torch.ones(1)}, TypeError, "weight must be a torch.Tensor, got int"),
        ({"weight": torch.zeros(81, 32), "scale": torch.ones(1)}, ValueError, "weight must have shape"),
        ({"weight": None, "linear": torch.nn.Linear(32, 80).double()}, RuntimeError, "dtype"),
        ({"weight": None, "linear": torch.nn.Linear(32, 81)}, ValueError, "linear's result must have shape"),
        ({"backend": "cpu"}, RuntimeError, "backend 'cpu' is not available: it has no C.. kernel"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        kv_up_project(**{**GOOD, **change})


def test_nothing_is_half_written():
    linear = torch.nn.Linear(32, 80).requires_grad_(False)
    k_out = torch.full((5, 2, 24), torch.nan)
    for v_out in (torch.zeros(4, 2, 24), torch.zeros(5, 2, 24).half()):
        with pytest.raises((ValueError, TypeError), match="v_out must"):
            kv_up_project(GOOD["latents"], GOOD["rows"], None, DIMS, linear=linear, k_out=k_out, v_out=v_out)
        assert k_out.isnan().all()
    with pytest.raises(TypeError, match="linear's result must be float32 as the latents, got float64"):
        kv_up_project(GOOD["latents"], GOOD["rows"], None, DIMS, linear=lambda x: linear(x).double(), k_out=k_out)
    assert k_out.isnan().all()
