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
from ...ops.head import Head
from ..attaching import after, before, detach_all
from ..attention_plans import without_plans
from ..capabilities.findings import Findings
from ..following.calls import Followed, Prompts
from ..following.generating import watch_generate
from ..given import as_list
from ..regimes import each_alone
from ..sharded import is_split
from ..stream import Stream, others, residual
from .configuration import context_of, text_config
from .kept import Kept
from .offload import is_absent, where_it_runs

__all__ = ["Handles", "ModelAdapter", "ResidualHook", "exclusive", "undisturbed"]

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

    def __repr__(self) -> str:
        return f"Handles({f'{len(self._handles)} attached' if self._handles else 'removed'})"

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class ModelAdapter(ABC):
    """A causal language model as the engine sees it.

    Attributes:
        model: the object the user gave.
        hf_model: the transformers module inside it (the same object for a plain Hugging Face model).
        layers: the decoder layers, in order.
        tokenizer: the model's tokenizer if it carries one, else None.
        model_id: its name or path, for metadata and messages.
        d_model: width of the residual stream.
        findings: what :mod:`mechanex.engine.capabilities` found out about the model.
    """

    model: nn.Module
    hf_model: nn.Module
    layers: list[nn.Module]
    d_model: int
    kept: Kept

    @property
    def tokenizer(self) -> Any:
        return self.kept.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.kept.tokenizer = tokenizer

    @property
    def model_id(self) -> str:
        return self.kept.model_id

    @model_id.setter
    def model_id(self, name: str) -> None:
        self.kept.model_id = name

    @property
    def findings(self) -> Findings:
        return Findings(self, self.kept.findings)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again from its model when asked for.
        return (type(None), ())

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding weights, or the one that offloaded weights are brought to."""
        weight = self._reference_weight()
        return where_it_runs(self.hf_model, self.model_id) if is_absent(weight) else weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the model's weights."""
        return self._reference_weight().dtype

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return text_config(self.hf_model.config)

    @property
    def context(self) -> int | None:
        """Tokens that a text may have; None where the model names no limit."""
        return context_of(self.config)

    @property
    def family(self) -> str | None:
        """The architecture, as its configuration names it: checkpoints of one family have the same layers in kind."""
        family = getattr(self.config, "model_type", None)
        return family if isinstance(family, str) and family else None

    def _reference_weight(self) -> Tensor:
        embeddings = self._part("get_input_embeddings")
        weights = list((self.hf_model if embeddings is None else embeddings).parameters())
        return next((w for w in weights if torch.is_floating_point(w)), weights[0])

    def _part(self, getter: str) -> nn.Module | None:
        """What a transformers getter such as ``get_input_embeddings`` gives, if the model has it."""
        get: Any = getattr(self.hf_model, getter, None)
        part = get() if callable(get) else None
        return part if isinstance(part, nn.Module) else None

    @property
    def embedding(self) -> nn.Module | None:
        """The module that turns token ids into the residual stream, if the model names it."""
        return self._part("get_input_embeddings")

    def is_current(self) -> bool:
        """Whether the model still has the layers that this adapter knows."""
        return True

    def layer_index(self, layer: int) -> int:
        """The layer as 0 … n_layers; negatives count back from the last block, so -1 is n_layers - 1.

        Layer n_layers is the stream that leaves the last block, before the final norm.

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
        if not -self.n_layers <= layer <= self.n_layers:
            raise ValidationError(
                f"Layer {layer} does not exist: {self.model_id} has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1} (negatives count from the end), and {self.n_layers} for the stream "
                "that leaves the last one."
            )
        return layer if layer >= 0 else layer + self.n_layers

    def layer_indices(self, layers: object, name: str = "layers") -> list[int]:
        """A list of layers as :meth:`layer_index` gives them, in order and each once.

        Args:
            layers: what can be walked through.
            name: what it is called in messages.

        Raises:
            ValidationError: no list, an empty one, or a layer that doesn't exist.
        """
        return sorted({self.layer_index(layer) for layer in as_list(name, layers, "layers")})

    @property
    def stream(self) -> Stream:
        """The model's residual stream, to check what its blocks pass on."""
        return Stream(self.d_model, self.model_id)

    def check_token_ids(self, ids: Iterable[int]) -> None:
        """Raises a ValidationError for a token id that is outside the model's vocabulary."""
        size, known = getattr(self.config, "vocab_size", None), list(ids)
        least, largest = min(known, default=0), max(known, default=0)
        if least < 0 or (isinstance(size, int) and largest >= size):
            raise ValidationError(
                f"Token id {least if least < 0 else largest} is outside the vocabulary of {self.model_id} "
                f"({size} tokens); use the model's own tokenizer."
            )

    @abstractmethod
    def on_residual(self, layer: int, fn: ResidualHook) -> Any:
        """Calls ``fn`` with the residual stream [B, T, d_model] of a layer on every pass.

        A tensor that ``fn`` returns takes its place; None leaves it. Returns a handle with ``remove()``.

        Args:
            layer: the block that the stream enters; n_layers for the stream that leaves the last block.
            fn: never called for a model that has more than one stream, which is a ValidationError.
        """

    @abstractmethod
    def on_block(
        self, layer: int, hook: Callable[..., Any], *, with_kwargs: bool, traced: bool = False
    ) -> Any:
        """Registers a forward pre-hook on block ``layer``; returns a handle with ``remove()``.

        At layer n_layers the hook is called with the stream that leaves the last block as the only argument.
        ``traced`` as for :func:`mechanex.engine.attaching.before`.
        """

    @property
    @abstractmethod
    def unembedding(self) -> Head:
        """The map from final hidden states to logits."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The module whose input is the final, normed hidden state; None when the model has no language head."""

    @property
    def unembeds(self) -> bool:
        """Whether the head is one matrix whose numbers are there between calls, to compute with outside of the model.

        torch multiplies by weights without numbers, and gives whatever the memory held.
        """
        head = self.head
        return (
            head is not None
            and self._matrix is not None
            and not any(is_absent(weight) for weight in head.parameters())
            # FSDP gathers a head for a pass and may leave it so until its weights change.
            and not is_split(self.hf_model)
        )

    @property
    def _matrix(self) -> Tensor | None:
        """[n_vocab, d_model], what the head multiplies by; None where it is no single matrix."""
        matrix = getattr(self.head, "weight", None)
        return matrix if isinstance(matrix, Tensor) else None

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

    def track_positions(self, *, prompt_tokens: int | None = None) -> Handles:
        """Follows the model's calls, so that token selectors know absolute positions, until the handle is removed.

        Contexts that overlap share what was seen: a later one knows the prompt that an earlier one saw.

        Args:
            prompt_tokens: length of the prompts with their padding, for loops that read them in pieces or run grown
                texts anew; None where the first call with a cache, or each call without one, is the prompt.
        """
        following: Following | None = self.kept.following
        if following is None or not following.users:
            following = self.kept.following = self._follow()
        handle = following.join()
        if prompt_tokens is not None:
            handle.add(_Stated(following.followed, Prompts(prompt_tokens, None, stated=True)))
        return handle

    def detach_all(self) -> int:
        """Removes every hook of ours from the model, whoever holds the handles; returns how many there were."""
        n = sum(detach_all(module) for module in {self.model, self.hf_model})
        self.kept.applied.clear()
        following, self.kept.following = self.kept.following, None
        if following is not None:
            following.end()
        return n

    def _follow(self) -> Following:
        """New hooks that follow this model."""
        followed, trunk, first = Followed(), self.trunk, self.layers[0]

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            followed.begin(args, kwargs)

        def embed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            followed.embed(args, kwargs)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            positional, named = others(args, kwargs)
            followed.enter(residual(args, kwargs), [*positional, *named.values()])

        def end(*_: Any) -> None:
            followed.end()

        following = Following(followed)
        following.add(before(trunk, begin, first=True))
        if (embedding := self._part("get_input_embeddings")) is not None:
            following.add(before(embedding, embed, first=True))
        # Before the hooks that ask, whenever those were attached.
        following.add(before(first, enter, first=True))
        following.add(after(trunk, end, always=True))
        for watched in watch_generate([self.model, *self.hf_model.modules()], followed, self.d_model):
            following.add(watched)
        return following


