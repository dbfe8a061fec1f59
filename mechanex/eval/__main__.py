"""``python -m mechanex.eval``: the harness's own command line, with the model type ``mechanex`` known to it."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

from . import LM

__all__ = ["LM"]

if __name__ == "__main__":
    cli_evaluate()
