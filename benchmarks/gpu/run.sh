#!/usr/bin/env bash
# Build, test and time the ops on a machine with a GPU, without a network, from what such a machine usually has: torch, pytest,
# pybind11, cmake and, for the CUDA sources, nvcc. Under nine minutes. Usage: benchmarks/gpu/run.sh [RESULT.json or folder]
# Where a test fails the times are taken too, marked as such, and the exit status is that of the tests.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
result=${1:-benchmarks/results}
case $result in *.json) mkdir -p "$(dirname "$result")" ;; *) mkdir -p "$result" ;; esac
result=$(realpath "$result")
export PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "build"
command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export PATH=/usr/local/cuda/bin:$PATH
options=()
if command -v nvcc >/dev/null; then
  nvcc --version | tail -n 2
  # Code for the GPU at hand; without one, the list of a build from source.
  if command -v nvidia-smi >/dev/null; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || capability=
    [[ ! $capability =~ ^[0-9]+$ ]] || options+=("-DMECHANEX_CUDA_ARCHITECTURES=$capability")
  fi
else
  echo "no nvcc: built without the CUDA kernels"
fi
JOBS=${JOBS:-$(nproc)} scripts/stage.sh "$work/site" "${options[@]}" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# From another folder: the source tree, which has no compiled modules, would come before the staged package.
export PYTHONPATH=$work/site HF_HUB_OFFLINE=1 MECHANEX_HOME=$work/home PYTHONDONTWRITEBYTECODE=1
cd "$work"
"$PYTHON" -m mechanex

step "test"
workers=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n "${WORKERS:-8}"); fi
tests=("$root"/tests/test_{steer_op,steer_many,steer_table,steer_gpu,logprob_op,logprob_gpu,backends}.py)
for more in "$root"/tests/test_triton*.py; do [ ! -e "$more" ] || tests+=("$more"); done
status=0
timeout 360 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" "${tests[@]}" || status=$?
outcome=passed
if [ "$status" -ne 0 ]; then
  outcome="failed ($status)"
  echo "tests $outcome: the timings that follow say so, and may be of wrong results" >&2
fi

step "time"
timeout 120 "$PYTHON" "$root/benchmarks/gpu/timings.py" "$result" --tests "$outcome" || status=$?
step "done"
exit "$status"
