"""Merges: their errors, their registration with torch, CUDA graphs and large inputs."""

import math

import pytest
import torch

from batches import same_bits
from pcp_mla.ops.merge_states import RowOp, cp_correct_out, merge_attn_states, merge_n_attn_states
from test_merge_states import check, partial

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
backends = pytest.mark.parametrize("backend", ["auto", "reference"])


def merge_arguments(device="cpu", tokens=4):
    out_a, lse_a = partial(tokens, 3, 16, torch.bfloat16, device, 1, wider=8)
    out_b, lse_b = partial(tokens, 3, 16, torch.bfloat16, device, 2)
    results = {
        "out": torch.zeros(tokens, 3, 16, dtype=torch.bfloat16, device=device),
        "lse_out": torch.zeros(tokens, 3, device=device),
    }
    return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, **results}


def merge_n_arguments(device="cpu", tokens=4):
    both = merge_arguments(device, tokens)
    results = {name: both[name] for name in ("out", "lse_out")}
    return {"outs": [both["out_a"], both["out_b"]], "lses": [both["lse_a"], both["lse_b"]], **results}


def correct_arguments(device="cpu", tokens=4):
    both = merge_arguments(device, tokens)
    results = {"corrected": both["out"].float(), "lse_out": both["lse_out"]}
    return {"out": both["out_a"], "lses": torch.stack([both["lse_a"], both["lse_b"]]), "rank": 1, **results}


ALLOCATED = {"out": None, "lse_out": None}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors_of(arguments):
    flat = [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, torch.Tensor) and x.device.type != "meta"]


def check_error(function, good, change, error, words, backend):
    """The error, and not a byte written."""
    function(**good, backend=backend)
    for name in ("out", "corrected", "lse_out"):
        if name in good and not (function is cp_correct_out and name == "out"):
            good[name].zero_()
    changed = {**good, **change(good)}
    before = [x.detach().clone() for x in tensors_of(changed)]
    with pytest.raises(error, match=f"^{function.__name__}: .*{words}"):
        function(**{"backend": backend, **changed})
    for x, old in zip(tensors_of(changed), before, strict=True):
        assert torch.equal(x, old)


