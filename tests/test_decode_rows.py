"""Decodes of several tokens, drafts that are to be verified, beside prefills: every rank has them all, and each token sees those
before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pcp_mla import HeadExchange, LatentExchange, MLAPrefill, PCPMetadata, PCPPlanner, partition
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.layer.graphs import PiecewiseGraph
from pcp_mla.plan.slots import PagedCache
from pcp_mla.testing.played import play
from test_pipeline import BLOCK, DIMS, SCALE, Batch

# Decodes of two to five tokens and of one, prefills with and without context, and a request without new tokens.
MIXED = ([3, 17, 2, 5, 0, 9, 1, 4], [11, 0, 30, 4, 7, 26, 13, 1], [False, True, False, False, True, True, False, False])
DECODES = ([2, 5, 1, 3, 4], [19, 3, 30, 8, 16], [False] * 5)
BATCHES = [pytest.param(MIXED, id="beside prefills"), pytest.param(DECODES, id="alone")]


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("rank", [0, 1])
def test_numbers_of_a_step(rank: int, layout: str) -> None:
    """Two ranks: six tokens of a prompt of 20 between decodes of three and of two."""
    planner = PCPPlanner(3, 20, 2, rank, layout=layout, block_size=4)
    tables = np.arange(100, 130, dtype=np.int32).reshape(3, 10)
    meta = planner.plan([3, 6, 2], [5, 6, 9], [False, True, False], tables, prompt_lens=[5, 20, 9])
    pads = (layout == "padded" and rank == 0) * 2
    prompt = [[3, 4], [5, 6, 7, 8]][rank]
    assert meta.local_token_indices.tolist() == [0, 1, 2, *prompt, *[-1] * pads, 9, 10]
    assert meta.positions.tolist() == [5, 6, 7, *(index + 3 for index in prompt), *[12, 13][:pads], 9, 10]
    assert meta.cu_seqlens_q.tolist() == np.cumsum([0, 3, 0, 2, len(prompt) - 2 + pads, 2, 0]).tolist()
    assert meta.seqused_k.tolist() == [8, 0, [8, 10][rank], [14 if pads else 0, 12][rank], 11, 0]
    assert meta.discard_request_mask.tolist() == [False, True, False]
    # In the gathered order, of the first rank's copies alone; the other's stand behind its nine rows.
    end = 7 if layout == "padded" else 5
    drafts, prompts = [0, 1, 2, end, end + 1], [3, 4, 12, 13, 14, 15]
    assert meta.hidden_restore_idx.tolist() == [*drafts[:3], *prompts, *drafts[3:]]
    slots = dict(zip([*drafts, *prompts], [405, 406, 407, 489, 490, 446, 447, *range(448, 452)], strict=True))
    assert meta.slot_mapping.tolist() == [slots.get(row, -1) for row in range(18)]


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_decodes_logits_are_those_before_its_last(world_size: int, layout: str) -> None:
    """So many of the restored order as it has tokens, up to the one that ``logits_indices`` names."""
    lengths = MIXED[0]
    natural = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    for rank in range(world_size):
        meta = PCPMetadata.build(*MIXED, world_size=world_size, rank=rank, layout=layout)
        gathered = meta.partition.gathered_token_indices
        restored, last = gathered[meta.allgather_restore_idx.numpy()], meta.logits_indices.tolist()
        for request, is_prefill in enumerate(MIXED[2]):
            if not is_prefill:
                drafts = restored[last[request] - lengths[request] + 1 : last[request] + 1]
                assert drafts.tolist() == natural[request].tolist()


def layer_of(split: str, q: Any, kv_c: Any, k_pe: Any, weight: Any, meta: PCPMetadata, group: Any, cache: Any) -> torch.Tensor:
    exchange, heads = (
        kind(group, meta.num_tokens_padded, DIMS, q.dtype) if kind is LatentExchange or split == "heads" else None
        for kind in (LatentExchange, HeadExchange)
    )
    return MLAPrefill(DIMS, SCALE, exchange, heads=heads, split=split)(q, kv_c, k_pe, weight, meta, cache)


def check(batch: Batch, world_size: int, layout: str, split: str, cached: bool, workspace: int | None) -> None:
    def layer(*arguments: Any) -> torch.Tensor:
        *inputs, _, _, cache = arguments
        return layer_of(split, *inputs, cache)

    if workspace is not None:
        assert len(batch.plan(None, layout, workspace)[0].key_chunks) > 1
    results = play(world_size, lambda group: batch.one_rank(layer, group, layout, cached, workspace=workspace))
    batch.compare(results, torch.float64, 1e-11 if workspace is None else 1e-5)
    starts = np.cumsum([0, *batch.query_lens])
    for start, length, is_prefill in zip(starts, batch.query_lens, batch.is_prefill, strict=False):
        for tokens, _ in results:
            if not is_prefill:  # all of it on every rank, in its order
                first = tokens.tolist().index(start)
                assert tokens[first : first + length].tolist() == list(range(start, start + length))


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize(
    ("world_size", "split"), [(1, "tokens"), (2, "tokens"), (3, "tokens"), (4, "tokens"), (2, "heads"), (3, "heads")]
)
@pytest.mark.parametrize("lengths", BATCHES)
def test_the_layer(lengths: Any, world_size: int, split: str, layout: str, in_chunks: bool) -> None:
    """By tokens and by heads; in chunks, the context of a decode is a call of its own, its tokens are in the causal one."""
    workspace = None
    if in_chunks:
        workspace = int(partition(*lengths, world_size=world_size, rank=0, layout=layout).padded_lens.sum())
    check(Batch(*lengths), world_size, layout, split, True, workspace)


@pytest.mark.parametrize("world_size", [2, 4])
def test_without_a_cache(world_size: int) -> None:
    """Nobody has context then: a decode is a short prompt that every rank computes."""
    check(Batch([4, 9, 2], [0, 0, 0], [False, True, False]), world_size, "unpadded", "tokens", False, None)


SIZES = {"num_tokens_padded": 30, "num_requests_padded": 6, "num_kv_tokens_padded": 140}
# Of one padded size: numbers of drafts that change from step to step, and requests that come and go.
STEPS = [
    ([5, 17, 2], [9, 6, 20], [False, True, False]),
    ([1, 23, 1, 4], [14, 0, 21, 3], [False, True, False, False]),
    ([4, 3, 5, 2], [15, 23, 22, 7], [False, False, False, False]),
    ([2, 8, 3, 12], [19, 26, 27, 0], [False, True, False, True]),
]


class PaddedSteps:
    """Steps of one padded size of a rank, over buffers that stay; of each its outputs and tokens."""

    def __init__(self, group: Any, device: str) -> None:
        world, self.device = group_world_size(group), device
        self.planner = PCPPlanner(6, 80, world, group_rank(group), block_size=BLOCK, device=device, max_kv_tokens=140)
        self.exchange = LatentExchange(group, 30, DIMS, torch.float32, device)
        self.layer = MLAPrefill(DIMS, SCALE, self.exchange)
        self.q, self.kv_c, self.k_pe, self.weight, self.cache = (
            torch.zeros(*shape, device=device)
            for shape in (
                (30, DIMS.num_heads, DIMS.qk_head_dim),
                (30, DIMS.kv_lora_rank),
                (30, DIMS.qk_rope_head_dim),
                (DIMS.num_heads * DIMS.expanded_dim, DIMS.kv_lora_rank),
                (60, BLOCK, DIMS.latent_dim),
            )
        )

    def plan(self, batch: Batch) -> PCPMetadata:
        """Of a step, whose rows and context take the place of the last ones; pads are NaN."""
        count = len(batch.query_lens)
        tables = np.random.default_rng(3).permutation(60).astype(np.int32).reshape(4, 15)[:count]
        lengths = (batch.query_lens, batch.context_lens, batch.is_prefill)
        meta = self.planner.plan(*lengths, torch.from_numpy(tables).to(self.device), **SIZES)
        requests = np.repeat(np.arange(count), batch.context_lens)
        positions = np.concatenate([np.arange(n) for n in batch.context_lens])
        cache = torch.full((60 * BLOCK, DIMS.latent_dim), torch.nan)
        cache[torch.from_numpy(PagedCache(BLOCK).slots(tables, requests, positions))] = batch.context.float()
        self.cache.copy_(cache.view(self.cache.shape))
        self.weight.copy_(batch.weight)
        tokens = meta.local_token_indices.cpu().long()
        for buffer, natural in zip((self.q, self.kv_c, self.k_pe), (batch.q, *batch.latents.split([7, 4], 1)), strict=True):
            rows = torch.full(buffer.shape, torch.nan)
            rows[tokens >= 0] = natural[tokens[tokens >= 0]].float()
            buffer.copy_(rows)
        return meta

    def call(self, meta: PCPMetadata) -> torch.Tensor:
        return self.layer(self.q, self.kv_c, self.k_pe, self.weight, meta, self.cache)

    def result(self, meta: PCPMetadata, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return meta.local_token_indices[: meta.num_tokens].cpu().clone(), out[: meta.num_tokens].cpu().clone()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padded_plans(world_size: int) -> None:
    """What a captured graph runs on, call by call."""
    batches = [Batch(*step) for step in STEPS]

    def rank(group: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        steps = PaddedSteps(group, "cpu")
        return [steps.result(meta, steps.call(meta)) for meta in map(steps.plan, batches)]

    for batch, *results in zip(batches, *play(world_size, rank), strict=True):
        batch.compare(results, torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_graph_of_drafts(world_size: int) -> None:
    """Captured over the first step, right for all that follow."""
    batches = [Batch(*step) for step in STEPS]

    def rank(group: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        steps, graph = PaddedSteps(group, "cuda"), PiecewiseGraph()
        meta = steps.plan(batches[0])
        steps.call(meta)
        out = graph.capture(lambda: steps.call(meta), [steps.exchange])
        results = []
        for batch in [*batches[1:], batches[0]]:
            new = steps.plan(batch)
            graph.replay()
            results.append(steps.result(new, out))
        return results

    for batch, *results in zip([*batches[1:], batches[0]], *play(world_size, rank), strict=True):
        batch.compare(results, torch.float32, 1e-4)
