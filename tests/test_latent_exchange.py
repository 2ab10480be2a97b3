"""The packed exchange: latents of all ranks, rank-major, over gloo, NCCL, played ranks and alone."""

import numpy as np
import pytest
import torch

from batches import as_bytes, random_bytes, same_bits
from pcp_mla import LatentExchange, PCPMetadata, PCPPlanner, gather_latents, write_latent_cache
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

DIMS = MLADims(num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=12)
# A large step, then smaller ones, whose pads must not show what the first left; a rank may have no token.
STEPS = [[70, 9], [3], [5, 1, 1], [1], [40, 2]]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def latents_of(meta, dtype, step):
    """What any rank can make of any: random bits."""
    generator = torch.Generator().manual_seed(100 * step + meta.rank)
    return random_bytes((meta.num_tokens, 16), dtype, meta.device, generator)


def exchange_all(group, device, layout="unpadded"):
    """Exchange every step in every dtype; the results and the addresses, and what they should be."""
    world, rank = group_world_size(group), group_rank(group)
    results = []
    for dtype in DTYPES:
        exchange = LatentExchange(group, 80, DIMS, dtype, device)
        for number, lengths in enumerate(STEPS):
            metas = [PCPMetadata.build(lengths, world_size=world, rank=r, layout=layout, device=device) for r in range(world)]
            mine = latents_of(metas[rank], dtype, number)
            wanted = torch.zeros(world, metas[rank].num_tokens_padded, 16, device=device).to(dtype)
            for to, meta in zip(wanted, metas, strict=True):
                to.view(torch.uint8)[: meta.num_tokens] = latents_of(meta, dtype, number).view(torch.uint8)
            for kv_c, k_pe in ((mine[:, :12], mine[:, 12:]), (mine[:, :12].clone(), mine[:, 12:].clone())):
                got = exchange.all_gather(kv_c, k_pe, metas[rank])
                results.append((same_bits(got, wanted.flatten(0, 1)), got.data_ptr()))
        if world > 1:
            assert len({address for _, address in results[-2 * len(STEPS) :]}) == 1
    return [same for same, _ in results]


@pytest.mark.parametrize("world", [2, 4])
def test_gloo(world):
    for rank in run_distributed(world, exchange_all, "cpu"):
        assert rank == [True] * (2 * len(STEPS) * len(DTYPES))


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_nccl():
    for rank in run_distributed(2, exchange_all, "cuda", backend="nccl"):
        assert rank == [True] * (2 * len(STEPS) * len(DTYPES))


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_played_and_alone(device, layout):
    for world in (1, 2, 3, 8):
        for rank in play(world, lambda group: exchange_all(group, device, layout)):
            assert all(rank)
    assert all(exchange_all(None, device, layout))


@pytest.mark.parametrize("planned", [False, True])
def test_replicated_decodes_are_not_sent(planned, monkeypatch):
    """Decodes alone need no collective: each rank has their latents. Any prefill token, another layout or policy, a graph do."""

    def no_collective(*_):
        raise AssertionError("a collective was called")

    def metadata(rank, lengths, prefills, padded=None, **options):
        context = [8] * len(lengths)
        if not planned:
            return PCPMetadata.build(lengths, context, prefills, world_size=2, rank=rank, **options)
        tables = torch.arange(4 * len(lengths), dtype=torch.int32).view(-1, 4)
        planner = PCPPlanner(4, 40, 2, rank, block_size=8, **options)
        return planner.plan(lengths, context, prefills, tables, num_tokens_padded=padded)

    monkeypatch.setattr("pcp_mla.exchange.latents.gathering_into", no_collective)

    def run(group):
        exchange = LatentExchange(group, 40, DIMS, torch.float32)
        for lengths, prefills in (([2, 1], [False, False]), ([2, 0], [False, True])):
            meta = metadata(group.rank, lengths, prefills)
            latents = torch.randn(meta.num_tokens, 16)
            for kv_c, k_pe in ((latents[:, :12], latents[:, 12:]), (latents[:, :12].clone(), latents[:, 12:].clone())):
                got = exchange.all_gather(kv_c, k_pe, meta)
                assert len(got) == 2 * meta.num_tokens_padded
                assert torch.equal(got[meta.allgather_restore_idx.long()], latents)
        sent = [metadata(group.rank, [2, 1], [False, True]), metadata(group.rank, [2, 1], [False, False], layout="padded")]
        sent.append(metadata(group.rank, [2, 1], [False, False], decode_policy="round_robin"))
        if planned:
            sent.append(metadata(group.rank, [2, 1], [False, False], padded=8))
        for meta in sent:
            latents = torch.randn(meta.num_tokens, 16)
            with pytest.raises(AssertionError, match="a collective was called"):
                exchange.all_gather(latents[:, :12], latents[:, 12:], meta)

    play(2, run)