@backends
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: {"lse_base": "10"}, ValueError, "lse_base must be 'e' or '2', got '10'"),
        (lambda g: {"lse_base": ["2"]}, ValueError, r"lse_base must be 'e' or '2', got \['2'\]"),
        (lambda g: {"backend": "cudnn"}, ValueError, "backend must be one of auto, .* got 'cudnn'"),
        (lambda g: {"out_a": 1.0}, TypeError, "out_a must be a torch.Tensor, got float"),
        (lambda g: {"out_a": g["out_a"][0]}, ValueError, r"out_a must have 3 dimensions \[tokens, heads, dim\], got 2"),
        (lambda g: {"out_b": g["out_b"][0]}, ValueError, "out_b must have 3 dimensions"),
        (lambda g: {"out_b": g["out_b"][:, :2]}, ValueError, r"out_b must have shape .* = \(4, 3, 16\), got \(4, 2, 16\)"),
        (lambda g: {"out_b": g["out_b"].to("meta")}, ValueError, "out_b must be on cpu, .* got meta"),
        (lambda g: {"out_a": g["out_a"].double()}, NotImplementedError, "out_a must be bfloat16, .* got float64"),
        (lambda g: {"out_b": g["out_b"].half()}, TypeError, "out_b must have dtype bfloat16 .* got float16"),
        (lambda g: {"out_a": g["out_a"][:, :0], "out_b": g["out_b"][:, :0]}, ValueError, "out_a must have at least one head"),
        (lambda g: {"out_b": g["out_b"].mT.contiguous().mT}, ValueError, "out_b must have a contiguous last dimension"),
        (lambda g: {"out_a": g["out_a"].clone().requires_grad_()}, NotImplementedError, "out_a must not require gradients"),
        (lambda g: {"out_b": g["out_b"].clone().requires_grad_()}, NotImplementedError, "out_b must not require gradients"),
        (lambda g: {"lse_a": g["lse_a"].clone().requires_grad_()}, NotImplementedError, "lse_a must not require gradients"),
        (lambda g: {"lse_b": g["lse_b"].clone().requires_grad_()}, NotImplementedError, "lse_b must not require gradients"),
        (lambda g: {"out": g["out"].clone().requires_grad_()}, NotImplementedError, "out must not require gradients"),
        (lambda g: {"lse_out": g["lse_out"].clone().requires_grad_()}, NotImplementedError, "lse_out must not require gradients"),
        (lambda g: {"scale": torch.ones(1).requires_grad_(), "out": None}, NotImplementedError, "scale must not require gradients"),
        (lambda g: ALLOCATED | {"lse_b": g["lse_b"].clone().requires_grad_()}, NotImplementedError, "lse_b must not require grad"),
        (lambda g: ALLOCATED | {"out_b": g["out_b"].to("meta")}, ValueError, "out_b must be on cpu, .* got meta"),
        (lambda g: ALLOCATED | {"lse_b": g["lse_b"].to("meta")}, ValueError, "lse_b must be on cpu, .* got meta"),
        (lambda g: ALLOCATED | {"scale": torch.ones(1, device="meta")}, ValueError, "scale must be one float32 on cpu"),
        (lambda g: {"lse_a": None}, TypeError, "lse_a must be a torch.Tensor, got NoneType"),
        (lambda g: {"lse_a": g["lse_a"].T}, ValueError, r"lse_a must have shape \[tokens, heads\] = \(4, 3\), got \(3, 4\)"),
        (lambda g: {"lse_b": g["lse_b"].double()}, TypeError, "lse_b must be float32, got float64"),
        (lambda g: {"lse_b": g["lse_b"].to("meta")}, ValueError, "lse_b must be on cpu"),
        (lambda g: {"lse_out": g["lse_out"].to("meta")}, ValueError, "lse_out must be on cpu, .* got meta"),
        (lambda g: {"row_op": ints(3, 3, 3, 3).to("meta")}, ValueError, "row_op must be on cpu, .* got meta"),
        (lambda g: {"out_rows": ints(0, 1, 2, 3).to("meta")}, ValueError, "out_rows must be on cpu, .* got meta"),
        (lambda g: {"out": None, "lse_out": None, "row_op": ints(3, 3, 3, 3)}, ValueError, "out must be given with row_op"),
        (lambda g: {"out": None, "out_rows": ints(0, 1, 2, 3)}, ValueError, "out must be given with out_rows"),
        (lambda g: {"cu_seqlens": ints(0, 4)}, ValueError, "cu_seqlens must come with row_op"),
        (lambda g: {"row_op": ints(3, 3)}, ValueError, r"row_op must have shape \[tokens\] = \(4\), got \(2,\)"),
        (lambda g: {"row_op": ints(3, 3, 3, 3).long()}, TypeError, "row_op must be int32, got int64"),
        (lambda g: {"row_op": ints(*[3] * 8)[::2]}, ValueError, "row_op must be contiguous"),
        (lambda g: {"row_op": [3, 3, 3, 3]}, TypeError, "row_op must be a torch.Tensor, got list"),
        (lambda g: {"row_op": ints(3), "cu_seqlens": ints(0, 2, 4)}, ValueError, "cu_seqlens must have shape .requests . 1. = .2"),
        (lambda g: {"row_op": ints(3), "cu_seqlens": ints(0, 4).long()}, TypeError, "cu_seqlens must be int32"),
        (lambda g: {"out_rows": ints(0, 1)}, ValueError, "out_rows must have shape"),
        (lambda g: {"out_rows": ints(0, 1, 2, 3).float()}, TypeError, "out_rows must be int32, got float32"),
        (lambda g: {"scale": 0.5}, TypeError, "scale must be a torch.Tensor, got float"),
        (lambda g: {"scale": torch.ones(2)}, ValueError, r"scale must be one float32 on cpu, got float32 \(2,\) on cpu"),
        (lambda g: {"scale": torch.ones(1).half()}, ValueError, "scale must be one float32 on cpu, got float16"),
        (lambda g: {"scale": torch.ones(1)}, TypeError, "out must be float8_e4m3fn with a scale, got bfloat16"),
        (lambda g: {"out": g["out"].to(torch.float8_e4m3fn)}, TypeError, "out must be bfloat16 or float32, got float8_e4m3fn"),
        (lambda g: {"out": g["out"].half()}, TypeError, "out must be bfloat16 or float32, got float16"),
        (lambda g: {"out": g["out"][1:]}, ValueError, r"out must have shape .* = \(4, 3, 16\), got \(3, 3, 16\)"),
        (lambda g: {"out": g["out"][:, :, ::2], "out_rows": ints(0, 1, 2, 3)}, ValueError, "out must have shape"),
        (lambda g: {"out": g["out"].mT.contiguous().mT}, ValueError, "out must have a contiguous last dimension"),
        (lambda g: {"out": g["out"][:1].expand(4, 3, 16)}, ValueError, r"out must not be expanded, got strides \(0, 16, 1\)"),
        (lambda g: {"lse_out": g["lse_out"][:, :1].expand(4, 3)}, ValueError, "lse_out must not be expanded"),
        (lambda g: {"lse_out": g["lse_out"][1:]}, ValueError, r"lse_out must have shape \[rows, heads\] = \(4, 3\), got \(3, 3\)"),
        (lambda g: {"lse_out": g["lse_out"].double()}, TypeError, "lse_out must be float32, got float64"),
        (lambda g: {"out": None, "lse_out": g["lse_out"].double()}, TypeError, "lse_out must be float32, got float64"),
    ],
)
def test_errors_of_a_merge(backend, change, error, words):
    check_error(merge_attn_states, merge_arguments(), change, error, words, backend)


