"""One MLA layer under prefill context parallelism: latents of this rank in, attention output of this rank out.

Every stage is one small function, so that a fused kernel can take its place. Nothing is gathered or restored in between: rows are
written and read by their address, the head and the tail of a request are two rows over one K/V prefix, and q is in local order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..exchange.latents import LatentExchange
from ..exchange.peers import PeerExchange
from ..ops.attention.call import attend
from ..ops.attention.checks import check_scale
from ..ops.attention.libraries import apart
from ..ops.kv_up_project import expand
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from ..plan.slots import KeyChunk
from .checks import check_layer_inputs, check_published, check_rest, check_stream
from .projection import KVProjection, expand_rows, plain_weight
from .steps import Kind, LayerStep, known_step, new_step

_NO_TOOL = -2  # NVTX_NO_PUSH_POP_TRACKING: what a push gives where nothing is attached


@functools.cache
def _has_listener() -> bool:
    """Whether ranges go to anyone: PCP_MLA_NVTX=1 or 0 says so, else what runs a profiler in this process (nsys, ncu and others set
    these), or what a first push gives. NVTX looks for its tool once, so that the answer stays."""
    asked = os.environ.get("PCP_MLA_NVTX", "")
    if asked in ("0", "1"):
        return asked == "1"
    if any(os.environ.get(name) for name in ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")):
        return True
    depth = torch.cuda.nvtx.range_push("pcp_mla")
    torch.cuda.nvtx.range_pop()
    return depth != _NO_TOOL


class _Stage:
    """An NVTX range around a stage, for a profiler's timeline if there is one: even to nobody, a push costs a microsecond."""

    def __init__(self, name: str) -> None:
        self._name = f"pcp_mla.{name}"

    def __enter__(self) -> None:
        if _has_listener():
            torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *_: object) -> None:
        if _has_listener():
            torch.cuda.nvtx.range_pop()


_STAGES = {name: _Stage(name) for name in ("exchange", "up_project", "attention")}
_UNMARKED = nullcontext()


def _stage(name: str, x: torch.Tensor) -> AbstractContextManager[None]:
    """The range of a stage, where its work is a GPU's. Whether there is a GPU is not asked: that wakes the driver, and forks of a
    process whose driver is awake cannot use CUDA."""
    return _STAGES[name] if x.is_cuda and not torch.compiler.is_compiling() else _UNMARKED


class Started(NamedTuple):
    """What a layer has published in a step, for :meth:`MLAPrefill.finish`: of it, or of one with latents of these widths.

    Attributes:
        meta: the step.
        latents: that keys are expanded from: the cache if it is ``cached``, else [P * Np, W].
        dtype, num_rows, widths: of this rank's latents and rotated keys.
        published: when that is done, if it is on a stream of its own.
    """

    meta: PCPMetadata
    latents: torch.Tensor
    cached: bool
    dtype: torch.dtype
    num_rows: int
    widths: tuple[int, int]
    published: torch.cuda.Event | None


