"""``mechanex serve``: a model as a server."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from ..engine.models.resolve import load
from ..errors import ValidationError
from ..serving import serve

__all__ = ["run_serve"]


def run_serve(
    *, model: str, device: str | None, dtype: str | None, tp: bool, log_level: str, **options: Any
) -> None:
    """Loads the model and serves it; the log goes to stderr, one JSON object a line.

    Raises:
        MechanexError: whatever is wrong with the model, the settings or the address.
    """
    given = {name: value for name, value in options.items() if value is not None}
    use_vllm, arguments = given.pop("use_vllm"), given.pop("vllm_args")
    if not use_vllm:
        if arguments:
            raise ValidationError("--vllm-arg goes with --use-vllm.")
        _log_json(log_level)
        split = _splitting(model, device) if tp else {"device": device}
        serve(load(model, backend="transformers", dtype=dtype, **split), **given)
        return
    if tp:
        raise ValidationError(
            "vLLM splits models itself: --vllm-arg=--tensor-parallel-size=2 in the place of --tp."
        )
    from ..vllm.supported import check_installed

    check_installed()
    if device is not None:
        raise ValidationError("vLLM chooses its devices itself: leave --device out.")
    from ..vllm.launch import serve_vllm

    serve_vllm(model, {k: v for k, v in given.items() if v is not False}, dtype=dtype, vllm_args=arguments)


def _splitting(model: str, device: str | None) -> dict[str, Any]:
    """How a model is loaded that is split over the processes of this job."""
    if device is not None:
        raise ValidationError("--tp places the parts of a model itself: leave --device out.")
    if "WORLD_SIZE" not in os.environ:
        raise ValidationError(
            "--tp splits a model over several processes, and there is one: start them with "
            f"torchrun --nproc-per-node 2 -m mechanex serve {model} --tp"
        )
    return {"tp": "auto"}


def _log_json(level: str) -> None:
    from transformers.utils import logging as of_transformers

    from ..server.serve import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Else these write lines of their own to stderr.
    logging.captureWarnings(True)
    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    logging.getLogger("torch").handlers.clear()
    logging.getLogger("torch").propagate = True
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
