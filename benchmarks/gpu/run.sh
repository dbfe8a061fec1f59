#!/usr/bin/env bash
# Build, test and time the ops on a machine with a GPU, without a network, from what such a machine usually has: torch, pytest,
# pybind11, scikit-build-core and, for CUDA sources, nvcc. Usage: benchmarks/gpu/run.sh [RESULT.json]
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
result=$(realpath -m "${1:-build/gpu.json}")
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export PATH=/usr/local/cuda/bin:$PATH
if command -v nvcc >/dev/null; then nvcc --version | tail -n 2; else echo "no nvcc: built without CUDA sources"; fi

"$python" -m pip install -q --no-deps --no-build-isolation --no-index --target "$site" .
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1

# From another folder: the source tree, which has no compiled modules, would come before the installed package.
cd "$site"
"$python" -m mechanex
status=0
"$python" -m pytest -q -p no:cacheprovider "$root/tests/test_steer_op.py" "$root/tests/test_backends.py" || status=$?
mkdir -p "$(dirname "$result")"
if [ "$status" -ne 0 ]; then
  echo '{"tests": "failed"}' >"$result"
  echo "tests failed: no timings" >&2
  exit "$status"
fi
"$python" "$root/benchmarks/gpu/steer.py" "$result"
