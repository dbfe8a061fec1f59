"""Hugging Face causal models: where their blocks, norm and unembedding are, found by structure and not by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..._private.torch import without_hooks
from ...errors import ValidationError
from ...ops.head import Head
from ..attaching import after, before
from ..sharded import check_whole
from ..stream import Stream, residual, with_residual
from .adapter import Handles, ModelAdapter, ResidualHook, undisturbed
from .configuration import text_config
from .kept import Kept

__all__ = ["HuggingFaceAdapter", "find_layers"]

LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "model.decoder.layers",
    "decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "transformer.layers",
    "gpt_neox.layers",
    "backbone.layers",
    "layers",
    "h",
    "blocks",
)
FINAL_NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "ln_f",
    "norm_f",
    "final_norm",
    "ln_out",
    "norm_out",
)


def find_layers(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The path and list of the decoder layers.

    Args:
        model: a causal language model.
        path: dotted path of the list, for models whose structure isn't recognised.

    Raises:
        ValidationError: nothing was found; the text says what was looked for and how to name the list.
    """
    if path is not None:
        found = _descend(model, path)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ValidationError(
                f"layers={path!r} must name a ModuleList of decoder layers in {type(model).__name__}; it is "
                f"{type(found).__name__ if found is not None else 'not there'}. {_candidates(model)}"
            )
        return path, found
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValidationError(
            f"{type(model).__name__} is an encoder-decoder model; steering needs a decoder-only (causal) model."
        )
    for candidate in LAYER_PATHS:
        found = _descend(model, candidate)
        if isinstance(found, nn.ModuleList) and len(found):
            return candidate, found
    depth = _configured_depth(model)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) == 1:
        return lists[0]
    raise ValidationError(
        f"The decoder layers of {type(model).__name__} were not found. Looked for {', '.join(LAYER_PATHS)}, "
        f"and for a single ModuleList of {depth} modules. Name the list yourself, for example "
        f"adapter_for(model, layers='transformer.my_blocks'). {_candidates(model)}"
    )


def _descend(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _configured_depth(model: nn.Module) -> int | None:
    return getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", None)


def _candidates(model: nn.Module) -> str:
    lists = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n]
    return f"Its module lists: {', '.join(lists[:8]) or 'none'}."


def _that_run(model: nn.Module, listed: list[nn.Module]) -> list[nn.Module]:
    """The layers of a list that a pass goes through: some checkpoints append blocks that predict further tokens.

    Raises:
        ValidationError: that can't be seen, or they aren't the first of the list.
    """
    ran: list[nn.Module] = []
    embed: Any = getattr(model, "get_input_embeddings", lambda: None)()
    device = next((w.device for w in (model if embed is None else embed).parameters()), None)
    handles, problem = Handles(), ""
    try:
        with torch.no_grad(), without_hooks(model), undisturbed(model):
            for block in listed:
                handles.add(before(block, lambda module, *_: ran.append(module)))
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    except Exception as error:  # a model's own code may raise anything
        problem = f" ({type(error).__name__}: {error})"
    finally:
        handles.remove()
    if problem or not ran or ran != listed[: len(ran)]:
        raise ValidationError(
            f"{type(model).__name__} lists {len(listed)} decoder layers and its configuration names fewer; a pass over "
            f"two tokens doesn't tell which of them run{problem}. Set num_hidden_layers, or name the list of the "
            "layers that run: adapter_for(model, layers='…')."
        )
    return ran


def is_traced(fn: ResidualHook) -> bool:
    """Whether compilers may look into an edit: it says so itself, by an attribute ``traced``."""
    return bool(getattr(fn, "traced", False))


def _residual_hook(stream: Stream, fn: ResidualHook) -> Any:
    """A forward pre-hook for a decoder layer: ``fn`` of its hidden state takes its place, other arguments are kept."""

    width = stream.width

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Called at every layer of every step. What layers nearly always get is told without another call.
        if args and type(hidden := args[0]) is Tensor and hidden.dim() == 3 and hidden.shape[2] == width:
            new = fn(hidden)
            return None if new is None else ((new, *args[1:]), kwargs)
        hidden = residual(args, kwargs)
        stream.check(hidden)
        new = fn(hidden)
        return None if new is None else with_residual(new, args, kwargs)

    return hook


