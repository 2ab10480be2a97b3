"""Partial attention outputs of a context-parallel group to the output over all keys, three ways; and the flat group for it.

Every rank attends with all H heads to its shard of the keys and has a partial output and its log-sum-exp (LSE). What each function
moves, and which one to take: docs/merge_states.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_tensor
from ..groups import Group, all_gather_rows, all_reduce_rows, all_to_all_rows, group_rank, group_world_size, reduce_scatter_rows
from ..ops.merge_states import cp_correct_out, merge_n_attn_states
from ..ops.merge_states_checks import MAX_PARTIALS, check_lse, check_partial

_ALIGNMENT = 16  # bytes: the widest access of the kernels


def _check(op: str, out: Any, lse: Any, group: Group, lse_base: Any, seqused_k: Any, scatters: bool) -> tuple[int, int]:
    """World size and rank. Raises unless the arguments fit each other and the group, before any collective."""
    world = group_world_size(group, op)
    if world > MAX_PARTIALS:
        raise ValueError(f"{op}: group must have at most {MAX_PARTIALS} ranks, got {world}")
    check_partial(op, "out", out, None)
    check_lse(op, "lse", lse, tuple(out.shape[:2]), "[tokens, heads]", out)
    if seqused_k is not None:
        check_tensor(op, "seqused_k", seqused_k, (out.shape[0],), "[tokens]", out.device)
        if seqused_k.dtype != torch.int32:
            raise TypeError(f"{op}: seqused_k must be int32, got {str(seqused_k.dtype).removeprefix('torch.')}")
    if not isinstance(lse_base, str) or lse_base not in ("e", "2"):
        raise ValueError(f"{op}: lse_base must be 'e' or '2', got {lse_base!r}")
    if scatters and out.shape[1] % world:
        raise ValueError(f"{op}: out must have a number of heads that the group's {world} ranks divide, got {out.shape[1]}")
    return world, group_rank(group)


def _alone(
    out: torch.Tensor, lse: torch.Tensor, lse_base: str, seqused_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merge of one partial: its own bits, with what is empty made 0 and -inf."""
    used = None if seqused_k is None else seqused_k[None].contiguous()
    result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    return cp_correct_out(out, lse[None], 0, corrected=result, lse_base=lse_base, seqused_k=used)


def _all_lses(lse: torch.Tensor, group: Group, seqused_k: torch.Tensor | None) -> torch.Tensor:
    """[W, T, H] of all ranks, -inf where a rank has no keys for a row."""
    if seqused_k is not None:
        lse = torch.where((seqused_k == 0)[:, None], -torch.inf, lse)
    return all_gather_rows(lse.contiguous()[None], group)


