"""What a step is, in plain NumPy: the partition of a batch over the ranks, where its tokens lie in the cache, and the metadata that
ops and layers read. The specification of every index, and the data that all other rooms share. From outside: all of it, but for
names with an underscore; it imports nothing but the checks.
"""
