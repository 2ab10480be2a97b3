"""When a call of the exchange by peers waits before it stores (csrc/publish_latents.h; why: docs/peers.md), without a GPU."""

import ctypes

import pytest

from host_library import host_library

SOURCE = """
#include "publish_latents.h"

using pcp_mla::Mailbox;

extern "C" Mailbox* make() { return new Mailbox{}; }
extern "C" void end(Mailbox* box) { delete box; }
extern "C" bool waits(Mailbox* box, const char* written, bool alone, int64_t step, uint64_t capture) {
  const pcp_mla::View none{};
  return must_wait(*box, written, {none, none, nullptr, nullptr, nullptr, 0, 0, 0, 0, step, alone}, capture);
}
"""
A, B, C = 0x1000, 0x2000, 0x3000  # where caches begin


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp("order"), SOURCE)
    library.make.restype = ctypes.c_void_p
    library.end.argtypes, library.end.restype = (ctypes.c_void_p,), None
    library.waits.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool, ctypes.c_int64, ctypes.c_uint64)
    library.waits.restype = ctypes.c_bool
    return library


@pytest.fixture
def waits_of(library):
    """Whether each of these calls waits, of an exchange that was just made."""

    def waits_of(*calls):
        box = library.make()
        waits = [library.waits(box, *call) for call in calls]
        library.end(box)
        return waits

    return waits_of


def call(cache, step=1, capture=0, alone=False):
    return cache, alone, step, capture


@pytest.mark.parametrize(
    ("alone", "other_step", "other_capture", "written", "waits", "behind_it"),
    [
        (False, False, False, False, False, (True, True, False)),
        (False, False, False, True, True, (True, False, False)),
        (False, False, True, False, True, (True, False, False)),
        (False, False, True, True, True, (True, False, False)),
        (False, True, False, False, True, (True, False, False)),
        (False, True, False, True, True, (True, False, False)),
        (False, True, True, False, True, (True, False, False)),
        (False, True, True, True, True, (True, False, False)),
        # Of rows that every rank has nothing is sent. They are written, though, and say nothing of which step the others are in.
        (True, False, False, False, False, (True, True, False)),
        (True, False, False, True, False, (True, True, False)),
        (True, False, True, False, False, (True, True, True)),
        (True, False, True, True, False, (True, True, True)),
        (True, True, False, False, False, (True, True, True)),
        (True, True, False, True, False, (True, True, True)),
        (True, True, True, False, False, (True, True, True)),
        (True, True, True, True, False, (True, True, True)),
    ],
)
def test_table(alone, other_step, other_capture, written, waits, behind_it, waits_of):
    """A call that stores to A, behind one that waited and stored to B, and where A was written to since, one that did that.
    ``behind_it``: whether the call behind it, of the same step and capture, waits before it stores to A, B, and C, which is new."""
    before = [call(B), call(A)] if written else [call(B)]
    assert waits_of(*before) == [True, False][: len(before)]
    now = {"step": 1 + other_step, "capture": 7 * other_capture}
    here = call(A, alone=alone, **now)
    for cache, wanted in zip((A, B, C), behind_it, strict=True):
        assert waits_of(*before, here, call(cache, **now))[len(before) :] == [waits, wanted]


def test_models(waits_of):
    steps = (1, 2, 3)
    assert waits_of(*(call(cache, step) for step in steps for cache in (A, B, C))) == [True, False, False] * 3
    assert waits_of(*(call(A, step) for step in steps for _ in range(2))) == [True] * 6  # one layer, called twice a step
    assert waits_of(call(A), call(B), call(A), call(B)) == [True, False, True, False]  # a draft over the caches of the model
    # Decodes that all ranks have, also where a rank makes them in another order.
    decodes = [call(cache, 2, alone=True) for cache in (A, B)]
    assert waits_of(call(A), call(B), *decodes, call(A, 3), call(B, 3)) == [True, False, False, False, True, False]
    assert waits_of(call(A), *decodes, call(B), call(C)) == [True, False, False, True, False]
    # A graph has its own wait, whatever step it is captured in, and what comes behind it, too.
    graph = [call(cache, 1, 5) for cache in (A, B)]
    assert waits_of(call(A), call(B), *graph, call(B), call(A)) == [True, False, True, False, True, False]
