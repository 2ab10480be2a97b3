"""PCPPlanner under a stream of steps against loops over tokens, in all its forms; and PCPMetadata.build."""

from __future__ import annotations

import itertools
from copy import copy
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from pcp_mla import PCPMetadata, PCPPlanner
from pcp_mla.ops import native
from pcp_mla.ops.registry import select
from pcp_mla.planner import buffers
from stress.draw import Draw
from stress.expected import refused
from stress.families import DEVICE, Arguments, Family, backends
from stress.plain_plan import Cache, PlainPlan, before, double
from stress.steps import draw_step

HOSTS = ["numpy"] if native.status["_planner"] else ["native", "native", "numpy"]
EXPANDERS = ["auto"] if DEVICE == "cuda" else ["auto", *backends("plan_expand")]  # a GPU's planner launches by itself
TABLES = ["int32", "int64", "list", "tensor", "long tensor", "columns", "transposed", "wide", "more rows", "uint8", "none"]
ROOM = {"max_requests": 8, "max_tokens": 400, "max_context_chunks": 40}


def draw_stream(draw: Draw) -> Arguments:
    world = draw.choice([1, 2, 3, 4, 5, 8, 16])
    first = draw_step(draw, world=world)
    shards = draw.choice([1, 1, 1, 2, 3, 4])
    expander = draw.choice(EXPANDERS)
    size = {"most": 3, "high": 10} if expander == "triton" else {"most": 6, "high": draw.choice([10, 60])}
    steps = []
    for _ in range(draw.int(1, 5)):
        batch = draw_step(draw, **size, world=world)
        plan = PlainPlan(**batch | {name: first[name] for name in ("rank", "layout", "decode_policy")})
        keys, new = sum(plan.key_sizes()), sum(plan.sizes)
        padding = None
        if draw.chance(0.3):
            padding = {
                "num_tokens_padded": plan.fullest + draw.choice([0, 1, 4]),
                "num_requests_padded": min(8, len(plan.queries) + draw.choice([0, 1, 2])),
                "num_kv_tokens_padded": keys + draw.choice([0, 3]),
            }
        steps.append(
            {name: batch[name] for name in ("query_lens", "context_lens", "is_prefill")}
            | {
                "prompt_lens": None if draw.chance(0.5) else [draw.int(0, 120) for _ in plan.queries],
                "workspace_tokens": None if draw.chance(0.5) else max(1, new, keys // draw.int(1, 6)),
                "padding": padding,
                "tables": draw.choice(TABLES),
                "more_columns": draw.choice([0, 0, 1, 3]),
                "table_seed": draw.seed(),
                "keys_first": draw.chance(0.5),
                "rank_rows": draw.chance(0.5),
                "overwritten": draw.chance(0.4),
                "bad": draw.choice(BAD_NAMES) if draw.chance(0.3) else None,
            }
        )
    return {
        "device": DEVICE,
        "host": draw.choice(HOSTS),
        "expander": expander,
        "split": {name: first[name] for name in ("world_size", "rank", "layout", "decode_policy")},
        "cache": (draw.choice([1, 2, 7, 16]), shards, draw.int(0, shards - 1), draw.choice([1, 2, 5, 16])),
        "max_kv_tokens": draw.choice([None, 5000]),
        "steps": steps,
    }


# Changes of a step that must be refused, and leave the last plan as it was: the argument that the error names, and its value.
BAD = {
    "a negative length": ("query_lens", lambda step: [-1, *step["query_lens"][1:]] if step["query_lens"] else [-1]),
    "too many tokens": ("query_lens", lambda step: [401] * max(1, len(step["query_lens"]))),
    "too many requests": ("query_lens", lambda step: [0] * 9),
    "too few padded tokens": ("num_tokens_padded", lambda step: -1),
    "too few padded requests": ("num_requests_padded", lambda step: 9),
    "a negative workspace": ("workspace_tokens", lambda step: -5),
    "tables of one dimension": ("block_tables", lambda step: np.zeros(4, np.int32)),
    "a block that is no int32": ("block_tables", lambda step: np.full((len(step["query_lens"]), 999), 2**32 + 5)),
    "a block below 0": ("block_tables", lambda step: np.full((len(step["query_lens"]), 999), -2)),
    "a slot that is no int32": ("block_tables", lambda step: np.full((len(step["query_lens"]), 999), 2**31 - 1)),
}
BAD_NAMES = sorted(BAD)


def check_planner(device, host, expander, split, cache, max_kv_tokens, steps) -> None:
    reason = {"_planner": "not wanted"} if host == "numpy" else {}
    call = buffers.plan_expand if expander == "auto" else select("plan_expand", expander, device)
    names = ("block_size", "dcp_world_size", "dcp_rank", "cp_interleave")
    with patch.dict(native.status, reason), patch.object(buffers, "plan_expand", call):
        options = dict(zip(names, cache, strict=True)) | split | ROOM
        planner = PCPPlanner(**options, max_kv_tokens=max_kv_tokens, device=device)
        addresses: set[tuple[int, ...]] = set()
        last = None
        for step in steps:
            if last is not None and step["bad"] is not None:
                check_refusal(planner, step)
                compare(*last)
            last = check_step(planner, step, split, Cache(*cache))
            compare(*last)
            meta = last[0]
            fixed = [meta.row_table, meta.cu_seqlens_q, meta.seqused_k, meta.positions, meta.allgather_restore_idx]
            addresses.add(tuple(x.untyped_storage().data_ptr() for x in fixed))
            assert len(addresses) == 1, "buffers must stay where they are"


def check_refusal(planner: PCPPlanner, step: Arguments) -> None:
    name, change = BAD[step["bad"]]
    cache, of_blocks = planner.cache, "block" in step["bad"] or "slot" in step["bad"]
    used = any(step["query_lens"]) and cache.dcp_world_size == 1  # else the number may be one that nobody looks at
    if of_blocks and not (used and (cache.block_size > 1 or "slot" not in step["bad"])):
        return
    given = {key: step[key] for key in ("query_lens", "context_lens", "is_prefill")}
    given[name] = change(step)
    if name == "query_lens":
        given |= {"context_lens": [0] * len(given[name]), "is_prefill": [True] * len(given[name])}
    refused(lambda: planner.plan(**given), "PCPPlanner.plan", name)


def block_tables(kind: str, seed: int, requests: int, columns: int, device: str) -> tuple[Any, list[list[int]], Any]:
    """Tables as a caller may have them, the numbers in them, and what holds them in memory, to be overwritten."""
    rng = np.random.default_rng(seed)
    high = 256 if kind == "uint8" else 2**20
    rows = rng.integers(0, high, (requests, columns)).astype(np.int32)
    numbers = rows.tolist()
    if kind == "none":
        return None, numbers, None
    if kind == "list":
        return numbers, numbers, None
    if kind in ("int32", "int64", "uint8"):
        given = rows.astype(kind)
        return given, numbers, given
    if kind == "more rows":
        given = np.concatenate([rows, np.full((2, columns), -7, np.int32)])
        return given, numbers, given
    whole = torch.from_numpy(rows)
    if kind == "transposed":
        held = whole.T.contiguous().to(device)
        return held.T, numbers, held
    if kind == "columns":
        held = whole.repeat_interleave(2, dim=1).to(device)
        return held[:, ::2], numbers, held
    if kind == "wide":
        held = torch.cat([whole, whole], dim=1).to(device)
        return held[:, :columns], numbers, held
    held = whole.to(torch.int64) if kind == "long tensor" else whole.to(device)
    return held, numbers, held


def check_step(planner: PCPPlanner, step: Arguments, split: Arguments, cache: Cache) -> tuple[Any, ...]:
    padding = step["padding"] or {}
    batch = {name: list(step[name]) for name in ("query_lens", "context_lens", "is_prefill")}
    longest = max([0, *(a + b for a, b in zip(batch["query_lens"], batch["context_lens"], strict=True))])
    columns = -(-longest // cache.block_size) + step["more_columns"]
    device = str(planner.device)
    tables, numbers, held = block_tables(step["tables"], step["table_seed"], len(batch["query_lens"]), columns, device)
    options = {"workspace_tokens": step["workspace_tokens"], "prompt_lens": step["prompt_lens"], **padding}
    meta = planner.plan(**batch, block_tables=tables, **options)
    assert planner.largest_rank(batch["query_lens"], batch["is_prefill"]) == PlainPlan(**batch, **split).fullest
    if not step["padding"]:
        build = PCPMetadata.build(**batch, **split, prompt_lens=step["prompt_lens"], device=planner.device)
        compare_common(build, wanted_arrays(PlainPlan(**batch, **split), step))
    more = padding.get("num_requests_padded", len(numbers)) - len(numbers)
    for name, empty in (("query_lens", 0), ("context_lens", 0), ("is_prefill", True)):
        batch[name] += [empty] * more
    plan = PlainPlan(**batch, **split, rank_tokens=padding.get("num_tokens_padded"))
    if step["keys_first"]:
        assert (meta.kv_rows is None) == (tables is None)
    if step["overwritten"] and held is not None:
        held[...] = 0
    return meta, plan, step, numbers if tables is not None else None, cache


def wanted_arrays(plan: PlainPlan, step: Arguments) -> dict[str, tuple[list[Any], str]]:
    """Arrays that every metadata has, and their types."""
    rows = [row for pair in plan.rows[plan.rank] for row in pair]
    used = plan.used()
    columns = ([len(r) for r in rows[::2]], [len(r) for r in rows[1::2]], used[::2], used[1::2], plan.key_sizes())
    prompts = step["prompt_lens"]
    ends = [a + b for a, b in zip(plan.contexts, plan.queries, strict=True)]
    known = ends if prompts is None else [*prompts, *ends[len(prompts) :]]
    wanted = {
        "row_table": [before(column) for column in columns],
        "cu_seqlens_q": before([len(row) for row in rows]),
        "cu_seqlens_k": double(before(plan.key_sizes())),
        "seqused_k": used,
        "logits_indices": plan.logits_indices(),
        "local_token_indices": plan.local_token_indices(),
        "positions": plan.positions(),
        "allgather_restore_idx": plan.allgather_restore_idx(),
        "hidden_restore_idx": plan.hidden_restore_idx(),
    }
    discards = [n == 0 or end < prompt for n, end, prompt in zip(plan.queries, ends, known, strict=True)]
    return {name: (values, "int32") for name, values in wanted.items()} | {"discard_request_mask": (discards, "bool")}


def same(name: str, got: torch.Tensor, wanted: list[Any], dtype: str) -> None:
    assert str(got.dtype) == f"torch.{dtype}", f"{name} is {got.dtype}"
    assert got.tolist() == wanted, f"{name}: {got.tolist()} is not {wanted}"


def compare_common(meta: PCPMetadata, wanted: dict[str, tuple[list[Any], str]]) -> None:
    for name, (values, dtype) in wanted.items():
        same(name, getattr(meta, name), values, dtype)


def compare(meta: Any, plan: PlainPlan, step: Arguments, tables: list[list[int]] | None, cache: Cache) -> None:
    """Everything that a plan says."""
    padding, local, keys = step["padding"], plan.local[plan.rank], sum(plan.key_sizes())
    wanted = wanted_arrays(plan, step)
    if tables is not None:
        chunks = plan.chunks(step["workspace_tokens"])
        wanted["slot_mapping"] = (plan.slot_mapping(tables, cache), "int64")
        wanted["kv_rows"] = (plan.kv_rows(tables, cache, len(chunks) > 1), "int32")
    else:
        assert meta.slot_mapping is None
        assert meta.kv_rows is None
    if padding is not None:
        sizes = {"local_token_indices": plan.rank_tokens, "positions": plan.rank_tokens, "kv_rows": padding["num_kv_tokens_padded"]}
        for name in ("allgather_restore_idx", "hidden_restore_idx"):
            sizes[name] = plan.world * plan.rank_tokens
        for name, size in sizes.items():
            if name in wanted:
                values, dtype = wanted[name]
                wanted[name] = (values + [0 if name == "positions" else -1] * (size - len(values)), dtype)
    order = sorted(wanted, key=lambda name: (name == "kv_rows") != step["keys_first"])
    compare_common(meta, {name: wanted[name] for name in order})
    used, rows = plan.used(), [row for pair in plan.rows[plan.rank] for row in pair]
    longest = (max([0, *map(len, rows)]), max([0, *used]))
    total = keys if padding is None else padding["num_kv_tokens_padded"]
    if padding is not None:
        longest = (plan.rank_tokens, total)
    numbers = {
        "num_requests": len(plan.queries),
        "num_tokens": len(local),
        "num_tokens_padded": plan.rank_tokens,
        "num_kv_tokens": total,
        "num_context_tokens": sum(plan.contexts),
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
    }
    for name, number in numbers.items():
        assert getattr(meta, name) == number, f"{name}: {getattr(meta, name)} is not {number}"
    first = 0
    calls = plan.chunks(step["workspace_tokens"])
    assert len(meta.key_chunks) == len(calls)
    for chunk, (count, causal, starts, first_keys, counts) in zip(meta.key_chunks, calls, strict=True):
        assert (chunk.first_row, chunk.num_rows, chunk.causal) == (first, count, causal)
        assert chunk.max_seqlen_k == (max([0, *counts]) if padding is None else count)
        same("chunk.starts", chunk.starts, starts, "int32")
        same("chunk.cu_seqlens_k", chunk.cu_seqlens_k, first_keys, "int32")
        same("chunk.seqused_k", chunk.seqused_k, counts, "int32")
        first += count
    if step["rank_rows"]:
        compare_ranks(meta.rank_rows, plan, step)


def compare_ranks(got: Any, plan: PlainPlan, step: Arguments) -> None:
    """The rows of all ranks: each rank's, and its pads."""
    ranks, padding = [copy(plan) for _ in range(plan.world)], step["padding"]
    starts: list[int] = []
    for r, of in enumerate(ranks):
        of.rank = r
        lengths = [len(row) for pair in plan.rows[r] for row in pair]
        starts += [r * plan.rank_tokens + start for start in before(lengths)]
    starts.append(plan.world * plan.rank_tokens)
    same("rank_rows.cu_seqlens_q", got.cu_seqlens_q, starts, "int32")
    total = sum(plan.key_sizes()) if padding is None else padding["num_kv_tokens_padded"]
    longest = max(b - a for a, b in itertools.pairwise(starts)) if padding is None else plan.rank_tokens
    assert got.max_seqlen_q == longest
    by_rank = [of.chunks(None) for of in ranks], [of.chunks(step["workspace_tokens"]) for of in ranks]
    tables = [(got, list(calls)) for calls in zip(*by_rank[0], strict=True)]
    tables += [(chunk, list(calls)) for chunk, calls in zip(got.key_chunks, zip(*by_rank[1], strict=True), strict=True)]
    for where, calls in tables:
        count, _, _, first_keys, _ = calls[0]
        counts = [n for call in calls for n in [*call[4], 0]]
        same("rank_rows.cu_seqlens_k", where.cu_seqlens_k, first_keys * plan.world + first_keys[-1:], "int32")
        same("rank_rows.seqused_k", where.seqused_k, counts, "int32")
        most = max([0, *counts]) if padding is None else total if where is got else count
        assert where.max_seqlen_k == most


FAMILIES = [Family(draw_stream, check_planner)]