def _leaving_hook(hook: Callable[..., Any], with_kwargs: bool) -> Any:
    """A forward hook that shows a block's output to a pre-hook, as if another block came next."""

    def leave(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple)
        hidden = output[0] if several else output
        answer = hook(module, (hidden,), {}) if with_kwargs else hook(module, (hidden,))
        if answer is None:
            return None
        args = answer[0] if with_kwargs else answer
        new = args[0] if isinstance(args, tuple) else args
        return (new, *output[1:]) if several else new

    return leave


class HuggingFaceAdapter(ModelAdapter):
    """A transformers causal model.

    Args:
        model: the model.
        layers: dotted path of its list of decoder layers, where it isn't found by itself.
    """

    def __init__(self, model: nn.Module, *, layers: str | None = None) -> None:
        self.model = self.hf_model = model
        self.kept = Kept()
        self._locate(layers)
        self.tokenizer = getattr(model, "tokenizer", None)

    def _locate(self, layers: str | None) -> None:
        self.kept.override = layers
        self._path, found = find_layers(self.hf_model, layers)
        self._listed = list(found)
        depth = _configured_depth(self.hf_model)
        longer = depth is not None and len(found) > depth
        self.layers = _that_run(self.hf_model, self._listed) if longer else self._listed
        parent, _, _ = self._path.rpartition(".")
        self._trunk: nn.Module = _descend(self.hf_model, parent) if parent else self.hf_model
        config = self.config
        self.d_model = _width(config, self._part("get_input_embeddings"))
        self.model_id = getattr(self.hf_model, "name_or_path", "") or type(self.hf_model).__name__

    @property
    def trunk(self) -> nn.Module:
        return self._trunk

    def is_current(self) -> bool:
        found = _descend(self.hf_model, self._path)
        return isinstance(found, nn.ModuleList) and list(found) == self._listed

    def on_residual(self, layer: int, fn: ResidualHook) -> Any:
        return self.on_block(layer, _residual_hook(self.stream, fn), with_kwargs=True, traced=is_traced(fn))

    def on_block(
        self, layer: int, hook: Callable[..., Any], *, with_kwargs: bool, traced: bool = False
    ) -> Any:
        index = self.layer_index(layer)
        if index == self.n_layers:
            return after(self.layers[-1], _leaving_hook(hook, with_kwargs), traced=traced)
        return before(self.layers[index], hook, kwargs=with_kwargs, traced=traced)

    @property
    def head(self) -> nn.Module | None:
        return self._part("get_output_embeddings")

    @property
    def unembedding(self) -> Head:
        head: Any = self.head
        if head is None:
            raise ValidationError(
                f"{type(self.hf_model).__name__} has no language head; load it with AutoModelForCausalLM."
            )
        matrix = self._matrix
        check_whole(self.hf_model, "The unembedding itself can't be used")
        if matrix is None:
            raise ValidationError(
                f"The language head of {self.model_id} is a {type(head).__name__} and no single matrix: what needs the "
                "unembedding itself can't be computed for it."
            )
        config = self.config
        scale = 1.0
        if isinstance(multiplier := getattr(config, "logit_scale", None), int | float):
            scale = float(multiplier)
        if isinstance(divisor := getattr(config, "logits_scaling", None), int | float):
            scale /= float(divisor)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(matrix, getattr(head, "bias", None), scale, softcap)

    @cached_property
    def _tail(self) -> list[nn.Module]:
        norms = [n for name in FINAL_NORMS if isinstance(n := getattr(self._trunk, name, None), nn.Module)]
        out = getattr(self._trunk, "project_out", None)
        return norms[:1] + ([out] if isinstance(out, nn.Module) else [])

    def finish(self, hidden: Tensor) -> Tensor:
        for module in self._tail:
            hidden = module(hidden)
        return hidden


def _width(config: Any, embeddings: Any) -> int:
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    if isinstance(weight := getattr(embeddings, "weight", None), Tensor):
        return int(weight.shape[1])
    raise ValidationError(
        f"The model's width was not found in its {type(config).__name__} or its embeddings."
    )
