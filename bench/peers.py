"""Other projects' ops to measure beside ours, where they are: an installed vLLM, or its op library by PCP_MLA_VLLM_OPS."""

from __future__ import annotations

import functools
import importlib
import os

import torch


@functools.cache
def has_vllm_ops() -> bool:
    """Whether ``torch.ops._C`` and ``torch.ops._C_cache_ops`` are vLLM's."""
    path = os.environ.get("PCP_MLA_VLLM_OPS")
    if path:
        torch.ops.load_library(path)
    else:
        try:
            importlib.import_module("vllm._custom_ops")
        except ImportError:
            return False
    return hasattr(torch.ops._C_cache_ops, "concat_and_cache_mla")
