"""A pack's pass through a model: read the residual stream, get the scored hidden states, or resume from a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .attaching import before
from .hooks import attach
from .limits import window_of
from .models.adapter import Handles, ModelAdapter
from .pack import Pack
from .stream import others, residual

__all__ = ["Resumed", "final_hidden", "run_pack", "scored_hidden", "visit_residuals"]


class _Enough(Exception):
    """Ends a pass once everything asked for has been seen; an Exception, so that torch runs ``always_call`` hooks."""


def run_pack(adapter: ModelAdapter, pack: Pack, **extra: Any) -> Any:
    """What the model gives for a pack; ``extra`` are further keyword arguments of its call."""
    with pack.running(adapter.hf_model):
        return adapter.call(**pack.inputs(adapter.dtype, window_of(adapter)), **extra)


def _until(
    adapter: ModelAdapter, hooks: Mapping[int, Callable[[Tensor], None]], run: Callable[[], Any]
) -> None:
    """Runs a pass that shows the residual stream to ``hooks`` and stops at the highest of their layers."""
    last = max(hooks)

    def watcher(layer: int, fn: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def watch(hidden: Tensor) -> None:
            fn(hidden)
            if layer == last:
                raise _Enough

        return watch

    with attach(adapter, [(layer, watcher(layer, fn)) for layer, fn in hooks.items()]):
        try:
            run()
        except _Enough:
            return
    raise ValidationError(
        f"{adapter.model_id} did not pass through layer {last}; "
        "name its decoder layers with adapter_for(model, layers=…)."
    )


def visit_residuals(
    adapter: ModelAdapter, pack: Pack, visitors: Mapping[int, Callable[[Tensor], None]]
) -> None:
    """Shows the residual stream [B, T, d_model] entering each layer to its visitor, and stops after the highest one.

    Args:
        adapter: the model; steering that is applied to it is seen.
        pack: what to run.
        visitors: layer (0 to n_layers) to function; what it returns is ignored.
    """
    _until(adapter, visitors, lambda: run_pack(adapter, pack))


def final_hidden(adapter: ModelAdapter, run: Callable[[], Any]) -> Tensor:
    """[B, T, d_model] normed hidden states that would enter the unembedding; the unembedding itself is not run.

    Args:
        adapter: the model.
        run: calls the model.

    Raises:
        ValidationError: the model has no language head, or the pass does not reach it.
    """
    head = adapter.head
    if head is None:
        raise ValidationError(f"{adapter.model_id} has no language head; load it with AutoModelForCausalLM.")
    seen: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))
        raise _Enough

    handle = before(head, capture)
    try:
        run()
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ValidationError(f"The pass through {adapter.model_id} never reached its language head.")


def scored_hidden(adapter: ModelAdapter, pack: Pack, **extra: Any) -> Tensor:
    """[N, d_model] normed hidden states that predict the pack's completion tokens, in the pack's order.

    Args:
        adapter: the model.
        pack: what to run.
        extra: further keyword arguments of the model's call.
    """
    hidden = final_hidden(adapter, lambda: run_pack(adapter, pack, **extra))
    return pack.predictors_of(hidden)


class Resumed:
    """A pack whose layers below ``layer`` have run once; :meth:`scored` runs the rest as often as wanted.

    Edits at ``layer`` and above are made by whatever is attached to the model at the time (a plan with masks over the
    pack, say), and gradients flow through them.

    Args:
        adapter: the model.
        pack: what to run.
        layer: lowest layer that will be edited, 0 to n_layers; n_layers is edited where the last block, which is run
            again, gives its output.
        also: higher layers up to n_layers - 1 whose residual is kept too.

    Attributes:
        residual: [B, T, d_model] entering ``layer`` or the last block, without gradient; None where the
            pass did not come by.
        residuals: the same by layer, for that one and ``also``.
        arguments: what each layer from there up was called with, beside the residual.
    """

    def __init__(self, adapter: ModelAdapter, pack: Pack, layer: int, also: Sequence[int] = ()) -> None:
        self._adapter, self._pack, self._layer = adapter, pack, min(layer, adapter.n_layers - 1)
        self._keep = {self._layer, *also}
        self.residuals: dict[int, Tensor] = {}
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._record()

    @property
    def residual(self) -> Tensor | None:
        """[B, T, d_model] that :meth:`scored` begins with, without gradient; None where the pass did not come by."""
        return self.residuals.get(self._layer)

    def _record(self) -> None:
        """One whole pass that notes what every layer from here up is called with."""
        handles = Handles()

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, hidden = self._layer + len(self.arguments), residual(args, kwargs)
            if layer in self._keep:
                self.residuals[layer] = hidden.detach()
            self.arguments.append(others(args, kwargs))
            if layer == self._adapter.n_layers - 1:
                raise _Enough

        try:
            for block in self._adapter.layers[self._layer :]:
                # First among the layer's hooks, so that the residual is noted before any edit of it.
                handles.add(before(block, note, first=True))
            with torch.no_grad():
                run_pack(self._adapter, self._pack)
        except _Enough:
            pass
        finally:
            handles.remove()

    def scored(self) -> Tensor:
        """[N, d_model] normed hidden states that predict the completion tokens, in the pack's order."""
        pack, adapter, hidden = self._pack, self._adapter, self.residual
        assert hidden is not None
        with pack.running(adapter.hf_model):
            for block, (args, kwargs) in zip(adapter.layers[self._layer :], self.arguments, strict=True):
                out = block(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return adapter.finish(pack.predictors_of(hidden))
