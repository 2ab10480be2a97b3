"""Block tables of a plan: read once, in plan(); numbers that have slots; tables without entries."""

import numpy as np
import pytest
import torch

from pcp_mla import PCPPlanner, partition
from pcp_mla.ops import native
from pcp_mla.plan.slots import PagedCache, kv_rows, slot_mapping
from plans import assert_equal, assert_plan

BATCH = {
    "query_lens": np.array([9, 1, 0, 4], np.int32),
    "context_lens": np.array([7, 30, 3, 0], np.int32),
    "is_prefill": np.array([True, False, True, True]),
    "prompt_lens": np.array([20, 3, 4, 4], np.int32),
}
TABLES = np.random.default_rng(0).permutation(5 * 9).reshape(5, 9).astype(np.int32)


@pytest.fixture(params=["native", "numpy"])
def host(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setitem(native.status, "_planner", "not built: for this test")


def make(block_size=4, **options):
    return PCPPlanner(6, 100, 2, 1, block_size=block_size, **options)


def plain(tables):
    return tables


FORMS = {
    "numpy int32": plain,
    "numpy int64": lambda tables: tables.astype(np.int64),
    "every second column": lambda tables: np.repeat(tables, 2, axis=1)[:, ::2],
    "every second row": lambda tables: np.repeat(tables, 2, axis=0)[::2],
    "columns first": lambda tables: np.asfortranarray(tables),
    "tensor int32": lambda tables: torch.from_numpy(tables),
    "tensor int64": lambda tables: torch.from_numpy(tables).long(),
    "tensor columns first": lambda tables: torch.from_numpy(tables.T.copy()).T,
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_kv_tokens", [None, 80])
@pytest.mark.parametrize("read_first", ["nothing", "slot_mapping", "kv_rows"])
def test_a_plan_is_of_one_moment(form, max_kv_tokens, read_first):
    """The caller writes the next step into all that it gave before it looks at the plan."""
    part = partition(**BATCH, world_size=2, rank=1)
    given, tables = {name: array.copy() for name, array in BATCH.items()}, FORMS[form](TABLES.copy())
    meta = make(max_kv_tokens=max_kv_tokens).plan(**given, block_tables=tables)
    getattr(meta, read_first, None)
    for array in (*given.values(), tables):
        array[:] = 1
    assert_plan(meta, part, TABLES, PagedCache(4), None)
    for name in BATCH:
        if name != "prompt_lens":
            assert_equal(getattr(meta.partition, name), BATCH[name], name)
    assert_equal(meta.partition.discard_request_mask, part.discard_request_mask, "discard_request_mask")


@pytest.mark.usefixtures("host")
def test_a_plan_that_fails_leaves_the_tables_of_the_last():
    planner = make()
    meta = planner.plan([9], [7], block_tables=TABLES)
    for wrong in (TABLES - 100, np.full((1, 50), -1), np.zeros((1, 1), np.int32)):
        with pytest.raises(ValueError, match="block_tables must have"):
            planner.plan([9], [7], block_tables=wrong)
    assert_plan(meta, partition([9], [7], world_size=2, rank=1), TABLES, PagedCache(4), None)
    wider = np.arange(60, dtype=np.int32)[None, ::-1].copy()
    meta = planner.plan([9], [200], block_tables=wider)
    assert_plan(meta, partition([9], [200], world_size=2, rank=1), wider, PagedCache(4), None)
    assert_plan(planner.plan([9], [7], block_tables=TABLES), partition([9], [7], world_size=2, rank=1), TABLES, PagedCache(4), None)


@pytest.mark.usefixtures("host")
def test_room_for_tables_is_made_once():
    planner = make()
    tables = [planner.plan([9], [7], None, TABLES[:, :width]) and planner._buffers.tables for width in (4, 9, 9, 5)]
    assert tables[0] is not tables[1]
    assert tables[1] is tables[2] is tables[3]
    assert planner.plan([9]).slot_mapping is None
    assert planner.plan([9], [7], None, TABLES)
    assert planner._buffers.tables is tables[1]


@pytest.mark.usefixtures("host")
def test_metadata_of_an_earlier_plan_raises_instead_of_showing_the_next():
    planner = make()
    old = planner.plan(**BATCH, block_tables=TABLES)
    seen = old.positions
    new = planner.plan([5], block_tables=TABLES[4:])
    for name in ("slot_mapping", "kv_rows", "local_token_indices", "row_table", "key_chunks", "discard_request_mask"):
        with pytest.raises(RuntimeError, match=r"before the next plan\(\), got plan 1 while the planner's buffers hold plan 2"):
            getattr(old, name)
    assert old.positions is seen
    assert old.num_tokens == partition(**BATCH, world_size=2, rank=1).num_tokens
    assert_equal(old.partition.query_lens, BATCH["query_lens"], "query_lens")
    assert_plan(new, partition([5], world_size=2, rank=1), TABLES[4:], PagedCache(4), None)


EMPTY = [
    [],
    [[]],
    np.empty((0, 0), np.int32),
    np.empty((0, 1), np.int32),
    np.empty((0, 5), np.int32),
    np.empty((0, 5), np.int64),
    np.empty((0, 5)),
    np.empty((5, 0), np.int32).T,
    np.empty((3, 0), np.int32),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    torch.empty(0, 5, dtype=torch.int32),
    torch.empty(0, 5, dtype=torch.int64),
    torch.empty(2, 0, dtype=torch.int32),
    torch.empty(5, 0, dtype=torch.int32).T,
]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("tables", EMPTY, ids=lambda t: f"{type(t).__name__}{list(np.shape(t))}")
@pytest.mark.parametrize("padded", [{}, {"num_tokens_padded": 3, "num_kv_tokens_padded": 7, "num_requests_padded": 2}])
def test_a_step_without_requests(tables, padded):
    meta = make().plan([], block_tables=tables, **padded)
    rows, keys = padded.get("num_tokens_padded", 0), padded.get("num_kv_tokens_padded", 0)
    assert meta.slot_mapping.tolist() == [-1] * 2 * rows
    assert meta.kv_rows.tolist() == [-1] * keys
    assert meta.paged_cache == PagedCache(4)


@pytest.mark.usefixtures("host")
def test_tables_without_columns():
    planner = make()
    for tables in ([[], []], np.empty((2, 0), np.int32), torch.empty(3, 0, dtype=torch.int32)):
        meta = planner.plan([0, 0], block_tables=tables)
        assert meta.slot_mapping.tolist() == meta.kv_rows.tolist() == []
        with pytest.raises(ValueError, match=r"block_tables must have at least 1 blocks of 4 for the 1 .* of request 1, got 0"):
            planner.plan([0, 1], block_tables=tables)
    with pytest.raises(ValueError, match="block_tables must have a row for each of the 2 requests, got 0"):
        planner.plan([0, 0], block_tables=[])


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("form", [np.int64, np.uint64, torch.int64, list, np.int32, torch.int32])
def test_numbers_without_slots_are_refused(block_size, form):
    """The last block whose slots an int32 holds is taken, the next is not, nor a negative one, nor one whose low bits are 5."""
    last = 2**31 // block_size - 1
    planner = PCPPlanner(6, 3000, 2, 1, block_size=block_size)
    narrow = form in (np.int32, torch.int32)

    def table(number):
        values = np.array([[3, 3], [3, number]], np.uint64 if form is np.uint64 else np.int64)
        if form is list:
            return values.tolist()
        return torch.from_numpy(values).to(form) if isinstance(form, torch.dtype) else values.astype(form)

    lengths = [block_size, block_size + 1]
    if block_size < 50:
        meta = planner.plan(lengths, block_tables=table(last))
        assert max(meta.slot_mapping.tolist()) == max(meta.kv_rows.tolist()) == last * block_size
    limits = f"numbers of 0 to {last}, so that slots of blocks of {block_size} stay below 2\\*\\*31"
    if form is np.uint64:
        for number in (2**63, 2**63 + 5, 2**64 - 1):
            with pytest.raises(ValueError, match=f"block_tables must have {limits}, got -"):
                planner.plan([1, 2 * block_size], block_tables=table(number))
    for number in (last + 1, 2**32 + 5, 2**32 - 1, 2**33, 2**62, -1, -(2**31)):
        if (number < 0 and form is np.uint64) or (narrow and not -(2**31) <= number < 2**31):
            continue
        with pytest.raises(ValueError, match=f"block_tables must have {limits}, got {number} for block 1 of request 1"):
            planner.plan(lengths, block_tables=table(number))
        # What is behind the blocks in use is nobody's business.
        planner.plan([block_size] * 2, block_tables=table(number))


@pytest.mark.usefixtures("host")
def test_context_counts_as_use_and_other_shards_tokens_do_not():
    tables = np.array([[2, 7, -1]])
    with pytest.raises(ValueError, match="got -1 for block 2 of request 0"):
        make().plan([1], [8], block_tables=tables)
    make().plan([1], [7], block_tables=tables)
    # Of 13 tokens in runs of 4, shard 0 of 2 has 8, shard 1 has 5.
    for shard, blocks in ((0, 2), (1, 2)):
        make(dcp_world_size=2, dcp_rank=shard, cp_interleave=4).plan([3], [10], block_tables=tables[:, : blocks + 1])
    with pytest.raises(ValueError, match="got -1 for block 2 of request 0"):
        make(dcp_world_size=2, dcp_rank=0, cp_interleave=4).plan([3], [14], block_tables=tables)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 64, 1000, 2**16 + 1, 2**31 - 1])
