"""The ops' Triton kernels, one file an op family, by the words of ``ops``. Nobody imports them but ``ops.registry``, by name and
when a kernel is first called: importing Triton takes longer than all the rest.
"""
