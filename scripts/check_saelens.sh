#!/usr/bin/env bash
# Compares what the readers of sparse autoencoders compute with SAELens itself, in a folder of packages of its own:
# SAELens wants a TransformerLens before 4. torch and transformers stay those that are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
TARGET=${TARGET:-build/saelens}

if [ ! -d "$TARGET/sae_lens" ]; then
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --target "$TARGET" \
    sae-lens==6.54.12 "transformer-lens<4" plotly plotly-express "babe<0.0.8" simple-parsing docstring-parser tenacity \
    python-dotenv patsy statsmodels better-abc py2store config2py graze dol i2
fi
PYTHONPATH="$TARGET${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m pytest -q -p no:xdist tests/test_saelens.py -rA | sed -n '/e-0\|e+0\|FAILED\|passed/p' | sort | uniq -c
