"""The ops: one file each by its one word, which checks, allocates and launches; its schema (``schemas``), and which implementation
runs (``registry``, ``native``). Definitions are in ``reference``, kernels in ``triton`` and csrc under the same words. From
outside: the functions that :mod:`pcp_mla` exports, ``registry.availability``, and for layers the calls of arguments that are
known to fit.
"""
