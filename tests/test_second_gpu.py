"""Every op on a GPU that is not the current one: it works there, behind what that GPU's current stream does, and leaves the current
device alone. On a CPU the same calls show that the expected results are right."""

import math

import pytest
import torch

from pcp_mla import (
    MLADims,
    PCPMetadata,
    concat_k,
    cp_correct_out,
    gather_latents,
    kv_up_project,
    merge_attn_states,
    merge_n_attn_states,
    partition,
    pcp_attention,
    pcp_fused_gather,
    pcp_fused_restore,
    write_latent_cache,
)
from pcp_mla.ops.registry import select
from pcp_mla.planner.step_buffer import request_table


def numbers(*shape, start=0.0):
    """1, 2, 3 ... over 8: exact in every dtype here as long as there are few."""
    return (torch.arange(math.prod(shape)) + start).view(shape) / 8


def batch(device):
    return PCPMetadata.build([9, 4], world_size=2, rank=0, device=device)


# Each of them: inputs on the CPU, the call with these on the device, and what it must give. Rank 0 of 2 holds chunks 0 and 3 of a
# request's four: of 9 tokens 0 to 2 (none are left for the last), of 4 tokens 0 and 3.


def fused_gather():
    q, k = numbers(5, 1, 8), numbers(13, 1, 8, start=40)

    def call(backend, q, k):
        rows = pcp_fused_gather(q, k, k, batch(q.device), backend=backend)
        return rows.q_head, rows.q_tail, rows.k_head, rows.v_tail

    return (q, k), call, (q[[0, 1, 2, 3]], q[[4]], k[[0, 1, 2, 9]], k[[9, 10, 11, 12]])


def fused_restore():
    head, tail, lse = numbers(4, 1, 8), numbers(1, 1, 8, start=50), numbers(5, 1)

    def call(backend, head, tail, lse):
        return pcp_fused_restore(head, tail, lse[:4], lse[4:], batch(head.device), backend=backend)

    return (head, tail, lse), call, (torch.cat([head, tail]), lse)


