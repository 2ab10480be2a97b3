"""Prefill context parallelism for MLA models: fused kernels behind a thin layer. See the README for use."""

from .attention import pcp_attention
from .cp_merge import cp_lse_a2a, cp_lse_ag_out_ar, cp_lse_ag_out_rs, flat_cp_group
from .latent_cache import gather_latents, write_latent_cache
from .latent_exchange import LatentExchange
from .merge import RowOp, cp_correct_out, merge_attn_states, merge_n_attn_states
from .metadata import PCPMetadata
from .ops import GatheredRows, pcp_fused_gather, pcp_fused_restore
from .partition import Partition, partition
from .pipeline import MLADims, MLAPrefill
from .planner import PCPPlanner
from .up_project import concat_k, kv_up_project

__version__ = "0.1.0"

__all__ = [
    "GatheredRows",
    "LatentExchange",
    "MLADims",
    "MLAPrefill",
    "PCPMetadata",
    "PCPPlanner",
    "Partition",
    "RowOp",
    "concat_k",
    "cp_correct_out",
    "cp_lse_a2a",
    "cp_lse_ag_out_ar",
    "cp_lse_ag_out_rs",
    "flat_cp_group",
    "gather_latents",
    "kv_up_project",
    "merge_attn_states",
    "merge_n_attn_states",
    "partition",
    "pcp_attention",
    "pcp_fused_gather",
    "pcp_fused_restore",
    "write_latent_cache",
]
