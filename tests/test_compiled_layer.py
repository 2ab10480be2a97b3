"""The layer under torch.compile, against attention written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from batches import same_bits
from bench.graphs import Echo
from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner
from test_layer import attend_last, size


def written_out(
    q: torch.Tensor, weight: torch.Tensor, meta: Any, cache: torch.Tensor, inside: torch.dtype = torch.float64
) -> torch.Tensor:
    """Attention of the plan's rows to the tokens that the cache holds, in float64; what a layer keeps is rounded to ``inside``."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(inside).double()

    q, weight = q.double().cpu(), weight.double().cpu()
    held = cache.flatten(0, 1)[meta.kv_rows.long().clamp(min=0)].double().cpu()
    out = torch.zeros(meta.num_tokens, 2, 128, dtype=torch.float64)
    starts, first_keys, counts = (x.tolist() for x in (meta.cu_seqlens_q, meta.cu_seqlens_k, meta.seqused_k))
    for row, count in enumerate(counts):
        queries, keys = slice(starts[row], starts[row + 1]), held[first_keys[row] : first_keys[row] + count]
        out[queries] = attend_last(q[queries], keys, weight, rounded)
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("group", [None, Echo(rank=1)], ids=["alone", "of two"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "float8"])
def test_the_layer_compiles_whole(device: str, group: Any, scaled: bool) -> None:
    """One graph, and padded plans of a size share it from the third at the latest: numbers that vary have become symbols."""
    dims = MLADims(2, 128, 64, 128, 512)
    world, rank = (1, 0) if group is None else (2, 1)
    planner = PCPPlanner(4, 256 * world, world, rank, block_size=16, device=device, max_kv_tokens=700)
    tables = torch.arange(4 * 40, dtype=torch.int32, device=device).view(4, 40)
    layer = MLAPrefill(dims, 192**-0.5, LatentExchange(group, planner.max_local_tokens, dims, torch.bfloat16, device), "auto")
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    cache, weight = values(160, 16, 576), values(2 * 256, 512) * 512**-0.5
    scale = torch.full((1,), 0.02, device=device) if scaled else None
    cache = cache.to(torch.float8_e4m3fn) if scaled else cache
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def eager(*arguments: Any) -> torch.Tensor:
        return layer(*arguments, scale=scale)

    compiled = torch.compile(eager, fullgraph=True, backend=counter)

    batches = [([100, 1], [20, 5]), ([37, 60, 1], [0, 8, 3]), ([200], [100]), ([50, 50], [1, 1]), ([9, 9, 9, 9], [0, 0, 3, 7])]
    with torch.no_grad():
        for number, (lengths, contexts) in enumerate(batches):
            sizes = {"num_tokens_padded": 256, "num_requests_padded": 4, "num_kv_tokens_padded": 700}
            meta = planner.plan(lengths, contexts, [length > 1 for length in lengths], tables, **sizes)
            inputs = values(256, 2, 192), values(256, 512), values(256, 64), weight, meta
            theirs, mine = cache.clone(), cache.clone()
            wanted, got = eager(*inputs, theirs)[: meta.num_tokens], compiled(*inputs, mine)[: meta.num_tokens]
            assert same_bits(mine, theirs)
            held = mine if scale is None else (mine.float() * scale).bfloat16()
            right, own = written_out(inputs[0], weight, meta, held), written_out(inputs[0], weight, meta, held, torch.bfloat16)
            for result in (wanted, got):
                assert size(result.double().cpu() - right) <= 1.5 * size(own - right)
            assert counter.frame_count <= min(number + 1, 3)
