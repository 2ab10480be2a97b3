"""Several ranks where there is one process, or one machine: played ranks in turn, and ranks that are processes.

For tests, demos and benchmarks. Above the groups, whose kind of rank a played one is; nothing that users run imports it.
"""

from .launch import RankError, run_distributed
from .played import PlayedGroup, play

__all__ = ["PlayedGroup", "RankError", "play", "run_distributed"]