def cp_lse_ag_out_rs(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    lse_base: str = "e",
    seqused_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of all ranks, for this rank's share of the heads: an all-gather of the LSEs, one launch, and a
    reduce-scatter of the outputs, in float32 with one rounding at the end.

    All of it is issued on the current stream and nothing waits for it, so that it can be captured in a graph where the group's
    collectives can (NCCL). ``group`` must be ONE flat group of all ranks that the keys are sharded over, see :func:`flat_cp_group`.

    Args:
        out: [T, H, D] this rank's output over its keys for ALL heads, bf16, fp16 or fp32, any row and head strides, the last
            dimension contiguous. T, H, D and the dtype must be the same on all ranks.
        lse: float32 [T, H], any strides. Where it is -inf or +inf this rank attended to nothing and ``out`` is not read.
        group: a ``torch.distributed`` process group, a :class:`PlayedGroup`, or None for a world of one rank, which has the same
            results without a collective.
        lse_base: ``"e"`` or ``"2"``, of ``lse`` and of the result.
        seqused_k: int32 [T] keys that THIS rank's shard has for each row: where 0 the rank counts as empty, whatever it left in
            ``out`` and ``lse``.
        return_lse: return the merged LSE too.

    Returns:
        [T, H / W, D] of ``out``'s dtype, heads ``rank * H / W`` and on; with ``return_lse`` also float32 [T, H / W].

    Raises:
        ValueError, TypeError, NotImplementedError: an argument does not fit the others or the group; before any collective. An
            error that only some ranks see leaves the others waiting for them: what is checked must be the same on all.
    """
    op = "cp_lse_ag_out_rs"
    world, rank = _check(op, out, lse, group, lse_base, seqused_k, scatters=True)
    if world == 1:
        alone = _alone(out, lse, lse_base, seqused_k)
        return alone if return_lse else alone[0]
    tokens, heads, dim = out.shape
    lses = _all_lses(lse, group, seqused_k)
    # float32 before the sum: rounded partial sums would cost more than the one rounding of the result.
    corrected = torch.empty(world, tokens, heads // world, dim, dtype=torch.float32, device=out.device)
    merged = torch.empty(world, tokens, heads // world, dtype=torch.float32, device=out.device)
    cp_correct_out(out, lses, rank, corrected=corrected, lse_out=merged, lse_base=lse_base)
    result = reduce_scatter_rows(corrected, group)[0].to(out.dtype)
    return (result, merged[rank]) if return_lse else result


def cp_lse_ag_out_ar(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    lse_base: str = "e",
    seqused_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As :func:`cp_lse_ag_out_rs`, with an all-reduce: every rank gets all heads, [T, H, D] and [T, H]. Any number of heads."""
    op = "cp_lse_ag_out_ar"
    world, rank = _check(op, out, lse, group, lse_base, seqused_k, scatters=False)
    if world == 1:
        alone = _alone(out, lse, lse_base, seqused_k)
        return alone if return_lse else alone[0]
    corrected, merged = cp_correct_out(out, _all_lses(lse, group, seqused_k), rank, lse_base=lse_base)
    result = all_reduce_rows(corrected, group).to(out.dtype)
    return (result, merged) if return_lse else result


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def cp_lse_a2a(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    lse_base: str = "e",
    seqused_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As :func:`cp_lse_ag_out_rs`, by ONE all-to-all: outputs in their own dtype and LSEs travel in one buffer, each rank merges
    the W partials of its heads, in float32 with one rounding. Two launches, whatever W is."""
    op = "cp_lse_a2a"
    world, _ = _check(op, out, lse, group, lse_base, seqused_k, scatters=True)
    if world == 1:
        alone = _alone(out, lse, lse_base, seqused_k)
        return alone if return_lse else alone[0]
    tokens, heads, dim = out.shape
    share = heads // world
    out_bytes, lse_bytes = tokens * share * dim * out.element_size(), tokens * share * 4
    lse_start = _aligned(out_bytes)
    block = max(lse_start + _aligned(lse_bytes), _ALIGNMENT)  # not empty for no tokens: such views have no strides to check
    send = torch.empty(world, block, dtype=torch.uint8, device=out.device)

    def parts(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs [W, T, H / W, D] and LSEs [W, T, H / W] in a buffer."""
        outs = buffer[:, :out_bytes].view(out.dtype).unflatten(1, (tokens, share, dim))
        return outs, buffer[:, lse_start : lse_start + lse_bytes].view(torch.float32).unflatten(1, (tokens, share))

    outs, lses = parts(send)
    # Among one rank the factor is 1: this packs, and makes what is empty 0 and -inf.
    used = None if seqused_k is None else seqused_k[None].contiguous()
    cp_correct_out(out, lse[None], 0, corrected=outs, lse_out=lses, lse_base=lse_base, seqused_k=used)
    outs, lses = parts(all_to_all_rows(send, group))
    result, merged = merge_n_attn_states(outs, lses, lse_base=lse_base)
    assert merged is not None  # as no `out` was given
    return (result, merged) if return_lse else result


def flat_cp_group(layout: Any, *, backend: str | None = None) -> dist.ProcessGroup:
    """Make the ONE group over all P x W ranks of a 2-D (PCP x DCP) layout that this process belongs to.

    One flat group in place of a DCP group inside each PCP rank: with nested groups a merge takes two stages, and the second must
    weigh the results of the first by THEIR LSEs. With the first stage's LSEs, per rank, the outcome is wrong, and different on each
    rank; docs/merge_states.md has an example. A flat group has one stage and two collectives where two stages have four.

    Every process of the world must call this, with the same layout. Its flat rank is ``pcp_rank * W + dcp_rank``.

    Args:
        layout: a ``DeviceMesh`` or integers [..., P, W], the global rank of each (PCP, DCP) place. Leading dimensions are
            independent groups (DP, TP). For another order of dimensions permute ``mesh.mesh``; a slice of a mesh has only the ranks
            of one group. Each rank of the world occurs once, and ranks ascend in each group: torch orders a group by global ranks,
            so that in another order heads would go to the wrong ranks.
        backend: of the new groups; by default the world's.

    Raises:
        ValueError, TypeError: the layout is not of this form; on every process, before any group is made.
    """
    op = "flat_cp_group"
    try:
        ranks = (layout.mesh if isinstance(layout, DeviceMesh) else torch.as_tensor(layout)).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{op}: layout must be a DeviceMesh or integers [..., PCP, DCP], got {layout!r}") from error
    if ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
        raise TypeError(f"{op}: layout must be integers, got {str(ranks.dtype).removeprefix('torch.')}")
    if ranks.dim() < 2 or not ranks.numel():
        raise ValueError(f"{op}: layout must have at least 2 dimensions [..., PCP, DCP] and not be empty, got {tuple(ranks.shape)}")
    world = dist.get_world_size()
    if sorted(ranks.flatten().tolist()) != list(range(world)):
        raise ValueError(f"{op}: layout must have each of the ranks 0..{world - 1} of the world exactly once, got {ranks.tolist()}")
    groups = ranks.flatten(-2).reshape(-1, ranks.shape[-2] * ranks.shape[-1]).tolist()
    if len(groups[0]) > MAX_PARTIALS:
        raise ValueError(f"{op}: layout must have groups of at most {MAX_PARTIALS} ranks, got {len(groups[0])}")
    for members in groups:
        if members != sorted(members):
            raise ValueError(f"{op}: layout must have ascending ranks in each group, PCP outer and DCP inner, got {members}")
    mine = None
    for members in groups:  # all processes make all groups, in the same order
        made = dist.new_group(members, backend=backend)
        if dist.get_rank() in members:
            mine = made
    assert mine is not None
    return mine
