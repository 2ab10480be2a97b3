#!/usr/bin/env bash
# Counters of each of our kernels by Nsight Compute, for a roofline: bench/ncu.sh [FOLDER] writes FOLDER/ncu_<device>.json (docs/profiling.md).
# PYTHON chooses the interpreter. Clocks stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
export PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A generation of GPUs has some metrics and not others, and ncu refuses what it does not know.
ncu --query-metrics | awk '{print $1}' | sort -u > "$scratch/known"
metrics=$("$python" -m bench.ncu metrics | while read -r metric; do
  if grep -qx "${metric%%.*}" "$scratch/known"; then echo "$metric"; fi
done | paste -sd,)

# Only what lies between cudaProfilerStart and cudaProfilerStop, and of that what is ours: each is launched once or twice there.
ours='(fused_gather|fused_restore|latent_cache|merge|merge_states|concat_k|kv_up_project|attention)_kernel'
ncu --profile-from-start off --clock-control none --nvtx -k "regex:$ours" --launch-count 40 \
  --metrics "$metrics" --csv --page raw --log-file "$scratch/csv" "$python" -m bench.ncu calls "$scratch/work" ||
  { cat "$scratch/csv"; exit 1; }
mkdir -p "$out"
"$python" -m bench.ncu json "$scratch/csv" "$scratch/work" "$out" || { tail -n 20 "$scratch/csv"; exit 1; }
