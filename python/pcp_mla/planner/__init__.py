"""All indices of a step in a few microseconds, in buffers whose addresses never change: ``planner`` is what users make, ``host``
the part on the host (native, or NumPy's), ``step_buffer`` where it writes, ``buffers`` the tensors, ``planned`` the metadata
over them, ``consistency`` the comparison of ranks. From outside: :class:`pcp_mla.PCPPlanner` and ``consistency``.
"""
