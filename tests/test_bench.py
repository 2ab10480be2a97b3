"""A benchmark refuses to time an op that gives something else than it must."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import (
    attention,
    cp_merge,
    exchange,
    fused_gather,
    graphs,
    heads,
    kv_up_project,
    latent_cache,
    layer,
    merge_states,
    plain,
    planner,
    seed,
    split,
    timing,
    tune_kv_up_project,
)
from bench.__main__ import main, parse_geometries
from bench.vllm import __main__ as vllm
from pcp_mla import MLADims, PCPMetadata, PCPPlanner
from pcp_mla.exchange import latents
from pcp_mla.testing.played import play

DIMS = MLADims(2, 16, 8, 16, 32)
META = PCPMetadata.build([5, 30], world_size=2, rank=1, device="cpu")


def partials(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.randn(9, 2, 16).bfloat16() for _ in range(count)], [torch.randn(2, 9).T for _ in range(count)]


def merges_over_ranks(group: Any) -> Any:
    return cp_merge.make_calls(*cp_merge.inputs(3, 8, group, "cpu"), group)


def heads_over_ranks(group: Any) -> Any:
    step = heads.Step(128, 3, group, "cpu")
    return step.checked("a collective", step.collective())


def plans() -> None:
    lengths = {"query_lens": np.array([40, 1]), "context_lens": np.array([0, 70]), "is_prefill": np.array([True, False])}
    tables = np.arange(4, dtype=np.int32).reshape(2, 2)
    steps = planner.PCPPlanner(2, 64, 2, 1, block_size=planner.BLOCK, device="cpu")
    meta = steps.plan(**lengths, block_tables=torch.from_numpy(tables))
    planner.check(meta, planner.partition(**lengths, world_size=2, rank=1), tables)


# What makes the paths of each benchmark, all of them checked.
MAKE: dict[str, Callable[[], Any]] = {
    "attention": lambda: attention.make_paths(*attention.inputs(40, DIMS, 2, "cpu"), "cpu"),
    "cp_merge": lambda: play(2, merges_over_ranks),
    "exchange": lambda: play(2, lambda group: exchange.paths(exchange.Step(128, group, "cpu"))),
    "gather": lambda: fused_gather.gather_paths(META, 2, ["auto"]),
    "graphs": lambda: graphs.Stack(graphs.Echo(), 32, "cpu").paths(False),
    "heads": lambda: play(2, heads_over_ranks),
    "latent_cache": lambda: latent_cache.make_paths(128, DIMS, "cpu", ["auto"]),
    "layer": lambda: layer.Layer(([9, 4], [30, 0], 1, 2), None, 0, "cpu").paths("seed", "rows", "ours"),
    "merge_n": lambda: merge_states.make_paths(*partials(3), ["auto"]),
    "merge_two": lambda: merge_states.make_paths(*partials(2), ["auto"]),
    "planner": plans,
    "restore": lambda: fused_gather.restore_paths(META, 2, ["auto"]),
    "split": lambda: split.Split(([9], [30], 3, 2), None, 0, "cpu").paths(),
    "tune": lambda: tune_kv_up_project.make_call(70, torch.float32, "cpu")(tune_kv_up_project.DEFAULT),
    "kv_up_project": lambda: kv_up_project.make_paths(64, DIMS, "cpu", ["auto"]),
}
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cp_merge, "HEADS", 4)
    monkeypatch.setattr(graphs, "LAYERS", 1)
    monkeypatch.setattr(graphs, "HIDDEN", 64)
    monkeypatch.setattr(graphs, "DIMS", DIMS)
    monkeypatch.setattr(exchange, "DIMS", DIMS)
    monkeypatch.setattr(tune_kv_up_project, "DIMS", DIMS)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda: function())


@pytest.mark.parametrize("name", [pytest.param(name, marks=INTERPRETED if name == "tune" else ()) for name in MAKE])
@torch.inference_mode()
def test_what_is_right_is_timed(name: str) -> None:
    MAKE[name]()


def spoiled(op: Callable[..., Any], result: int = 0) -> Callable[..., Any]:
    """The op with 5 % too much in the last row of one of its results."""

    def call(*arguments: Any, **options: Any) -> Any:
        given = op(*arguments, **options)
        part = given if isinstance(given, torch.Tensor) else given[result]
        part[-1] *= 1.05
        return given

    return call


def spoiled_apart(op: Callable[..., Any], result: int) -> Callable[..., Any]:
    """Spoiled where k_pe is left out of K."""
    wrong = spoiled(op, result)
    return lambda *arguments, **options: (wrong if options.get("k_pe_apart") else op)(*arguments, **options)


def into(op: Callable[..., Any], argument: int) -> Callable[..., Any]:
    """The op with 5 % too much at the end of one of the arguments that it writes."""

    def call(*arguments: Any, **options: Any) -> None:
        op(*arguments, **options)
        arguments[argument][-1] *= 1.05

    return call


def elsewhere(op: Callable[..., Any]) -> Callable[..., Any]:
    """A write into the cache that touches one row more."""

    def call(latents: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *rest: Any, **options: Any) -> None:
        op(latents, cache, slots, *rest, **options)
        free = torch.ones(cache.shape[0] * cache.shape[1], dtype=torch.bool)
        free[slots] = False
        cache.view(-1, cache.shape[2])[free.nonzero()[0]] = 1

    return call


def scaled(op: Callable[..., Any], share: float = 1.01) -> Callable[..., Any]:
    return lambda *arguments, softmax_scale, **options: op(*arguments, softmax_scale=softmax_scale * share, **options)


def with_other_scale(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda dims, scale, *rest: make(dims, scale * 1.04, *rest)


@pytest.mark.parametrize(
    ("name", "module", "attribute", "wrong"),
    [
        ("attention", attention, "pcp_attention", spoiled),
        ("attention", attention, "pcp_attention", lambda op: spoiled(op, 1)),
        ("attention", attention, "pcp_attention", scaled),
        ("cp_merge", cp_merge, "cp_lse_a2a", spoiled),
        ("cp_merge", cp_merge, "cp_lse_ag_out_rs", spoiled),
        ("cp_merge", cp_merge, "torch_a2a", spoiled),
        ("cp_merge", cp_merge, "torch_ag_out_rs", spoiled),
        ("exchange", latents, "write_rows", elsewhere),
        ("exchange", latents, "write_rows", lambda op: lambda x, *rest: op(x.roll(1, 0), *rest)),
        ("exchange", exchange, "gather_part", spoiled),
        ("gather", fused_gather, "pcp_fused_gather", lambda op: spoiled(op, 5)),
        ("graphs", graphs, "MLAPrefill", with_other_scale),
        ("graphs", graphs.Stack, "attend", spoiled),
        ("graphs", seed.SeedPath, "__call__", spoiled),
        ("graphs", torch, "compile", lambda compile: lambda function, **_: lambda: 1.2 * function()),
        ("heads", heads.HeadExchange, "to_heads", spoiled),
        ("heads", heads.HeadExchange, "to_tokens", spoiled),
        ("latent_cache", latent_cache, "write_latent_cache", elsewhere),
        ("latent_cache", latent_cache, "write_latent_cache", lambda op: lambda x, *rest, **_: op(x.roll(1, 0), *rest)),
        ("latent_cache", latent_cache, "gather_latents", spoiled),
        ("layer", layer, "MLAPrefill", with_other_scale),
        ("layer", layer.Layer, "ours", spoiled),
        ("layer", layer.Layer, "rows", spoiled),
        ("layer", seed.SeedPath, "__call__", spoiled),
        ("merge_n", merge_states, "merge_n_attn_states", spoiled),
        ("merge_n", merge_states, "merge_n_attn_states", lambda op: spoiled(op, 1)),
        ("merge_two", merge_states, "merge_attn_states", spoiled),
        ("merge_two", merge_states, "merge_attn_states", lambda op: spoiled(op, 1)),
        ("restore", fused_gather, "pcp_fused_restore", spoiled),
        ("restore", fused_gather, "pcp_fused_restore", lambda op: spoiled(op, 1)),
        ("split", split.CopiedHeads, "to_tokens", spoiled),
        pytest.param("tune", tune_kv_up_project, "kv_up_project", lambda op: into(op, 4), marks=INTERPRETED),
        pytest.param("tune", tune_kv_up_project, "kv_up_project", lambda op: into(op, 5), marks=INTERPRETED),
        ("kv_up_project", kv_up_project, "kv_up_project", spoiled),
        ("kv_up_project", kv_up_project, "kv_up_project", lambda op: spoiled(op, 1)),
        ("kv_up_project", kv_up_project, "kv_up_project", lambda op: spoiled_apart(op, 0)),
        ("kv_up_project", kv_up_project, "kv_up_project", lambda op: spoiled_apart(op, 2)),
        ("kv_up_project", kv_up_project, "concat_k", spoiled),
    ],
)
@torch.inference_mode()
def test_what_is_wrong_is_not(
    name: str, module: Any, attribute: str, wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, attribute, wrong(getattr(module, attribute)))
    with pytest.raises(plain.WrongResultError):
        MAKE[name]()


@pytest.mark.parametrize("field", [*planner.NAMES, "slot_mapping"])
def test_a_wrong_plan_is_not(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PCPPlanner):
        def plan(self, *arguments: Any, **options: Any) -> Any:
            meta = super().plan(*arguments, **options)
            fields = {name: getattr(meta, name).clone() for name in (*planner.NAMES, "slot_mapping")}
            fields[field].view(-1)[-1] += 1
            return SimpleNamespace(**fields)

    monkeypatch.setattr(planner, "PCPPlanner", Wrong)
    with pytest.raises(plain.WrongResultError, match=f"the plan's {field} is wrong"):
        plans()
    monkeypatch.setattr(planner, "BATCHES", {"small": ([64], 2, 10)})
    monkeypatch.setattr(timing, "cpu_us", lambda *_: 1.0)
    with pytest.raises(plain.WrongResultError):
        list(planner.run("cpu"))


def test_nothing_is_printed_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(merge_states, "merge_attn_states", spoiled(merge_states.merge_attn_states))
    with pytest.raises(plain.WrongResultError, match="auto is wrong"):
        main(["merge_states", "--out", str(tmp_path)])
    assert "merge N=" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_geometries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each op that takes them, one file of all, whose numbers a row of the page is made of."""
    main(["--geometry", "16,8,16,32x2", "32,0,32,64", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "geometry_cpu.json").read_text()) if not torch.cuda.is_available() else None
    assert [file.stem.split("_")[0] for file in tmp_path.iterdir()] == ["geometry"]
    if written is None:
        return
    assert written["benchmark"] == "--geometry 16,8,16,32x2 32,0,32,64"
    of = [(r["op"], r["heads"], r["nope"], r["rope"], r["v"], r["rank"]) for r in written["results"]]
    ops = ["attention", "write_latent_cache", "gather_latents", "kv_up_project", "concat_k"]
    assert sorted(of) == sorted(
        [(op, 2, 16, 8, 16, 32) for op in ops] + [(op, 16, 32, 0, 32, 64) for op in ops if op != "concat_k"]
    )
    assert "16 + 8 / 16, rank 32" in capsys.readouterr().out
    for wrong in ("16,8,16", "16,8,16,32x", "16,8,16,0", "some"):
        with pytest.raises(SystemExit):
            main(["--geometry", wrong, "--out", str(tmp_path)])
        said = capsys.readouterr().err
        assert "a geometry must be nope,rope,v,rank" in said
        assert repr(wrong) in said
    with pytest.raises(SystemExit):
        main(["planner", "--geometry", "all", "--out", str(tmp_path)])
    assert "no geometries of 'planner'" in capsys.readouterr().err
    assert len(parse_geometries(["all"])) == len(set(parse_geometries(["all"]))) > 5


