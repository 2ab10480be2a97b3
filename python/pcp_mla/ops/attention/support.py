"""The backends of pcp_attention: what each can do, and which one does a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...checks import dtype_name
from .. import native
from ..registry import HAS_TRITON, interpreted
from .libraries import BF16_FP16, LIBRARIES, Library, apart, find

FLOATS = (*BF16_FP16, torch.float32)


class Support(NamedTuple):
    """What a backend can do. All give LSEs, and merge ``prev``: those that have no kernel for it in a launch of its own.

    Attributes:
        dtypes: of q, K and V.
        widths: whether it takes q and K, and V, of these widths; ``words`` says which.
        kv_rows: whether keys may be listed.
        k_pe: whether K may come in two parts; else they are concatenated first, in a launch of its own.
        capabilities: major compute capabilities of the GPUs that it runs on; None: any device.
    """

    dtypes: tuple[torch.dtype, ...]
    widths: Callable[[int, int], bool]
    words: str
    kv_rows: bool
    k_pe: bool
    capabilities: tuple[int, ...] | None


SUPPORT = {
    "cuda": Support(
        BF16_FP16,
        lambda d, dv: d % 8 == 0 and (-(-d // 64), dv) in ((2, 64), (2, 128), (3, 128), (4, 256)),
        "q over 64 and up to 128 with v 64, up to 192 with v 128; q over 192 and up to 256 with v 256",
        kv_rows=True,
        k_pe=True,
        capabilities=(9,),
    ),
    "fa3": Support(
        BF16_FP16,
        lambda d, dv: d % 8 == 0 and dv % 8 == 0 and (d == dv <= 256 or (128 < d <= 192 and 96 < dv <= 128)),
        "equal ones up to 256, or q up to 192 and v up to 128",
        kv_rows=False,
        k_pe=False,
        capabilities=(9,),
    ),
    "fa4": Support(
        BF16_FP16,
        lambda d, dv: (d == dv <= 128 and d % 8 == 0) or (d, dv) == (192, 128),
        "equal ones up to 128, or q 192 and v 128",
        kv_rows=False,
        k_pe=False,
        capabilities=(9, 10),
    ),
    "fa2": Support(
        BF16_FP16,
        lambda d, dv: dv <= d <= 256 and d % 8 == 0,
        "q up to 256, v padded to it",
        kv_rows=False,
        k_pe=False,
        capabilities=(8, 9, 10, 12),
    ),
    "triton": Support(
        FLOATS,
        lambda d, dv: d <= 576 and dv <= 512,
        "q up to 576, v up to 512",
        kv_rows=True,
        k_pe=True,
        capabilities=(8, 9, 10, 12),
    ),
    "torch": Support((*FLOATS, torch.float64), lambda d, dv: True, "any", kv_rows=True, k_pe=True, capabilities=None),
}


# As measured (docs/attention.md): the first that takes a call. The library is ahead by more than 1.5 % where a row has so many
# queries and there is much to do: by widths of q and V, the queries of the longest row times heads. Twice as much of both where K
# must first be put together for it.
_FASTEST = ("cuda", "triton")
_LIBRARY, _LIBRARY_QUERIES = "fa3", 2048
_LIBRARY_WORK = {(192, 128): 65536, (256, 256): 65536, (128, 128): 49152}


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def missing(name: str, device: torch.device) -> str:
    """Why the backend cannot be used on this device; the empty string where it can."""
    support = SUPPORT[name]
    if name == "triton" and not HAS_TRITON:
        return "triton is not installed: pip install triton"
    if support.capabilities is not None and not (name == "triton" and interpreted()):
        if device.type != "cuda":
            return f"it needs tensors on a CUDA device, got {device}"
        if _capability(device) not in support.capabilities:
            wanted = ", ".join(f"sm_{major}x" for major in support.capabilities)
            return f"it is for {wanted}, this GPU is sm_{_capability(device)}x"
    if name == "cuda":
        return native.status["_native_cuda"]
    found = find(name) if name in LIBRARIES else ""
    return found if isinstance(found, str) else ""


def availability() -> dict[str, str]:
    """Every backend with the reason why it cannot be used here; the empty string where it can."""
    if not torch.cuda.is_available():
        none = {name: "no CUDA GPU is visible to torch" for name, support in SUPPORT.items() if support.capabilities is not None}
        return none | {"torch": ""} | ({"triton": ""} if HAS_TRITON and interpreted() else {})
    return {name: missing(name, torch.device("cuda", torch.cuda.current_device())) for name in SUPPORT}


def refusal(name: str, dtype: torch.dtype, width: int, v_width: int, listed: bool) -> str:
    """What the backend does not support of this; the empty string if it does it all."""
    support = SUPPORT[name]
    found = find(name) if name in LIBRARIES else ""
    dtypes = found.dtypes if isinstance(found, Library) else support.dtypes
    if dtype not in dtypes:
        return f"dtype {dtype_name(dtype)}"
    if not support.widths(width, v_width):
        return f"widths {width} of q and {v_width} of v (it takes {support.words})"
    return "kv_rows" if listed and not support.kv_rows else ""


def out_of_reach(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    out: torch.Tensor | None,
    prev_out: torch.Tensor | None,
) -> str:
    """What tensor copies and 16-byte accesses of ``cuda`` do not reach among these; the empty string if they reach all. As
    csrc/cuda/attention.cu has it."""
    if k_pe is not None and (k.shape[2] % 64 != 0 or k_pe.shape[1] > 64 or k_pe.shape[1] % 8 != 0):
        return f"widths {k.shape[2]} of k and {k_pe.shape[1]} of k_pe (k's must be a multiple of 64, k_pe's of 8 and at most 64)"
    if k_pe is not None and (k_pe.data_ptr() | k_pe.stride(0) * k_pe.element_size()) % 16 != 0:
        return f"a k_pe whose rows are not at multiples of 16 bytes (strides {k_pe.stride()})"
    if k_pe is not None and k_pe.shape[0] > 1 and k_pe.stride(0) == 0:
        return "a k_pe that is expanded"
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("prev", prev_out)):
        if x is not None and apart(x):
            return f"a tensor {name} whose rows and heads are not at multiples of 16 bytes (strides {x.stride()})"
        if x is not None and any(x.shape[i] > 1 and x.stride(i) == 0 for i in range(2)):
            return f"a tensor {name} that is expanded"
    return ""


def wants_apart(name: str, nope: int, rope: int) -> bool:
    """Whether K is to be left in two parts for a backend that was chosen: it takes these, and nobody writes to every head what all
    of them share. Triton pads each part to a power of two: others than it would make of K in one piece may need more shared memory
    than a GPU has. ``auto``, under a compiler, may be either of the two."""
    if name == "triton":
        return nope & (nope - 1) == 0 and 0 < rope <= nope
    return name in ("auto", "cuda") and nope % 64 == 0 and 0 < rope <= 64 and rope % 8 == 0


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    v_width: int,
    listed: bool,
    longest: int = 0,
    heads: int = 1,
    apart: bool = False,
) -> str:
    """The backend that does this: the named one, or with ``auto`` the fastest that there is. ``longest``: most queries of a row;
    ``apart``: K is there already, in two parts. Under a compiler, where looking for libraries is nothing to compile, ``auto``: on a
    GPU the op that chooses among our own kernels when it runs.

    Raises:
        ValueError: no such backend.
        NotImplementedError: it does not support this; the message names those that do.
        RuntimeError: it is not available here; the message says why and what is.
    """
    if torch.compiler.is_compiling():
        if backend != "auto" and device.type == "cuda":
            raise NotImplementedError(f"pcp_attention: backend must be auto under torch.compile on a GPU, got {backend!r}")
        return "auto"
    if backend == "auto":
        if device.type != "cuda":
            return "torch"
        queries = longest // 2 if apart else longest
        work = _LIBRARY_WORK.get((width, v_width))
        ahead = work is not None and not listed and queries >= _LIBRARY_QUERIES and queries * heads >= work
        for name in (_LIBRARY, *_FASTEST) if ahead else _FASTEST:
            if not missing(name, device) and not refusal(name, dtype, width, v_width, listed):
                return name
        return "torch"
    if backend not in SUPPORT:
        raise ValueError(f"pcp_attention: backend must be one of auto, {', '.join(SUPPORT)}, got {backend!r}")
    refused = refusal(backend, dtype, width, v_width, listed)
    if refused:
        able = ", ".join(name for name in SUPPORT if not refusal(name, dtype, width, v_width, listed))
        raise NotImplementedError(f"pcp_attention: backend {backend!r} does not support {refused}; these do: {able}")
    reason = missing(backend, device)
    if reason:
        usable = ", ".join(name for name in SUPPORT if not missing(name, device))
        raise RuntimeError(f"pcp_attention: backend {backend!r} is not available: {reason}; available here: {usable}")
    return backend
