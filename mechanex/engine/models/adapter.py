"""What the engine needs to know of a model, whatever library built it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..positions import PositionTracker, read_call

__all__ = ["Handles", "ModelAdapter", "ResidualHook", "Unembedding"]

ResidualHook = Callable[[Tensor], "Tensor | None"]


class Handles:
    """Several hook registrations that are removed together, latest first; removing twice does nothing."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def add(self, handle: Any) -> None:
        """Takes charge of something with a ``remove()`` method."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Removes every hook."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


@dataclass(frozen=True)
class Unembedding:
    """From the last hidden state to logits: softcap·tanh(scale·(Wh + bias)/softcap).

    Args:
        weight: [n_vocab, d_model].
        bias: [n_vocab] or None.
        scale: multiplies the products.
        softcap: bounds the logits, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., n_vocab] logits of ``hidden`` [..., d_model], in the weight's dtype as the model computes them."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class ModelAdapter(ABC):
    """A causal language model as the engine sees it.

    Attributes:
        model: the object the user gave.
        hf_model: the transformers module inside it (the same object for a plain Hugging Face model).
        layers: the decoder layers, in order.
        tokenizer: the model's tokenizer if it carries one, else None.
        model_id: its name or path, for metadata and messages.
        d_model: width of the residual stream.
        findings: what :mod:`mechanex.engine.selfcheck` found out about the model.
    """

    model: nn.Module
    hf_model: nn.Module
    layers: list[nn.Module]
    tokenizer: Any
    model_id: str
    d_model: int
    findings: dict[str, Any]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding weights."""
        return self._reference_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the model's weights."""
        return self._reference_weight().dtype

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        config: Any = self.hf_model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _reference_weight(self) -> Tensor:
        embeddings = self._part("get_input_embeddings")
        weights = list((self.hf_model if embeddings is None else embeddings).parameters())
        return next((w for w in weights if torch.is_floating_point(w)), weights[0])

    def _part(self, getter: str) -> nn.Module | None:
        """What a transformers getter such as ``get_input_embeddings`` gives, if the model has it."""
        get: Any = getattr(self.hf_model, getter, None)
        part = get() if callable(get) else None
        return part if isinstance(part, nn.Module) else None

    def layer_index(self, layer: int) -> int:
        """The layer as 0 … n_layers - 1; negatives count from the end.

        Raises:
            ValidationError: there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValidationError(f"A layer is an int; got {layer!r}.")
        if not -self.n_layers <= layer < self.n_layers:
            raise ValidationError(
                f"Layer {layer} does not exist: {self.model_id} has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1} (negatives count from the end)."
            )
        return layer % self.n_layers

    @abstractmethod
    def on_residual(self, layer: int, fn: ResidualHook) -> Any:
        """Calls ``fn`` with the residual stream [B, T, d_model] entering block ``layer`` on every pass.

        A tensor that ``fn`` returns takes its place; None leaves it. Returns a handle with ``remove()``.
        """

    @property
    @abstractmethod
    def unembedding(self) -> Unembedding:
        """The map from final hidden states to logits."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The module whose input is the final, normed hidden state; None when the model has no language head."""

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm, and whatever else stands between the last block and the unembedding."""

    def call(self, **inputs: Any) -> Any:
        """Runs the transformers model without a cache."""
        return self.hf_model(**inputs, use_cache=False, return_dict=True)

    def track_positions(self) -> Handles:
        """Follows the model's calls so that token selectors know absolute positions. Returns the registrations."""
        tracker = PositionTracker()
        handles = Handles()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tracker.before(read_call(module, args, kwargs, tracker))

        def after(*_: Any) -> None:
            tracker.after()

        handles.add(tracker)
        handles.add(self.hf_model.register_forward_pre_hook(before, with_kwargs=True))
        handles.add(self.hf_model.register_forward_hook(after, always_call=True))
        return handles


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs a block with the model in eval mode and without weight gradients; everything is put back afterwards."""
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
