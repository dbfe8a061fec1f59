#!/usr/bin/env bash
# Build, test and time on a machine with a GPU, without a network, from what such a machine usually has: torch, transformers,
# pytest, pybind11, cmake and, for the CUDA sources, nvcc. All parts together take under nine minutes: LIMIT seconds, 520 if it
# is not set. What is then still to be done is skipped, and said to be.
#
#   benchmarks/gpu/run.sh [RESULT.json or folder] [--only PART,... | --ranks] [-- options of the timed part]
#
# Parts: build, test, steer, logprob, work and decode. One more, ranks, runs only when it is asked for: several processes, and
# models that are split over them, on a machine with several GPUs; LIMIT doesn't bound it. --ranks is --only build,ranks.
# Without "build" the run uses what was built before and builds only if there is nothing. Where a test fails the times are
# taken too, marked as such; a part that fails or takes too long doesn't stop the ones that follow. After timed parts the goals
# that were missed are printed, and what auto takes at every size. The exit status is that of the last part that failed.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
result=benchmarks/results
parts=build,test,steer,logprob,work,decode
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --only)
      [ $# -ge 2 ] || { echo "--only takes parts, as in --only steer,decode; see the head of $0" >&2; exit 2; }
      parts=$2
      shift 2
      ;;
    --ranks) parts=build,ranks; shift ;;
    --) shift; options=("$@"); break ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *) result=$1; shift ;;
  esac
done
for part in ${parts//,/ }; do
  case $part in build | test | steer | logprob | work | decode | ranks) ;; *) echo "unknown part $part; see the head of $0" >&2; exit 2 ;; esac
done
case $result in *.json) mkdir -p "$(dirname "$result")" ;; *) mkdir -p "$result" ;; esac
result=$(realpath "$result")
export PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
site=$root/build/gpu/site
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wanted() { case ,$parts, in *,$1,*) return 0 ;; *) return 1 ;; esac }
limit=${LIMIT:-520}
status=0
# Runs a command for at most so many seconds and no longer than there is time for all; skips it if too little is left.
within() {
  local seconds=$1 left=$((limit - SECONDS))
  shift
  if [ "$left" -lt 20 ]; then
    echo "skipped: $SECONDS of $limit s are over" >&2
    return 124
  fi
  timeout "$((seconds < left ? seconds : left))" "$@"
}
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

if wanted build || [ ! -d "$site" ]; then
  step build
  command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export PATH=/usr/local/cuda/bin:$PATH
  definitions=()
  if command -v nvcc >/dev/null; then
    nvcc --version | tail -n 2
    # Code for the GPU at hand; without one, the list of a build from source.
    if command -v nvidia-smi >/dev/null; then
      capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || capability=
      [[ ! $capability =~ ^[0-9]+$ ]] || definitions+=("-DMECHANEX_CUDA_ARCHITECTURES=$capability")
    fi
  else
    echo "no nvcc: built without the CUDA kernels"
  fi
  rm -rf "$site"
  export JOBS=${JOBS:-$(nproc)}
  within 300 scripts/stage.sh "$site" "${definitions[@]}" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
fi

# From another folder: the source tree, which has no compiled modules, would come before the staged package.
export PYTHONPATH=$site HF_HUB_OFFLINE=1 MECHANEX_HOME=$work/home PYTHONDONTWRITEBYTECODE=1
cd "$work"
! wanted build || "$PYTHON" -m mechanex

outcome="not run"
if wanted test; then
  step test
  workers=()
  if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n "${WORKERS:-8}"); fi
  tests=("$root"/tests/test_{steer_op,steer_many,steer_table,steer_gpu,logprob_op,logprob_gpu,backends}.py)
  for more in "$root"/tests/test_{triton,static}*.py; do [ ! -e "$more" ] || tests+=("$more"); done
  outcome=passed
  within 180 "$PYTHON" -m pytest -q -m "not long" -p no:cacheprovider "${workers[@]}" "${tests[@]}" || status=$?
  if [ "$status" -ne 0 ]; then
    outcome="failed ($status)"
    echo "tests $outcome: the timings that follow say so, and may be of wrong results" >&2
  fi
fi

if wanted ranks; then
  step ranks
  begun=$SECONDS
  timeout 480 "$PYTHON" -m pytest -q -m "not long" -p no:cacheprovider "$root"/tests/test_{ranks,split}.py || status=$?
  timeout 300 "$PYTHON" "$root/benchmarks/ranks.py" --rounds 1 || status=$?
  timeout 300 "$PYTHON" "$root/benchmarks/ranks.py" --rounds 1 --split || status=$?
  limit=$((limit + SECONDS - begun))
fi

timed=
touch "$work/begun"
for part in steer:60 logprob:120 work:120 decode:200; do
  name=${part%:*}
  wanted "$name" || continue
  timed=1
  step "$name"
  within "${part#*:}" "$PYTHON" "$root/benchmarks/gpu/$name.py" "$result" --tests "$outcome" "${options[@]}" || status=$?
done
if [ -n "$timed" ]; then
  step goals
  written=$(find "$result" -maxdepth 1 -name '*.json' -newer "$work/begun" 2>/dev/null) || true
  [ -n "$written" ] || echo "nothing was written, so there is nothing to judge"
  while IFS= read -r file; do
    [ -z "$file" ] || "$PYTHON" "$root/benchmarks/gpu/record.py" "$file" || status=$?
  done <<<"$written"
fi
step "done"
exit "$status"
