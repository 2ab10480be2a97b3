"""The few names of vLLM that the plug-in looks at, in modules of the same names on a temporary path: the fixture ``vllm``."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

MLA_ATTENTION = '''
from types import SimpleNamespace

import torch

CALLS = []
CONFIG = SimpleNamespace(
    parallel_config=SimpleNamespace(prefill_context_parallel_size=2, decode_context_parallel_size=1),
    attention_config=SimpleNamespace(use_prefill_query_quantization=False),
    scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=3),
    model_config=SimpleNamespace(dtype=torch.float32, max_model_len=50),
    lora_config=None,
    speculative_config=None,
    compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_attn_quant=False)),
)


def get_current_vllm_config():
    return CONFIG


def maybe_gather_mla_latent_cache_inputs(kv_c_normed, k_pe, slot_mapping, num_decode_tokens, use_pcp, SHARDED):
    """Vanilla gather."""
    CALLS.append("gather")
    return kv_c_normed, k_pe, slot_mapping


def build_mla_chunked_context_metadata(*, context_lens_cpu):
    CALLS.append("chunks")
    return "chunks"


class MLACommonBaseImpl:
    num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank, scale = 2, 8, 4, 8, 12, 0.3
    kv_cache_dtype, kv_b_proj = "auto", None

    def forward_mha(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale=None):
        CALLS.append("forward")

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        CALLS.append("write")


class Impl(MLACommonBaseImpl):
    pass


class MLAAttention:
    kv_cache_dtype, chunked_prefill_workspace_size = "auto", 100
    num_heads, qk_head_dim, v_head_dim = 2, 12, 8

    def __init__(self, layer_name="layer", impl=None):
        self.layer_name, self.impl = layer_name, impl or Impl()

    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, output_scale=None):
        CALLS.append("layer")


class MLACommonMetadataBuilder:
    use_pcp, page_size, chunked_prefill_workspace_size = True, 4, 1000

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        chunks = build_mla_chunked_context_metadata(context_lens_cpu=None)
        prefill = SimpleNamespace(chunked_context=chunks, block_table=common_attn_metadata.block_table)
        decodes = common_attn_metadata.num_decodes
        return SimpleNamespace(prefill=prefill, num_decodes=decodes, num_prefills=common_attn_metadata.num_reqs - decodes)
'''

PCP_MANAGER = """
class PCPManager:
    def __init__(self, *args):
        pass

    def partition_batch(self, input_batch, batch_desc=None):
        return input_batch

    def prepare_attn(self, input_batch):
        return "tables", "slots"

    def restore_hidden_states(self, hidden_states):
        return hidden_states
"""

PARALLEL_STATE = """
GROUP = None


def get_pcp_group():
    return GROUP
"""

ATTENTION_NAME = "vllm.model_executor.layers.attention.mla_attention"
MANAGER_NAME = "vllm.v1.worker.gpu.pcp_manager"


def write_vllm(folder: Path, attention: str = MLA_ATTENTION, manager: str = PCP_MANAGER, sharded: bool = True) -> None:
    parameter = "pcp_shard_decode_requests=False" if sharded else ""
    modules = {
        ATTENTION_NAME: attention.replace("SHARDED", parameter),
        MANAGER_NAME: manager,
        "vllm.distributed.parallel_state": PARALLEL_STATE,
    }
    for name, text in modules.items():
        *packages, module = name.split(".")
        here = folder
        for package in packages:
            here = here / package
            here.mkdir(exist_ok=True)
            (here / "__init__.py").touch()
        (here / f"{module}.py").write_text(text)


def modules() -> tuple[ModuleType, ModuleType]:
    """Imported, as vLLM imports them."""
    return importlib.import_module(ATTENTION_NAME), importlib.import_module(MANAGER_NAME)


@contextmanager
def played_vllm(folder: Path, monkeypatch: Any) -> Iterator[Callable[..., None]]:
    """The state of a process in which nothing has happened yet, undone at the end, and what writes a vLLM where Python finds it."""
    from pcp_mla.integrations.vllm import finder, parts
    from pcp_mla.integrations.vllm.state import State

    for name, value in (("enabled", set()), ("running", set()), ("refused", {}), ("layers", {}), ("counts", Counter())):
        monkeypatch.setattr(parts, name, value)
    for name, value in (
        ("communicator", None),
        ("exchange", None),
        ("by_peers", True),
        ("planner", None),
        ("batch", None),
        ("taking_rows", False),
        ("layers", []),
        ("max_tokens", 0),
        ("max_local_tokens", 0),
        ("heads", None),
        ("workspace_rows", 0),
        ("reserved", False),
        ("told", False),
    ):
        monkeypatch.setattr(State, name, value)
    monkeypatch.setattr(sys, "meta_path", [found for found in sys.meta_path if not isinstance(found, finder._Finder)])
    monkeypatch.delenv(parts.VARIABLE, raising=False)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}

    def write(**options: Any) -> None:
        write_vllm(folder, **options)
        monkeypatch.syspath_prepend(folder)

    try:
        yield write
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(real)
