"""The layer against attention written out in float64, sequence by sequence, and the seed path against the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pcp_mla import LatentExchange, MLAPrefill, PCPMetadata, PCPPlanner
from pcp_mla.compare.seed_path import seed_cu_seqlens, seed_layer
from pcp_mla.exchange import latents as exchange_module
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.ops.attention import rows
from pcp_mla.ops.attention.rows import attend_row
from pcp_mla.plan.dims import MLADims
from pcp_mla.plan.slots import PagedCache
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

# No two widths alike, so that a width in the wrong place shows.
DIMS = MLADims(num_heads=3, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=7)
SCALE = 0.35
BLOCK = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Each played rank is a thread with a pool of its own, and tiny products gain nothing from a second core.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Batch:
    """Random inputs in natural order, float64: q and latents of new tokens, latents of cached ones."""

    def __init__(self, query_lens: list[int], context_lens: list[int], is_prefill: list[bool]) -> None:
        self.query_lens, self.context_lens, self.is_prefill = query_lens, context_lens, is_prefill
        generator = torch.Generator().manual_seed(sum(query_lens) + 1000 * sum(context_lens))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        total = sum(query_lens)
        self.q = random(total, DIMS.num_heads, DIMS.qk_head_dim)
        self.latents = random(total, DIMS.latent_dim)
        self.context = random(sum(context_lens), DIMS.latent_dim)
        self.weight = random(DIMS.num_heads * (DIMS.qk_nope_head_dim + DIMS.v_head_dim), DIMS.kv_lora_rank)

    def reference(self, dtype: torch.dtype = torch.float64, inside: torch.dtype = torch.float64) -> torch.Tensor:
        """[tokens, heads, v] in natural order: every query, every head on its own, no mask, no PCP.

        In float64 of inputs that are ``dtype``; K, V, the softmax and the result are rounded to ``inside``.
        """

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.to(inside).double()

        q, latents, context, whole = (x.to(dtype).double() for x in (self.q, self.latents, self.context, self.weight))
        out = torch.empty(len(q), DIMS.num_heads, DIMS.v_head_dim, dtype=torch.float64)
        start = cached = 0
        for new, old in zip(self.query_lens, self.context_lens, strict=True):
            sequence = torch.cat([context[cached : cached + old], latents[start : start + new]])
            kv_c, k_pe = sequence[:, : DIMS.kv_lora_rank], sequence[:, DIMS.kv_lora_rank :]
            for head, weight in enumerate(whole.chunk(DIMS.num_heads)):
                keys = torch.cat([rounded(kv_c @ weight[: DIMS.qk_nope_head_dim].T), k_pe], dim=1)
                values = rounded(kv_c @ weight[DIMS.qk_nope_head_dim :].T)
                for i in range(new):
                    seen = old + i + 1
                    scores = keys[:seen] @ q[start + i, head] * SCALE
                    out[start + i, head] = rounded(rounded(scores.softmax(0)) @ values[:seen])
            start, cached = start + new, cached + old
        return out

    def plan(self, group: Any, layout: str, workspace: int | None = None) -> tuple[PCPMetadata, torch.Tensor]:
        """The step for one rank, and the cache before it: blocks in no order, NaN wherever there is no token yet."""
        lengths = [new + old for new, old in zip(self.query_lens, self.context_lens, strict=True)]
        columns = max(1, -(-max(lengths, default=0) // BLOCK))
        tables = np.random.default_rng(sum(lengths)).permutation(len(lengths) * columns).astype(np.int32).reshape(-1, columns)
        planner = PCPPlanner(
            len(lengths), sum(self.query_lens), group_world_size(group), group_rank(group), layout=layout, block_size=BLOCK
        )
        meta = planner.plan(self.query_lens, self.context_lens, self.is_prefill, tables, workspace_tokens=workspace)
        cache = torch.full((tables.size, BLOCK, DIMS.latent_dim), torch.nan, dtype=torch.float64)
        requests = np.repeat(np.arange(len(lengths)), self.context_lens)
        positions = np.concatenate([np.arange(n) for n in (*self.context_lens, 0)])
        cache.flatten(0, 1)[torch.from_numpy(PagedCache(BLOCK).slots(tables, requests, positions))] = self.context
        return meta, cache

    def build(self, group: Any, layout: str) -> PCPMetadata:
        """The step for one rank, without a cache."""
        world, rank = group_world_size(group), group_rank(group)
        return PCPMetadata.build(self.query_lens, None, self.is_prefill, world_size=world, rank=rank, layout=layout)

    def run(
        self, layer: Any, group: Any, meta: PCPMetadata, cache: torch.Tensor | None, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        # A pad takes the last row; with a large number there, a real token that sees a pad shows.
        def local(natural: torch.Tensor) -> torch.Tensor:
            rows = torch.cat(
                [natural, torch.full_like(natural[:1], 50.0) if len(natural) else natural.new_zeros(1, *natural.shape[1:])]
            )
            return rows[meta.local_token_indices.long()].to(dtype)

        kv_c, k_pe = local(self.latents).split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
        cache = None if cache is None else cache.to(dtype)
        return layer(local(self.q), kv_c, k_pe, self.weight.to(dtype), meta, group, DIMS, SCALE, cache)

    def one_rank(
        self, layer: Any, group: Any, layout: str, cached: bool, dtype: torch.dtype = torch.float64, workspace: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of one rank, -1 for pads, and their outputs."""
        meta, cache = self.plan(group, layout, workspace) if cached else (self.build(group, layout), None)
        if workspace is not None:
            assert all(chunk.num_rows <= workspace for chunk in meta.key_chunks)
        return meta.local_token_indices.clone(), self.run(layer, group, meta, cache, dtype)

    def compare(self, results: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, tolerance: float | None) -> None:
        """Each number, or without a tolerance all together: beside the error that rounding makes."""
        reference = self.reference(dtype)
        seen = torch.zeros(len(reference), dtype=torch.int64)
        errors, own = [], None if tolerance is not None else self.reference(dtype, dtype) - reference
        for tokens, out in results:
            assert out.shape == (len(tokens), DIMS.num_heads, DIMS.v_head_dim)
            assert out.dtype == dtype
            real = tokens >= 0
            if own is None:
                torch.testing.assert_close(out[real].double(), reference[tokens[real].long()], rtol=tolerance, atol=tolerance)
            else:
                errors.append(torch.stack([out[real].double() - reference[tokens[real].long()], own[tokens[real].long()]]))
            seen[tokens[real].long()] += 1
        if own is not None:
            error, allowed = torch.cat(errors, 1).square().mean((1, 2, 3)).sqrt()
            assert error <= 1.3 * allowed  # a softmax scale one percent off makes 1.7
        assert (seen >= 1).all()

    def check(self, layer: Any, world_size: int, layout: str) -> None:
        """With the cache, and without one where there is no context."""
        for cached in (True, False)[: 2 - any(self.context_lens)]:
            results = play(world_size, lambda group, cached=cached: self.one_rank(layer, group, layout, cached))
            self.compare(results, torch.float64, 1e-11)