def test_blocks_in_use_are_counted_exactly(block_size):
    """One block number too few is refused, and the first that is not in use is not read."""
    for length in (1, block_size - 1, block_size, block_size + 1, 3 * block_size, 2**31 - 2):
        blocks = -(-length // block_size)
        if not 1 <= length < 2**31 - 1 or blocks > 2**20:
            continue
        tables = np.zeros((1, blocks + 1), np.int32)
        tables[0, blocks] = -1
        planner = PCPPlanner(1, 1, 1, 0, block_size=block_size)
        planner.plan([1], [length - 1], block_tables=tables)
        planner.plan([1], [length - 1], block_tables=tables[:, :-1])
        with pytest.raises(ValueError, match=f"block_tables must have at least {blocks} blocks"):
            planner.plan([1], [length - 1], block_tables=tables[:, :-2])
        tables[0, blocks - 1] = -1
        with pytest.raises(ValueError, match=f"got -1 for block {blocks - 1} of request 0"):
            planner.plan([1], [length - 1], block_tables=tables)


def test_the_specification_has_no_slot_for_such_a_block():
    """A table is int64 there: what an int32 cannot hold is not cut."""
    part = partition([2, 2, 2], world_size=1, rank=0)
    tables = np.array([[-1], [2**32 + 5], [2**31 // 4 - 1]])
    slots = [-1, -1, -1, -1, 2**31 - 4, 2**31 - 3]
    assert slot_mapping(part, tables, PagedCache(4)).tolist() == slots
    assert kv_rows(part, tables, PagedCache(4)).tolist() == slots
    assert kv_rows(part, np.array([[2**62], [-(2**63)], [5]]), PagedCache(4)).tolist() == [-1, -1, -1, -1, 20, 21]
    assert slot_mapping(part, np.array([[2**29], [2**31 - 1], [0]]), PagedCache(4)).tolist() == [-1, -1, -1, -1, 0, 1]
