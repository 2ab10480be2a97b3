"""One MLA layer, from this rank's latents to its output (``prefill``), and a model's layers in CUDA graphs between their
collectives (``graphs``). From outside: :class:`pcp_mla.MLAPrefill`, ``graphs.PiecewiseGraph``, and ``prefill.plain_weight`` for
integrations.
"""
