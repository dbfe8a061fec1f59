#!/usr/bin/env bash
# Run the op tests on a build of the CPU kernels that checks every access and every undefined operation.
# Usage: scripts/sanitize.sh [pytest options]. PYTHON: an interpreter with the test dependencies.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

checks=-fsanitize=address,undefined
"$root/scripts/stage.sh" "$work/site" -DMECHANEX_CUDA=OFF -DCMAKE_CXX_COMPILER=g++ \
  "-DCMAKE_CXX_FLAGS=$checks -fno-sanitize-recover=all -fno-omit-frame-pointer -g" \
  "-DCMAKE_MODULE_LINKER_FLAGS=$checks" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# The interpreter itself is not instrumented: its own leaks say nothing, and the library must come first. Without the C++
# library beside it, ASan finds no exception to intercept.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$work/site PYTHONDONTWRITEBYTECODE=1
cd "$work"
"$PYTHON" - <<'PY'
import mechanex._native

built = open(mechanex._native.__file__, "rb").read()
assert b"__asan_init" in built and b"__ubsan" in built, f"not the instrumented module: {mechanex._native.__file__}"
PY
"$PYTHON" -m pytest -q -p no:cacheprovider "$root/tests/test_steer_op.py" "$root/tests/test_steer_many.py" \
  "$root/tests/test_logprob_op.py" \
  -k "native or level or instruction" "$@"
