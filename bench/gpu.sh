#!/usr/bin/env bash
# Everything that needs a GPU in one run, with the torch that the interpreter has:
#   bench/gpu.sh [FOLDER]      builds in place, GPU tests, sanitizer, random calls, benchmarks and the demo; logs and JSON go to FOLDER
# PYTHON chooses the interpreter. STEPS picks some of: build test sanitize stress bench demo eval. STRESS_SECONDS is how long
# stress takes (600), STRESS_SEED repeats one. If there: PCP_MLA_FA3 and PCP_MLA_VLLM_OPS name libraries of other projects, for stress
# (the former) and benchmarks, PCP_MLA_TRACE a trace of requests.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
export PYTHONPATH=python PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=()

step() {  # step NAME COMMAND...: run it if wanted, log it, remember a failure
  local name=$1
  shift
  [[ " ${STEPS:-build test sanitize stress bench demo eval} " == *" ${name%%-*} "* ]] || return 0
  echo "== $name: $*"
  local begin=$SECONDS
  "$@" 2>&1 | tee "$out/$name.log" | tail -n "${TAIL:-25}" || failed+=("$name")
  echo "== $name: $((SECONDS - begin)) s"
}

sanitizer() {  # small shapes through each CUDA kernel: random batches and types, so every access width, with LSEs and without
  local skip=none
  # It does not follow barriers that are waited for by parity: it reports cuBLAS's and cuDNN's kernels, and kv_up_project's.
  [[ $1 == racecheck ]] && skip="(test_kv_up_project or test_attention)"
  compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -m gpu \
    -k "cuda and not reference and not $skip and (random or unaligned or empty or identity or block_of_rows or in_place or row_ops or shares or float8 or sequences or behind_the_last or share_keys)" tests
}

step build env PCP_MLA_CUDA="${PCP_MLA_CUDA:-1}" "$python" setup.py -q build_ext --inplace
step test "$python" -m pytest -q -m gpu tests
step sanitize-memcheck sanitizer memcheck
step sanitize-racecheck sanitizer racecheck
step stress env STRESS_SECONDS="${STRESS_SECONDS:-600}" "$python" -m pytest -m stress tests/stress
step bench "$python" -m bench --out "$out"
step demo "$python" -m pcp_mla demo --model v2-lite --pcp 1 2 --json "$out/demo.json"
step eval "$python" -m pcp_mla eval --pcp 1 2 4 8 --limit 500 --json "$out/eval.json"
step eval-cached "$python" -m pcp_mla eval --pcp 1 2 4 8 --limit 500 --chunk 4096 --prefix-cache --json "$out/eval_cached.json"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