def ours(q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, weight: Any, meta: Any, group: Any, *rest: Any) -> torch.Tensor:
    """The layer with an exchange of its own, so that both layers are called alike; its two halves must do the same."""
    dims, softmax_scale, cache = rest
    exchange = LatentExchange(group, meta.num_tokens_padded, DIMS, q.dtype)
    layer, other = MLAPrefill(dims, softmax_scale, exchange), None if cache is None else cache.clone()
    started = layer.start(kv_c, k_pe, meta, other)
    halves = layer.finish(q, weight, started)
    out = layer(q, kv_c, k_pe, weight, meta, cache)
    assert torch.equal(halves[: meta.num_tokens], out[: meta.num_tokens])
    if cache is not None:
        assert torch.equal(other.nan_to_num(1.5), cache.nan_to_num(1.5))
    return out


def edge_lengths(world_size: int) -> list[int]:
    return [0, 1, 2 * world_size - 1, 2 * world_size, 2 * world_size + 1, 17]


LAYERS = [pytest.param(ours, id="pcp"), pytest.param(seed_layer, id="seed")]


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_prefills_of_edge_lengths(layer: Any, world_size: int, layout: str) -> None:
    lengths = edge_lengths(world_size)
    Batch(lengths, [0] * len(lengths), [True] * len(lengths)).check(layer, world_size, layout)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_decodes_and_contexts_among_prefills(layer: Any, world_size: int, layout: str) -> None:
    batch = Batch([1, 9, 3, 0, 13, 1], [6, 4, 11, 3, 0, 0], [False, True, False, True, True, False])
    batch.check(layer, world_size, layout)


