"""What the engine needs to know of a model, whatever library built it."""

from __future__ import annotations

import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..positions import PositionTracker, read_call
from .placement import execution_device

__all__ = ["Handles", "ModelAdapter", "ResidualHook", "Unembedding", "exclusive", "undisturbed"]

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

    @property
    def at_hand(self) -> bool:
        """Whether the weight is there between the model's calls, or brought for each by what offloads it."""
        return self.weight.device.type != "meta"

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., n_vocab] logits of ``hidden`` [..., d_model], in the weight's dtype as the model computes them."""
        logits = nn.functional.linear(hidden.to(self.weight.device), self.weight, self.bias)
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
    _following: _Following | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Kept on the model, and made again when asked for: a pickled or copied model goes without it.
        return (type(None), ())

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device on which the embedding is computed."""
        part = self._part("get_input_embeddings") or self.hf_model
        return execution_device(self.hf_model, part, self._reference_weight())

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

    def is_current(self) -> bool:
        """Whether the model still has the layers that this adapter knows."""
        return True

    def layer_index(self, layer: int) -> int:
        """The layer as 0 … n_layers - 1; negatives count from the end.

        Raises:
            ValidationError: there is no such layer.
        """
        try:
            index = operator.index(layer)
        except TypeError:
            index = None
        if index is None or isinstance(layer, bool):
            raise ValidationError(f"A layer is an int; got {layer!r}.")
        layer = index
        if not -self.n_layers <= layer < self.n_layers:
            raise ValidationError(
                f"Layer {layer} does not exist: {self.model_id} has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1} (negatives count from the end)."
            )
        return layer % self.n_layers

    def check_token_ids(self, ids: Iterable[int]) -> None:
        """Raises a ValidationError for a token id that is outside the model's vocabulary."""
        size, largest = getattr(self.config, "vocab_size", None), max(ids, default=0)
        if isinstance(size, int) and largest >= size:
            raise ValidationError(
                f"Token id {largest} is outside the vocabulary of {self.model_id} ({size} tokens); "
                "use the model's own tokenizer."
            )

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

    @property
    def trunk(self) -> nn.Module:
        """The module that owns the decoder layers: its calls are seen whatever wraps the model."""
        return self.hf_model

    def track_positions(self) -> Handles:
        """Follows the model's calls, so that token selectors know absolute positions, until the handle is removed.

        Contexts that overlap share one tracker: a later one knows the prompt that an earlier one saw.
        """
        if self._following is None or not self._following.users:
            self._following = _Following(self.trunk)
        return self._following.join()


class _Following:
    """The hooks that follow a model, for as long as someone uses them."""

    def __init__(self, trunk: nn.Module) -> None:
        tracker = PositionTracker()
        self.users = 0
        self._handles = Handles()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tracker.before(read_call(module, args, kwargs, tracker))

        def after(*_: Any) -> None:
            tracker.after()

        self._handles.add(tracker)
        self._handles.add(trunk.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.add(trunk.register_forward_hook(after, always_call=True))

    def join(self) -> Handles:
        """A handle for one more user; the last one's removal removes the hooks."""
        self.users += 1
        handle = Handles()
        handle.add(_Leave(self))
        return handle

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users:
            self._handles.remove()


@dataclass(frozen=True)
class _Leave:
    following: _Following

    def remove(self) -> None:
        self.following.leave()


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


@contextmanager
def exclusive(adapter: ModelAdapter) -> Iterator[None]:
    """Runs a block alone on a model: steering lives on it, so calls that steer it differently must not overlap."""
    with _locks_guard:
        lock = _locks.setdefault(adapter.hf_model, threading.RLock())
    with lock:
        yield


@contextmanager
def undisturbed(model: nn.Module, *, freeze: bool = True) -> Iterator[None]:
    """Runs a block with the model in eval mode and without weight gradients; everything is put back afterwards.

    Args:
        model: a module.
        freeze: False leaves the weights' ``requires_grad`` as it is.
    """
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if freeze and p.requires_grad]
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
