"""Which implementation of an op runs: registration with torch's dispatcher, and a choice by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from .. import reference
from . import native
from .schemas import SCHEMAS

BACKENDS = ("cuda", "triton", "cpu", "reference")

# The files of an op, where they have not its name: ops that share their kernels are one family.
FAMILIES = {
    "merge_attn_states": "merge_states",
    "merge_n_attn_states": "merge_states",
    "cp_correct_out": "merge_states",
    "write_latent_cache": "latent_cache",
    "gather_latents": "latent_cache",
    "concat_k": "concat_k",
    "kv_up_project": "kv_up_project",
    "kv_up_project_wgmma": "kv_up_project",
    "attention_wgmma": "attention",
}

# Ops that have no kernel in C++ for the CPU, where torch's is as good, and on CUDA choose between Triton and the op named here.
COMPOSED = {"kv_up_project": "kv_up_project_wgmma", "attention": "attention_wgmma"}


def family(op: str) -> str:
    """The stem of the op's files in csrc/cpu, csrc/cuda and triton."""
    return FAMILIES.get(op) or FAMILIES.get(op.removesuffix("_out")) or op.removesuffix("_out")


def public_name(op: str) -> str:
    """What users call an op by, and its errors."""
    name = op if op in FAMILIES else op.removesuffix("_out")
    return name if name in FAMILIES else f"pcp_{name}"


# Whether "auto" means a native kernel on every device that this torch has.
ALL_NATIVE = not native.status["_native"] and not (torch.version.cuda and native.status["_native_cuda"])

HAS_TRITON = importlib.util.find_spec("triton") is not None
_library = torch.library.Library("pcp_mla", "FRAGMENT")


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_form(op: str) -> Callable[..., Any]:
    """The Triton implementation, imported when it is first called: importing Triton takes longer than all the rest."""

    @functools.cache
    def implementation() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"pcp_mla.triton.{family(op)}"), op)

    def call(*args: Any) -> Any:
        # Triton launches on the current device, whatever its arguments' device is.
        with torch.cuda.device_of(args[0][0] if isinstance(args[0], list | tuple) else args[0]):
            return implementation()(*args)

    return call


def direct() -> Any:
    """The calls past the dispatcher, None under a compiler.

    In eager inference the dispatcher costs more host time than the launch of a small kernel. Each function of the module returns
    False where it cannot do the work, or where gradients or a mode could want to see the op, and has done nothing then.
    """
    return None if torch.compiler.is_compiling() else native.direct


def availability(op: str) -> dict[str, str]:
    """Every backend of ``op`` with the reason why it cannot be used here; the empty string where it can."""
    gpu = "" if torch.cuda.is_available() else "no CUDA GPU is visible to torch"
    if not HAS_TRITON:
        triton = "triton is not installed: pip install triton"
    elif interpreted():
        triton = ""
    else:
        triton = gpu
    no_cpp = op in (*COMPOSED, *COMPOSED.values())
    return {
        "cuda": native.status["_native_cuda"] or gpu,
        "triton": triton,
        "cpu": "it has no C++ kernel, reference is what runs" if no_cpp else native.status["_native"],
        "reference": "",
    }


def fake_in_place(*args: Any) -> None:
    """The fake kernel of ops that write into given tensors: they return nothing."""
    if len({x.device for x in args if isinstance(x, torch.Tensor)}) > 1:
        raise RuntimeError("pcp_mla: all tensors must be on one device")


def register(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``op``, fill in kernels that csrc/ has not or that are not built, and return the op to call."""
    _library.define(op + SCHEMAS[op])
    if native.status["_native"]:
        _library.impl(op, getattr(reference, op), "CPU")
    if native.status["_native_cuda"]:
        _library.impl(op, triton_form(op) if HAS_TRITON else getattr(reference, op), "CUDA")
    torch.library.register_fake(f"pcp_mla::{op}", fake, lib=_library)
    return getattr(torch.ops.pcp_mla, op).default


def register_composed(
    op: str, fake: Callable[..., Any], *, cpu: Callable[..., Any], cuda: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an op of :data:`COMPOSED`, whose implementations are Python functions, and return the op to call."""
    for name in (op, COMPOSED[op]):
        _library.define(name + SCHEMAS[name])
        torch.library.register_fake(f"pcp_mla::{name}", fake, lib=_library)
    _library.impl(op, cpu, "CPU")
    _library.impl(op, cuda, "CUDA")
    return getattr(torch.ops.pcp_mla, op).default


def select(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The implementation of ``op`` that ``backend`` names, for tensors on such a device.

    Raises:
        ValueError: no such backend, or it does not run on this kind of device.
        RuntimeError: it is not available here; the message says why and what is.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{public_name(op)}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return _selected(op, backend, device_type)


@functools.cache
def _selected(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    if backend == "reference":
        return getattr(reference, op)
    name = public_name(op)
    reasons = availability(op)
    if reasons[backend]:
        usable = ", ".join(other for other, reason in reasons.items() if not reason)
        raise RuntimeError(f"{name}: backend {backend!r} is not available: {reasons[backend]}; available here: {usable}")
    on_any = backend == "triton" and interpreted()
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device_type != wanted and not on_any:
        raise ValueError(f"{name}: backend {backend!r} needs tensors on a {wanted} device, got {device_type}")
    return triton_form(op) if backend == "triton" else getattr(torch.ops.pcp_mla, COMPOSED.get(op, op)).default
