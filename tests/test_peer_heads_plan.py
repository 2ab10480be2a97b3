"""What each rank stores where, and when a call waits before it does (csrc/exchange_heads.h; why: docs/peers.md), without a GPU."""

import ctypes

import numpy as np
import pytest

from host_library import host_library
from pcp_mla import heads_of

SOURCE = """
#include "exchange_heads.h"

using namespace pcp_mla;

extern "C" Mailbox* make() { return new Mailbox{}; }
extern "C" void end(Mailbox* box) { delete box; }
extern "C" bool waits(Mailbox* box, int64_t offset, int64_t step, uint64_t capture) {
  return must_wait(*box, {View{}, 0, 0, 0, step, 1, 1, offset, false}, capture);
}
// `numbers`: item, row and head stride, padded, heads, width, offset; `found`: the block, and the end of all.
extern "C" void block(const int64_t* numbers, int64_t world, int64_t rank, int64_t other, bool back, int64_t* found) {
  View x{};
  x.item = static_cast<int32_t>(numbers[0]);
  x.strides[0] = numbers[1];
  x.strides[1] = numbers[2];
  const HeadsCall call{x, 0, 0, numbers[3], 0, numbers[4], numbers[5], numbers[6], back};
  const HeadBlock b = block_for(call, world, rank, other);
  found[0] = b.from, found[1] = b.to, found[2] = b.to_row, found[3] = b.heads, found[4] = heads_end(call, world);
}
"""
Numbers = ctypes.c_int64 * 7
Found = ctypes.c_int64 * 5


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("heads"), SOURCE)
    library.make.restype = ctypes.c_void_p
    library.end.argtypes, library.end.restype = (ctypes.c_void_p,), None
    library.waits.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64)
    library.waits.restype = ctypes.c_bool
    library.block.argtypes = (Numbers, *[ctypes.c_int64] * 3, ctypes.c_bool, Found)
    library.block.restype = None
    return library


class Played:
    """Every rank's buffer, and the copies that the kernel makes of blocks: bytes, of which each may be written once."""

    def __init__(self, library, world, padded, num_heads, width, offset, back):
        self.block, self.world, self.back = library.block, world, back
        self.padded, self.num_heads, self.width, self.offset = padded, num_heads, width, offset
        heads = num_heads if back else world * -(-num_heads // world)
        self.end = offset + padded * heads * width
        self.buffers = np.full((world, self.end), 255, np.uint8)
        self.writes = np.zeros((world, self.end), int)

    def store(self, rank, x):
        for other in range(self.world):
            found = Found()
            numbers = Numbers(1, *x.strides[:2], self.padded, self.num_heads, self.width, self.offset)
            self.block(numbers, self.world, rank, other, self.back, found)
            from_, to, to_row, heads, end = found
            assert end == self.end
            base, row_bytes = x.ctypes.data + from_, heads * self.width
            for row in range(self.padded):
                for head in range(heads):
                    at = base + row * x.strides[0] + head * x.strides[1]
                    to_at = to + row * to_row + head * self.width
                    self.buffers[other, to_at : to_at + self.width] = np.frombuffer(ctypes.string_at(at, self.width), np.uint8)
                span = slice(to + row * to_row, to + row * to_row + row_bytes)
                self.writes[other, span] += 1


def rows_of(rng, rows, heads, width, form):
    """[rows, heads, width] of random bytes: gapless, with gaps, or heads outermost."""
    if form == "gapless":
        return rng.integers(0, 255, (rows, heads, width), np.uint8)
    if form == "gaps":
        return rng.integers(0, 255, (rows, heads + 1, width + 3), np.uint8)[:, 1:, 2:-1]
    return rng.integers(0, 255, (heads, rows, width), np.uint8).transpose(1, 0, 2)


@pytest.mark.parametrize("form", ["gapless", "gaps", "outermost"])
@pytest.mark.parametrize("num_heads", [5, 16, 20])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8, 16])
def test_every_row_and_head_is_stored_once_at_its_place(world, num_heads, form, library):
    if num_heads < world:
        pytest.skip("fewer heads than ranks")
    rng, padded, width, offset = np.random.default_rng(world), 7, 6, 32
    bounds = [heads_of(num_heads, world, rank) for rank in range(world)]
    queries = [rows_of(rng, padded, num_heads, width, form) for _ in range(world)]
    there = Played(library, world, padded, num_heads, width, 0, False)
    for rank, x in enumerate(queries):
        there.store(rank, x)
    for (first, last), buffer, writes in zip(bounds, there.buffers, there.writes, strict=True):
        wanted = np.concatenate([x[:, first:last] for x in queries]).reshape(-1)
        assert np.array_equal(buffer[: len(wanted)], wanted)
        assert (writes[: len(wanted)] == 1).all()
        assert not writes[len(wanted) :].any()
    outs = [rows_of(rng, world * padded, last - first, width, form) for first, last in bounds]
    back = Played(library, world, padded, num_heads, width, offset, True)
    for rank, x in enumerate(outs):
        back.store(rank, x)
    for rank, (buffer, writes) in enumerate(zip(back.buffers, back.writes, strict=True)):
        wanted = np.concatenate([x[rank * padded :][:padded] for x in outs], axis=1).reshape(-1)
        assert np.array_equal(buffer[offset:], wanted)
        assert (writes[offset:] == 1).all()
        assert not writes[:offset].any()


QUERIES, OUTPUTS = 0, 4096  # where the two parts of a buffer begin


@pytest.fixture
def waits_of(library):
    """Whether each of these calls waits, of an exchange that was just made."""

    def waits_of(*calls):
        box = library.make()
        waits = [library.waits(box, *call) for call in calls]
        library.end(box)
        return waits

    return waits_of


def call(where, step=1, capture=0):
    return where, step, capture


def test_layers_wait_once_a_step(waits_of):
    steps = (1, 2, 3)
    assert waits_of(*(call(where, step) for step in steps for where in 3 * (QUERIES, OUTPUTS))) == [True, *[False] * 5] * 3


def test_what_was_just_written_to_is_waited_for(waits_of):
    assert waits_of(call(QUERIES), call(QUERIES), call(OUTPUTS), call(OUTPUTS), call(QUERIES)) == [True, True, False, True, False]


def test_a_graph_has_its_own_wait_and_so_has_what_comes_behind_it(waits_of):
    layers = [call(where, 1, 7) for where in 2 * (QUERIES, OUTPUTS)]
    assert waits_of(call(QUERIES), call(OUTPUTS), *layers, call(QUERIES), call(OUTPUTS)) == [
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert waits_of(call(QUERIES, 1, 7), call(OUTPUTS, 1, 8), call(QUERIES, 1, 8)) == [True, True, False]  # a graph in pieces
