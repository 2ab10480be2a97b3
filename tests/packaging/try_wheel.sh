#!/usr/bin/env bash
# Installs a wheel into fresh environments, one for each Python and torch, and tries it there, away from the source tree:
#   tests/packaging/try_wheel.sh dist/NAME.whl [PYTHON=TORCH ...]
# needs a network for torch and transformers, but no GPU. With a torch that has CUDA the CUDA library must load, too.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wheel=$(realpath "$1")
shift
(($#)) || set -- python3.10=2.10 python3.12=2.11 python3.11=2.13 python3.13=2.14
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for pair in "$@"; do
  python=${pair%=*} torch=${pair#*=}
  echo "== $python, torch $torch"
  begin=$SECONDS
  "$python" -m venv --clear env
  env/bin/python -m pip install -q "$wheel[demo]" "torch==$torch.*"
  echo "== installed in $((SECONDS - begin)) s"
  libraries=(_native _planner)
  if env/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    libraries+=(_native_cuda)
  fi
  env/bin/python "$here/installed.py" "${libraries[@]}"
  env/bin/pcp-mla env
  env/bin/pcp-mla demo --pcp 1 2 --max-tokens 128
  env/bin/pcp-mla eval --pcp 2 --limit 2
  echo "== passed in $((SECONDS - begin)) s"
done
