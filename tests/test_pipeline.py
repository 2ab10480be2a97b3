"""The layer against attention written out in float64, sequence by sequence, and the seed path against the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcp_mla.metadata import PCPMetadata
from pcp_mla.pipeline import MLADims, attend_row, pcp_layer, restore_to_key_order
from pcp_mla.played import PlayedGroup, play
from pcp_mla.seed_path import seed_cu_seqlens, seed_layer

# No two widths alike, so that a width in the wrong place shows.
DIMS = MLADims(num_heads=3, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=7)
SCALE = 0.35


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

    def reference(self) -> torch.Tensor:
        """[tokens, heads, v] in natural order: every query, every head on its own, no mask, no PCP."""
        out = torch.empty(len(self.q), DIMS.num_heads, DIMS.v_head_dim, dtype=torch.float64)
        start = cached = 0
        for new, old in zip(self.query_lens, self.context_lens, strict=True):
            sequence = torch.cat([self.context[cached : cached + old], self.latents[start : start + new]])
            kv_c, k_pe = sequence[:, : DIMS.kv_lora_rank], sequence[:, DIMS.kv_lora_rank :]
            for head, weight in enumerate(self.weight.chunk(DIMS.num_heads)):
                keys = torch.cat([kv_c @ weight[: DIMS.qk_nope_head_dim].T, k_pe], dim=1)
                values = kv_c @ weight[DIMS.qk_nope_head_dim :].T
                for i in range(new):
                    seen = old + i + 1
                    scores = keys[:seen] @ self.q[start + i, head] * SCALE
                    out[start + i, head] = scores.softmax(0) @ values[:seen]
            start, cached = start + new, cached + old
        return out

    def run(self, layer: Any, group: PlayedGroup, layout: str, dtype: torch.dtype) -> tuple[PCPMetadata, torch.Tensor]:
        meta = PCPMetadata.build(
            self.query_lens, self.context_lens, self.is_prefill, world_size=group.world_size, rank=group.rank, layout=layout
        )

        # A pad takes the last row; with a large number there, a real token that sees a pad shows.
        def local(natural: torch.Tensor) -> torch.Tensor:
            rows = torch.cat(
                [natural, torch.full_like(natural[:1], 50.0) if len(natural) else natural.new_zeros(1, *natural.shape[1:])]
            )
            return rows[meta.local_token_indices.long()].to(dtype)

        latents = local(self.latents)
        kv_c, k_pe = latents.split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
        context = self.context.to(dtype) if len(self.context) else None
        return meta, layer(local(self.q), kv_c, k_pe, self.weight.to(dtype), meta, group, DIMS, SCALE, context)

    def check(self, layer: Any, world_size: int, layout: str, dtype: torch.dtype = torch.float64, tolerance: float = 1e-11) -> None:
        reference = self.reference()
        seen = torch.zeros(len(reference), dtype=torch.int64)
        for meta, out in play(world_size, lambda group: self.run(layer, group, layout, dtype)):
            assert out.shape == (meta.num_tokens, DIMS.num_heads, DIMS.v_head_dim)
            assert out.dtype == dtype
            real = meta.local_token_indices >= 0
            tokens = meta.local_token_indices[real].long()
            torch.testing.assert_close(out[real].double(), reference[tokens], rtol=tolerance, atol=tolerance)
            seen[tokens] += 1
        assert (seen >= 1).all()


def edge_lengths(world_size: int) -> list[int]:
    return [0, 1, 2 * world_size - 1, 2 * world_size, 2 * world_size + 1, 17]


LAYERS = [pytest.param(pcp_layer, id="pcp"), pytest.param(seed_layer, id="seed")]


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


def test_float32() -> None:
    Batch([33, 5], [4, 0], [True, True]).check(pcp_layer, 2, "unpadded", torch.float32, 1e-4)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.booleans()), min_size=1, max_size=5),
    world_size=st.integers(1, 5),
    layout=st.sampled_from(["unpadded", "padded"]),
)
def test_random_batches(requests: list[tuple[int, int, bool]], world_size: int, layout: str) -> None:
    queries, contexts, prefills = (list(column) for column in zip(*requests, strict=True))
    Batch(queries, contexts, prefills).check(pcp_layer, world_size, layout)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_seed_path_and_layer_give_equal_bits(layout: str) -> None:
    batch = Batch([1, 9, 40, 1], [6, 4, 0, 0], [False, True, True, False])

    def both(group: PlayedGroup) -> tuple[torch.Tensor, torch.Tensor]:
        ours = batch.run(pcp_layer, group, layout, torch.float32)[1]
        return ours, batch.run(seed_layer, group, layout, torch.float32)[1]

    for ours, seed in play(3, both):
        assert torch.equal(ours, seed)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_seed_lengths_are_those_of_the_metadata(layout: str) -> None:
    meta = PCPMetadata.build([5, 1, 12], [2, 8, 0], [True, False, True], world_size=2, rank=1, layout=layout)
    wanted = [meta.cu_seqlens_q_head, meta.cu_seqlens_q_tail, meta.cu_seqlens_k_head, meta.cu_seqlens_k_tail]
    assert torch.equal(seed_cu_seqlens(meta), torch.stack(wanted, dim=1))


def test_module_and_weight_give_the_same() -> None:
    batch = Batch([6], [0], [True])
    linear = torch.nn.Linear(DIMS.kv_lora_rank, len(batch.weight), bias=False, dtype=torch.float64)
    linear.weight.data.copy_(batch.weight)
    meta = PCPMetadata.build([6], world_size=1, rank=0)
    parts = batch.latents.split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
    outs = [pcp_layer(batch.q, *parts, projection, meta, None, DIMS, SCALE) for projection in (linear, batch.weight)]
    assert torch.equal(*outs)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (4, 4), (4, 9)])
def test_row_is_aligned_bottom_right(n: int, m: int) -> None:
    # With equal scores a query's output is the mean of the values it sees: key i's value is i.
    out = attend_row(torch.zeros(n, 1, 2), torch.zeros(m, 1, 2), torch.arange(float(m)).view(m, 1, 1), 1.0)
    assert out.flatten().tolist() == pytest.approx([(m - n + j) / 2 for j in range(n)])


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(6, 3, 11)}, ValueError, r"q must have shape \(6, 3, 12\), got \(6, 3, 11\)"),
        ({"q": torch.zeros(5, 3, 12)}, ValueError, r"q must have shape \(6, 3, 12\), got \(5, 3, 12\)"),
        ({"kv_c": torch.zeros(6, 8)}, ValueError, r"kv_c must have shape \(6, 7\), got \(6, 8\)"),
        ({"k_pe": torch.zeros(6, 4, dtype=torch.float16)}, TypeError, "k_pe must be torch.float32, as q, got torch.float16"),
        ({"kv_b_proj": torch.zeros(40, 7)}, ValueError, r"kv_b_proj must have a weight of shape \(39, 7\), got \(40, 7\)"),
        ({"kv_b_proj": torch.nn.Linear(7, 38)}, ValueError, r"kv_b_proj must have a weight of shape \(39, 7\), got \(38, 7\)"),
        ({"context": torch.zeros(2, 11)}, ValueError, r"context must have shape \(0, 11\), got \(2, 11\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "q": torch.zeros(6, 3, 12),
        "kv_c": torch.zeros(6, 7),
        "k_pe": torch.zeros(6, 4),
        "kv_b_proj": torch.zeros(39, 7),
        "meta": PCPMetadata.build([6], world_size=1, rank=0),
        "group": None,
        "dims": DIMS,
        "softmax_scale": SCALE,
    }
    with pytest.raises(error, match=message):
        pcp_layer(**(arguments | change))


def test_missing_context() -> None:
    meta = PCPMetadata.build([3], [2], world_size=1, rank=0)
    with pytest.raises(ValueError, match=r"restore_to_key_order: context must have shape \(2, 11\), got \(0, 11\)"):
        restore_to_key_order(torch.zeros(3, 11), meta)