class Following:
    """The hooks that follow a model, for as long as someone uses them."""

    def __init__(self, followed: Followed) -> None:
        self.followed, self.users = followed, 0
        self._handles = Handles()
        self._handles.add(followed)

    def add(self, handle: Any) -> None:
        """Takes charge of a hook."""
        self._handles.add(handle)

    def join(self) -> Handles:
        """A handle for one more user; the last one's removal removes the hooks."""
        self.users += 1
        handle = Handles()
        handle.add(_Leave(self))
        return handle

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        if self.users == 0:
            self.end()

    def end(self) -> None:
        """Follows no more, whoever uses it."""
        self._handles.remove()


class _Stated:
    """Says where the prompt ends until it is removed."""

    def __init__(self, followed: Followed, prompts: Prompts) -> None:
        self._context = followed.generating(prompts)
        self._context.__enter__()

    def remove(self) -> None:
        self._context.__exit__(None, None, None)


@dataclass(frozen=True)
class _Leave:
    following: Following

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
    """Runs a block in eval mode, without weight gradients, with every row as it is alone; then all is put back.

    Args:
        model: a module.
        freeze: False leaves the weights' ``requires_grad`` as it is.
    """
    modules = list(model.modules())
    training = [m for m in modules if m.training]
    # By name: offloaded weights are other objects after a call.
    trainable = [
        (module, name)
        for module in (modules if freeze else ())
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad
    ]
    try:
        for module in training:
            module.training = False
        for module, name in trainable:
            getattr(module, name).requires_grad_(False)
        with each_alone(model), without_plans():
            yield
    finally:
        for module in training:
            module.training = True
        for module, name in trainable:
            getattr(module, name).requires_grad_(True)
