"""The order in which the Triton kernel's programs take the tiles of all rows."""

import itertools
import os

import pytest
import torch
import triton
import triton.language as tl

from pcp_mla.triton.attention_kernel import work_item

TILE = 16


@triton.jit
def list_items(
    found, cu_seqlens_q, seqused_k, rows, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr
):
    row, tile = work_item(tl.program_id(0), cu_seqlens_q, seqused_k, rows, QUERIES, CAUSAL, SKIP, ROWS)
    tl.store(found + 2 * tl.program_id(0), row)
    tl.store(found + 2 * tl.program_id(0) + 1, tile)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_tile_once_and_the_longest_first(device, causal, skip, seed):
    generator = torch.Generator().manual_seed(seed)
    count = (1, 12, 60)[seed]
    lengths = torch.randint(0, 60, (count,), generator=generator) * (torch.rand(count, generator=generator) < 0.8)
    used = (lengths + torch.randint(0, 300, (count,), generator=generator)) * (torch.rand(count, generator=generator) < 0.7)
    wanted = {(row, tile) for row in range(count) for tile in range(-(-int(lengths[row]) // TILE)) if used[row] > 0 or not skip}
    starts = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    grid = int(lengths.sum()) // TILE + count + 1  # as the kernel's, or one more
    found = torch.full((grid, 2), -7, dtype=torch.int32, device=device)
    list_items[(grid,)](found, starts.to(device), used.int().to(device), count, TILE, causal, skip, 256)
    items = [tuple(item) for item in found.tolist()]
    assert set(items[: len(wanted)]) == wanted
    assert all(row == -1 for row, _ in items[len(wanted) :])
    keys = [
        (max(int(used[r] - lengths[r]), 0) // TILE + tile if causal else int(used[r]) // TILE) for r, tile in items[: len(wanted)]
    ]
    assert all(a >= b for a, b in itertools.pairwise(keys))
