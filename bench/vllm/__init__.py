"""vLLM's own prefill context parallelism against the same engine with this package's plug-in: time to first token, time of a decode
step, host time and GPU time of a layer. ``python -m bench.vllm --help``; docs/vllm.md says what was measured."""
