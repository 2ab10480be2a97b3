"""pcp_fused_restore."""

from __future__ import annotations

import torch

from ..checks import check_output
from .fused_gather import local_rows


def check_restored(
    out_head: torch.Tensor, out_tail: torch.Tensor, lse_head: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Raise unless ``out`` and ``lse`` are outputs of ``fused_restore`` for these inputs."""
    op, rows = "pcp_fused_restore", out_head.shape[0] + out_tail.shape[0]
    check_output(op, "out[0]", out, (rows, *out_head.shape[1:]), out_head.dtype, out_head.device)
    if lse_head is not None:
        check_output(op, "out[1]", lse, (rows, out_head.shape[1]), torch.float32, out_head.device)


def fused_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and LSEs if given (else an empty tensor), back in local order."""
    heads, tails = local_rows(row_table)
    out = out_head.new_empty(len(out_head) + len(out_tail), *out_head.shape[1:])
    out[heads], out[tails] = out_head[: len(heads)], out_tail[: len(tails)]
    if lse_head is None or lse_tail is None:
        return out, out_head.new_empty(0, dtype=torch.float32)
    lse = lse_head.new_empty(len(out), lse_head.shape[1])
    lse[heads], lse[tails] = lse_head[: len(heads)], lse_tail[: len(tails)]
    return out, lse


def fused_restore_out(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """The same into given tensors."""
    check_restored(out_head, out_tail, lse_head, out, lse)
    restored, restored_lse = fused_restore(out_head, out_tail, lse_head, lse_tail, row_table)
    out.copy_(restored)
    if lse is not None and lse_head is not None:
        lse.copy_(restored_lse)
