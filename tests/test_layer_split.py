"""When a layer is shared out by heads, and what it refuses before anything is exchanged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pcp_mla import HeadExchange, LatentExchange, MLADims, MLAPrefill, PCPMetadata
from pcp_mla.layer import split, steps
from pcp_mla.testing.played import play
from test_attention_backends import library  # noqa: F401
from test_layer_heads import CASES, ROOM, SCALE, SMALL, Inputs, plan


class Untouched:
    """In place of exchanges: nothing may be exchanged. As a LatentExchange, or as one of heads."""

    def __init__(self, heads: HeadExchange) -> None:
        for name in ("form", "heads", "max_tokens", "group"):
            setattr(self, name, getattr(heads, name))

    def publish(self, *_: Any, **__: Any) -> None:
        pytest.fail("exchanged")

    to_heads = to_tokens = publish


class Alone:
    """A rank of two, by itself."""

    rank, world_size = 0, 2

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def all_to_all_into(self, *_: Any) -> None:
        raise AssertionError


class Quantised(torch.nn.Linear):
    pass


def hooked(weight: torch.Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    linear.register_forward_hook(lambda module, given, out: 2 * out)
    return linear


MODULES = {"a subclass": lambda w: Quantised(*w.T.shape, bias=False).requires_grad_(False), "hooks": hooked,
           "a subclass of Tensor": lambda w: w.as_subclass(type("Sharded", (torch.Tensor,), {}))}  # fmt: skip


def refused(change: Any, error: Any, message: str, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Nothing is exchanged, and the cache is as it was."""
    dims = MLADims(5, *SMALL)
    heads: Any = Untouched(HeadExchange(Alone(), ROOM, dims, dtype))
    for name, value in changes.items():
        setattr(heads, name, value)
    meta = plan(CASES["context"], 2, 0)
    x = Inputs(meta, dims, torch.float32)
    layer, before = MLAPrefill(dims, SCALE, heads, "auto", heads, "heads"), x.cache.clone()
    with pytest.raises(error, match=message):
        layer(x.q, x.kv_c, x.k_pe, x.weight if change is None else change(x.weight), meta, x.cache)
    assert torch.equal(x.cache, before)


@pytest.mark.parametrize("name", MODULES)
def test_modules_whose_heads_cannot_be_had_alone(name: str) -> None:
    refused(
        MODULES[name], NotImplementedError, "MLAPrefill: kv_b_proj must be a weight, or a Linear without hooks, for split 'heads'"
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": 15}, ValueError, r"MLAPrefill: meta must have at most 15 tokens a rank \(max_tokens\), got 16"),
        (
            {"dtype": torch.bfloat16},
            TypeError,
            "MLAPrefill: heads must be an exchange of torch.float32, as q, got torch.bfloat16",
        ),
        ({"group": None}, ValueError, "MLAPrefill: meta must be for rank 0 of 1, as the group, got rank 0 of 2"),
    ],
)
def test_exchanges_of_another_kind(changes: Any, error: Any, message: str) -> None:
    refused(None, error, message, **changes)


