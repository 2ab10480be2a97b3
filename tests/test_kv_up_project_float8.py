"""kv_up_project over float8 latents with a scale: what gather_latents makes of them, multiplied, in one launch."""

import pytest
import torch

from batches import same_bits
from pcp_mla import gather_latents, kv_up_project, write_latent_cache
from pcp_mla.ops.kv_up_project import expand, expand_into
from test_kv_up_project import ODD, WIDE, check, make, outputs, projects, random_rows, whole_sums

__all__ = ["whole_sums"]  # a fixture
DIMS = WIDE[2]
FLOAT8 = torch.float8_e4m3fn
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def quantised(latents, form="slots"):
    """A cache of these latents, and its scale, with which all fit, and the smallest become denormals or zeros."""
    scale = latents.abs().max().float() / 400
    cache = torch.zeros(latents.shape, device=latents.device).to(FLOAT8)
    if form == "layer":  # a slice of the cache of all layers, blocks of 5
        cache = torch.zeros(3, len(latents) // 5, 5, latents.shape[1] + 16, device=latents.device).to(FLOAT8)[1, :, :, :-16]
    write_latent_cache(latents, cache, torch.arange(len(latents), device=latents.device), scale=scale)
    return cache, scale


@projects
@pytest.mark.parametrize("form", ["slots", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [DIMS, ODD[0], WIDE[3]], ids=["wide", "odd", "without rope"])
def test_the_bits_of_a_gather_and_the_product(device, backend, dims, dtype, form):
    """Which are those of float64 sums, rounded once."""
    if backend == "cuda" and (dims in ODD or dtype == torch.float32):
        pytest.skip("not a shape of the CUDA kernel")
    latents, weight = make(dims, 50, dtype, device)
    cache, scale = quantised(latents, form)
    for rows in (random_rows(33, 50, device, 1), None):
        gathered = gather_latents(cache, torch.arange(50).int().to(device) if rows is None else rows, scale=scale, dtype=dtype)
        for apart in (False, True):
            got = kv_up_project(cache, rows, weight, dims, scale=scale, k_pe_apart=apart, backend=backend)
            check(dims, gathered, None, weight, *got)
            wanted = kv_up_project(gathered, None, weight, dims, k_pe_apart=apart, backend=backend)
            assert all(same_bits(x, y) for x, y in zip(got, wanted, strict=True))


@projects
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.0371, 2.0**-9])
def test_every_number_of_eight_bits(device, backend, dtype, scale):
    """In k_pe, which is not multiplied: denormals, both zeros, NaN."""
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("not a dtype of the CUDA kernel")
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(-1, 32)
    cache = torch.zeros(8, DIMS.latent_dim, dtype=torch.uint8, device=device)
    cache[:, DIMS.kv_lora_rank :] = codes
    _, weight = make(DIMS, 1, dtype, device)
    factor = torch.tensor([scale], device=device)
    _, _, k_pe = kv_up_project(cache.view(FLOAT8), None, weight, DIMS, scale=factor, k_pe_apart=True, backend=backend)
    wanted = (factor.double() * codes.view(FLOAT8).double()).float().cpu()
    assert wanted.isnan().sum() == 2
    torch.testing.assert_close(k_pe.cpu(), wanted.to(dtype), rtol=0, atol=0, equal_nan=True)
    given = gather_latents(cache.view(FLOAT8), torch.arange(8).int().to(device), scale=factor, dtype=dtype)[:, DIMS.kv_lora_rank :]
    assert same_bits(k_pe.nan_to_num(7), given.contiguous().nan_to_num(7))


@devices
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_calls_for_arguments_that_are_known_to_fit(device, apart):
    latents, weight = make(DIMS, 40, torch.bfloat16, device)
    cache, scale = quantised(latents)
    rows = random_rows(30, 40, device, 5)
    gathered = gather_latents(cache, rows, scale=scale)
    check(DIMS, gathered, None, weight, *expand(cache, rows, weight, DIMS, apart, scale))
    outs = outputs(DIMS, 150, torch.bfloat16, device, apart)
    expand_into(cache, rows, weight, *outs, scale=scale)
    check(DIMS, gathered, None, weight, *(out[:30] for out in outs))
    for out in outs:
        assert not out[30:128].any()
        assert out[128:].isnan().all()