@backends
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: {"lse_base": 2}, ValueError, "lse_base must be 'e' or '2', got 2"),
        (lambda g: {"outs": None}, TypeError, "outs must be a tensor or a sequence of tensors, got NoneType"),
        (lambda g: {"lses": torch.stack(g["lses"])}, TypeError, "outs and lses must both be tensors or both sequences"),
        (lambda g: {"outs": g["outs"][0], "lses": g["lses"][0]}, ValueError, "outs must have 4 dimensions .* got 3"),
        (lambda g: {"outs": torch.stack(g["outs"]), "lses": g["lses"][0]}, ValueError, "lses must have 3 dimensions .* got 2"),
        (lambda g: {"outs": [], "lses": []}, ValueError, "outs must be 1 to 64 partials, got 0"),
        (lambda g: {"outs": g["outs"] * 33, "lses": g["lses"] * 33}, ValueError, "outs must be 1 to 64 partials, got 66"),
        (lambda g: {"lses": g["lses"][:1]}, ValueError, "lses must be as many as outs, 2, got 1"),
        (lambda g: {"outs": [g["outs"][0], None]}, TypeError, r"outs\[1\] must be a torch.Tensor, got NoneType"),
        (lambda g: {"outs": [g["outs"][0], g["outs"][1][1:]]}, ValueError, r"outs\[1\] must have shape"),
        (lambda g: {"outs": [g["outs"][0], g["outs"][1].half()]}, TypeError, r"outs\[1\] must have dtype bfloat16"),
        (lambda g: {"outs": [x.double() for x in g["outs"]]}, NotImplementedError, r"outs\[0\] must be bfloat16, float16 or"),
        (lambda g: {"outs": [x.clone().requires_grad_() for x in g["outs"]]}, NotImplementedError, "must not require gradients"),
        (
            lambda g: {"outs": [g["outs"][0], g["outs"][1].clone().requires_grad_()]},
            NotImplementedError,
            r"outs\[1\] must not require gradients",
        ),
        (
            lambda g: {"lses": [g["lses"][0], g["lses"][1].clone().requires_grad_()]},
            NotImplementedError,
            r"lses\[1\] must not require gradients",
        ),
        (lambda g: {"out": g["out"].clone().requires_grad_()}, NotImplementedError, "out must not require gradients"),
        (lambda g: {"lse_out": g["lse_out"].clone().requires_grad_()}, NotImplementedError, "lse_out must not require gradients"),
        (lambda g: {"scale": torch.ones(1).requires_grad_(), "out": None}, NotImplementedError, "scale must not require gradients"),
        (lambda g: {"outs": [g["outs"][0], g["outs"][1].to("meta")]}, ValueError, r"outs\[1\] must be on cpu"),
        (lambda g: {"lses": [g["lses"][0], g["lses"][1].to("meta")]}, ValueError, r"lses\[1\] must be on cpu"),
        (lambda g: {"lse_out": g["lse_out"].to("meta")}, ValueError, "lse_out must be on cpu, .* got meta"),
        (lambda g: ALLOCATED | {"scale": torch.ones(1, device="meta")}, ValueError, "scale must be one float32 on cpu"),
        (lambda g: ALLOCATED | {"outs": [g["outs"][0], g["outs"][1].to("meta")]}, ValueError, r"outs\[1\] must be on cpu"),
        (lambda g: ALLOCATED | {"lses": [g["lses"][0], g["lses"][1].to("meta")]}, ValueError, r"lses\[1\] must be on cpu"),
        (
            lambda g: {"outs": [torch.stack(g["outs"])], "lses": [torch.stack(g["lses"])]},
            ValueError,
            r"outs\[0\] must have 3 dimensions",
        ),
        (lambda g: {"lses": [g["lses"][0], g["lses"][1].T]}, ValueError, r"lses\[1\] must have shape"),
        (lambda g: {"lses": [g["lses"][0], g["lses"][1].half()]}, TypeError, r"lses\[1\] must be float32, got float16"),
        (lambda g: {"out": g["out"][1:]}, ValueError, "out must have shape"),
        (lambda g: {"out": g["out"].half()}, TypeError, "out must be bfloat16 or float32, got float16"),
        (lambda g: {"lse_out": g["lse_out"].T}, ValueError, "lse_out must have shape"),
        (lambda g: {"scale": torch.ones(1).double()}, ValueError, "scale must be one float32"),
    ],
)
def test_errors_of_a_merge_of_n(backend, change, error, words):
    check_error(merge_n_attn_states, merge_n_arguments(), change, error, words, backend)


