#!/usr/bin/env bash
# Build the CPU kernels with another compiler: they must pass the op's tests, and give the bits of the installed build.
# Usage: scripts/second_compiler.sh [compiler, by default clang++]. PYTHON: an interpreter with the test dependencies.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
compiler=${1:-clang++}
export PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
if ! command -v "$compiler" >/dev/null; then
  echo "second compiler: SKIPPED, no $compiler"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$root/scripts/stage.sh" "$work/site" -DMECHANEX_CUDA=OFF "-DCMAKE_CXX_COMPILER=$compiler" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
cd "$work"
export MECHANEX_HOME=$work/home PYTHONDONTWRITEBYTECODE=1
"$PYTHON" "$root/tests/native_bits.py" >installed
export PYTHONPATH=$work/site
"$PYTHON" -c "import mechanex._native as n; assert n.__file__.startswith('$work'), n.__file__"
"$PYTHON" "$root/tests/native_bits.py" >staged
"$compiler" --version | head -n 1
diff installed staged || { echo "the two builds differ in their bits (digests by instruction set above)" >&2; exit 1; }
sed 's/^/same bits: /' staged | cut -c 1-40
"$PYTHON" -m pytest -q -p no:cacheprovider "$root/tests/test_steer_op.py" "$root/tests/test_steer_many.py" \
  "$root/tests/test_logprob_op.py" -k "neighbours or instruction"
