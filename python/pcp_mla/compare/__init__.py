"""What our layer is compared with, in demos and benchmarks: the first implementation's way through it. Nothing that users run
imports it. From outside: ``seed_path``.
"""
