"""The layer at DeepSeek's widths on every attention backend, P played, with a cached prefix, a workspace and a captured graph,
against attention written out in float64."""

import functools

import pytest
import torch

from bench import peers
from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.ops.attention import support
from pcp_mla.testing.played import play

peers.load_fa3()

DIMS = MLADims(num_heads=2, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
SCALE, BLOCK = 192**-0.5, 16
LENGTHS, CONTEXTS = [150, 1, 40], [130, 70, 0]
GPU_BACKENDS = [pytest.param("cuda", name, marks=pytest.mark.gpu, id=name) for name in ("auto", "fa3", "fa2", "triton", "torch")]
everywhere = pytest.mark.parametrize(("device", "backend"), [pytest.param("cpu", "auto", id="cpu"), *GPU_BACKENDS])


def available(device, backend):
    reason = "" if backend == "auto" else support.missing(backend, torch.device(device, 0))
    if device == "cuda" and reason:
        pytest.skip(f"{backend}: {reason}")


@functools.cache
def inputs():
    """q and latents of the new tokens, latents of the cached ones, the weight, and the requests' blocks: bf16 on the CPU."""
    generator = torch.Generator().manual_seed(1)

    def values(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    weight = values(DIMS.num_heads * DIMS.expanded_dim, DIMS.kv_lora_rank) * DIMS.kv_lora_rank**-0.5
    tables = torch.randperm(60, generator=generator).int().view(3, 20)
    return values(sum(LENGTHS), 2, 192), values(sum(LENGTHS), 576), values(sum(CONTEXTS), 576), weight, tables


class Step:
    """One rank's layer, ready to run."""

    def __init__(self, group, device, dtype, backend, workspace=None):
        q, latents, context, weight, tables = (x.to(device) for x in inputs())
        q, latents, context, self.weight = (x.to(dtype) for x in (q, latents, context, weight))
        world, rank = group_world_size(group), group_rank(group)
        planner = PCPPlanner(3, sum(LENGTHS), world, rank, block_size=BLOCK, device=device)
        # Planned as a prefill first, for the slots of the cached tokens alone.
        self.cache = torch.zeros(60, BLOCK, 576, dtype=dtype, device=device)
        alone = PCPPlanner(3, sum(CONTEXTS), 1, 0, block_size=BLOCK, device=device).plan(CONTEXTS, None, None, tables)
        self.cache.view(-1, 576)[alone.slot_mapping] = context
        self.meta = planner.plan(LENGTHS, CONTEXTS, [True, False, True], tables, workspace_tokens=workspace)
        self.tokens = self.meta.local_token_indices.long()
        self.q, local = q[self.tokens], latents[self.tokens]
        self.kv_c, self.k_pe = local[:, :512].contiguous(), local[:, 512:].contiguous()
        exchange = LatentExchange(group, planner.max_local_tokens, DIMS, dtype, device)
        self.layer = MLAPrefill(DIMS, SCALE, exchange, backend)

    def __call__(self):
        return self.layer(self.q, self.kv_c, self.k_pe, self.weight, self.meta, self.cache)


def attend_last(q, sequence, weight, rounded):
    """[n, heads, v] of q [n, heads, nope + rope], the last n tokens of a sequence of latents, in float64; K, V, the softmax and the
    result go through ``rounded``."""
    expanded = rounded(sequence[:, :512] @ weight.T).view(-1, 2, 256)
    keys = torch.cat([expanded[..., :128], sequence[:, None, 512:].expand(-1, 2, -1)], dim=-1)
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * 192**-0.5
    old, total = len(sequence) - len(q), len(sequence)
    scores.masked_fill_(torch.arange(total) > torch.arange(old, total)[:, None], -torch.inf)
    return rounded(torch.einsum("hnm,mhd->nhd", rounded(scores.softmax(-1)), expanded[..., 128:]))


def attention(rounded):
    """[tokens, heads, v] in natural order, by request."""
    q, latents, context, weight, _ = (x.double() for x in inputs())
    out, start, cached = [], 0, 0
    for new, old in zip(LENGTHS, CONTEXTS, strict=True):
        sequence = torch.cat([context[cached : cached + old], latents[start : start + new]])
        out.append(attend_last(q[start : start + new], sequence, weight, rounded))
        start, cached = start + new, cached + old
    return torch.cat(out)


@functools.cache
def exact():
    return attention(lambda x: x)


@functools.cache
def own_error():
    """What each number is off by where everything that is kept in bf16 is rounded, and nothing else goes wrong."""
    return attention(lambda x: x.bfloat16().double()) - exact()


def size(x):
    return x.square().mean().sqrt()


def check(tokens, out):
    """A softmax scale half a percent off makes the errors 1.7 times as large, one percent three times."""
    assert out.dtype == torch.bfloat16
    tokens = tokens.long().cpu()
    error, own = out.double().cpu() - exact()[tokens], own_error()[tokens]
    assert size(error) <= 1.5 * size(own)
    assert error.abs().max() <= 2 * own_error().abs().max()


@everywhere
@pytest.mark.parametrize("workspace", [None, 192])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks(device, backend, workspace, world):
    available(device, backend)

    def rank(group):
        step = Step(group, device, torch.bfloat16, backend, workspace)
        assert (workspace is None) == (len(step.meta.key_chunks) == 1)
        return step.tokens, step()

    seen = set()
    for tokens, out in play(world, rank):
        check(tokens, out)
        seen |= set(tokens.tolist())
    assert len(seen) == sum(LENGTHS)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [None, 192])
@pytest.mark.parametrize("backend", ["auto", "fa3", "triton"])
def test_graph_replay(backend, workspace):
    available("cuda", backend)
    step = Step(None, "cuda", torch.bfloat16, backend, workspace)
    wanted = step()
    check(step.tokens, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = step()
    step.q.neg_()
    step.cache.mul_(2)
    kv_c = step.kv_c.clone()
    step.kv_c.mul_(0.5)
    graph.replay()
    other = out.clone()
    assert torch.equal(other, step())
    assert not torch.equal(other, wanted)
    step.q.neg_()
    step.cache.div_(2)
    step.kv_c.copy_(kv_c)
    graph.replay()
    assert torch.equal(out, wanted)
