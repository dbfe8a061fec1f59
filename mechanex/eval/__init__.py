"""Steered models in EleutherAI's lm-evaluation-harness, as its model type ``mechanex``.

In Python, ``lm_eval.simple_evaluate(model=LM("mx-tiny", vector=…, strength=…), tasks=…)``. The harness knows only the
model types that were imported, so in a shell ``python -m mechanex.eval`` takes the place of ``lm_eval``::

    python -m mechanex.eval --model mechanex \\
        --model_args pretrained=mx-tiny,vector=calm.safetensors,strength=2 --tasks …
"""

from __future__ import annotations

from importlib.util import find_spec

from ..extras import install_line

if find_spec("lm_eval") is None:
    raise ModuleNotFoundError(
        f"mechanex.eval needs the lm-evaluation-harness, which is not installed: {install_line('eval')}",
        name="lm_eval",
    )

from .lm import LM

__all__ = ["LM"]