@dataclass(frozen=True)
class MLAPrefill:
    """MLA attention of a rank's tokens over all tokens of their requests: latents in, the output in local order out.

    A call is :meth:`start` and :meth:`finish`, with everything checked before anything is exchanged.

    One collective; rank-major rows to their slots; K and V of the keys' slots, in key order; one attention call. The order of the
    rows is restored by no op of its own. A step whose plan was given ``workspace_tokens`` never holds more rows of K and V at a
    time: the new tokens' call comes first, and each window of context is merged into its result.

    Decodes beside prefills are computed as any other row. An engine that has a decode kernel over latents keeps them out of the
    plan.

    Attributes:
        dims: of the layers that it serves.
        softmax_scale: factor of the scores.
        exchange: of the group, of these widths and this dtype; all layers can share one.
        backend: of :func:`pcp_mla.pcp_attention`.
    """

    dims: MLADims
    softmax_scale: float
    exchange: LatentExchange | PeerExchange
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_scale("MLAPrefill", self.softmax_scale)
        if not isinstance(self.dims, MLADims):
            raise TypeError(f"MLAPrefill: dims must be MLADims, got {type(self.dims).__name__}")

    def __call__(
        self,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_b_proj: KVProjection,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer of a step.

        Args:
            q: [T, heads, nope + rope] in local order, rope applied; of a padded plan also [Np, ...], as the next two, whatever the
                pads hold.
            kv_c: [T, kv_lora_rank] normed latents in local order, same dtype.
            k_pe: [T, rope] rotated keys in local order, same dtype.
            kv_b_proj: linear module, or its weight [heads * (nope + v), kv_lora_rank].
            meta: the step, for this rank of the exchange's group; with a cache, from :meth:`PCPPlanner.plan` with block tables.
            cache: [num_blocks, block_size, kv_lora_rank + rope] this layer's paged latent cache, same dtype; the new tokens'
                latents are written to it. Not needed if no request has context.

        Returns:
            [T, heads, v] in local order.

        Raises:
            ValueError, TypeError: an argument does not fit ``dims``, ``meta`` or the exchange; the message has its name and value.
            NotImplementedError: a cache that decode context parallelism shares out, an input that requires gradients, or what the
                attention backend does not support.
            RuntimeError: the attention backend is not available.

            All before anything is exchanged or written.
        """
        kind = self._kind(q, cache)
        step = known_step(kind, meta)
        weight = plain_weight(kv_b_proj)
        if step is None or not (step.fits_latents(kv_c, k_pe, cache) and step.fits_rest(q, weight, kv_c.shape[0])):
            check_layer_inputs("MLAPrefill", q, kv_c, k_pe, kv_b_proj, meta, self.dims, cache)
        step = step or new_step(kind, meta)
        return self._finish(step, q, self._publish(kv_c, k_pe, meta, cache), kv_b_proj, weight, meta)

    def start(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> Started:
        """The first half of a call, for which q need not be there yet: the latents of all ranks, published.

        Args:
            kv_c, k_pe, meta, cache: as of a call. They must stay as they are until :meth:`finish`, and so must the plan. Without a
                cache the result lies in the exchange's buffer: finish before the exchange is used again. With caches, any number
                of layers can be started before the first is finished, on all ranks in the same order.
            stream: to publish on beside what the current stream goes on with, behind what it has so far; the stream that is
                current in :meth:`finish` waits for it. Not while a :class:`PiecewiseGraph` is captured.

        Raises:
            As a call, as far as the arguments are the same; ValueError or TypeError if ``stream`` is no CUDA stream of the
            metadata's device. All before anything is exchanged or written.
        """
        kind = self._kind(kv_c, cache)
        step = known_step(kind, meta)
        if step is None or not step.fits_latents(kv_c, k_pe, cache):
            check_published("MLAPrefill.start", kv_c, k_pe, meta, self.dims, cache)
        if stream is not None:
            check_stream("MLAPrefill.start", stream, meta)
        if step is None:
            new_step(kind, meta)
        published = None
        if stream is None:
            latents = self._publish(kv_c, k_pe, meta, cache)
        else:
            stream.wait_stream(torch.cuda.current_stream(meta.device))
            for tensor in (kv_c, k_pe, cache):
                if tensor is not None:  # whose memory must not go to somebody else before the stream has read it
                    tensor.record_stream(stream)
            with torch.cuda.stream(stream):
                latents = self._publish(kv_c, k_pe, meta, cache)
                published = stream.record_event()
        return Started(meta, latents, cache is not None, kv_c.dtype, kv_c.shape[0], (kv_c.shape[1], k_pe.shape[1]), published)

    def finish(self, q: torch.Tensor, kv_b_proj: KVProjection, started: Started) -> torch.Tensor:
        """The second half: attention over what :meth:`start` published. Arguments and result as of a call, q with as many rows as
        the latents had.

        Raises:
            As a call; ValueError or TypeError if ``started`` is none, or of other widths.
        """
        op = "MLAPrefill.finish"
        if not isinstance(started, Started):
            raise TypeError(f"{op}: started must be what start returned, got {type(started).__name__}")
        widths = (self.dims.kv_lora_rank, self.dims.qk_rope_head_dim)
        if started.widths != widths:
            raise ValueError(f"{op}: started must have latents of widths {widths}, as this layer's, got {started.widths}")
        meta, weight = started.meta, plain_weight(kv_b_proj)
        kind = (self.dims, self.softmax_scale, self.backend, started.dtype, started.cached)
        step = known_step(kind, meta)
        if step is None or not step.fits_rest(q, weight, started.num_rows):
            check_rest(op, q, kv_b_proj, started.num_rows, started.dtype, meta, self.dims)
        step = step or new_step(kind, meta)
        if started.published is not None:
            stream = torch.cuda.current_stream(meta.device)
            stream.wait_event(started.published)
            started.latents.record_stream(stream)
        return self._finish(step, q, started.latents, kv_b_proj, weight, meta)

    def _kind(self, like: Any, cache: torch.Tensor | None) -> Kind:
        dtype = like.dtype if isinstance(like, torch.Tensor) else None
        return self.dims, self.softmax_scale, self.backend, dtype, cache is not None

    def _publish(self, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata, cache: torch.Tensor | None) -> torch.Tensor:
        with _stage("exchange", kv_c):
            return self.exchange.publish(kv_c, k_pe, meta, cache)

    def _finish(
        self,
        step: LayerStep,
        q: torch.Tensor,
        latents: torch.Tensor,
        kv_b_proj: KVProjection,
        weight: torch.Tensor | None,
        meta: PCPMetadata,
    ) -> torch.Tensor:
        """For inputs that are known to fit; ``weight`` if it is all of ``kv_b_proj``."""
        if weight is not None and step.call is not None and q.shape[0] and not apart(q):
            return self._attend_at_once(step, step.call, q, latents, weight)
        *context, new = step.chunks or (None,)
        if not context:
            return self._attend(step, q, latents, kv_b_proj, meta, None, None)[0]
        state = self._attend(step, q, latents, kv_b_proj, meta, new, None)
        for chunk in context:
            self._attend(step, q, latents, kv_b_proj, meta, chunk, state)
        return state[0]

    def _attend_at_once(
        self, step: LayerStep, call: Callable[..., None], q: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """What :meth:`_attend` does without a chunk, by the call that the layers of the step share."""
        with _stage("up_project", q):
            k, v, *k_pe = expand(latents, step.rows, weight, self.dims, step.apart)
        with _stage("attention", q):
            out = q.new_empty(q.shape[0], self.dims.num_heads, self.dims.v_head_dim)
            call(q, k, v, out, *k_pe)
        return out

    def _attend(
        self,
        step: LayerStep,
        q: torch.Tensor,
        latents: torch.Tensor,
        kv_b_proj: KVProjection,
        meta: PCPMetadata,
        chunk: KeyChunk | None,
        prev: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE over the keys of a chunk, merged into ``prev`` in place; without a chunk over all keys, and no LSE."""
        rows = step.rows if chunk is None else step.rows[chunk.first_row : chunk.first_row + chunk.num_rows]
        with _stage("up_project", q):
            k, v, *apart = expand_rows(latents, rows, kv_b_proj, self.dims, step.apart)
            k_pe = apart[0] if apart else None
        with _stage("attention", q):
            # Everything was checked, or made here.
            if chunk is None:
                out = attend(step.backend, q, k, v, meta, self.softmax_scale, k_pe=k_pe)
                assert isinstance(out, torch.Tensor)
                return out, out
            state = attend(step.backend, q, k, v, meta, self.softmax_scale, True, k_pe, prev=prev, chunk=chunk, out=prev)
            assert isinstance(state, tuple)
            assert state[1] is not None
            return state[0], state[1]