@pytest.mark.parametrize("layer", LAYERS)
def test_rank_without_tokens(layer: Any) -> None:
    assert PCPMetadata.build([1, 2], world_size=4, rank=3).num_tokens == 0
    Batch([1, 2], [0, 0], [True, True]).check(layer, 4, "unpadded")


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.booleans()), min_size=1, max_size=5),
    world_size=st.integers(1, 5),
    layout=st.sampled_from(["unpadded", "padded"]),
)
def test_random_batches(requests: list[tuple[int, int, bool]], world_size: int, layout: str) -> None:
    queries, contexts, prefills = (list(column) for column in zip(*requests, strict=True))
    Batch(queries, contexts, prefills).check(ours, world_size, layout)


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, None)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_dtypes(dtype: torch.dtype, tolerance: float | None) -> None:
    batch = Batch([33, 5], [4, 0], [True, True])
    batch.compare(play(2, lambda group: batch.one_rank(ours, group, "unpadded", True, dtype)), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_keys_that_do_not_fit_the_workspace(world_size: int, layout: str, dtype: torch.dtype, tolerance: float | None) -> None:
    # The context's windows of 56 rows begin and end within requests, and some rows have no keys in some.
    batch = Batch([1, 9, 3, 0, 17, 1], [60, 4, 91, 30, 0, 0], [False, True, True, True, True, False])
    assert len(batch.plan(None, layout, 56)[0].key_chunks) == 5
    results = play(world_size, lambda group: batch.one_rank(ours, group, layout, True, dtype, 56))
    batch.compare(results, dtype, tolerance)


def in_process(group: Any, batch: Batch, layout: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch.one_rank(ours, group, layout, True, torch.float32, workspace) for workspace in (None, 64)]


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_processes(layout: str) -> None:
    batch = Batch([1, 29, 3], [30, 44, 0], [False, True, True])
    for results in zip(*run_distributed(2, in_process, batch, layout), strict=True):
        batch.compare(list(results), torch.float32, 1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_over_used_blocks_that_wrap_around(world_size: int) -> None:
    """A request in three steps, then another that gets the blocks back: the last ones first, then around to the start."""
    whole = [Batch([29], [0], [True]), Batch([26], [0], [True])]
    tables = [np.roll(np.arange(8, dtype=np.int32), 3)[None], np.roll(np.arange(8, dtype=np.int32), -2)[None]]

    def steps(group: Any) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        planner = PCPPlanner(1, 29, group.world_size, group.rank, block_size=BLOCK)
        cache = torch.full((8, BLOCK, DIMS.latent_dim), torch.nan, dtype=torch.float64)
        results = []
        for batch, table in zip(whole, tables, strict=True):
            done, parts = 0, []
            for length in (13, 1, batch.query_lens[0] - 14):
                part = Batch([length], [done], [True])
                part.weight = batch.weight
                part.q, part.latents = (x[done : done + length] for x in (batch.q, batch.latents))
                meta = planner.plan([length], [done], [True], table)
                parts.append((meta.local_token_indices + done, part.run(ours, group, meta, cache)))
                done += length
            results.append(parts)
        return results

    ranks = play(world_size, steps)
    for number, batch in enumerate(whole):
        batch.compare([part for rank in ranks for part in rank[number]], torch.float64, 1e-11)


def test_two_requests_share_blocks_of_a_prefix() -> None:
    long, short = Batch([21], [0], [True]), Batch([17], [0], [True])
    short.latents[:8], short.weight = long.latents[:8], long.weight
    batch = Batch([13, 9], [8, 8], [True, True])
    batch.q, batch.latents = (torch.cat([a[8:], b[8:]]) for a, b in ((long.q, short.q), (long.latents, short.latents)))
    batch.weight = long.weight
    wanted = torch.cat([long.reference()[8:], short.reference()[8:]])

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        planner = PCPPlanner(2, 22, group.world_size, group.rank, block_size=BLOCK)
        meta = planner.plan([13, 9], [8, 8], None, [[6, 1, 2, 9, 4, 8], [6, 1, 5, 0, 3, 3]])
        cache = torch.full((10, BLOCK, DIMS.latent_dim), torch.nan, dtype=torch.float64)
        cache[[6, 1]] = long.latents[:8].view(2, BLOCK, -1)
        return meta.local_token_indices.clone(), batch.run(ours, group, meta, cache)

    for tokens, out in play(2, rank):
        torch.testing.assert_close(out, wanted[tokens.long()], rtol=1e-11, atol=1e-11)


def test_cache_holds_the_latents_bit_for_bit() -> None:
    batch = Batch([9, 2], [3, 6], [True, False])

    def rank(group: Any) -> torch.Tensor:
        meta, cache = batch.plan(group, "padded")
        batch.run(ours, group, meta, cache)
        rows = meta.kv_rows
        return cache.flatten(0, 1)[rows[rows >= 0].long()]

    wanted = torch.cat([batch.context[:3], batch.latents[:9], batch.context[3:], batch.latents[9:]])
    for held in play(2, rank):
        assert torch.equal(held, wanted)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_seed_path_and_layer_give_equal_bits(layout: str, cached: bool) -> None:
    batch = Batch([1, 9, 40, 1], [6, 4, 0, 0] if cached else [0] * 4, [False, True, True, False])

    def both(group: Any) -> list[torch.Tensor]:
        results = [batch.one_rank(layer, group, layout, cached, torch.float32) for layer in (ours, seed_layer)]
        return [out[tokens >= 0] for tokens, out in results]

    for our_bits, seed_bits in play(3, both):
        assert torch.equal(our_bits, seed_bits)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_seed_lengths_are_those_of_the_metadata(layout: str) -> None:
    meta = PCPMetadata.build([5, 1, 12], [2, 8, 0], [True, False, True], world_size=2, rank=1, layout=layout)
    wanted = [meta.cu_seqlens_q_head, meta.cu_seqlens_q_tail, meta.cu_seqlens_k_head, meta.cu_seqlens_k_tail]
    assert torch.equal(seed_cu_seqlens(meta), torch.stack(wanted))


class Tripled(torch.nn.Linear):
    """A module whose weight is not all that it does, as with quantised ones; engines return a bias beside the result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 3 * super().forward(x), None


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_modules(cached: bool) -> None:
    batch = Batch([6], [5] if cached else [0], [True])
    meta, cache = batch.plan(None, "unpadded") if cached else (batch.build(None, "unpadded"), None)

    def run(module: Any) -> torch.Tensor:
        return batch.run(lambda q, kv_c, k_pe, _, *rest: ours(q, kv_c, k_pe, module, *rest), None, meta, cache)

    plain = torch.nn.Linear(*reversed(batch.weight.shape), bias=False, dtype=torch.float64)
    biased = torch.nn.Linear(*reversed(batch.weight.shape), dtype=torch.float64)
    tripled = Tripled(*reversed(batch.weight.shape), bias=False, dtype=torch.float64)
    for module in (plain, biased):
        module.weight.copy_(batch.weight)
    biased.bias.zero_()
    tripled.weight.copy_(batch.weight / 3)
    wanted = run(batch.weight)
    assert torch.equal(run(plain), wanted)
    for module in (biased, tripled):
        torch.testing.assert_close(run(module), wanted, rtol=1e-11, atol=1e-11)
    biased.bias.fill_(1.0)
    assert (run(biased) - wanted).abs().min() > 0.1  # a bias is not left out


@pytest.mark.parametrize("v_dim", [3, 8])
def test_row_with_v_of_another_width(v_dim: int) -> None:
    q, k, v = (torch.randn(n, 2, width, dtype=torch.float64) for n, width in ((4, 6), (9, 6), (9, v_dim)))
    scores = torch.einsum("nhd,mhd->hnm", q, k).masked_fill(torch.ones(4, 9).triu(6).bool(), -torch.inf)
    torch.testing.assert_close(attend_row(q, k, v, 1.0), torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v))


def test_row_at_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gets rows and heads at multiples of 16 bytes."""
    seen: list[torch.Tensor] = []
    product = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **options: seen.extend(x) or product(*x, **options))
    q, k, v = (torch.randn(n, 2, width) for n, width in ((5, 4), (5, 4), (5, 16)))
    room = torch.zeros(1 + 5 * 11)
    apart = room[1:].as_strided((5, 2, 4), (11, 4, 1)).copy_(q)
    assert torch.equal(attend_row(apart, k, v, 0.3), attend_row(q, k, v, 0.3))
    assert [x.data_ptr() % 16 for x in seen] == [0] * 6
    assert {stride * 4 % 16 for x in seen for stride in x.stride()[1:3]} == {0}


@pytest.mark.parametrize("block", [2**24, 20, 1])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (4, 4), (4, 9)])
def test_row_is_aligned_bottom_right(n: int, m: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With equal scores a query's output is the mean of the values it sees: key i's value is i.
    monkeypatch.setattr(rows, "_BLOCK", block)
    row = torch.zeros(n, 1, 2), torch.zeros(m, 1, 2), torch.arange(float(m)).view(m, 1, 1)
    means = [(m - n + j) / 2 for j in range(n)]
    assert attend_row(*row, 1.0).flatten().tolist() == pytest.approx(means)
    assert attend_row(*row, 1.0, causal=False).flatten().tolist() == pytest.approx([(m - 1) / 2] * n)


def test_hooks_of_a_module_are_not_left_out() -> None:
    batch = Batch([6], [0], [True])
    meta = batch.build(None, "unpadded")
    linear = torch.nn.Linear(*reversed(batch.weight.shape), bias=False, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(batch.weight / 2)

    def run(module: Any) -> torch.Tensor:
        return batch.run(lambda q, kv_c, k_pe, _, *rest: ours(q, kv_c, k_pe, module, *rest), None, meta, None)

    for register in (linear.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(run(linear), run(batch.weight), rtol=1e-11, atol=1e-11)
        handle.remove()
    for register in (linear.register_forward_pre_hook, torch.nn.modules.module.register_module_forward_pre_hook):
        handle = register(lambda module, inputs: (2 * inputs[0],))
        torch.testing.assert_close(run(linear), run(batch.weight), rtol=1e-11, atol=1e-11)
        handle.remove()
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    torch.testing.assert_close(run(linear), run(batch.weight), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", ["pre-hook", "pre-hook of all", "forward"])
def test_a_weight_that_is_elsewhere(how: str) -> None:
    """Offloaded or quantised: what the module says it has is not looked at where a hook or its own forward fetches it."""
    batch = Batch([6], [0], [True])
    meta = batch.build(None, "unpadded")
    linear = torch.nn.Linear(*reversed(batch.weight.shape), bias=False, device="meta").requires_grad_(False)

    def fetch(*_: Any) -> None:
        linear.weight = torch.nn.Parameter(batch.weight, requires_grad=False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, batch.weight)

    handle = None
    if how == "forward":
        linear.forward = forward  # type: ignore[method-assign]
    else:
        register = (
            linear.register_forward_pre_hook if how == "pre-hook" else torch.nn.modules.module.register_module_forward_pre_hook
        )
        handle = register(fetch)
    try:
        out = batch.run(lambda q, kv_c, k_pe, _, *rest: ours(q, kv_c, k_pe, linear, *rest), None, meta, None)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(out, batch.reference(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("workspace", [None, 64])
@pytest.mark.parametrize("world_size", [1, 2])
def test_padded_plans_take_padded_tensors(world_size: int, workspace: int | None) -> None:
    """What a captured graph runs on: Np rows of q and latents, the pads NaN, and key rows of pads."""
    batch = Batch([21, 1, 6], [40, 9, 0], [True, False, True])

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tables = np.random.default_rng(1).permutation(60).astype(np.int32).reshape(3, 20)
        planner = PCPPlanner(4, 40, world_size, group.rank, block_size=BLOCK)
        lengths = (batch.query_lens, batch.context_lens, batch.is_prefill)
        options: dict[str, Any] = {"num_tokens_padded": 30, "num_kv_tokens_padded": 90, "workspace_tokens": workspace}
        meta = planner.plan(*lengths, tables, **options)
        assert meta.num_local_rows == 30 > meta.num_tokens
        cache = torch.full((60, BLOCK, DIMS.latent_dim), torch.nan, dtype=torch.float64)
        requests = np.repeat(np.arange(3), batch.context_lens)
        positions = np.concatenate([np.arange(n) for n in batch.context_lens])
        cache.flatten(0, 1)[torch.from_numpy(PagedCache(BLOCK).slots(tables, requests, positions))] = batch.context
        tokens = meta.local_token_indices.long()
        q, latents = (
            torch.where((tokens >= 0)[(...,) + (None,) * (x.dim() - 1)], x[tokens], torch.nan) for x in (batch.q, batch.latents)
        )
        kv_c, k_pe = latents.split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
        out = ours(q, kv_c, k_pe, batch.weight, meta, group, DIMS, SCALE, cache)
        assert len(out) == 30
        return tokens[: meta.num_tokens], out[: meta.num_tokens]

    batch.compare(play(world_size, rank), torch.float64, 1e-11 if workspace is None else 1e-5)


def test_module_without_keys() -> None:
    batch = Batch([0], [0], [True])
    meta, cache = batch.plan(None, "unpadded")
    module = torch.nn.Linear(*reversed(batch.weight.shape), dtype=torch.float64).requires_grad_(False)
    out = batch.run(lambda q, kv_c, k_pe, _, *rest: ours(q, kv_c, k_pe, module, *rest), None, meta, cache)
    assert out.shape == (0, DIMS.num_heads, DIMS.v_head_dim)


# Bad input: before anything is exchanged or written.


class Wrapped(torch.nn.Module):
    """A module that is called, not unpacked."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.calls = inputs, 0
        self.dtype, self.outputs = dtype, outputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        return x.sum(1, keepdim=True).repeat(1, self.outputs).to(self.dtype), None


def hooked(inputs: int, outputs: int) -> torch.nn.Linear:
    """Whose weight is right, and whose hook takes a column off the result."""
    linear = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.register_forward_hook(lambda module, given, out: out[:, 1:])
    return linear


def test_a_module_is_tried_once() -> None:
    meta, module = PCPMetadata.build([6], world_size=1, rank=0), Wrapped(7, 39)
    layer = MLAPrefill(DIMS, SCALE, LatentExchange(None, 6, DIMS, torch.float32))
    for calls in (2, 3, 4):
        layer(torch.zeros(6, 3, 12), torch.zeros(6, 7), torch.zeros(6, 4), module, meta)
        assert module.calls == calls


class Fours(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) % 4 == 0, "rows in fours"
        return super().forward(x)


def test_a_module_that_does_not_take_any_number_of_rows() -> None:
    layer = MLAPrefill(DIMS, SCALE, LatentExchange(None, 6, DIMS, torch.float32))
    meta = PCPMetadata.build([4], world_size=1, rank=0)
    wanted = "MLAPrefill: kv_b_proj must take any number of rows, got AssertionError for one of zeros: rows in fours"
    with torch.no_grad(), pytest.raises(ValueError, match=wanted):
        layer(torch.zeros(4, 3, 12), torch.zeros(4, 7), torch.zeros(4, 4), Fours(7, 39), meta)


@pytest.mark.parametrize("native", [True, False])
def test_latents_in_the_cache_itself(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused while they are where they were: a world of one sends nothing."""
    monkeypatch.setattr(exchange_module, "ALL_NATIVE", native and exchange_module.ALL_NATIVE)
    cache = torch.randn(2, BLOCK, 11)
    rows = cache.flatten(0, 1)[2:]
    layer = MLAPrefill(DIMS, SCALE, LatentExchange(None, 6, DIMS, torch.float32))
    before = cache.clone()
    with pytest.raises(ValueError, match="cache must not share memory with kv_c and k_pe"):
        layer(torch.zeros(6, 3, 12), rows[:, :7], rows[:, 7:], torch.zeros(39, 7), planned(), cache)
    assert torch.equal(cache, before)


def planned(**options: Any) -> Any:
    return PCPPlanner(1, 6, 1, 0, block_size=BLOCK, **options).plan([6], [2], None, [[1, 0]])


CACHE = torch.zeros(2, BLOCK, 11)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(6, 3, 11)}, ValueError, r"q must have shape \(6, 3, 12\), got \(6, 3, 11\)"),
        ({"q": torch.zeros(5, 3, 12)}, ValueError, r"q must have shape \(6, 3, 12\), got \(5, 3, 12\)"),
        ({"kv_c": torch.zeros(6, 8)}, ValueError, r"kv_c must have shape \(6, 7\), got \(6, 8\)"),
        ({"k_pe": torch.zeros(6, 4, dtype=torch.float16)}, TypeError, "k_pe must be torch.float32, as q, got torch.float16"),
        ({"kv_b_proj": torch.zeros(40, 7)}, ValueError, r"kv_b_proj must have a weight of shape \(39, 7\), got \(40, 7\)"),
        ({"kv_b_proj": torch.nn.Linear(7, 38)}, ValueError, r"kv_b_proj must have a weight of shape \(39, 7\), got \(38, 7\)"),
        (
            {"kv_b_proj": torch.zeros(39, 7).half()},
            TypeError,
            "kv_b_proj must have a weight of torch.float32, as q, got torch.float16",
        ),
        ({"kv_b_proj": torch.nn.Linear(7, 39)}, NotImplementedError, "inputs must not require gradients, there is no backward"),
        ({"kv_b_proj": Wrapped(7, 38)}, ValueError, r"kv_b_proj's result must have shape .* = \(1, 39\), got \(1, 38\)"),
        ({"kv_b_proj": Wrapped(8, 39)}, ValueError, "kv_b_proj must take kv_lora_rank = 7 numbers, got in_features 8"),
        ({"kv_b_proj": Wrapped(7, 39, torch.float16)}, TypeError, "kv_b_proj's result must be float32 as the latents, got float16"),
        ({"kv_b_proj": hooked(7, 39)}, ValueError, r"kv_b_proj's result must have shape .* = \(1, 39\), got \(1, 38\)"),
        ({"kv_b_proj": torch.nn.Identity()}, ValueError, r"kv_b_proj's result must have shape .* = \(1, 39\), got \(1, 7\)"),
        ({"meta": None}, TypeError, "meta must be a PCPMetadata, got NoneType"),
        ({"cache": [0]}, TypeError, "cache must be a torch.Tensor or None, got list"),
        ({"cache": CACHE[:1].expand(2, -1, -1)}, ValueError, r"cache must not be expanded, got strides \(0, 11, 1\)"),
        ({"cache": CACHE.clone().requires_grad_()}, NotImplementedError, "cache must not require gradients"),
        ({"q": [0.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"q": torch.zeros(6, 12, 3).mT}, ValueError, "q must have a contiguous last dimension, got strides"),
        ({"q": torch.zeros(6, 3, 12, device="meta")}, ValueError, "q must be on cpu, where the metadata is, got meta"),
        ({"kv_b_proj": 3}, TypeError, "kv_b_proj must be a torch.Tensor or a torch.nn.Module, got int"),
        ({"kv_b_proj": torch.zeros(7, 39).T}, ValueError, "kv_b_proj must have a weight with a contiguous last dimension"),
        ({"cache": None}, ValueError, "cache must be given, as meta has 2 tokens of context, got None"),
        ({"meta": PCPMetadata.build([6], world_size=1, rank=0)}, ValueError, "meta must have cache slots, as a cache is given"),
        ({"meta": PCPPlanner(1, 6, 1, 0).plan([6])}, ValueError, "plan it with block tables, got none"),
        ({"meta": planned(dcp_world_size=2)}, NotImplementedError, "a cache that is not shared out, got 2 DCP shards"),
        ({"cache": torch.zeros(4, 2, 11)}, ValueError, r"cache must be .* = \(any, 4, 11\), got \(4, 2, 11\)"),
        ({"cache": torch.zeros(8, 11)}, ValueError, r"cache must be .* = \(any, 4, 11\), got \(8, 11\)"),
        (
            {"cache": torch.zeros(2, 11, BLOCK).mT},
            ValueError,
            r"cache must have a contiguous last dimension, got strides \(44, 1, 4\)",
        ),
        ({"cache": CACHE.half()}, TypeError, "cache must be torch.float32, as kv_c, or come with a scale, got torch.float16"),
        ({"cache": torch.zeros(2, BLOCK, 11, device="meta")}, ValueError, "cache must be on cpu, as kv_c, got meta"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "second layer"])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, first: bool) -> None:
    class NoExchange:
        def publish(self, *_: Any, **__: Any) -> None:
            pytest.fail("exchanged")

    arguments = {
        "q": torch.zeros(6, 3, 12),
        "kv_c": torch.zeros(6, 7),
        "k_pe": torch.zeros(6, 4),
        "kv_b_proj": torch.zeros(39, 7),
        "meta": planned(),
        "cache": CACHE,
    }
    if not first:
        MLAPrefill(DIMS, SCALE, LatentExchange(None, 6, DIMS, torch.float32))(**arguments)
    layer = MLAPrefill(DIMS, SCALE, NoExchange())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        layer(**(arguments | change))


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("fa9", ValueError, "backend must be one of auto, cuda, fa3, fa4, fa2, triton, torch, got 'fa9'"),
        ("fa2", NotImplementedError, "backend 'fa2' does not support dtype float32"),
    ],
)
def test_backend_is_chosen_before_the_exchange(backend: str, error: type[Exception], message: str) -> None:
    arguments = (torch.zeros(6, 3, 12), torch.zeros(6, 7), torch.zeros(6, 4), torch.zeros(39, 7), planned(), CACHE)
    with pytest.raises(error, match=message):
        MLAPrefill(DIMS, SCALE, None, backend)(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [-1.0, 0, float("nan"), None])
def test_bad_scale(scale: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="MLAPrefill: softmax_scale must be"):
        MLAPrefill(DIMS, scale, None)  # type: ignore[arg-type]


def test_seed_path_expands_all_keys_at_a_time() -> None:
    batch = Batch([4], [9], [True])
    meta, cache = batch.plan(None, "unpadded", 8)
    with pytest.raises(NotImplementedError, match="seed_layer: meta must have one key chunk, got 3"):
        batch.run(seed_layer, None, meta, cache)
