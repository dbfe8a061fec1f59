#!/usr/bin/env bash
# Check what compilers made of the kernels. Baseline objects hold no AVX code, and the objects of an instruction set share no
# function with them (the linker could keep the wrong copy). Where nvcc is found: the CUDA module compiles, no kernel spills,
# it loads beside the torch that is installed,
# and its architectures are listed. PYTHON: an interpreter with pybind11.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$@" >&2; exit 1; }

"$root/scripts/stage.sh" "$work/site" -DCMAKE_CUDA_FLAGS=-Xptxas=-v >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
objects=$work/site.build/CMakeFiles

# Every AVX instruction, of any width, has a name in v; those of AVX-512 may name a mask register only.
avx() { objdump -d --no-show-raw-insn "$@" | grep -cE '^ *[0-9a-f]+:\s+(v[a-z]|k(mov|and|or|xor|not|unpck|test))|%[yz]mm' || true; }

if [ "$(uname -m)" != x86_64 ]; then
  echo "instruction sets: nothing to check on $(uname -m)"
elif ! command -v objdump >/dev/null || ! command -v nm >/dev/null; then
  echo "instruction sets: SKIPPED, objdump and nm are missing (install binutils)"
  [ -z "${CI:-}" ] || exit 1
else
  for object in "$objects"/cpu_generic.dir/csrc/cpu/*.o "$objects"/_native.dir/csrc/*.o "$objects"/_native.dir/csrc/cpu/*.o; do
    found=$(avx "$object")
    [ "$found" -eq 0 ] || fail "$found AVX instructions in the baseline object $object"
    echo "baseline: no AVX instruction in ${object#"$objects"/}"
  done
  for level in generic avx2 avx512; do
    for object in "$objects/cpu_$level.dir"/csrc/cpu/*.o; do
      names=$(nm --defined-only --extern-only --format=posix "$object" | cut -d' ' -f1)
      # steer.cpp came first and has the plain name; every other source puts its own between.
      source=$(basename "$object" .cpp.o)
      table=mechanex_cpu_${source}_$level
      [ "$source" != steer ] || table=mechanex_cpu_$level
      [ "$names" = "$table" ] || fail "${object#"$objects"/} defines more than its table:" $names
      # A check that can't see AVX code would pass above, too.
      [ "$level" = generic ] || [ "$(avx "$object")" -gt 100 ] || fail "no AVX code seen in ${object#"$objects"/}"
    done
    echo "level $level: one external symbol each"
  done
fi

module=$(find "$work/site/mechanex" -name '_native_cuda*.so')
if [ -z "$module" ]; then
  if command -v nvcc >/dev/null; then grep -i cuda "$work/log" >&2; fail "nvcc is there, but the CUDA module was not built"; fi
  echo "CUDA: SKIPPED, no nvcc"
  exit 0
fi
kernels=$(grep -c 'bytes stack frame' "$work/log") || fail "no register report from ptxas"
spills=$(grep 'bytes stack frame' "$work/log" | grep -vc ' 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads') || true
[ "$spills" -eq 0 ] || fail "$spills of $kernels kernels spill registers"
echo "CUDA: $kernels kernels compiled, none spills; module of $(stat -c %s "$module") bytes"
if readelf -d "$module" | grep NEEDED | grep -E 'cuda|torch|c10|gomp'; then fail "the CUDA module needs a library that only torch or CUDA has"; fi
# It loads beside any torch, one for the CPU too, and says there what is missing.
(cd "$work" && PYTHONPATH=$work/site "$PYTHON" -c '
import torch

import mechanex._native_cuda as module
from mechanex.backends.native.modules import missing_cuda

print(f"CUDA: loads beside torch {torch.__version__}: runtime {module.runtime_version()}, {missing_cuda() or torch.cuda.get_device_name()}")')
lister=$(command -v cuobjdump || ls "$(dirname "$(readlink -f "$(command -v nvcc)")")/cuobjdump" 2>/dev/null ||
  "$PYTHON" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0] + "/backends/nvidia/bin/cuobjdump")' 2>/dev/null || true)
if [ -x "$lister" ]; then
  "$lister" --list-elf --list-ptx "$module" | sed 's/^/CUDA: /'
else
  echo "CUDA: no cuobjdump to list the architectures; asked for: $(cd "$work" && PYTHONPATH=$work/site "$PYTHON" -c 'import mechanex._native_cuda as m; print(m.architectures)')"
fi
