"""Which backend of pcp_attention does a call: what each takes, on which GPUs, and what auto chooses."""

import re
from dataclasses import replace

import pytest
import torch

from pcp_mla.ops.attention import libraries, support
from pcp_mla.ops.attention.libraries import of_function
from pcp_mla.ops.attention.support import SUPPORT

LIBRARY = of_function(lambda q, k, v: None)

# What each backend takes: the widths of q and of v.
TAKEN = {
    "cuda": [(72, 64), (128, 64), (72, 128), (128, 128), (136, 128), (192, 128), (200, 256), (256, 256)],
    "fa3": [(8, 8), (64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (136, 104), (160, 128)],
    "fa4": [(8, 8), (64, 64), (128, 128), (192, 128)],
    "fa2": [(8, 8), (64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (136, 104), (160, 128), (128, 64), (192, 5)],
    "triton": [(5, 3), (264, 264), (576, 512), (64, 128), (192, 128)],
    "torch": [(5, 3), (264, 264), (576, 512), (64, 128), (577, 512), (576, 513), (1024, 1024)],
}
REFUSED = {
    "cuda": [(64, 64), (64, 128), (128, 96), (192, 192), (192, 64), (190, 128), (192, 256), (256, 128), (264, 256), (576, 512)],
    "fa3": [(100, 100), (264, 264), (128, 104), (200, 128), (192, 136), (192, 96), (192, 100), (128, 64), (64, 128), (576, 512)],
    "fa4": [(100, 100), (136, 136), (192, 192), (256, 256), (192, 96), (160, 128), (128, 64), (64, 128), (200, 128), (576, 512)],
    "fa2": [(100, 100), (264, 264), (64, 128), (576, 512)],
    "triton": [(577, 512), (576, 513)],
    "torch": [],
}
HALVES, ALL = {torch.bfloat16, torch.float16}, {torch.bfloat16, torch.float16, torch.float32, torch.float64}
DTYPES = {"cuda": HALVES, "fa3": HALVES, "fa4": HALVES, "fa2": HALVES, "triton": ALL - {torch.float64}, "torch": ALL}


@pytest.mark.parametrize("name", SUPPORT)
def test_what_a_backend_takes(name, monkeypatch):
    monkeypatch.setattr(support, "find", lambda backend: "no library")
    monkeypatch.setattr(support, "missing", lambda backend, device: "")
    for widths in TAKEN[name]:
        assert support.refusal(name, torch.bfloat16, *widths, False) == ""
    for width, v_width in REFUSED[name]:
        words = f"widths {width} of q and {v_width} of v (it takes {SUPPORT[name].words})"
        assert support.refusal(name, torch.bfloat16, width, v_width, False) == words
        with pytest.raises(NotImplementedError, match=f"widths {width} of q and {v_width} of v"):
            support.choose(name, torch.device("cuda", 0), torch.bfloat16, width, v_width, False)
    for dtype in [*ALL, torch.int32, torch.float8_e4m3fn]:
        wanted = "" if dtype in DTYPES[name] else f"dtype {str(dtype).removeprefix('torch.')}"
        assert support.refusal(name, dtype, *TAKEN[name][-1], False) == wanted
    listed = "" if name in ("cuda", "triton", "torch") else "kv_rows"
    assert support.refusal(name, torch.bfloat16, *TAKEN[name][-1], True) == listed


def test_a_library_that_is_built_for_one_dtype(monkeypatch):
    """fa3-fwd is; the others of FlashAttention 3 are for both."""
    for namespace in libraries._FA3:
        here = {namespace: LIBRARY}
        monkeypatch.setattr(libraries, "_op", lambda name, op, *modules, here=here: here.get(name, "none"))
        found = libraries.LIBRARIES["fa3"]()
        assert set(found.dtypes) == ({torch.bfloat16} if namespace == "fa3_fwd" else HALVES)
        monkeypatch.setattr(support, "find", lambda backend, found=found: found)
        wanted = "dtype float16" if namespace == "fa3_fwd" else ""
        assert support.refusal("fa3", torch.float16, 192, 128, False) == wanted


@pytest.mark.parametrize(
    ("missing", "dtype", "widths", "listed", "longest", "heads", "apart", "wanted"),
    [
        ("", torch.bfloat16, (192, 128), False, 0, 16, False, "cuda"),
        ("", torch.float16, (192, 128), False, 4095, 16, False, "cuda"),
        ("", torch.bfloat16, (192, 128), False, 4096, 16, False, "fa3"),
        ("", torch.bfloat16, (192, 128), False, 8191, 16, True, "cuda"),
        ("", torch.bfloat16, (192, 128), False, 8192, 16, True, "fa3"),
        ("", torch.bfloat16, (192, 128), False, 2048, 32, False, "fa3"),
        ("", torch.bfloat16, (192, 128), False, 2047, 128, False, "cuda"),
        ("", torch.bfloat16, (192, 128), False, 4096, 15, False, "cuda"),
        ("", torch.bfloat16, (192, 128), True, 8192, 16, False, "cuda"),
        ("fa3", torch.bfloat16, (192, 128), False, 8192, 16, False, "cuda"),
        ("cuda", torch.bfloat16, (192, 128), False, 8192, 16, False, "fa3"),
        ("cuda", torch.bfloat16, (192, 128), False, 4095, 16, False, "triton"),
        ("", torch.float32, (192, 128), False, 8192, 16, False, "triton"),
        ("", torch.float64, (192, 128), False, 8192, 16, False, "torch"),
        ("", torch.bfloat16, (128, 64), False, 8192, 16, False, "cuda"),
        ("", torch.bfloat16, (128, 128), False, 3072, 16, False, "fa3"),
        ("", torch.bfloat16, (128, 128), False, 3071, 16, False, "cuda"),
        ("", torch.bfloat16, (192, 192), False, 8192, 16, False, "triton"),
        ("", torch.bfloat16, (256, 256), False, 4095, 16, False, "cuda"),
        ("", torch.bfloat16, (256, 256), False, 4096, 16, False, "fa3"),
        ("", torch.bfloat16, (256, 256), True, 8192, 16, False, "cuda"),
        ("", torch.bfloat16, (64, 64), False, 0, 16, False, "triton"),
        ("", torch.bfloat16, (576, 512), False, 0, 16, False, "triton"),
        ("", torch.bfloat16, (577, 512), False, 0, 16, False, "torch"),
        ("cuda triton", torch.bfloat16, (128, 128), False, 0, 16, False, "torch"),
    ],
)
def test_what_auto_takes(missing, dtype, widths, listed, longest, heads, apart, wanted, monkeypatch):
    monkeypatch.setattr(support, "find", lambda backend: LIBRARY)
    monkeypatch.setattr(support, "missing", lambda name, device: "gone" if name in missing.split() else "")
    assert support.choose("auto", torch.device("cuda", 0), dtype, *widths, listed, longest, heads, apart) == wanted
    assert support.choose("auto", torch.device("cpu"), dtype, *widths, listed, longest, heads, apart) == "torch"


def test_a_library_of_one_dtype_leaves_the_other_to_our_own(monkeypatch):
    monkeypatch.setattr(support, "find", lambda backend: replace(LIBRARY, dtypes=(torch.bfloat16,)))
    monkeypatch.setattr(support, "missing", lambda name, device: "")
    gpu = torch.device("cuda", 0)
    chosen = [support.choose("auto", gpu, dtype, 192, 128, False, 8192, 16) for dtype in (torch.bfloat16, torch.half)]
    assert chosen == ["fa3", "cuda"]


@pytest.mark.parametrize(
    ("name", "nope", "rope", "wanted"),
    [
        ("cuda", 128, 64, True),
        ("cuda", 192, 64, True),
        ("cuda", 64, 32, True),
        ("cuda", 96, 32, False),  # the rest of K would not begin at a slab
        ("cuda", 128, 72, False),
        ("cuda", 64, 12, False),
        ("cuda", 256, 0, False),
        ("triton", 128, 64, True),
        ("triton", 16, 12, True),
        ("triton", 160, 32, False),  # 256 and 32 columns, where K in one piece has 128 and 64
        ("triton", 16, 24, False),
        ("triton", 64, 0, False),
        ("auto", 128, 64, True),
        ("auto", 192, 64, True),
        ("auto", 96, 32, False),
        ("fa3", 128, 64, False),
        ("torch", 128, 64, False),
    ],
)
def test_who_has_k_in_two_parts(name, nope, rope, wanted):
    assert support.wants_apart(name, nope, rope) is wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"k": (5, 2, 96), "k_pe": (5, 96)}, "widths 96 of k and 96 of k_pe"),
        ({"k_pe": (5, 12)}, "widths 128 of k and 12 of k_pe"),
        ({"k_pe": ((5, 64), (68, 1))}, r"a k_pe whose rows are not at multiples of 16 bytes \(strides \(68, 1\)\)"),
        ({"q": ((3, 2, 192), (388, 192, 1))}, r"a tensor q whose rows and heads .* \(strides \(388, 192, 1\)\)"),
        ({"v": ((5, 2, 128), (260, 128, 1))}, "a tensor v whose rows"),
        ({"k": ((5, 2, 128), (128, 0, 1))}, "a tensor k that is expanded"),
        ({"k_pe": ((5, 64), (0, 1))}, "a k_pe that is expanded"),
        ({"k": ((1, 1, 128), (0, 0, 1)), "k_pe": ((1, 64), (0, 1))}, ""),  # of one row and one head nothing is
        ({"out": ((3, 2, 128), (260, 128, 1))}, "a tensor out whose rows"),
        ({"prev_out": ((3, 2, 128), (260, 128, 1))}, "a tensor prev whose rows"),
    ],
)
def test_what_tensor_copies_reach(change, words):
    shapes = {"q": (3, 2, 192), "k": (5, 2, 128), "v": (5, 2, 128), "k_pe": (5, 64), "out": (3, 2, 128), "prev_out": (3, 2, 128)}
    tensors = {}
    for name, form in (shapes | change).items():
        size, strides = form if isinstance(form[0], tuple) else (form, None)
        room = torch.zeros(4000, dtype=torch.bfloat16)
        tensors[name] = room[: torch.Size(size).numel()].view(size) if strides is None else room.as_strided(size, strides)
    assert re.match(words or "$", support.out_of_reach(**tensors))


GPUS = {"cuda": {9}, "fa3": {9}, "fa4": {9, 10}, "fa2": {8, 9, 10, 12}, "triton": {8, 9, 10, 12}, "torch": set(range(7, 13))}


@pytest.mark.parametrize("major", range(7, 13))
def test_gpus_of_each_backend(major, monkeypatch):
    monkeypatch.setattr(support, "_capability", lambda device: major)
    monkeypatch.setattr(support, "find", lambda backend: LIBRARY)
    monkeypatch.setattr(support, "interpreted", lambda: False)
    monkeypatch.setattr(support, "HAS_TRITON", True)
    monkeypatch.setitem(support.native.status, "_native_cuda", "")
    for name, majors in GPUS.items():
        reason = support.missing(name, torch.device("cuda", 0))
        assert reason == "" if major in majors else reason.endswith(f"this GPU is sm_{major}x")
