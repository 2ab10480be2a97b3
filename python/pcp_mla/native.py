"""Loads the native libraries beside this file, and says why one did not load."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("_native", "_native_cuda")


def _load(name: str, prerequisite: str) -> str:
    if prerequisite:
        return prerequisite
    path = Path(__file__).with_name(f"{name}.so")
    if not path.exists():
        return f"not built ({path.name} is not in {path.parent})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"did not load: {error}"
    return ""


# Library name to the reason why it is missing; the empty string where it is loaded.
status = {"_native": _load("_native", "")}
status["_native_cuda"] = _load(
    "_native_cuda",
    "needs _native, which is missing" if status["_native"] else "" if torch.version.cuda else "this torch is a build without CUDA",
)

planner: Any = None  # the module _planner, where it is built
try:
    planner = importlib.import_module("pcp_mla._planner")
    status["_planner"] = ""
except ImportError as error:
    status["_planner"] = f"not built ({error})"


def _exported(name: str) -> int:
    """Address of a table that the CUDA library exports to the modules."""
    find = getattr(ctypes.CDLL(str(Path(__file__).with_name("_native_cuda.so"))), name)
    find.restype = ctypes.c_void_p
    return find()


def plan_transport() -> int:
    """Address of what the native planner sends its plans to a GPU with (csrc/plan_transport.h)."""
    return _exported("pcp_mla_plan_transport")


def _load_direct() -> Any:
    """The module _direct, connected to the CUDA library; None where the dispatcher is the only way."""
    if status["_native_cuda"] or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    try:
        module = importlib.import_module("pcp_mla._direct")
        module.connect(_exported("pcp_mla_direct_ops"), torch)
    except (ImportError, RuntimeError):
        return None
    return module


direct: Any = _load_direct()
