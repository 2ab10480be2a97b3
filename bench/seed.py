"""The first implementation's way through a layer, over any attention library: what our layer is timed beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pcp_mla import MLADims
from pcp_mla.compare.seed_path import build_kv, gather_calls
from pcp_mla.groups import all_gather_rows
from pcp_mla.ops.attention.call import run_rows
from pcp_mla.ops.attention.libraries import Rows

from . import peers


class SeedPath:
    """Two all-gathers, two restores, a cache write, kv_b_proj and K concat, six index_select, two attention calls, a restore.

    Args:
        meta: a step with cache slots.
        group: of the ranks; None plays them: a collective is a copy of its result.
    """

    def __init__(self, meta: Any, group: Any, dims: MLADims, backend: str) -> None:
        self.meta, self.group, self.dims, self.backend = meta, group, dims, backend
        self.softmax_scale = dims.qk_head_dim**-0.5
        self._in_order = meta.slot_mapping[meta.allgather_restore_idx.long()]
        self._cache_scale = torch.ones(1, device=meta.device)

    def gather(self, part: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        """A collective: real, or a copy of its result ``whole``."""
        if self.group is None:
            assert whole is not None
            return whole.clone()
        pads = self.meta.num_tokens_padded - len(part)
        return all_gather_rows(torch.nn.functional.pad(part, (0, 0, 0, pads)).contiguous(), self.group)

    def write(self, kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor) -> None:
        """Latents in natural order to their slots."""
        if peers.has_vllm_ops() and kv_c.is_cuda:
            torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, cache, self._in_order, "auto", self._cache_scale)
        else:
            cache.view(-1, self.dims.latent_dim).index_copy_(0, self._in_order, torch.cat([kv_c, k_pe], dim=1))

    def __call__(
        self,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        weight: torch.Tensor,
        cache: torch.Tensor,
        gathered: Sequence[torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        meta = self.meta
        parts = [self.gather(mine, whole) for mine, whole in zip((kv_c, k_pe), gathered, strict=True)]
        kv_c, k_pe = (part.index_select(0, meta.allgather_restore_idx) for part in parts)
        self.write(kv_c, k_pe, cache)
        if meta.num_context_tokens:
            latents = cache.view(-1, self.dims.latent_dim).index_select(0, meta.kv_rows)
            kv_c, k_pe = latents.split([self.dims.kv_lora_rank, self.dims.qk_rope_head_dim], dim=1)
        outs = []
        for call in gather_calls(q, *build_kv(kv_c, k_pe, weight, self.dims), meta):
            lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k.diff(), meta.max_seqlen_q, meta.max_seqlen_k, True)
            outs.append(run_rows(self.backend, call.q, call.k, call.v, Rows(*lengths), self.softmax_scale, False)[0])
        return torch.cat(outs).index_select(0, meta.output_restore_idx)