@devices
def test_opcheck_and_compile(device):
    latents, weight = make(DIMS, 40, torch.bfloat16, device)
    cache, scale = quantised(latents)
    rows = random_rows(30, 40, device, 3)
    outs = outputs(DIMS, 30, torch.bfloat16, device, True)
    tests = ("test_autograd_registration", "test_faketensor")  # the others compare float8, which torch cannot
    torch.library.opcheck(torch.ops.pcp_mla.kv_up_project.default, (cache, rows, weight, scale, *outs), test_utils=tests)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(cache, rows, weight, scale):
        return [x + 1 for x in kv_up_project(cache, rows, weight, DIMS, scale=scale, k_pe_apart=True)]

    wanted = kv_up_project(cache, rows, weight, DIMS, scale=scale, k_pe_apart=True)
    for x, y in zip(compiled(cache, rows, weight, scale), wanted, strict=True):
        assert torch.equal(x, y + 1)


@pytest.mark.gpu
def test_graph():
    """Replays read the scale that is there then."""
    latents, weight = make(DIMS, 40, torch.bfloat16, "cuda")
    cache, scale = quantised(latents)
    rows = random_rows(30, 40, "cuda", 3)
    outs = outputs(DIMS, 30, torch.bfloat16, "cuda", True)
    names = dict(zip(("k_out", "v_out", "k_pe_out"), outs, strict=True))
    kv_up_project(cache, rows, weight, DIMS, scale=scale, k_pe_apart=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        kv_up_project(cache, rows, weight, DIMS, scale=scale, k_pe_apart=True, **names)
    for factor in (1, 2):
        scale.mul_(factor)
        graph.replay()
        wanted = kv_up_project(cache, rows, weight, DIMS, scale=scale, k_pe_apart=True)
        assert all(same_bits(x, y) for x, y in zip(outs, wanted, strict=True))


GOOD = {
    "latents": torch.zeros(9, 40).to(FLOAT8),
    "rows": torch.zeros(5, dtype=torch.int32),
    "weight": torch.zeros(80, 32),
    "dims": ODD[0].__class__(2, 16, 8, 24, 32),
    "scale": torch.ones(1),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latents": torch.zeros(9, 40)}, TypeError, "latents must be float8_e4m3fn with a scale, got float32"),
        ({"latents": torch.zeros(9, 40, dtype=torch.uint8)}, TypeError, "latents must be float8_e4m3fn with a scale, got uint8"),
        ({"latents": torch.zeros(9, 40).to(torch.float8_e5m2)}, TypeError, "latents must be float8_e4m3fn .* got float8_e5m2"),
        ({"scale": None}, TypeError, "latents must be float32 as weight, or come with a scale, got float8_e4m3fn"),
        ({"scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \[1\] = \(1\), got \(2,\)"),
        ({"scale": torch.ones(1, device="meta")}, ValueError, "scale must be on cpu, .* got meta"),
        ({"scale": torch.ones(1).half()}, TypeError, "scale must be float32, got float16"),
        ({"scale": torch.ones(1, requires_grad=True)}, NotImplementedError, "scale must not require gradients"),
        ({"weight": torch.zeros(80, 32).double()}, TypeError, "weight must be bfloat16, .* with a scale, got float64"),
        ({"k_out": torch.zeros(5, 2, 24).half()}, TypeError, "k_out must be float32, got float16"),
        ({"weight": None, "linear": torch.nn.Linear(32, 80), "scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=f"kv_up_project: {words}"):
        kv_up_project(**{**GOOD, **change})
    k_out = torch.full((5, 2, 24), torch.nan)
    with pytest.raises(error):
        kv_up_project(**{**GOOD, "k_out": k_out, **change})
    assert k_out.isnan().all()
