#!/usr/bin/env bash
# Build the compiled modules with cmake alone and lay the package out in SITE, for a run that must not use an installed one.
# Usage: scripts/stage.sh SITE [cmake -D options]. Then: PYTHONPATH=SITE python ..., from outside the source tree.
# PYTHON: the interpreter (needs pybind11). The build goes to SITE.build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=$(realpath -m "$1")
shift
python=${PYTHON:-python3}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

cmake -S "$root" -B "$site.build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" "$@"
cmake --build "$site.build" --parallel "${JOBS:-2}"
cmake --install "$site.build" --prefix "$site"
(cd "$root" && find mechanex -name '*.so' -prune -o -name __pycache__ -prune -o -type f -print0 | xargs -0 cp --parents -t "$site")
cp -r "$root/kernels" "$site/mechanex/kernels"
# The hook of an editable install would answer before PYTHONPATH, in subprocesses too.
cat >"$site/sitecustomize.py" <<'PY'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
PY
