"""Other projects' ops to measure beside ours, where they are: installed, or libraries that PCP_MLA_VLLM_OPS and PCP_MLA_FA3
name."""

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


@functools.cache
def load_fa3() -> None:
    """Define FlashAttention 3's op by the library that PCP_MLA_FA3 names, such as the fa3-fwd wheel's, on a machine with a GPU."""
    if torch.cuda.is_available() and "PCP_MLA_FA3" in os.environ:
        torch.ops.load_library(os.environ["PCP_MLA_FA3"])
