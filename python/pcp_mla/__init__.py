"""Prefill context parallelism for MLA models: fused kernels behind a thin layer. See the README for use."""

from .metadata import PCPMetadata
from .ops import GatheredRows, pcp_fused_gather, pcp_fused_restore
from .partition import Partition, partition
from .planner import PCPPlanner

__version__ = "0.1.0"

__all__ = [
    "GatheredRows",
    "PCPMetadata",
    "PCPPlanner",
    "Partition",
    "partition",
    "pcp_fused_gather",
    "pcp_fused_restore",
]
