"""One attention call over the rows of a step by any library: ``call`` chooses and runs one, ``support`` says which library takes
what and why not, ``libraries`` are their calls, ``kernels`` our own, ``rows`` is torch's, row by row. From outside:
``call.pcp_attention``, and for layers ``support.choose`` and of ``call`` ``attend``, ``prepared_call`` and ``run_rows``, which
check nothing.
"""