@backends
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: {"lse_base": None}, ValueError, "lse_base must be 'e' or '2', got None"),
        (lambda g: {"out": g["out"][0]}, ValueError, "out must have 3 dimensions"),
        (lambda g: {"out": g["out"].double()}, NotImplementedError, "out must be bfloat16, float16 or float32"),
        (lambda g: {"out": g["out"].clone().requires_grad_()}, NotImplementedError, "out must not require gradients"),
        (lambda g: {"lses": list(g["lses"])}, TypeError, "lses must be a torch.Tensor, got list"),
        (lambda g: {"lses": g["lses"][0]}, ValueError, r"lses must have 3 dimensions \[ranks, tokens, heads\], got 2"),
        (lambda g: {"lses": g["lses"][:, 1:]}, ValueError, r"lses must have shape .* = \(2, 4, 3\), got \(2, 3, 3\)"),
        (lambda g: {"lses": g["lses"].double()}, TypeError, "lses must be float32"),
        (lambda g: {"lses": g["lses"][:0]}, ValueError, "lses must be of 1 to 64 ranks, got 0"),
        (lambda g: {"lses": g["lses"].repeat(33, 1, 1)}, ValueError, "lses must be of 1 to 64 ranks, got 66"),
        (lambda g: {"rank": 2}, ValueError, r"rank must be in 0..1, got 2"),
        (lambda g: {"rank": -1}, ValueError, r"rank must be in 0..1, got -1"),
        (lambda g: {"rank": "0"}, TypeError, "rank must be an int, got '0'"),
        (lambda g: {"rank": True}, TypeError, "rank must be an int, got True"),
        (lambda g: {"lses": g["lses"].clone().requires_grad_()}, NotImplementedError, "lses must not require gradients"),
        (lambda g: {"corrected": g["corrected"].clone().requires_grad_()}, NotImplementedError, "corrected must not require grad"),
        (lambda g: {"lse_out": g["lse_out"].clone().requires_grad_()}, NotImplementedError, "lse_out must not require gradients"),
        (lambda g: {"lses": g["lses"].to("meta")}, ValueError, "lses must be on cpu, .* got meta"),
        (lambda g: {"corrected": g["corrected"].to("meta")}, ValueError, "corrected must be on cpu, .* got meta"),
        (lambda g: {"lse_out": g["lse_out"].to("meta")}, ValueError, "lse_out must be on cpu, .* got meta"),
        (lambda g: {"seqused_k": ints(*[1] * 8).view(2, 4).to("meta")}, ValueError, "seqused_k must be on cpu, .* got meta"),
        (lambda g: {"seqused_k": ints(1, 1)}, ValueError, r"seqused_k must have 2 dimensions \[ranks, tokens\]"),
        (lambda g: {"seqused_k": torch.ones(2, 4)}, TypeError, "seqused_k must be int32, got float32"),
        (lambda g: {"seqused_k": ints(*[1] * 8).view(4, 2).T}, ValueError, "seqused_k must be contiguous"),
        (lambda g: {"corrected": g["corrected"][1:]}, ValueError, "corrected must have shape"),
        (lambda g: {"corrected": g["corrected"].half()}, TypeError, "corrected must be bfloat16 or float32, got float16"),
        (lambda g: {"corrected": g["corrected"].mT.contiguous().mT}, ValueError, "corrected must have a contiguous last dim"),
        (
            lambda g: {"corrected": torch.zeros(2, 4, 1, 16)},
            ValueError,
            "corrected must have a number of shares that divides the 3",
        ),
        (lambda g: {"corrected": torch.zeros(3, 4, 3, 16)}, ValueError, "corrected must have shape .shares, .* = .3, 4, 1, 16"),
        (lambda g: {"lse_out": torch.zeros(0, 4, 1)}, ValueError, "lse_out must have a number of shares .* got 0"),
        (lambda g: {"lse_out": torch.zeros(3, 4, 2)}, ValueError, r"lse_out must have shape .shares, .* = \(3, 4, 1\)"),
        (lambda g: {"lse_out": g["lse_out"].double()}, TypeError, "lse_out must be float32, got float64"),
    ],
)
def test_errors_of_a_correction(backend, change, error, words):
    check_error(cp_correct_out, correct_arguments(), change, error, words, backend)


