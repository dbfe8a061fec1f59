"""One pass over a few tokens in which every module is seen: what goes in and out, and how it was computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._private.torch import without_hooks
from ..attaching import after, before
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..stream import by_token, given_out, residual, with_given_out, with_residual

__all__ = ["N_ROWS", "N_TOKENS", "Call", "Observed", "entry_hooks", "observe", "probing"]

N_ROWS, N_TOKENS = 2, 11


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        path: the module's path in the model.
        module: the module.
        layer: the decoder layer that it is a component of, or None.
        began, ended: when, among all calls.
        given: shape of the first tensor that it was called with, or None.
        gave: shape of what it gave out first, or None where that is no tensor.
        by_token: shape [N_ROWS, N_TOKENS, …] of that for each token, or None where it is nothing of the kind.
        node: what autograd knows of how that was computed, or None where it doesn't depend on the embeddings.
    """

    path: str
    module: nn.Module
    layer: int | None
    began: int
    ended: int = -1
    given: tuple[int, ...] | None = None
    gave: tuple[int, ...] | None = None
    by_token: tuple[int, ...] | None = None
    node: Any = None


@dataclass
class Observed:
    """What a pass showed.

    Attributes:
        calls: in the order in which they began.
        entries: for each layer, the node of the stream that enters it.
        exits: for each layer, the node of the stream that leaves it.
        one_stream: whether layers pass on one residual stream [B, T, d_model].
    """

    calls: list[Call] = field(default_factory=list)
    entries: dict[int, Any] = field(default_factory=dict)
    exits: dict[int, Any] = field(default_factory=dict)
    one_stream: bool = True

    def forget(self) -> None:
        """Drops how values were computed, which keeps the pass's tensors in memory."""
        self.entries, self.exits = {}, {}
        for call in self.calls:
            call.node = None


@contextmanager
def probing(adapter: ModelAdapter) -> Iterator[Tensor]:
    """Runs a block alone on a model, with gradients but none for weights; hands out [N_ROWS, N_TOKENS] token ids."""
    vocabulary = getattr(adapter.config, "vocab_size", None)
    most = vocabulary if isinstance(vocabulary, int) else N_ROWS * N_TOKENS
    ids = (torch.arange(N_ROWS * N_TOKENS) * 7 % min(most, 97)).reshape(N_ROWS, N_TOKENS)
    model = adapter.hf_model
    with (
        exclusive(adapter),
        without_hooks(model),
        undisturbed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield ids.to(adapter.device)


def entry_hooks(adapter: ModelAdapter, entered: dict[int, Tensor]) -> Handles:
    """Has every layer read a stream of its own, whose gradient ends there.

    Args:
        adapter: the model.
        entered: is given the leaf [B, T, d_model] of each layer.
    """
    handles = Handles()

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = residual(args, kwargs)
            if not adapter.stream.fits(hidden):
                return None
            entered[index] = hidden.detach().requires_grad_(True)
            # A layer may write into what it is given; a leaf can't be written to.
            return with_residual(entered[index].clone(), args, kwargs)

        return hook

    for index, layer in enumerate(adapter.layers):
        handles.add(before(layer, enter(index)))
    return handles


def observe(adapter: ModelAdapter) -> Observed:
    """Runs the model over a few tokens and notes every call of every module."""
    observed, running, clock = Observed(), list[Call](), iter(range(1 << 62))
    layers = {id(layer): index for index, layer in enumerate(adapter.layers)}
    handles = Handles()

    def begin(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = layers.get(id(module))
            layer = own if own is not None else running[-1].layer if running else None
            call = Call(path, module, layer, next(clock))
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            call.given = tuple(tensors[0].shape) if tensors else None
            if own is not None:
                entering = residual(args, kwargs)
                observed.one_stream &= adapter.stream.fits(entering)
                observed.entries[own] = getattr(entering, "grad_fn", None)
            running.append(call)
            observed.calls.append(call)

        return hook

    def end(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        call = running.pop()
        call.ended, gave = next(clock), given_out(output)
        if not isinstance(gave, Tensor):
            return None
        each = by_token(gave, N_ROWS, N_TOKENS)
        call.by_token = None if each is None else tuple(each.shape)
        call.gave, call.node = tuple(gave.shape), gave.grad_fn
        if id(module) in layers:
            observed.exits[layers[id(module)]] = gave.grad_fn
        if module is adapter.embedding and gave.grad_fn is None:
            return with_given_out(gave.detach().clone().requires_grad_(True), output)
        return None

    with probing(adapter) as ids, handles:
        entered: dict[int, Tensor] = {}
        handles.add(entry_hooks(adapter, entered))
        for path, module in adapter.hf_model.named_modules():
            handles.add(before(module, begin(path)))
            handles.add(after(module, end))
        adapter.call(input_ids=ids)
    return observed
