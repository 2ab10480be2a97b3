"""Every op's definition in plain torch: the specification that kernels are tested against, and the fallback where none is built.

Works in any dtype on any device. Nothing here is fast; on a GPU it synchronises with the host.
"""

from .attention import attention
from .concat_k import concat_k
from .fused_gather import fused_gather, fused_gather_out
from .fused_restore import fused_restore, fused_restore_out
from .kv_up_project import kv_up_project
from .latent_cache import gather_latents, write_latent_cache
from .merge_states import cp_correct_out, merge_attn_states, merge_attn_states_out, merge_n_attn_states, merge_n_attn_states_out
from .plan_expand import plan_expand
from .plan_rank_rows import plan_rank_rows
from .plan_shard_rows import plan_shard_rows

__all__ = [
    "attention",
    "concat_k",
    "cp_correct_out",
    "fused_gather",
    "fused_gather_out",
    "fused_restore",
    "fused_restore_out",
    "gather_latents",
    "kv_up_project",
    "merge_attn_states",
    "merge_attn_states_out",
    "merge_n_attn_states",
    "merge_n_attn_states_out",
    "plan_expand",
    "plan_rank_rows",
    "plan_shard_rows",
    "write_latent_cache",
]
