"""The first implementation's way through a layer, over any attention library and vLLM's cache write, to time ours beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pcp_mla import MLADims
from pcp_mla.compare import seed_path
from pcp_mla.ops.attention.call import run_rows
from pcp_mla.ops.attention.libraries import Rows

from . import peers


class SeedPath(seed_path.SeedPath):
    """Two all-gathers, two restores, a cache write, kv_b_proj and K concat, six index_select, two attention calls, a restore.

    Args:
        meta: a step with cache slots.
        group: of the ranks; None plays them: a collective is a copy of its result.
    """

    def __init__(self, meta: Any, group: Any, dims: MLADims, backend: str) -> None:
        super().__init__(meta, dims, dims.qk_head_dim**-0.5)
        self.group, self.backend = group, backend
        self._in_order = meta.slot_mapping[meta.allgather_restore_idx.long()]
        self._cache_scale = torch.ones(1, device=meta.device)

    def gather(self, part: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        """A collective: real, or a copy of its result ``whole``."""
        if self.group is None:
            assert whole is not None
            return whole.clone()
        return seed_path.gather_part(part, self.meta, self.group)

    def write(self, kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor) -> None:
        """Latents in natural order to their slots."""
        if peers.has_vllm_ops() and kv_c.is_cuda:
            torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, cache, self._in_order, "auto", self._cache_scale)
        else:
            cache.view(-1, self.dims.latent_dim).index_copy_(0, self._in_order, torch.cat([kv_c, k_pe], dim=1))

    def restore(self, kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert cache is not None
        kv_c, k_pe = (part.index_select(0, self.meta.allgather_restore_idx) for part in (kv_c, k_pe))
        self.write(kv_c, k_pe, cache)
        if self.meta.num_context_tokens:
            latents = cache.view(-1, self.dims.latent_dim).index_select(0, self.meta.kv_rows)
            kv_c, k_pe = latents.split([self.dims.kv_lora_rank, self.dims.qk_rope_head_dim], dim=1)
        return kv_c, k_pe

    def attend(self, call: seed_path.VarlenCall) -> torch.Tensor:
        lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k.diff(), self.meta.max_seqlen_q, self.meta.max_seqlen_k)
        return run_rows(self.backend, call.q, call.k, call.v, Rows(*lengths, True), self.softmax_scale, False)[0]

    def __call__(
        self,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        weight: torch.Tensor,
        cache: torch.Tensor,
        gathered: Sequence[torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        parts = [self.gather(mine, whole) for mine, whole in zip((kv_c, k_pe), gathered, strict=True)]
        return self.run(q, *parts, weight, cache)