def test_row_op_numbers():
    assert [*RowOp] == [RowOp.SKIP, RowOp.COPY_A, RowOp.COPY_B, RowOp.MERGE] == [0, 1, 2, 3]


@devices
def test_opcheck(device):
    both = merge_arguments(device)
    partials, results = [both[n] for n in ("out_a", "lse_a", "out_b", "lse_b")], [both["out"], both["lse_out"]]
    outs, lses = partials[::2], partials[1::2]
    scale, row_op = torch.ones(1, device=device), ints(3, 1, 0, 2).to(device)
    ops = torch.ops.pcp_mla
    for given in (None, scale):
        torch.library.opcheck(ops.merge_attn_states.default, (*partials, given, False))
        torch.library.opcheck(ops.merge_n_attn_states.default, (outs, lses, given, True))
    for rows in ((None, None, None), (row_op, None, row_op), (row_op[:1], ints(0, 3).to(device), None)):
        torch.library.opcheck(ops.merge_attn_states_out.default, (*partials, None, *rows, False, *results))
    for lse_out in (results[1], None):
        torch.library.opcheck(ops.merge_n_attn_states_out.default, (outs, lses, None, True, results[0], lse_out))
        torch.library.opcheck(ops.cp_correct_out.default, (outs[0], torch.stack(lses), None, 1, False, results[0], lse_out))


@devices
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(merge_attn_states, merge_arguments), (merge_n_attn_states, merge_n_arguments), (cp_correct_out, correct_arguments)],
)
def test_compiles_without_graph_breaks(device, function, arguments):
    torch.compiler.reset()  # the three functions' graphs count as recompilations of one

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**inputs):
        out, lse = function(**inputs)
        return out.float() + 1, lse * 2

    for tokens in (4, 9, 17):
        results = arguments(device, tokens)
        fresh = dict(list(results.items())[:-2])  # without given outputs
        for inputs in (fresh, results):
            out, lse = compiled(**inputs)
            wanted, wanted_lse = function(**fresh)
            assert torch.equal(out, wanted.float() + 1)
            assert torch.equal(lse, wanted_lse * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(merge_attn_states, merge_arguments), (merge_n_attn_states, merge_n_arguments), (cp_correct_out, correct_arguments)],
)
def test_graph_replay_on_a_side_stream_with_other_contents(backend, function, arguments):
    static = arguments("cuda", 300)
    function(**static, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        got = function(**static, backend=backend)
    for x in tensors_of(static):
        x.copy_(torch.randn_like(x))
    wanted = function(**{**static, **{name: x.clone() for name, x in zip(list(static)[-2:], got, strict=True)}}, backend=backend)
    graph.replay()
    assert same_bits(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31(backend):
    tokens, heads, dim = 131_100, 128, 128
    out_a, out_b = (torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert out_a.numel() > 2**31
    lse_a, lse_b = (torch.randn(tokens, heads, device="cuda") for _ in range(2))
    out, lse = merge_attn_states(out_a, lse_a, out_b, lse_b, backend=backend)
    rows = torch.tensor([0, 1, tokens // 2, 131_071, 131_072, tokens - 1], device="cuda")
    check(out[rows], lse[rows], [out_a[rows], out_b[rows]], [lse_a[rows], lse_b[rows]])
    merge_attn_states(out_a, lse_a, out_b, lse_b, out=out_b, lse_out=lse_b, backend=backend)
    assert torch.equal(out_b, out)
    assert math.isfinite(lse_b.sum().item())
