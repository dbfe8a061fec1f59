#!/usr/bin/env bash
# The tests that depend on transformers most, with the oldest version that pyproject.toml lets in and the newest of the
# index; or with the versions named as arguments. Each has an environment in build/versions that adds to .venv only what
# that version needs otherwise; torch stays the same.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME

python=.venv/bin/python
tests=(tests/test_positions.py tests/test_hooks.py tests/test_plan.py tests/test_beam.py tests/test_beam_rows.py
  tests/test_generation.py tests/test_pack.py tests/test_forward.py)

oldest() { sed -n 's/^ *"transformers>=\([0-9.]*\)",$/\1/p' pyproject.toml; }
newest() {
  "$python" -m pip --disable-pip-version-check install -q --dry-run --no-deps --upgrade --report - transformers |
    "$python" -c 'import json, sys
found = json.load(sys.stdin)["install"]
from importlib.metadata import version
print(found[0]["metadata"]["version"] if found else version("transformers"))'
}

# An environment whose own packages come before those of .venv.
environment() {
  local home=build/versions/$1
  [ -x "$home/bin/python" ] || "$python" -m venv --without-pip "$home"
  local own base torch
  own=$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  base=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
  echo "import site; site.addsitedir('$base')" >"$own/base.pth"
  # pip warns of packages of .venv that want another version; they are not what is tested here.
  "$home/bin/python" -m pip --disable-pip-version-check install -q "transformers==$1" "torch==$torch" 2>&1 |
    grep -v -e WARNING -e 'dependency resolver' -e 'is incompatible' || true
  "$home/bin/python" - "$1" "$torch" <<'CHECK'
import sys, torch, transformers
assert transformers.__version__ == sys.argv[1], f"transformers is {transformers.__version__}, not {sys.argv[1]}"
assert torch.__version__ == sys.argv[2], f"torch is {torch.__version__}, not {sys.argv[2]}"
CHECK
}

versions=("$@")
[ $# -gt 0 ] || versions=("$(oldest)" "$(newest)")
for version in "${versions[@]}"; do
  [ -n "$version" ] || { echo "no version of transformers was found in pyproject.toml or the index" >&2; exit 1; }
  echo "== transformers $version (${SECONDS} s)"
  environment "$version"
  # shellcheck disable=SC2086
  "build/versions/$version/bin/python" -m pytest -q -m "not long" -p no:cacheprovider ${PYTEST_ARGS:--n 3 --dist worksteal} "${tests[@]}"
done
echo "== done (${SECONDS} s)"
