"""Attention of all ranks' queries for some heads, against each rank's own attention for all of them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from batches import batches
from pcp_mla import PCPMetadata, PCPPlanner, pcp_attention
from pcp_mla.ops.attention.call import attend_ranks, check_library, prepared_call, shares_starts
from test_attention import ALL, BATCHES, NOPE, OURS, ROPE, SCALE, V, available, length_factor, meta_of
from test_attention_backends import library  # noqa: F401

HEADS = slice(1, 3)
LIBRARIES = ("fa3", "fa2", "fa4")  # what stands in for them


def gathered(qs, meta):
    """[P * Np, H, D] of every rank's q; pads are ones."""
    out = qs[0].new_ones(meta.world_size, meta.num_tokens_padded, *qs[0].shape[1:])
    for block, q in zip(out, qs, strict=True):
        block[: len(q)] = q
    return out.flatten(0, 1)


def inputs(metas, dtype, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    device, keys = metas[0].device, metas[0].num_kv_tokens + 3
    qs = [torch.randn(meta.num_tokens, heads, NOPE + ROPE, generator=generator).to(device, dtype) for meta in metas]
    k, v = (torch.randn(keys, heads, n, generator=generator).to(device, dtype) for n in (NOPE + ROPE, V))
    k[metas[0].num_kv_tokens :] = v[metas[0].num_kv_tokens :] = torch.nan
    return qs, k, v


def check(got, wanted, meta, states=True, exact=True):
    """Bit by bit, rank by rank; pads have nothing."""
    for part, empty, of_rank in zip(got, (0, -torch.inf), zip(*wanted, strict=True), strict=False):
        for rows, own in zip(part.unflatten(0, (meta.world_size, -1)), of_rank, strict=True):
            if exact:
                assert torch.equal(rows[: len(own)], own[:, HEADS])
            else:
                torch.testing.assert_close(rows[: len(own)], own[:, HEADS])
            assert (rows[len(own) :] == empty).all()
    assert states == (got[1] is not None)


def by_rank(batch, device, longer=1):
    return [meta_of(batch, rank, device, longer) for rank in range(batch[3])]


def compare(device, backend, dtype, metas):
    qs, k, v = inputs(metas, dtype)
    wanted = [
        pcp_attention(q, k, v, meta, softmax_scale=SCALE, return_lse=True, backend=backend)
        for q, meta in zip(qs, metas, strict=True)
    ]
    meta, q = metas[0], gathered(qs, metas[0])[:, HEADS]
    got = attend_ranks(backend, q, k[:, HEADS], v[:, HEADS], meta.rank_rows, meta.num_kv_tokens, SCALE, True)
    # What torch multiplies scores and weights by on a GPU depends on how many heads there are.
    check(got, wanted, meta, exact=(device, backend) != ("cuda", "torch"))


@pytest.mark.parametrize(("device", "backend"), ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [name for name, batch in BATCHES.items() if batch[0]])
def test_batches(device, backend, dtype, name):
    available(device, backend, dtype)
    compare(device, backend, dtype, by_rank(BATCHES[name], device, length_factor(device)))


@pytest.mark.parametrize(("device", "backend"), OURS)
@given(batches(max_requests=3, max_len=25))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, batch):
    available(device, backend)
    compare(
        device,
        backend,
        torch.bfloat16,
        [PCPMetadata.build(**batch | {"rank": rank}, device=device) for rank in range(batch["world_size"])],
    )


@pytest.mark.parametrize(("device", "backend"), [*ALL, *(pytest.param("cpu", name) for name in LIBRARIES)])
def test_key_chunks_are_merged_in_place(device, backend, library):  # noqa: F811
    """The new tokens first, then windows of context, as a layer does; pads stay as they are."""
    if backend in LIBRARIES and device == "cpu":
        library(backend)
        backend = "fa2"
    available(device, backend)
    batch = [21, 1, 9, 2], [30, 5, 0, 12], [True, False, True, True]
    metas = [PCPPlanner(4, 33, 3, rank, device=device).plan(*batch, workspace_tokens=35) for rank in range(3)]
    meta, (qs, k, v) = metas[0], inputs(metas, torch.bfloat16)
    assert len(meta.key_chunks) == 3

    def merged(chunks, call):
        state = None
        for chunk in (chunks[-1], *chunks[:-1]):
            keys = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            state = call(keys, chunk, state)
        return state

    def own(q, of):
        return lambda keys, chunk, state: pcp_attention(
            q, k[keys], v[keys], of, softmax_scale=SCALE, return_lse=True, chunk=chunk, prev=state, out=state, backend=backend
        )

    def of_all(keys, chunk, state):
        of_heads = (x[keys, HEADS] for x in (k, v))
        return attend_ranks(backend, q, *of_heads, meta.rank_rows, 0, SCALE, True, prev=state, chunk=chunk, out=state)

    wanted, q = [merged(of.key_chunks, own(q, of)) for q, of in zip(qs, metas, strict=True)], gathered(qs, meta)[:, HEADS]
    check(merged(meta.rank_rows.key_chunks, of_all), wanted, meta)


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries(library, name):  # noqa: F811
    """K and V of as many rows as there are keys; the call that layers prepare gives the same."""
    library(name)
    metas = by_rank(BATCHES["decodes among prefills"], "cpu")
    compare("cpu", "fa2", torch.bfloat16, metas)
    qs, k, v = inputs(metas, torch.bfloat16)
    meta, q = metas[0], gathered(qs, metas[0])[:, HEADS].contiguous()
    run = prepared_call("fa2", meta.rank_rows, SCALE)
    assert (run is None) == (name != "fa3")
    if run is not None:
        k, v = (x[: meta.num_kv_tokens, HEADS].contiguous() for x in (k, v))
        out = torch.full((*q.shape[:2], V), torch.nan, dtype=q.dtype)
        run(q, k, v, out)
        assert torch.equal(out, attend_ranks("fa2", q, k, v, meta.rank_rows, meta.num_kv_tokens, SCALE)[0])


def test_a_library_whose_rows_have_keys_of_their_own(library):  # noqa: F811
    library("old")
    assert not shares_starts("fa2")
    check_library("fa2")
    with pytest.raises(NotImplementedError, match="the rows of all ranks need seqused_k, which this version of fa2 lacks"):
        check_library("fa2", "the rows of all ranks")
    assert shares_starts("torch")
