"""One MLA layer under prefill context parallelism: latents of this rank in, attention output of this rank out.

Every stage is one small function, so that a fused kernel can take its place. Nothing is gathered or restored in between: rows are
written and read by their address, the head and the tail of a request are two rows over one K/V prefix, and q is in local order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..exchange.heads import HeadExchange
from ..exchange.latents import LatentExchange
from ..exchange.peer_heads import PeerHeadExchange
from ..exchange.peers import PeerExchange
from ..exchange.sharded import ShardedExchange
from ..ops.attention.checks import check_scale
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from .attend import attend_step
from .checks import check_layer_inputs, check_published, check_rest, check_split, check_stream
from .projection import KVProjection, Projection, plain_weight, rows_of
from .stages import stage
from .steps import Kind, LayerStep, known_step, new_step


class Started(NamedTuple):
    """What a layer has published in a step, for :meth:`MLAPrefill.finish`: of it, or of one with latents of these widths.

    Attributes:
        meta: the step.
        latents: that keys are expanded from: what the exchange published.
        scale: of a float8 cache.
        dtype, num_rows, widths: of this rank's latents and rotated keys.
        published: when that is done, if it is on a stream of its own.
    """

    meta: PCPMetadata
    latents: torch.Tensor
    cached: bool
    scale: torch.Tensor | None
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

    Shared out by tokens, every rank expands every key for all heads. Shared out by heads, it expands all keys for some of them, to
    which all ranks send their queries and which send outputs back: two more exchanges, and a part of the up-projection. Latents and
    caches are the same, and so are outputs, to the bit, where what is expanded for a head does not depend on how many there are: by
    the GPU kernels here it does not, by a matrix library it may.

    Attributes:
        dims: of the layers that it serves.
        softmax_scale: factor of the scores.
        exchange: of the group, of these widths and this dtype; all layers can share one. For a cache that decode context
            parallelism shares out, a :class:`ShardedExchange`.
        backend: of :func:`pcp_mla.pcp_attention`.
        heads: an exchange of queries and outputs, of the same group, dims and dtype.
        split: ``tokens``; ``heads``; or ``auto``: what costs less, step by step, by what a layer costs on this kind of GPU
            (:mod:`pcp_mla.plan.split_cost`), tokens without ``heads``, on a CPU, under a compiler, with an attention library that
            lacks ``seqused_k``, and for a ``kv_b_proj`` that is more than a weight and a bias. All ranks come to the same: their
            GPUs, libraries and modules, hooks included, must be of one kind.
    """

    dims: MLADims
    softmax_scale: float
    exchange: LatentExchange | PeerExchange | ShardedExchange
    backend: str = "auto"
    heads: HeadExchange | PeerHeadExchange | None = None
    split: str = "auto"

    def __post_init__(self) -> None:
        check_scale("MLAPrefill", self.softmax_scale)
        if not isinstance(self.dims, MLADims):
            raise TypeError(f"MLAPrefill: dims must be MLADims, got {type(self.dims).__name__}")
        check_split("MLAPrefill", self.split, self.heads, self.dims)

    def __call__(
        self,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_b_proj: KVProjection,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer of a step.

        Args:
            q: [T, heads, nope + rope] in local order, rope applied; of a padded plan also [Np, ...], as the next two, whatever the
                pads hold.
            kv_c: [T, kv_lora_rank] normed latents in local order, same dtype.
            k_pe: [T, rope] rotated keys in local order, same dtype.
            kv_b_proj: linear module, or its weight [heads * (nope + v), kv_lora_rank].
            meta: the step, for this rank of the exchange's group; with a cache, from :meth:`PCPPlanner.plan` with block tables.
            cache: [num_blocks, block_size, kv_lora_rank + rope] this layer's paged latent cache, same dtype without ``scale``; the
                new tokens' latents are written to it. Not needed if no request has context and it is not shared out; else this
                shard's.
            scale: float32 of one element, on the device, of this layer: the cache is float8_e4m3fn, as :func:`write_latent_cache`
                fills it. New tokens are attended to as the cache holds them, so that it makes no difference in how many steps a
                prompt comes.

        Returns:
            [T, heads, v] in local order.

        Raises:
            ValueError, TypeError: an argument does not fit ``dims``, ``meta`` or the exchange; the message has its name and value.
            NotImplementedError: a cache that is shared out without an exchange for that, an input that requires gradients, what the
                attention backend does not support, or, with ``split="heads"``, a ``kv_b_proj`` whose heads cannot be had alone.
            RuntimeError: the attention backend is not available.

            All before anything is exchanged or written.
        """
        kind = self._kind(q, cache is not None, scale is not None)
        step = known_step(kind, meta)
        weight = plain_weight(kv_b_proj)
        if step is None or not (step.fits_latents(kv_c, k_pe, cache, scale) and step.fits_rest(q, weight, kv_c.shape[0])):
            check_layer_inputs("MLAPrefill", q, kv_c, k_pe, kv_b_proj, meta, self.dims, cache, scale)
        step, part, weight = self._part("MLAPrefill", step or new_step(kind, meta), kv_b_proj, weight, meta)
        return attend_step(step, q, self._publish(kv_c, k_pe, meta, cache, scale), part, weight, meta, scale)

    def start(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Started:
        """The first half of a call, for which q need not be there yet: the latents of all ranks, published.

        Args:
            kv_c, k_pe, meta, cache, scale: as of a call. They must stay as they are until :meth:`finish`, and so must the plan.
                Without a cache, or with one that is shared out, the result lies in the exchange's buffer: finish before the
                exchange is used again. With other caches, any number of layers can be started before the first is finished, on
                all ranks in the same order.
            stream: to publish on beside what the current stream goes on with, behind what it has so far; the stream that is
                current in :meth:`finish` waits for it. Not while a :class:`PiecewiseGraph` is captured.

        Raises:
            As a call, as far as the arguments are the same; ValueError or TypeError if ``stream`` is no CUDA stream of the
            metadata's device. All before anything is exchanged or written.
        """
        kind = self._kind(kv_c, cache is not None, scale is not None)
        step = known_step(kind, meta)
        if step is None or not step.fits_latents(kv_c, k_pe, cache, scale):
            check_published("MLAPrefill.start", kv_c, k_pe, meta, self.dims, cache, scale)
        if stream is not None:
            check_stream("MLAPrefill.start", stream, meta)
        if step is None:
            new_step(kind, meta)
        published = None
        if stream is None:
            latents = self._publish(kv_c, k_pe, meta, cache, scale)
        else:
            stream.wait_stream(torch.cuda.current_stream(meta.device))
            for tensor in (kv_c, k_pe, cache, scale):
                if tensor is not None:  # whose memory must not go to somebody else before the stream has read it
                    tensor.record_stream(stream)
            with torch.cuda.stream(stream):
                latents = self._publish(kv_c, k_pe, meta, cache, scale)
                published = stream.record_event()
        widths = kv_c.shape[1], k_pe.shape[1]
        return Started(meta, latents, cache is not None, scale, kv_c.dtype, kv_c.shape[0], widths, published)

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
        kind = self._kind(started, started.cached, started.scale is not None)
        step = known_step(kind, meta)
        if step is None or not step.fits_rest(q, weight, started.num_rows):
            check_rest(op, q, kv_b_proj, started.num_rows, started.dtype, meta, self.dims)
        step, part, weight = self._part(op, step or new_step(kind, meta), kv_b_proj, weight, meta)
        if started.published is not None:
            stream = torch.cuda.current_stream(meta.device)
            stream.wait_event(started.published)
            started.latents.record_stream(stream)
        return attend_step(step, q, started.latents, part, weight, meta, started.scale)

    def _kind(self, like: Any, cached: bool, scaled: bool) -> Kind:
        dtype = like.dtype if isinstance(like, torch.Tensor | Started) else None
        sharded = isinstance(self.exchange, ShardedExchange)
        return Kind(self.dims, self.softmax_scale, self.backend, dtype, cached, self.heads, self.split, scaled, sharded)

    def _part(
        self, op: str, step: LayerStep, kv_b_proj: KVProjection, weight: torch.Tensor | None, meta: PCPMetadata
    ) -> tuple[LayerStep, Projection, torch.Tensor | None]:
        """Of ``kv_b_proj``, and of ``weight`` that is all of it, the heads that this rank computes; and the step, by tokens if
        these cannot be had and need not be."""
        if step.heads is None:
            return step, kv_b_proj, weight
        if weight is not None:
            part = weight[step.weight_rows]
            return step, part, part
        linear = rows_of(kv_b_proj, step.weight_rows)
        if linear is not None:
            return step, linear, None
        if self.split == "heads":
            name = type(kv_b_proj).__name__
            raise NotImplementedError(
                f"{op}: kv_b_proj must be a weight, or a Linear without hooks, for split 'heads', got a {name}"
            )
        by_tokens = step.kind._replace(split="tokens")
        return known_step(by_tokens, meta) or new_step(by_tokens, meta), kv_b_proj, None

    def _publish(
        self, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata, cache: torch.Tensor | None, scale: torch.Tensor | None
    ) -> torch.Tensor:
        with stage("exchange", kv_c):
            return self.exchange.publish(kv_c, k_pe, meta, cache, scale=scale)