def test_rows_are_compared_by_their_own_length() -> None:
    wanted = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    plain.check_close("same", wanted * (1 + 2**-8), wanted)
    for wrong in (wanted + torch.tensor([[0.0, 0.0], [0.0, 0.01]]), wanted * torch.nan, wanted[:1], torch.zeros_like(wanted)):
        with pytest.raises(plain.WrongResultError, match="op"):
            plain.check_close("op", wrong, wanted)
    plain.check_close("near nothing", torch.full((1, 1), 1e-5), torch.zeros(1, 1), least=1e-4)


def test_local_tokens() -> None:
    requests, tokens = plain.local_tokens([7, 2], 2, 0)
    assert requests.tolist() == [0, 0, 0, 1]
    assert tokens.tolist() == [0, 1, 6, 0]
    assert plain.local_tokens([7, 2], 2, 1)[1].tolist() == [2, 3, 4, 5, 1]
    gathered = torch.tensor([0, 1, 6, 10, -1, 2, 3, 4, 5, 11])
    assert [rows.tolist() for rows in plain.natural_order(gathered, [7, 2], 2)] == [list(range(7)), [10, 11]]


def test_sides_of_an_engine_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """Each on the same prompts, the first one of them in turn."""
    args = SimpleNamespace(parts="exchange,prefill", pcp=2, split="heads", seconds=60)
    ours = ("exchange", "prefill")
    assert vllm.sides(SimpleNamespace(**{**vars(args), "pcp": 1})) == {"vllm": ()}
    assert vllm.sides(SimpleNamespace(**{**vars(args), "split": None})) == {"vllm": (), "ours": ours}
    assert vllm.sides(args) == {"vllm": (), "ours": ours, "heads": (*ours, "heads")}

    calls: list[Any] = []
    generated = SimpleNamespace(token_ids=[7])
    llm = SimpleNamespace(
        collective_rpc=lambda function, args: calls.append(args[0]),
        generate=lambda requests, params, use_tqdm: [SimpleNamespace(outputs=[generated]) for _ in requests],
        llm_engine=SimpleNamespace(reset_prefix_cache=lambda: None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
        row = vllm.Timer(llm, args).compare([5], 1, 2)
    order = [(), ours, (*ours, "heads")]
    assert calls == [*order[::-1], *order, *order[::-1]]
    assert row["tokens_equal"]
    vllm.show({"case": "ttft", "prompt": 5, "step_tokens": 9} | row)
    assert "heads over ours" in capsys.readouterr().out
