"""Widths of an MLA layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count


@dataclass(frozen=True)
class MLADims:
    """Widths of an MLA layer: q and k are ``qk_head_dim`` wide, v ``v_head_dim``, a latent ``kv_lora_rank + qk_rope_head_dim``.

    Raises:
        ValueError, TypeError: one of them is not an int of at least 1, ``qk_rope_head_dim`` of at least 0.
    """

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"):
            check_count("MLADims", name, getattr(self, name), 0 if name == "qk_rope_head_dim" else 1)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def expanded_dim(self) -> int:
        """Of a head in ``kv_b_proj``'s output."""
        return self.qk_nope_head_dim + self.v_head_dim

    @property
    def latent_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim
