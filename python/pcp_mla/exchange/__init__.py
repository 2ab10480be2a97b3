"""What ranks give each other within a layer: ``latents`` before the attention, ``cp_merge`` partial results behind it. From
outside: :class:`pcp_mla.LatentExchange` and the ``cp_lse`` functions. Collectives themselves are in ``groups``.
"""
