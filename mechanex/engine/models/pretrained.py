"""Reading a causal model's configuration, tokenizer and weights with transformers, with errors that help."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import transformers

from ..._private.transformers import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from ...errors import MechanexError, ValidationError
from ...launched import local_rank
from ..sharded import is_split
from .sources import Source, explain

__all__ = ["check_causal", "choose_dtype", "place", "read_config", "read_model", "read_tokenizer"]

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
}
# from_pretrained arguments that configurations and tokenizers take as well.
SHARED = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def place(device: str | torch.device | None, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that the model is moved to; None where ``device_map`` or a quantizer places it.

    Raises:
        ValidationError: no such device, or both ``device`` and ``device_map``.
    """
    if kwargs.get("device_map") is not None:
        if device is not None:
            raise ValidationError("Give device or device_map, not both.")
        return None
    if device is None:
        if kwargs.get("quantization_config") is not None:
            return None
        if torch.cuda.is_available():
            # Of several processes on a machine each has a GPU of its own, as far as they go.
            own = local_rank()
            return torch.device("cuda" if own is None else f"cuda:{own % torch.cuda.device_count()}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValidationError(f"Unknown device {device!r}; for example 'cpu', 'cuda' or 'cuda:1'.") from None
    if chosen.type == "meta":
        raise ValidationError("A model on the meta device has no weights to run; use 'cpu' or 'cuda'.")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(chosen.type, True):
        raise ValidationError(f"This torch has no {chosen.type} device here; use device='cpu', or none.")
    return chosen


def choose_dtype(
    asked: str | torch.dtype | None, config: Any, device: torch.device | None
) -> str | torch.dtype:
    """The dtype to load in: what was asked for, else the checkpoint's, but not float16 on a CPU.

    Raises:
        ValidationError: not the name of a floating dtype.
    """
    if isinstance(asked, str):
        if asked == "auto":
            return asked
        if asked not in DTYPES:
            known = ", ".join(map(repr, DTYPES))
            raise ValidationError(f"Unknown dtype {asked!r}; 'auto', {known} or a torch dtype.")
        return DTYPES[asked]
    if asked is not None:
        if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
            raise ValidationError(f"A model's dtype is a floating torch dtype or its name; got {asked!r}.")
        return asked
    half = getattr(config, "dtype", None) == torch.float16
    return torch.float32 if half and device is not None and device.type == "cpu" else "auto"


def _read(source: Source, part: str, read: Callable[[], _T]) -> _T:
    """What ``read`` returns, its errors told in our words and without the chain below them."""
    problem: MechanexError | None = None
    try:
        return read()
    except MechanexError:
        raise
    except Exception as error:  # transformers and safetensors have no common base for what they raise
        _log.debug("Reading the %s of %s failed", part, source.name, exc_info=True)
        problem = explain(error, source, part)
    raise problem


def read_config(source: Source, kwargs: dict[str, Any]) -> Any:
    """The model's configuration.

    Raises:
        MechanexError: there is none, or transformers can't read it.
    """
    if kwargs.get("config") is not None:
        return kwargs["config"]
    read = transformers.AutoConfig.from_pretrained
    return _read(source, "configuration", lambda: read(source.location, **_shared(kwargs)))


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in SHARED if name in kwargs}


def check_causal(source: Source, config: Any) -> None:
    """Raises a ValidationError for a model that isn't a decoder-only language model."""
    kind = getattr(config, "model_type", type(config).__name__)
    problem = None
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        problem = "an encoder (masked language model)"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _has_own_code(config):
        problem = "not a language model that transformers can load for generation"
    if problem is not None:
        raise ValidationError(
            f"{source.name} (model type {kind!r}) is {problem}. Steering needs a decoder-only (causal) "
            "language model, such as a Llama, Qwen, Gemma, Mistral or GPT-2 model."
        )


def _has_own_code(config: Any) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def read_tokenizer(source: Source, kwargs: dict[str, Any]) -> Any:
    """The model's tokenizer, with its own defaults.

    Raises:
        MechanexError: there is none that can encode text.
    """
    missing = ValidationError(
        f"{source.name} has no tokenizer that can be read from {source.location}. Save one there with "
        "tokenizer.save_pretrained(folder), or pass tokenizer=…."
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **_shared(kwargs))
    except Exception as error:  # as in _read
        if source.kind == "hub":
            problem = explain(error, source, "tokenizer")
        else:
            problem = missing
            problem.details = str(error)
    else:
        # Some classes make an empty tokenizer when there are no files.
        if tokenizer("a", add_special_tokens=False)["input_ids"]:
            return tokenizer
        problem = missing
    raise problem


def read_model(
    source: Source, dtype: str | torch.dtype, device: torch.device | None, kwargs: dict[str, Any]
) -> Any:
    """The transformers model in eval mode, on ``device`` unless something else has placed it.

    Raises:
        MechanexError: unreadable weights, or a checkpoint without all the weights of a causal model.
    """
    options = {**kwargs, "dtype": dtype, "output_loading_info": True}
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    model: Any
    with _no_progress_bar() if source.kind == "bundled" else nullcontext():
        model, info = _read(source, "weights", lambda: read(source.location, **options))
    if info["missing_keys"]:
        raise ValidationError(
            f"The checkpoint {source.name} lacks weights that a causal language model needs: "
            f"{', '.join(sorted(info['missing_keys'])[:5])}. They would be random; "
            "load a checkpoint with a language head."
        )
    model.eval()
    placed = (
        getattr(model, "hf_device_map", None) is not None
        or getattr(model, "is_quantized", False)
        or is_split(model)
    )
    return model if device is None or placed else model.to(device)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """No bar for a model that loads in an instant."""
    bars: Any = transformers.utils.logging
    was_shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            bars.enable_progress_bar()