def test_a_library_without_lengths_of_its_own(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    library("old")
    dims = MLADims(2, 16, 8, 16, 32)
    heads: Any = Untouched(HeadExchange(Alone(), ROOM, dims, torch.bfloat16))
    meta = plan(CASES["odd lengths"], 2, 0)
    x = Inputs(meta, dims, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="the rows of all ranks need seqused_k, which this version of fa2 lacks"):
        MLAPrefill(dims, SCALE, heads, "fa2", heads, "heads")(x.q, x.kv_c, x.k_pe, x.weight, meta)
    monkeypatch.setattr(steps, "heads_pay", lambda *_: True)
    kind = steps.Kind(dims, SCALE, "fa2", torch.bfloat16, False, heads, "auto")
    assert steps.LayerStep(kind, meta).heads is None


def test_what_cannot_be_made() -> None:
    dims = MLADims(5, *SMALL)
    exchange, heads = LatentExchange(None, ROOM, dims, torch.float32), HeadExchange(None, ROOM, dims, torch.float32)
    with pytest.raises(ValueError, match="MLAPrefill: heads must be a HeadExchange for split 'heads', got None"):
        MLAPrefill(dims, SCALE, exchange, split="heads")
    with pytest.raises(ValueError, match="MLAPrefill: split must be one of auto, tokens, heads, got 'rows'"):
        MLAPrefill(dims, SCALE, exchange, heads=heads, split="rows")
    for name, other in (("num_heads", (6, *SMALL)), ("qk_head_dim", (5, 9, 4, 5, 16)), ("v_head_dim", (5, 8, 4, 6, 16))):
        with pytest.raises(ValueError, match=f"MLAPrefill: heads must have {name} "):
            MLAPrefill(MLADims(*other), SCALE, exchange, heads=heads)
    with pytest.raises(TypeError, match="MLAPrefill: heads must be a HeadExchange or a PeerHeadExchange, got LatentExchange"):
        MLAPrefill(dims, SCALE, exchange, heads=exchange)
    assert MLAPrefill(dims, SCALE, exchange).split == "auto"


class TestAuto:
    """What auto takes, told by whether the exchange of heads is called."""

    def count(self, world: int, projection: Any = None, start: bool = False) -> list[int]:
        dims = MLADims(5, *SMALL)

        class Counted(HeadExchange):
            calls = 0

            def to_heads(self, *given: Any) -> torch.Tensor:
                self.calls += 1
                return super().to_heads(*given)

        def rank(group: Any) -> int:
            heads = Counted(group, ROOM, dims, torch.float32)
            layer = MLAPrefill(dims, SCALE, LatentExchange(group, ROOM, dims, torch.float32), heads=heads)
            meta = plan(CASES["context"], world, group.rank)
            x = Inputs(meta, dims, torch.float32)
            weight = x.weight if projection is None else projection(x.weight)
            by_tokens = dataclasses.replace(layer, split="tokens")
            for _ in range(2):
                out = layer(x.q, x.kv_c, x.k_pe, weight, meta, x.cache)
                assert torch.equal(out, by_tokens(x.q, x.kv_c, x.k_pe, weight, meta, x.cache))
            return heads.calls

        return play(world, rank)

    def test_a_cpu(self) -> None:
        assert self.count(2) == [0, 0]

    def test_by_cost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(steps, "heads_pay", lambda *given: asked.append(given) or True)
        assert self.count(2) == [2, 2]
        assert len(asked) == 2  # once a step and kind on each rank
        assert self.count(1) == [0]

    @pytest.mark.parametrize("name", MODULES)
    def test_modules_whose_heads_cannot_be_had_alone(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "heads_pay", lambda *_: True)
        assert self.count(2, MODULES[name]) == [0, 0]


def test_all_ranks_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a rank knows of itself alone nothing enters: how many tokens it has, how long its rows are."""
    monkeypatch.setattr(split.torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    seen: list[Any] = []
    monkeypatch.setattr(split, "split_seconds", lambda *given: seen.append(given) or (1.0, 0.0))
    dims = MLADims(16, 128, 64, 128, 512)
    for case in CASES.values():
        seen.clear()
        longest = set()
        for rank in range(3):
            pads = {"num_kv_tokens_padded": 200 + rank} if "num_kv_tokens_padded" in case.options else {}
            meta = plan(case._replace(options=case.options | pads), 3, rank)
            longest.add((meta.rank_rows.max_seqlen_q, None if pads else meta.rank_rows.max_seqlen_k))
            object.__setattr__(meta, "device", torch.device("cuda"))
            heads = HeadExchange(None, ROOM, dims, torch.bfloat16)
            split.heads_pay(heads, dims, torch.bfloat16, meta)
        assert len(set(seen)) == 1
        assert len(seen) == 3
        assert len(longest) == 1


def test_peers_are_of_one_node_and_collectives_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split.torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    dims, peers = MLADims(16, 128, 64, 128, 512), object()
    meta = PCPMetadata.build([32768], world_size=16, rank=0)
    object.__setattr__(meta, "device", torch.device("cuda"))
    assert split.heads_pay(peers, dims, torch.bfloat16, meta)  # type: ignore[arg-type]
    assert not split.heads_pay(HeadExchange(None, ROOM, dims, torch.bfloat16), dims, torch.bfloat16, meta)
