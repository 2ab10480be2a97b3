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


class Storm:
    """The caches of one rank, what they must hold, and how often they did not."""

    def __init__(self, group, seed, attached):
        world, rank = group_world_size(group), group_rank(group)
        self.shared, self.own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + rank)
        self.caches = [torch.zeros(BLOCKS, BLOCK, DIMS.latent_dim, device="cuda") for _ in range(LAYERS)]
        self.wanted = [torch.zeros(BLOCKS * BLOCK, DIMS.latent_dim, device="cuda") for _ in self.caches]
        self.steps = [Step(self.shared, world, rank) for _ in range(PLANS)]
        caches = self.caches if attached else ()
        self.exchange = PeerExchange(group, 2 * ROOM, DIMS, torch.float32, "cuda", caches=caches, timeout=30.0)
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        self.bad = torch.zeros((), dtype=torch.int64, device="cuda")
        self.streams[0].wait_stream(torch.cuda.current_stream())
        self.streams[1].wait_stream(torch.cuda.current_stream())

    def pause(self, likely=0.02):
        if self.own.random() < likely:
            torch.cuda._sleep(int(self.own.integers(1000, 400_000)))

    def look(self, layer):
        self.bad += (self.caches[layer].view(-1, DIMS.latent_dim) != self.wanted[layer]).any()

    def publish(self, step, layer, number):
        latents = step.mine + number % 1000
        self.pause()
        kv_c, k_pe = latents[:, : DIMS.kv_lora_rank], latents[:, DIMS.kv_lora_rank :]
        self.exchange.publish(kv_c, k_pe, step.meta, self.caches[layer])
        self.pause()
        self.wanted[layer].index_copy_(0, step.slots, step.all + number % 1000)
        self.look(layer)
        self.pause()
        latents.record_stream(torch.cuda.current_stream())

    def end(self):
        self.exchange.check()
        self.exchange.close()
        return int(self.bad)


def storm(group, calls, seed, attached=True):
    """How many of so many exchanges, any step into any cache on either of two streams, left something wrong in this rank's."""
    with torch.inference_mode():
        storm = Storm(group, seed, attached)
        for number in range(calls):
            step, layer = storm.steps[storm.shared.integers(PLANS)], int(storm.shared.integers(LAYERS))
            with torch.cuda.stream(storm.streams[storm.shared.integers(2)]):
                storm.publish(step, layer, number)
        return storm.end()


def models(group, calls, seed, attached=True):
    """The same of two models, the first of two layers, that take steps in turn, the layers in their order, each step planned anew;
    and between them both read their caches without an exchange, as decodes do, the ranks at their own pace."""
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        storm, number, at = Storm(group, seed, attached), 0, 0
        while number < calls:
            at = (at + int(storm.shared.integers(1, PLANS))) % PLANS
            step, layers = storm.steps[at], ((0, 1), (2,))[storm.shared.integers(2)]
            for layer in layers:
                number += 1
                storm.publish(step, layer, number)
            if storm.shared.random() < 0.5:
                storm.pause(0.2)
                for layer in range(LAYERS):
                    storm.look(layer)
        return storm.end()
