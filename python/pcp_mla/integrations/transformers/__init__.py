"""Prefill context parallelism for transformers' own models with MLA.

:func:`enable_pcp` replaces the forward of the model and of every attention module: calls of the model and its own ``generate``
work as before, and :func:`prefill`, :func:`extend`, :func:`decode` and :func:`generate` drive it without padding. For inference
only.

A prefill cuts every request over the ranks. Every rank sees all latents in each layer, so it keeps the whole latent cache, in paged
blocks that requests with a common prefix share, and a decode step runs on all ranks alike, with no collective, over the latents.

Threads that call one model are served one after another, a :func:`generate` as a whole. Requests of a prefill belong to the thread
that made it: another one's :func:`extend` or :func:`decode` is refused, as is a second thread over several ranks.
"""

from .caches import PCPCache
from .context import PCPContext
from .enable import capture_graphs, disable_pcp, enable_pcp
from .generation import decode, extend, generate, greedy_steps, prefill
from .weights import copy_sharing_weights

__all__ = [
    "PCPCache",
    "PCPContext",
    "capture_graphs",
    "copy_sharing_weights",
    "decode",
    "disable_pcp",
    "enable_pcp",
    "extend",
    "generate",
    "greedy_steps",
    "prefill",
]
