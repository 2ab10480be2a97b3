"""vLLM with prefill context parallelism, faster: ``pip install pcp-mla`` is all. See docs/vllm.md.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins`` and calls it in every process. May be called from
outside: :func:`register`, :func:`switch`, and ``python -m pcp_mla.integrations.vllm``, which says what would be replaced here.
"""

from __future__ import annotations

from .parts import switch

__all__ = ["register", "switch"]


def register() -> None:
    """Let this package's parts take the place of vLLM's own, as ``PCP_MLA_VLLM`` says: ``0`` none, ``1`` or unset the default ones,
    else names of parts (:data:`pcp_mla.integrations.vllm.parts.PARTS`) with commas between.

    Nothing is imported of vLLM and no GPU is touched: modules are changed when vLLM itself imports them. A process that is forked
    from one that has called this needs no call of its own; further calls do nothing. Without PCP, or for models without MLA, all
    changes are without effect.
    """
    from .finder import install

    install()
