"""Exchanges by peers in random order, sizes and delays: after each, this rank's cache is what all ranks have written so far."""

import numpy as np
import torch

from pcp_mla import MLADims, PCPPlanner, PeerExchange
from pcp_mla.groups import group_rank, group_world_size

DIMS = MLADims(2, 8, 64, 8, 512)
BLOCK, BLOCKS, ROOM, LAYERS, PLANS = 16, 64, 700, 3, 24


class Step:
    """A plan, this rank's numbers of it, and where all of them go."""

    def __init__(self, rng, world, rank):
        count = int(rng.integers(1, 5))
        lengths = rng.integers(1, ROOM // count, count) // int(rng.choice([1, 1, 8, 64])) + 1
        needed = -(-lengths // BLOCK)
        blocks = rng.permutation(BLOCKS)[: needed.sum()].astype(np.int32)
        tables = np.full((count, needed.max()), -1, np.int32)
        for row, (end, some) in enumerate(zip(np.cumsum(needed), needed, strict=True)):
            tables[row, :some] = blocks[end - some : end]
        prefills = rng.random(count) < (0.0 if rng.random() < 0.1 else 0.9)
        self.planner = PCPPlanner(8, 2 * ROOM, world, rank, block_size=BLOCK, device="cuda")
        context = np.zeros(count, np.int64)
        self.meta = self.planner.plan(lengths.tolist(), context.tolist(), prefills.tolist(), torch.from_numpy(tables).cuda())
        total = int(lengths.sum())
        self.all = torch.arange(total * DIMS.latent_dim, device="cuda").view(total, -1) % 8191 * 1.0
        self.mine = self.all[self.meta.local_token_indices.long()]
        rows = np.concatenate([np.repeat(tables[i], BLOCK)[:n] * BLOCK + np.arange(n) % BLOCK for i, n in enumerate(lengths)])
        self.slots = torch.from_numpy(rows).long().cuda()


def storm(group, calls, seed, attached=True):
    """How many of so many exchanges left something wrong in this rank's cache."""
    world, rank = group_world_size(group), group_rank(group)
    shared, own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + rank)
    with torch.inference_mode():
        caches = [torch.zeros(BLOCKS, BLOCK, DIMS.latent_dim, device="cuda") for _ in range(LAYERS)]
        wanted = [torch.zeros(BLOCKS * BLOCK, DIMS.latent_dim, device="cuda") for _ in caches]
        steps = [Step(shared, world, rank) for _ in range(PLANS)]
        exchange = PeerExchange(group, 2 * ROOM, DIMS, torch.float32, "cuda", caches=caches if attached else (), timeout=30.0)
        streams, bad = [torch.cuda.Stream() for _ in range(2)], torch.zeros((), dtype=torch.int64, device="cuda")
        streams[0].wait_stream(torch.cuda.current_stream())

        def pause():
            if own.random() < 0.02:
                torch.cuda._sleep(int(own.integers(1000, 400_000)))

        at = streams[0]
        for number in range(calls):
            step, layer = steps[shared.integers(PLANS)], int(shared.integers(LAYERS))
            now = streams[shared.integers(2)]
            now.wait_stream(at)
            at = now
            with torch.cuda.stream(now):
                latents = step.mine + number % 1000
                pause()
                exchange.publish(latents[:, : DIMS.kv_lora_rank], latents[:, DIMS.kv_lora_rank :], step.meta, caches[layer])
                pause()
                wanted[layer].index_copy_(0, step.slots, step.all + number % 1000)
                bad += (caches[layer].view(-1, DIMS.latent_dim) != wanted[layer]).any()
                pause()
                latents.record_stream(now)
        exchange.check()
        exchange.close()
        return int(bad)
