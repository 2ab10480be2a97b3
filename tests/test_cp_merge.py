"""Context-parallel merges of attention outputs: over gloo processes, played ranks and no group, against attention over all keys."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from pcp_mla.exchange.cp_merge import cp_lse_a2a, cp_lse_ag_out_ar, cp_lse_ag_out_rs, flat_cp_group
from pcp_mla.ops.merge_states import cp_correct_out
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

FUNCTIONS = {"ag_out_rs": cp_lse_ag_out_rs, "ag_out_ar": cp_lse_ag_out_ar, "a2a": cp_lse_a2a}
TOKENS, HEADS, DIM, KEYS, INTERLEAVE = 7, 8, 10, 50, 3
# Keys that each row sees: shards of some ranks have none of them, row 0 sees none at all.
VISIBLE = torch.tensor([0, 1, 4, 9, 20, 33, KEYS])

# dtype, LSE base, what a rank without keys leaves ("seqused": NaN and a finite LSE, told by seqused_k), layout of the LSE
CASES = [
    (torch.float32, "e", "-inf", "TH"),
    (torch.float32, "2", "+inf", "TH"),
    (torch.float32, "e", "seqused", "HT"),
    (torch.bfloat16, "e", "seqused", "TH"),
    (torch.bfloat16, "2", "-inf", "HT"),
]


def attention(seed: int, keys_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in float64 over the keys where ``keys_of`` [KEYS] is true; NaN and -inf for rows that see none of them."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(TOKENS, HEADS, DIM, generator=gen, dtype=torch.float64)
    k, v = torch.randn(2, KEYS, HEADS, DIM, generator=gen, dtype=torch.float64)
    scores = torch.einsum("thd,nhd->thn", q, k)
    seen = (torch.arange(KEYS) < VISIBLE[:, None]) & keys_of
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("thn,nhd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def shard(case: tuple[Any, ...], world: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The rank's partial output, its LSE and the options to pass with them."""
    dtype, base, empty, layout = case
    mine = torch.arange(KEYS) // INTERLEAVE % world == rank
    out, lse = attention(seed, mine)
    used = ((torch.arange(KEYS) < VISIBLE[:, None]) & mine).sum(1).int()
    if base == "2":
        lse = lse / math.log(2)
    lse = lse.masked_fill(used[:, None] == 0, 3.0 if empty == "seqused" else float(empty)).float()
    if layout == "HT":
        lse = lse.T.contiguous().T
    wide = torch.full((TOKENS, HEADS, DIM + 6), torch.nan, dtype=dtype)  # V that was padded
    wide[..., :DIM] = out
    return wide[..., :DIM], lse, {"lse_base": base, "seqused_k": used if empty == "seqused" else None}


def run_cases(group: Any, world: int, rank: int) -> dict[Any, Any]:
    results = {}
    for i, case in enumerate(CASES):
        out, lse, options = shard(case, world, rank)
        results |= {(name, i): fn(out, lse, group, return_lse=True, **options) for name, fn in FUNCTIONS.items()}
    return results


@functools.cache
def exact(case: tuple[Any, ...], world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The right merge in float64: of the rounded partials, as a merge can do no better; for float32 attention over all keys."""
    out, lse = attention(0, torch.ones(KEYS, dtype=torch.bool))
    if case[0] != torch.float32:
        parts = [shard(case, world, r)[0].double() for r in range(world)]
        lses = torch.stack([attention(0, torch.arange(KEYS) // INTERLEAVE % world == r)[1] for r in range(world)])
        out = sum(x.nan_to_num() * (s - lse).exp().nan_to_num()[..., None] for x, s in zip(parts, lses, strict=True))
    return out.nan_to_num(), lse / math.log(2) if case[1] == "2" else lse


def share_of(x: torch.Tensor, name: str, world: int, rank: int) -> torch.Tensor:
    return x if name == "ag_out_ar" else x.unflatten(1, (world, -1))[:, rank]


def within_a_rounding(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether a bf16 result is within one rounding, 2**-8 of itself, of ``want``, but for the float32 sum's error."""
    return bool(((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all())


def check(result: tuple[torch.Tensor, torch.Tensor], name: str, case: tuple[Any, ...], world: int, rank: int) -> None:
    want, want_lse = (share_of(x, name, world, rank) for x in exact(case, world))
    out, lse = result
    assert out.dtype == case[0]
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=2e-6)
    if out.dtype == torch.float32:
        torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=2e-6)
    else:
        assert within_a_rounding(out, want)
    assert not out[0].any()  # row 0 sees no keys


def process(group: Any) -> dict[Any, Any]:
    """All that needs so many ranks, as they are spawned once."""
    world, rank = group.size(), group.rank()
    results = run_cases(group, world, rank)
    if world == 2:
        empty = torch.zeros(0, HEADS, DIM)
        results["no tokens"] = [fn(empty, empty[..., 0], group).shape for fn in FUNCTIONS.values()]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pcp", "dcp"))
        flat = flat_cp_group(mesh)
        results["flat"] = (flat.size(), flat.rank(), flat_cp_group([[0, 1], [2, 3]]).rank())
        results["2x2"] = run_cases(flat, 4, rank)
        results["errors"] = [layout_error(layout) for layout, _ in BAD_LAYOUTS]
        results["stages"] = two_stages(mesh, flat)
    if world == 8:
        results["2x4"] = run_cases(flat_cp_group(torch.arange(8).view(2, 4)), 8, rank)
        pair = flat_cp_group(init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "pcp", "dcp")))
        results["2x2x2"], results["pair"] = run_cases(pair, 4, rank % 4), pair.rank()
        # PCP outermost, DCP within TP: this rank's group is 0, 1, 4, 5 or 2, 3, 6, 7.
        results["tp"] = flat_cp_group(torch.arange(8).view(2, 2, 2).transpose(0, 1)).rank()
    return results


