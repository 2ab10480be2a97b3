"""Loads the native libraries, which lie in the package's folder, and says why one did not load."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("_native", "_native_cuda")
PACKAGE = Path(__file__).resolve().parents[1]


def _load(name: str) -> str:
    path = PACKAGE / f"{name}.so"
    if not path.exists():
        return f"not built ({path.name} is not in {path.parent})"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # whatever it is, the package must still import
        return f"did not load: {error}"
    return ""


# Library name to the reason why it is missing; the empty string where it is loaded.
status = {
    "_native": _load("_native"),
    "_native_cuda": _load("_native_cuda") if torch.version.cuda else "this torch is a build without CUDA",
}


def _module(name: str) -> Any:
    """The module, or None with the reason in status."""
    try:
        module = importlib.import_module(f"pcp_mla.{name}")
    except ModuleNotFoundError as error:
        status[name] = f"not built ({error})"
    except Exception as error:  # as above
        status[name] = f"did not load: {error}"
    else:
        status[name] = ""
        return module
    return None


planner = _module("_planner")


def _exported(name: str) -> int:
    """Address of a table that the CUDA library exports to the modules."""
    find = getattr(ctypes.CDLL(str(PACKAGE / "_native_cuda.so")), name)
    find.restype = ctypes.c_void_p
    return find()


def plan_transport() -> int:
    """Address of what the native planner sends its plans to a GPU with (csrc/plan_transport.h)."""
    return _exported("pcp_mla_plan_transport")


def _load_direct() -> Any:
    """The module _direct, connected to the CUDA library; None where the dispatcher is the only way, with the reason in status."""
    if status["_native_cuda"]:
        status["_direct"] = "needs _native_cuda, which is missing"
        return None
    module = _module("_direct")
    try:
        if module is not None:
            module.connect(_exported("pcp_mla_direct_ops"), torch)
    except Exception as error:  # among others, torch may drop a name that it needs
        status["_direct"] = f"did not connect: {error}"
        return None
    return module


direct = _load_direct()
