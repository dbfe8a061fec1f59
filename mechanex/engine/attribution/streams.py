"""Runs in which every component reads a residual stream of its own, made of whichever writes are wanted.

In such a run an edge of the model, from what one component writes to what another reads, can be looked at and changed
apart from all others. A layer is called once for each of its components, with the stream that this one is to read, and
what the others of the layer write is set to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import after, before
from ..models.adapter import Handles, ModelAdapter
from ..stream import given_out, residual, with_given_out, with_residual
from ..structure.components import Component
from ..structure.graph import Structure
from .sites import last_logits

__all__ = ["FINAL", "Reader", "StreamRun", "added", "everything", "readers_of", "sources_of"]

FINAL = "logits"
"""The reader at the end: the final norm and the unembedding."""

Reader = Component | None
"""A component, or None for what comes after the last layer."""

Read = Callable[[Reader, Mapping[str, Tensor]], Tensor]
"""Makes the stream [B, T, d_model] that a reader reads from the writes so far, by path."""


def readers_of(structure: Structure) -> list[Reader]:
    """Everything that reads the stream, in the order of running."""
    return [*(component for component in structure.components if component.layer is not None), None]


def sources_of(structure: Structure, reader: Reader) -> list[Component]:
    """What a reader reads the writes of, in the order of running."""
    return [component for component in structure.components if reader is None or reader.reads(component)]


def added(writes: Sequence[Tensor]) -> Tensor:
    """The sum of writes, in the order of running, on the device of the last."""
    device = writes[-1].device
    return torch.stack([write.to(device) for write in writes]).sum(0)


def everything(structure: Structure) -> Read:
    """Reads what the model's components do."""

    def read(reader: Reader, writes: Mapping[str, Tensor]) -> Tensor:
        return added([writes[component.path] for component in sources_of(structure, reader)])

    return read


class StreamRun:
    """One run.

    Args:
        adapter: the model.
        structure: of the model.
        read: what each reader reads.
        start: from the stream [B, T, d_model] that enters the first layer to what counts as the embedding's write.

    Attributes:
        writes: by path, [B, T, d_model] as added to the stream.
        reads: by path, and for :data:`FINAL`, [B, T, d_model].
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        structure: Structure,
        read: Read,
        start: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._adapter, self._read, self._start = adapter, read, start
        self._embedding = structure.components[0]
        self._of_layer: list[list[Component]] = [
            [component for component in structure.components if component.layer == layer]
            for layer in range(adapter.n_layers)
        ]
        self.writes: dict[str, Tensor] = {}
        self.reads: dict[str, Tensor] = {}
        self._running: Component | None = None

    def logits(self, ids: Tensor) -> Tensor:
        """[B, n_vocab] float32 logits at the last position of each row of ``ids`` [B, T]."""
        with Handles() as handles:
            for index, layer in enumerate(self._adapter.layers):
                # In front of other hooks: edits of the stream are made in what each component reads.
                handles.add(before(layer, self._entering(index), first=True))
                for component in self._of_layer[index]:
                    if component.role != "block":
                        handles.add(after(component.module, self._writing(component)))
                handles.add(after(layer, self._leaving(index)))
            return last_logits(self._adapter, ids)

    def _entering(self, index: int) -> Any:
        components = self._of_layer[index]

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._running is not None:
                return None
            if index == 0:
                stream = residual(args, kwargs)
                self._adapter.stream.check(stream)
                self.writes[self._embedding.path] = stream if self._start is None else self._start(stream)
            for component in components[:-1]:
                self._running = component
                given = with_residual(self._stream_of(component), args, kwargs)
                layer(*given[0], **given[1])
            # The call that is under way is the last component's.
            self._running = components[-1]
            return with_residual(self._stream_of(components[-1]), args, kwargs)

        return hook

    def _stream_of(self, component: Reader) -> Tensor:
        stream = self._read(component, self.writes)
        self.reads[FINAL if component is None else component.path] = stream
        # A layer may write into what it is given.
        return stream.clone()

    def _writing(self, component: Component) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            value = given_out(output)
            if self._running is component:
                self.writes[component.path] = (
                    value.reshape(self.reads[component.path].shape) * component.scale
                )
            return with_given_out(torch.zeros_like(value), output)

        return hook

    def _leaving(self, index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            component = self._running
            if component is not None and component.role == "block":
                left = given_out(output)
                self.writes[component.path] = left - self.reads[component.path].to(left.device)
            self._running = None
            if index == self._adapter.n_layers - 1 and component is self._of_layer[index][-1]:
                return with_given_out(self._stream_of(None), output)
            return None

        return hook