def test_latents_side_by_side_are_not_copied():
    meta = PCPMetadata.build([9], world_size=1, rank=0)
    exchange = LatentExchange(None, 9, DIMS, torch.float32)
    whole = torch.randn(20, 16)[5:14]
    assert exchange.all_gather(whole[:, :12], whole[:, 12:], meta).data_ptr() == whole.data_ptr()
    near = torch.from_numpy(np.arange(9 * 16, dtype=np.float32).reshape(9, 16))
    for kv_c, k_pe in (
        (near[:, :12], torch.from_numpy(near.numpy()[:, 12:])),  # as if side by side, but of two storages
        (whole[:, :12], whole.as_strided((9, 4), (8, 1), whole[0, 12:].storage_offset())),  # from where the first row's would be
        (whole.as_strided((9, 12), (8, 1), whole.storage_offset()), whole[:, 12:]),
        (whole[:, 4:], whole[:, :4]),
        (whole[:, :12], whole.clone()[:, 12:]),
        (whole[:, :12].clone(), whole[:, 12:]),
    ):
        got = exchange.all_gather(kv_c, k_pe, meta)
        assert got.data_ptr() not in (kv_c.data_ptr(), k_pe.data_ptr())
        assert same_bits(got, torch.cat([kv_c, k_pe], 1))


def test_exchange_and_cache_write_restore_the_order():
    """Three steps of two requests: what every rank's cache holds is the natural order, read by the planner's key rows."""
    texts = [torch.randn(n, 16) for n in (61, 19)]
    tables = torch.tensor([[7, 2, 9, 4, 11, 0, 5, 3], [1, 6, 8, 10, 12, 13, 14, 15]], dtype=torch.int32)

    def steps(group):
        planner = PCPPlanner(2, 80, group.world_size, group.rank, block_size=8)
        exchange = LatentExchange(group, planner.max_local_tokens, DIMS, torch.float32)
        cache = torch.full((16, 8, 16), torch.nan)
        done = [0, 0]
        for lengths in ([30, 7], [1, 12], [30, 0]):
            meta = planner.plan(lengths, done, [True, True], tables)
            fresh = torch.cat([text[d : d + n] for text, d, n in zip(texts, done, lengths, strict=True)])
            mine = fresh[meta.local_token_indices.long()]
            gathered = exchange.all_gather(mine[:, :12].clone(), mine[:, 12:].clone(), meta)
            write_latent_cache(gathered, cache, meta.slot_mapping)
            done = [d + n for d, n in zip(done, lengths, strict=True)]
            wanted = torch.cat([text[:d] for text, d in zip(texts, done, strict=True)])
            assert same_bits(gather_latents(cache, meta.kv_rows), wanted)
        return as_bytes(torch.nan_to_num(cache))

    for world in (1, 2, 4):
        caches = play(world, steps)
        assert all(torch.equal(cache, caches[0]) for cache in caches)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kv_c": torch.zeros(9, 11)}, ValueError, "kv_c and k_pe must be 12 and 4 wide, got 11 and 4"),
        ({"kv_c": torch.zeros(8, 12)}, ValueError, "kv_c must have 9 rows, one per local token of meta, got 8"),
        ({"k_pe": torch.zeros(9, 4, dtype=torch.half)}, TypeError, "k_pe must be torch.float32, as kv_c, got torch.float16"),
        ({"kv_c": torch.zeros(9, 12).half(), "k_pe": torch.zeros(9, 4).half()}, TypeError, "kv_c must be torch.float32, as the"),
        ({"k_pe": 3}, TypeError, "k_pe must be a tensor, got int"),
        ({"kv_c": torch.zeros(9, 1, 12)}, ValueError, r"kv_c must have 2 dimensions \[tokens, width\], got 3"),
        ({"k_pe": torch.zeros(9, 4, device="meta")}, ValueError, "k_pe must be on cpu, as meta, got meta"),
        ({"meta": PCPMetadata.build([9], world_size=2, rank=0)}, ValueError, "meta must be for rank 0 of 1"),
        ({"k_pe": torch.zeros(4, 9).T}, ValueError, "k_pe must have a contiguous last dimension, got strides .1, 9."),
        (
            {"kv_c": torch.zeros(11, 12), "k_pe": torch.zeros(11, 4), "meta": PCPMetadata.build([11], world_size=1, rank=0)},
            ValueError,
            "meta must have at most 10 tokens a rank .max_tokens., got 11",
        ),
    ],
)
def test_errors(change, error, words):
    good = {"kv_c": torch.zeros(9, 12), "k_pe": torch.zeros(9, 4), "meta": PCPMetadata.build([9], world_size=1, rank=0)}
    exchange = LatentExchange(None, 10, DIMS, torch.float32)
    exchange.all_gather(**good)
    with pytest.raises(error, match=words):
        exchange.all_gather(**{**good, **change})


def test_metadata_of_another_rank_of_a_played_group():
    def rank(group):
        meta = PCPMetadata.build([9], world_size=2, rank=1 - group.rank)
        exchange = LatentExchange(group, 9, DIMS, torch.float32)
        exchange.all_gather(torch.zeros(meta.num_tokens, 12), torch.zeros(meta.num_tokens, 4), meta)

    with pytest.raises(ValueError, match="meta must be for rank 0 of 2, as the group, got rank 1 of 2"):
        play(2, rank)


def test_bad_capacity():
    with pytest.raises(ValueError, match="max_tokens must be at least 0, got -1"):
        LatentExchange(None, -1, DIMS, torch.float32)
    with pytest.raises(TypeError, match="group must be a ProcessGroup, a PlayedGroup or None, got int"):
        LatentExchange(3, 1, DIMS, torch.float32)
