"""One MLA layer, from this rank's latents to its output (``prefill``; its ``checks``, ``kv_b_proj`` in ``projection``, and in
``steps`` what the layers of a step share), and a model's layers in CUDA graphs between their collectives (``graphs``). From
outside: :class:`pcp_mla.MLAPrefill`, ``graphs.PiecewiseGraph``, and for integrations ``projection.plain_weight``.
"""
