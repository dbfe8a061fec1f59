#!/usr/bin/env bash
# The wheel in dist/, as a stranger gets it: which system libraries it needs, and the op tests in a fresh environment from
# another folder. Usage: scripts/check_wheel.sh [wheel]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
wheel=$(realpath "${1:-$(ls "$root"/dist/mechanex-*.whl)}")
case $wheel in
  *-none-any.whl) echo "the wheel holds no compiled module: $wheel" >&2; exit 1 ;;
esac
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"${PYTHON:-python3}" -m venv "$fresh/venv"
pip() { "$fresh/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install -c constraints.txt --upgrade pip
pip install "${TORCH:-torch==2.13.0}"
pip install -c constraints.txt "$wheel" pytest pytest-xdist hypothesis auditwheel

# Only system libraries: no torch, no OpenMP.
unzip_to=$fresh/unpacked
"$fresh/venv/bin/python" -m zipfile -e "$wheel" "$unzip_to"
for module in "$unzip_to"/mechanex/_native*.so; do
  needed=$(readelf -d "$module" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | tr '\n' ' ')
  echo "$(basename "$module") needs: $needed"
  case $needed in *torch* | *gomp* | *iomp* | *cudart*) echo "that is more than the system's libraries" >&2; exit 1 ;; esac
done
diff -r "$root/mechanex/server/page/static" "$unzip_to/mechanex/server/page/static"  # the playground
PATH=$fresh/venv/bin:$PATH "$fresh/venv/bin/python" -m auditwheel show "$wheel" | tail -n 12

mkdir "$fresh/tests"
cp tests/conftest.py tests/optable.py tests/tolerances.py tests/test_steer_op.py tests/test_steer_many.py "$fresh/tests"
cd "$fresh/tests"
unset PYTHONPATH VIRTUAL_ENV
export MECHANEX_HOME=$fresh/home HF_HUB_OFFLINE=1
where=$("$fresh/venv/bin/python" -c "import mechanex; print(mechanex.__file__)")
case $where in "$fresh"/*) ;; *) echo "the tests would not see the wheel but $where" >&2; exit 1 ;; esac
"$fresh/venv/bin/python" -m mechanex
"$fresh/venv/bin/mechanex" --help >/dev/null
"$fresh/venv/bin/python" -m pytest -q -p no:cacheprovider -n 2 test_steer_op.py test_steer_many.py