def plan_expand():
    part = partition([9, 4], [3, 5], world_size=2, rank=0)
    table = torch.from_numpy(request_table(part).reshape(-1))
    blocks = torch.arange(8, dtype=torch.int32).flip(0).view(2, 4)
    rows, keys = part.num_tokens_padded, part.num_kv_tokens

    def call(backend, table, blocks):
        token = [torch.zeros(n, dtype=torch.int32, device=table.device) for n in (rows, rows, 2 * rows, 2 * rows)]
        slots = torch.zeros(2 * rows, dtype=torch.int64, device=table.device)
        kv = torch.zeros(keys, dtype=torch.int32, device=table.device)
        expand = torch.ops.pcp_mla.plan_expand if backend == "auto" else select("plan_expand", backend, table.device.type)
        expand(table, blocks, *token, slots, kv, 2, 2, 0, rows, keys, False, 4, 1, 0, 1)
        return token[1][:5], kv

    positions = torch.tensor([3, 4, 5, 5, 8])
    kv = [(7 - n // 4) * 4 + n % 4 for n in range(12)] + [(3 - n // 4) * 4 + n % 4 for n in range(9)]
    return (table, blocks), call, (positions, torch.tensor(kv))


def partials():
    return numbers(3, 2, 8), torch.zeros(3, 2), numbers(3, 2, 8, start=8), torch.full((3, 2), math.log(3.0))


def merge():
    inputs = partials()

    def call(backend, *inputs):
        out, lse = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
        merge_attn_states(*inputs, out=out, lse_out=lse, backend=backend)
        return *merge_attn_states(*inputs, backend=backend), out, lse

    wanted = inputs[0] / 4 + inputs[2] * 0.75, torch.full((3, 2), math.log(4.0))
    return inputs, call, wanted * 2


def merge_n():
    inputs = partials()

    def call(backend, a, lse_a, b, lse_b):
        out, lse = torch.empty_like(a), torch.empty_like(lse_a)
        merge_n_attn_states([a, b, a], [lse_a, lse_b, lse_a], out=out, lse_out=lse, backend=backend)
        return *merge_n_attn_states([a, b, a], [lse_a, lse_b, lse_a], backend=backend), out, lse

    wanted = inputs[0] * 0.4 + inputs[2] * 0.6, torch.full((3, 2), math.log(5.0))
    return inputs, call, wanted * 2


def correct():
    inputs = partials()

    def call(backend, a, lse_a, b, lse_b):
        return cp_correct_out(b, torch.stack([lse_a, lse_b]), 1, backend=backend)

    return inputs, call, (inputs[2] * 0.75, torch.full((3, 2), math.log(4.0)))


def write_cache():
    latents, slots = numbers(3, 8), torch.tensor([5, 0, 7])

    def call(backend, latents, slots):
        cache = torch.zeros(2, 4, 8, device=latents.device)
        write_latent_cache(latents, cache, slots, backend=backend)
        return (cache,)

    wanted = torch.zeros(8, 8)
    wanted[5], wanted[0], wanted[7] = latents
    return (latents, slots), call, (wanted.view(2, 4, 8),)


def gather_cache():
    cache, rows = numbers(2, 4, 8), torch.tensor([5, -1, 7], dtype=torch.int32)

    def call(backend, cache, rows):
        return (gather_latents(cache, rows, backend=backend),)

    return (cache, rows), call, (torch.stack([cache[1, 1], torch.zeros(8), cache[1, 3]]),)


def concat():
    k_nope, k_pe = numbers(3, 2, 8), numbers(3, 4)
    return (k_nope, k_pe), lambda backend, *x: (concat_k(*x, backend=backend),), (
        torch.stack([torch.cat([k_nope[:, head], k_pe], dim=1) for head in (0, 1)], dim=1),
    )  # fmt: skip


def up_project():
    """Every column of the weight adds up two numbers of the latent."""
    dims = MLADims(2, 64, 8, 64, 64)
    latents = (torch.arange(3 * 72).view(3, 72) % 16).bfloat16()
    weight = (torch.eye(64) + torch.eye(64).roll(1, 0)).repeat(4, 1).bfloat16()

    def call(backend, latents, weight):
        return kv_up_project(latents, None, weight, dims, backend=backend)

    x = latents[:, :64] + latents[:, :64].roll(1, 1)
    k = torch.cat([x, latents[:, 64:]], dim=1)
    return (latents, weight), call, tuple(y[:, None].expand(3, 2, -1) for y in (k, x))


def attention():
    """Zero queries: the mean of all values before."""
    q, k, v = torch.zeros(4, 2, 16), torch.ones(4, 2, 16), numbers(4, 2, 16)

    def call(backend, q, k, v):
        meta = PCPMetadata.build([4], world_size=1, rank=0, device=q.device)
        return pcp_attention(q, k, v, meta, softmax_scale=1.0, return_lse=True, backend=backend)

    count = torch.arange(1.0, 5.0)
    return (q, k, v), call, (v.cumsum(0) / count[:, None, None], count.log()[:, None].expand(4, 2))


OPS = (fused_gather, fused_restore, plan_expand, merge, merge_n, correct, write_cache, gather_cache, concat, up_project, attention)


def check(results, wanted):
    for got, right in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), right.double(), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_expected_results(op):
    inputs, call, wanted = op()
    check(call("auto", *inputs), wanted)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_on_a_device_that_is_not_current(op, backend):
    """On a stream of its own, which no launch on the current device could be given: the inputs are there only when it comes to
    them."""
    if op is up_project and backend == "cuda" and torch.cuda.get_device_capability(1)[0] != 9:
        pytest.skip("the CUDA kernel is for Hopper")
    if op is attention and backend == "cuda":
        pytest.skip("attention is Triton's")
    inputs, call, wanted = op()
    there = [x.to("cuda:1") for x in inputs]
    late = [torch.zeros_like(x) if x.is_floating_point() else x.clone() for x in there]
    call(backend, *there)  # compiles
    side = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for to, source in zip(late, there, strict=True):
            to.copy_(source)
        with torch.cuda.device(0), torch.inference_mode():
            results = call(backend, *late)
            assert torch.cuda.current_device() == 0
            assert torch.cuda.current_stream("cuda:1") == side
        side.synchronize()
        assert all(x.device == torch.device("cuda:1") for x in results)
        check(results, wanted)
    assert torch.cuda.current_device() == 0
