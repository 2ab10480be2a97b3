"""What ranks give each other within a layer: before the attention latents, by a collective (``latents``) or by stores to one
another's caches (``peers``), behind it partial results (``cp_merge``). From outside: :class:`pcp_mla.LatentExchange`,
:class:`pcp_mla.PeerExchange` and the ``cp_lse`` functions. Collectives themselves are in ``groups``.
"""
