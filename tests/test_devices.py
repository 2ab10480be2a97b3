"""Several GPUs and several threads: what a launch leaves behind it."""

import subprocess
import sys
import threading

import pytest
import torch

from batches import same_bits
from pcp_mla import MLADims, kv_up_project

# In a process of its own: GPU 0 is torch's current one, and nothing has used it.
ON_THE_SECOND = """
import torch
from pcp_mla import PCPMetadata, PCPPlanner, concat_k, gather_latents, merge_attn_states, pcp_fused_gather, write_latent_cache
from pcp_mla.ops import native

def used(gpu):
    return torch._C._cuda_hasPrimaryContext(gpu)

meta = PCPMetadata.build([50], world_size=2, rank=1, device="cuda:1")
q, k, v = (torch.ones(n, 2, 16, device="cuda:1") for n in (meta.num_tokens, meta.num_kv_tokens, meta.num_kv_tokens))
pcp_fused_gather(q, k, v, meta, backend="cuda")
out, lse = torch.ones(4, 2, 16, device="cuda:1"), torch.ones(4, 2, device="cuda:1")
merged = torch.empty_like(out)
with torch.inference_mode():
    merge_attn_states(out, lse, out.clone(), lse, out=merged)
    concat_k(out, lse, out=torch.empty(4, 2, 18, device="cuda:1"))
    write_latent_cache(out.flatten(1), torch.zeros(2, 4, 32, device="cuda:1"), torch.arange(4, device="cuda:1"))
    if native.direct is not None:  # on Hopper it is done
        latents, weight = (torch.ones(n, w, dtype=torch.bfloat16, device="cuda:1") for n, w in ((8, 128), (128, 64)))
        native.direct.kv_up_project(latents, None, weight, None, *(latents.new_empty(8, 1, n) for n in (128, 64)), None)
merge_attn_states(out, lse, out.clone(), lse, backend="cuda")
cache, slots = torch.zeros(4, 4, 24, device="cuda:1"), torch.arange(4, device="cuda:1")
write_latent_cache(concat_k(out[:, :1], lse[:, :1], backend="cuda").flatten(1)[:, :1].expand(4, 24).contiguous(), cache, slots)
gather_latents(cache, slots.int(), backend="cuda")
torch.cuda.synchronize(1)
assert used(1)
assert not used(0), "an op made a context on GPU 0"
plan = PCPPlanner(4, 64, 2, 1, block_size=4, device="cuda:1").plan([20], [3], None, torch.zeros(1, 8, dtype=torch.int32))
plan.slot_mapping.sum().item()
torch.cuda.synchronize(1)
assert not used(0), "the planner made a context on GPU 0"
assert torch.cuda.current_device() == 0
"""


@pytest.mark.multi_gpu
def test_a_gpu_that_is_not_used_has_no_context():
    done = subprocess.run([sys.executable, "-c", ON_THE_SECOND], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the CUDA kernel is for Hopper"
)
def test_threads_that_want_more_and_less_shared_memory():
    """The kernel's shared memory depends on the rank: no thread may take what another one's launch needs."""
    cases = []
    for rank in (64, 512):
        dims = MLADims(2, 128, 64, 128, rank)
        generator = torch.Generator("cuda").manual_seed(rank)
        latents = torch.randn(300, dims.latent_dim, device="cuda", generator=generator).bfloat16()
        weight = torch.randn(2 * dims.expanded_dim, rank, device="cuda", generator=generator).bfloat16()
        cases.append((dims, latents, weight, kv_up_project(latents, None, weight, dims, backend="cuda")))
    failures = []

    def launch(dims, latents, weight, wanted):
        try:
            for _ in range(300):
                got = kv_up_project(latents, None, weight, dims, backend="cuda")
            if not all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)):
                failures.append(f"rank {dims.kv_lora_rank} differs")
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=launch, args=case) for case in cases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
