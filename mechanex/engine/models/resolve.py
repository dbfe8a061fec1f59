"""From a name or path to a loaded model: what the name means, and which library wraps the model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ValidationError
from ...extras import install_line
from . import adapter_for, lens
from .adapter import undisturbed
from .configuration import text_config
from .lora import adapted, add_adapter
from .pretrained import check_causal, choose_dtype, place, read_config, read_model, read_tokenizer
from .sources import Source, find_source, unreachable
from .split import check_splits, splitting

__all__ = ["BACKENDS", "LoadedModel", "load"]

BACKENDS = ("auto", "transformers", "transformer_lens")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be steered, in eval mode.

    Args:
        model: a transformers model, or a TransformerLens ``TransformerBridge``.
        tokenizer: the model's own tokenizer, with its own defaults, the same for both backends.
        name: the bundled name, the path as it was given, or the Hub name.
        backend: "transformers" or "transformer_lens".
    """

    model: nn.Module
    tokenizer: Any
    name: str
    backend: str

    def __repr__(self) -> str:
        return f"LoadedModel({self.name!r}, backend={self.backend!r}, {type(self.model).__name__})"


def load(
    name_or_path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    layers: str | None = None,
    tp: int | str | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Loads a causal language model by bundled name, local folder, Hub name or TransformerLens short name.

    Args:
        name_or_path: ``mx-tiny``, a folder, ``EleutherAI/pythia-70m``, ``gpt2-small``, …; also a folder or Hub name
            of an adapter of peft's (LoRA), whose base model is loaded with it, as a plain model.
        backend: "transformers" for the plain model, "transformer_lens" for a ``TransformerBridge``; "auto"
            takes the bridge where the ``lens`` extra is installed and can wrap the model, and logs which.
        dtype: "float32", "bfloat16", "float16", "float64", a torch dtype, or "auto" for the checkpoint's own.
            None is "auto" too, except that a float16 checkpoint becomes float32 on the CPU.
        device: where the model goes; None for the GPU if there is one. Not together with ``device_map``.
        tokenizer: a tokenizer object to use instead of the model's own.
        layers: dotted path of the list of decoder layers, for models whose structure isn't recognised; they are
            loaded as plain models.
        tp: "auto" splits the model over the processes that torchrun has started (tensor parallelism), as a plain model;
            all of them then make the same calls.
        **kwargs: for transformers' ``from_pretrained``: ``revision``, ``token``, ``quantization_config``,
            ``device_map``, ``trust_remote_code`` (False unless given), ….

    Raises:
        NotFoundError: there is no such model, or it isn't here and the Hub can't be reached.
        ValidationError: not a decoder-only language model, broken files, a wrong argument, or the ``lens`` or
            ``lora`` extra is missing.
        AuthenticationError: a gated model of the Hub that your account may not read.
    """
    if backend not in BACKENDS:
        raise ValidationError(f"Unknown backend {backend!r}; one of {', '.join(BACKENDS)}.")
    if backend == "transformer_lens":
        lens.require()
        if layers is not None:
            raise ValidationError(
                "layers= names the layers of a plain model; use backend='transformers' with it."
            )
    if tp is not None and backend == "transformer_lens":
        raise ValidationError("TransformerLens can't wrap a model that is split: leave tp= or backend= out.")
    split = splitting(
        tp, {"device": device, **{name: kwargs.get(name) for name in ("device_map", "quantization_config")}}
    )
    use_lens = backend != "transformers" and layers is None and not split and lens.installed()
    source = find_source(name_or_path, ask_transformer_lens=lens.installed())
    kwargs.setdefault("trust_remote_code", False)
    if source.kind == "hub" and unreachable():
        kwargs.setdefault("local_files_only", True)
    parts = adapted(source, kwargs)
    base = source if parts is None else parts.base
    kwargs = kwargs if parts is None else parts.options
    if base.kind == "hub" and unreachable():
        kwargs.setdefault("local_files_only", True)
    if split and parts is not None:
        raise ValidationError(
            f"{source.name} has an adapter of peft's, which can't be split: merge it, or leave tp= out."
        )
    if dtype is None:
        dtype = kwargs.pop("torch_dtype", None)
    wanted = place(device, kwargs)

    config = read_config(base, kwargs)
    check_causal(base, config)
    if split:
        check_splits(source.name, text_config(config))
    reason = None
    if use_lens:
        reason = lens.unsuitable(config) if parts is None else "it is a model with an adapter of peft's."
    if reason is not None:
        if backend == "transformer_lens":
            raise ValidationError(f"TransformerLens can't wrap {source.name}: {reason}")
        _log.warning("%s is loaded as a plain Hugging Face model: %s", source.name, reason)
        use_lens = False
    own_tokenizer = (
        tokenizer
        if tokenizer is not None
        else read_tokenizer(base if parts is None else parts.tokenizer, kwargs)
    )
    precision = choose_dtype(dtype, config, wanted)

    def read() -> nn.Module:
        model: nn.Module = read_model(base, precision, wanted, kwargs | split)
        if parts is not None and parts.adapter is not None:
            add_adapter(model, parts.adapter)
        return model

    model = read()
    if use_lens:  # in place: what the plain model computes is noted first
        try:
            with undisturbed(model):
                plain = lens.watched(model)
            model = lens.wrap(model, source.name, own_tokenizer)
            with undisturbed(model):
                lens.same(model, plain)
        except Exception as error:  # the bridge of an architecture may fail in any way
            if backend == "transformer_lens":
                raise ValidationError(
                    f"TransformerLens could not wrap {source.name}: {type(error).__name__}: {error} "
                    "Load it with backend='transformers'; steering works the same way."
                ) from error
            _log.warning("%s is loaded as a plain model; TransformerLens failed: %s", source.name, error)
            use_lens, model = False, read()  # a failed wrapping may have left parts replaced
    adapter = adapter_for(model, layers=layers)
    adapter.tokenizer, adapter.model_id = own_tokenizer, source.name
    _say_what(source, backend, use_lens)
    return LoadedModel(model, own_tokenizer, source.name, "transformer_lens" if use_lens else "transformers")


def _say_what(source: Source, backend: str, used_lens: bool) -> None:
    if used_lens:
        why = "; pass backend='transformers' for the plain model" if backend == "auto" else ""
        _log.info("Loaded %s as a TransformerLens TransformerBridge%s.", source.name, why)
        return
    missing = backend == "auto" and not lens.installed()
    why = f"; for a TransformerBridge: {install_line('lens')}" if missing else ""
    _log.info("Loaded %s as a plain Hugging Face model%s.", source.name, why)