@functools.cache
def processes(world: int) -> list[dict[Any, Any]]:
    return run_distributed(world, process, timeout=110.0)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("world", "where"), [(2, None), (4, None), (8, None), (4, "2x2"), (8, "2x4"), (8, "2x2x2")])
def test_merge_is_attention_over_all_keys(world: int, where: str | None, name: str, case: int) -> None:
    ranks = 4 if where == "2x2x2" else world
    for rank, results in enumerate(processes(world)):  # of two groups, each with all keys, where there are more than ranks
        check((results if where is None else results[where])[name, case], name, CASES[case], ranks, rank % ranks)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_played_ranks_give_the_same(world: int) -> None:
    """As right, the all-to-all and the LSEs to the bit."""
    played = play(world, lambda group: run_cases(group, world, group.rank))
    for rank, (mine, theirs) in enumerate(zip(played, processes(world), strict=True)):
        assert mine.keys() == {(name, case) for name in FUNCTIONS for case in range(len(CASES))}
        for (name, case), (out, lse) in mine.items():
            check((out, lse), name, CASES[case], world, rank)
            assert torch.equal(lse, theirs[name, case][1])
            assert torch.equal(out, theirs[name, case][0]) or name != "a2a"


def test_no_tokens() -> None:
    assert processes(2)[0]["no tokens"] == [(0, HEADS // 2, DIM), (0, HEADS, DIM), (0, HEADS // 2, DIM)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_world_of_one(name: str, case: tuple[Any, ...]) -> None:
    """The bits of its own partial, without a group and with one of one rank; what is empty is cleaned."""
    out, lse, options = shard(case, 2, 1)
    seen = attention(0, torch.arange(KEYS) // INTERLEAVE % 2 == 1)[1] > -torch.inf
    got, got_lse = FUNCTIONS[name](out, lse, None, return_lse=True, **options)
    assert torch.equal(got, torch.where(seen[..., None], out, 0))
    torch.testing.assert_close(got_lse, torch.where(seen, lse, -torch.inf), rtol=1e-6, atol=0)
    assert torch.equal(FUNCTIONS[name](out, lse, None, **options), got)
    assert torch.equal(play(1, lambda group: FUNCTIONS[name](out, lse, group, **options))[0], got)


def test_rounding_before_the_sum_is_worse() -> None:
    """A sum of bf16 partial sums is not within one rounding, and its error is a good deal larger."""
    case = (torch.bfloat16, "e", "-inf", "TH")
    shards = [shard(case, 8, r) for r in range(8)]
    lses = torch.stack([lse for _, lse, _ in shards])
    early = torch.zeros(TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    for r, (out, _, _) in enumerate(shards):
        early += cp_correct_out(out, lses, r, corrected=torch.empty(out.shape, dtype=out.dtype))[0]
    late = play(8, lambda group: cp_lse_ag_out_ar(*shards[group.rank][:2], group))[0]
    want = exact(case, 8)[0]
    assert within_a_rounding(late, want)
    assert not within_a_rounding(early, want)
    assert (early.double() - want).square().mean().sqrt() > 1.3 * (late.double() - want).square().mean().sqrt()


# docs/merge_states.md has this example.
MASSES = torch.tensor([[1.0, 7.0], [1.0, 1.0]])  # exp(LSE) of rank (pcp, dcp)
OUTPUTS = torch.tensor([[1.0, 1.0], [0.0, 0.0]])


def two_stages(mesh: Any, flat: Any) -> dict[str, float]:
    """The merge over DCP and then over PCP on a 2 x 2 mesh, with the LSEs of the first stage or of the ranks."""
    dcp, pcp = mesh.get_group("dcp"), mesh.get_group("pcp")
    here = (pcp.rank(), dcp.rank())
    out, lse = OUTPUTS[here].view(1, 1, 1), MASSES[here].log().view(1, 1)
    stage, stage_lse = cp_lse_ag_out_ar(out, lse, dcp, return_lse=True)
    return {
        "flat": cp_lse_ag_out_ar(out, lse, flat).item(),
        "stages": cp_lse_ag_out_ar(stage, stage_lse, pcp).item(),
        "stale": cp_lse_ag_out_ar(stage, lse, pcp).item(),
    }


def test_second_stage_with_the_lse_of_the_first_is_wrong() -> None:
    for rank, results in enumerate(processes(4)):
        stages = results["stages"]
        assert stages["flat"] == pytest.approx(0.8, abs=1e-6)
        assert stages["stages"] == pytest.approx(0.8, abs=1e-6)
        assert stages["stale"] == pytest.approx([0.5, 0.875][rank % 2], abs=1e-6)


def test_flat_group() -> None:
    for rank, results in enumerate(processes(4)):
        assert results["flat"] == (4, rank, rank)
    assert [results["pair"] for results in processes(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [results["tp"] for results in processes(8)] == [0, 1, 0, 1, 2, 3, 2, 3]


ONCE = "ValueError: flat_cp_group: layout must have each of the ranks 0..3 of the world exactly once, got "
BAD_LAYOUTS = [
    ([0, 1, 2, 3], "ValueError: flat_cp_group: layout must have at least 2 dimensions [..., PCP, DCP] and not be empty, got (4,)"),
    ([[0, 1]], ONCE + "[[0, 1]]"),
    ([[0, 1], [2, 2]], ONCE + "[[0, 1], [2, 2]]"),
    ([[1, 2], [3, 4]], ONCE + "[[1, 2], [3, 4]]"),
    (
        [[0, 2], [1, 3]],
        "ValueError: flat_cp_group: layout must have ascending ranks in each group, PCP outer and DCP inner, got [0, 2",
    ),
    ([[0.0, 1.0], [2.0, 3.0]], "TypeError: flat_cp_group: layout must be integers, got float32"),
    ([[0, 1], [2]], "TypeError: flat_cp_group: layout must be a DeviceMesh or integers [..., PCP, DCP], got [[0, 1], [2]]"),
]


def layout_error(layout: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        flat_cp_group(layout)
    return f"{caught.type.__name__}: {caught.value}"


def test_bad_layout() -> None:
    for results in processes(4):
        for got, (_, message) in zip(results["errors"], BAD_LAYOUTS, strict=True):
            assert got.startswith(message)


class Silent:
    """One end of a group of two whose collectives must not be reached."""

    rank, world_size = 0, 2

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a collective was made")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.zeros(3, 4)}, ValueError, r"out must have 3 dimensions \[tokens, heads, dim\], got 2"),
        ({"out": torch.zeros(3, 4, 5).double()}, NotImplementedError, "out must be bfloat16, float16 or float32, got float64"),
        ({"lse": torch.zeros(4, 3)}, ValueError, r"lse must have shape \[tokens, heads\] = \(3, 4\), got \(4, 3\)"),
        ({"lse": torch.zeros(3, 4).bfloat16()}, TypeError, "lse must be float32, got bfloat16"),
        ({"seqused_k": torch.ones(2, 3).int()}, ValueError, r"seqused_k must have 1 dimensions \[tokens\], got 2"),
        ({"seqused_k": torch.ones(4).int()}, ValueError, r"seqused_k must have shape \[tokens\] = \(3\), got \(4,\)"),
        ({"seqused_k": torch.ones(3)}, TypeError, "seqused_k must be int32, got float32"),
        ({"lse_base": "10"}, ValueError, "lse_base must be 'e' or '2', got '10'"),
        ({"group": "world"}, TypeError, "group must be a ProcessGroup, a PlayedGroup or None, got str"),
    ],
)
def test_bad_input(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"out": torch.zeros(3, 4, 5), "lse": torch.zeros(3, 4), "group": Silent()} | change
    with pytest.raises(error, match=f"cp_lse_{name}: {message}"):
        FUNCTIONS[name](**arguments)


@pytest.mark.parametrize("name", ["ag_out_rs", "a2a"])
def test_heads_that_do_not_divide(name: str) -> None:
    with pytest.raises(ValueError, match=f"cp_lse_{name}: out must have a number of heads that the group's 2 ranks divide, got 3"):
        FUNCTIONS[name](torch.zeros(1, 3, 4), torch.zeros(1, 3), Silent())


def graph_equals_eager(group: Any, name: str) -> bool:
    fn, device = FUNCTIONS[name], torch.device("cuda", group.rank())
    (first, first_lse, options), (second, second_lse, _) = (shard(CASES[3], 2, group.rank(), seed) for seed in (1, 2))
    out, lse, used = (x.to(device) for x in (first, first_lse, options["seqused_k"]))
    fn(out, lse, group, seqused_k=used)  # the communicator and the kernels must exist before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
        replayed = fn(out, lse, group, seqused_k=used, return_lse=True)
    out.copy_(second)
    lse.copy_(second_lse)
    used[-1] = 0  # now a row without keys
    graph.replay()
    torch.cuda.synchronize()
    eager = fn(out, lse, group, seqused_k=used, return_lse=True)
    assert torch.isfinite(eager[0]).all()
    return all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_captured_graph(name: str) -> None:
    assert run_distributed(2, graph_equals_eager, name, backend="nccl") == [True, True]
