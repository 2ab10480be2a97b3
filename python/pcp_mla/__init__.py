"""Prefill context parallelism for MLA models: fused kernels behind a thin layer. See the README for use."""

from .exchange.cp_merge import cp_lse_a2a, cp_lse_ag_out_ar, cp_lse_ag_out_rs, flat_cp_group
from .exchange.heads import HeadExchange, heads_of
from .exchange.latents import LatentExchange
from .exchange.peer_heads import PeerHeadExchange
from .exchange.peers import PeerExchange
from .exchange.sharded import ShardedExchange
from .layer.prefill import MLAPrefill
from .ops.attention.call import pcp_attention
from .ops.concat_k import concat_k
from .ops.fused_gather import GatheredRows, pcp_fused_gather
from .ops.fused_restore import pcp_fused_restore
from .ops.kv_up_project import kv_up_project
from .ops.latent_cache import gather_latents, write_latent_cache
from .ops.merge_states import RowOp, cp_correct_out, merge_attn_states, merge_n_attn_states
from .plan.dims import MLADims
from .plan.metadata import PCPMetadata
from .plan.partition import Partition, partition
from .planner.planner import PCPPlanner

__version__ = "0.1.0"

__all__ = [
    "GatheredRows",
    "HeadExchange",
    "LatentExchange",
    "MLADims",
    "MLAPrefill",
    "PCPMetadata",
    "PCPPlanner",
    "Partition",
    "PeerExchange",
    "PeerHeadExchange",
    "RowOp",
    "ShardedExchange",
    "concat_k",
    "cp_correct_out",
    "cp_lse_a2a",
    "cp_lse_ag_out_ar",
    "cp_lse_ag_out_rs",
    "flat_cp_group",
    "gather_latents",
    "heads_of",
    "kv_up_project",
    "merge_attn_states",
    "merge_n_attn_states",
    "partition",
    "pcp_attention",
    "pcp_fused_gather",
    "pcp_fused_restore",
    "write_latent_cache",
]
