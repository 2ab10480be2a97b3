"""Which backend of pcp_attention does a call: what each takes, on which GPUs, and what auto chooses."""

from dataclasses import replace

import pytest
import torch

from pcp_mla.ops.attention import libraries, support
from pcp_mla.ops.attention.libraries import of_function
from pcp_mla.ops.attention.support import SUPPORT

LIBRARY = of_function(lambda q, k, v: None)

# What each backend takes: the widths of q and of v.
TAKEN = {
    "fa3": [(8, 8), (64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (136, 104), (160, 128)],
    "fa4": [(8, 8), (64, 64), (128, 128), (192, 128)],
    "fa2": [(8, 8), (64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (136, 104), (160, 128), (128, 64), (192, 5)],
    "triton": [(5, 3), (264, 264), (576, 512), (64, 128), (192, 128)],
    "torch": [(5, 3), (264, 264), (576, 512), (64, 128), (577, 512), (576, 513), (1024, 1024)],
}
REFUSED = {
    "fa3": [(100, 100), (264, 264), (128, 104), (200, 128), (192, 136), (192, 96), (192, 100), (128, 64), (64, 128), (576, 512)],
    "fa4": [(100, 100), (136, 136), (192, 192), (256, 256), (192, 96), (160, 128), (128, 64), (64, 128), (200, 128), (576, 512)],
    "fa2": [(100, 100), (264, 264), (64, 128), (576, 512)],
    "triton": [(577, 512), (576, 513)],
    "torch": [],
}
HALVES, ALL = {torch.bfloat16, torch.float16}, {torch.bfloat16, torch.float16, torch.float32, torch.float64}
DTYPES = {"fa3": HALVES, "fa4": HALVES, "fa2": HALVES, "triton": ALL - {torch.float64}, "torch": ALL}


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
    listed = "" if name in ("triton", "torch") else "kv_rows"
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
    ("missing", "dtype", "widths", "listed", "wanted"),
    [
        ("", torch.bfloat16, (192, 128), False, "fa3"),
        ("", torch.float16, (192, 128), False, "fa3"),
        ("", torch.float32, (192, 128), False, "triton"),
        ("", torch.float64, (192, 128), False, "torch"),
        ("", torch.bfloat16, (192, 128), True, "triton"),
        ("", torch.bfloat16, (128, 128), False, "triton"),
        ("", torch.bfloat16, (192, 192), False, "triton"),
        ("", torch.bfloat16, (256, 256), False, "triton"),
        ("", torch.bfloat16, (160, 128), False, "triton"),
        ("", torch.bfloat16, (576, 512), False, "triton"),
        ("", torch.bfloat16, (577, 512), False, "torch"),
        ("fa3", torch.bfloat16, (192, 128), False, "triton"),
        ("triton", torch.bfloat16, (192, 128), False, "fa3"),
        ("triton", torch.bfloat16, (128, 128), False, "torch"),
        ("fa3 triton", torch.bfloat16, (192, 128), False, "torch"),
    ],
)
def test_what_auto_takes(missing, dtype, widths, listed, wanted, monkeypatch):
    monkeypatch.setattr(support, "find", lambda backend: LIBRARY)
    monkeypatch.setattr(support, "missing", lambda name, device: "gone" if name in missing.split() else "")
    assert support.choose("auto", torch.device("cuda", 0), dtype, *widths, listed) == wanted
    assert support.choose("auto", torch.device("cpu"), dtype, *widths, listed) == "torch"


def test_a_library_of_one_dtype_leaves_the_other_to_triton(monkeypatch):
    monkeypatch.setattr(support, "find", lambda backend: replace(LIBRARY, dtypes=(torch.bfloat16,)))
    monkeypatch.setattr(support, "missing", lambda name, device: "")
    chosen = [support.choose("auto", torch.device("cuda", 0), dtype, 192, 128, False) for dtype in (torch.bfloat16, torch.half)]
    assert chosen == ["fa3", "triton"]


GPUS = {"fa3": {9}, "fa4": {9, 10}, "fa2": {8, 9, 10, 12}, "triton": {8, 9, 10, 12}, "torch": set(range(7, 13))}


@pytest.mark.parametrize("major", range(7, 13))
def test_gpus_of_each_backend(major, monkeypatch):
    monkeypatch.setattr(support, "_capability", lambda device: major)
    monkeypatch.setattr(support, "find", lambda backend: LIBRARY)
    monkeypatch.setattr(support, "interpreted", lambda: False)
    monkeypatch.setattr(support, "HAS_TRITON", True)
    for name, majors in GPUS.items():
        reason = support.missing(name, torch.device("cuda", 0))
        assert reason == "" if major in majors else reason.endswith(f"this GPU is sm_{major}x")
