"""The upper layers of a model run again and again over one pack: some of its rows, or several copies of them at once.

A pass is replayed with the arguments that the model was seen to give its layers. Which axis of an argument goes with
the rows is found by looking at two copies of the pack: it is the axis that doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._private.torch import tree_flatten, tree_unflatten
from ..capabilities.replaying import replay_agrees
from ..capabilities.unembedding import unembedding_agrees
from ..models.adapter import ModelAdapter
from ..pack import Pack
from ..passes import Resumed
from ..pauses import pause

__all__ = ["Replay"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Replay:
    """What the layers from the lowest of ``layers`` up are called with when the model runs a pack.

    Args:
        adapter: the model.
        pack: what it runs.
        layers: where jobs join.

    Attributes:
        possible: whether the model's layers can be replayed; else it runs whole.
    """

    def __init__(self, adapter: ModelAdapter, pack: Pack, layers: Sequence[int]) -> None:
        self._adapter, self._pack, self._layers = adapter, pack, sorted(set(layers))
        # Both are asked now: a check must not run while edits do.
        self.possible = all([replay_agrees(adapter), unembedding_agrees(adapter)])
        if self.possible:
            self._seen = Resumed(adapter, pack, self._layers[0], also=self._layers)
            self.possible = self._seen.residual is not None
        self._axes: list[list[int | None]] | None = None
        self._repeated: tuple[int, list[Arguments]] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept of the one pass: residuals, and the arguments of every layer."""
        if not self.possible:
            return []
        kept = [self._seen.residuals, self._seen.arguments]
        return [leaf for leaf in tree_flatten(kept)[0] if isinstance(leaf, Tensor)]

    def give_up(self) -> None:
        """Drops what is kept: the model runs whole from now on."""
        if self.possible:
            self.possible, self._axes, self._repeated = False, None, None
            del self._seen

    def residual(self, layer: int) -> Tensor:
        """[B, T, d_model] entering ``layer``, one of ``layers``, unsteered and without gradient."""
        return self._seen.residuals[layer]

    @property
    def first(self) -> int:
        """The lowest of ``layers``."""
        return self._layers[0]

    @property
    def stackable(self) -> bool:
        """Whether several copies, or some rows, of the pack can be replayed."""
        if self.possible and self._axes is None:
            pause()
            self._axes = self._find_axes()
        return bool(self._axes)

    def arguments(self, layer: int, copies: int, most: int) -> Arguments:
        """Arguments of a layer, beside the residual stream, for ``copies`` of the rows.

        Args:
            layer: the lowest of ``layers`` or above.
            copies: 1 or more; more than 1 only where it is ``stackable``.
            most: copies that other layers of the same pass need; what is kept of their arguments is shared.
        """
        place = layer - self._layers[0]
        if copies == most == 1:
            return self._seen.arguments[place]
        if self._repeated is None or self._repeated[0] != most:
            self._repeated = (most, self._mapped(lambda t, axis: torch.cat([t] * most, axis)))
        return self.beginning(layer, self._repeated[1][place], copies, most)

    def beginning(self, layer: int, arguments: Arguments, n: int, of: int) -> Arguments:
        """Arguments of a layer for the first ``n`` of the ``of`` rows, or copies, that they are for."""
        if n == of:
            return arguments
        return self._each(
            layer - self._layers[0],
            arguments,
            lambda t, axis: t.narrow(axis, 0, t.shape[axis] // of * n),
        )

    def rows(self, rows: Tensor) -> list[Arguments]:
        """Arguments of every layer for rows [n], which may come several times; only where it is ``stackable``."""
        n_rows = self._pack.input_ids.shape[0]

        def select(tensor: Tensor, axis: int) -> Tensor:
            each = tensor.shape[axis] // n_rows  # ALiBi's axis, for one, holds heads by rows
            index = rows.to(tensor.device)
            if each > 1:
                index = (index[:, None] * each + torch.arange(each, device=tensor.device)).flatten()
            return tensor.index_select(axis, index)

        return self._mapped(select)

    def _mapped(self, change: Callable[[Tensor, int], Tensor]) -> list[Arguments]:
        """Every layer's arguments with ``change`` made along the axis of rows; shared tensors stay shared."""
        done: dict[tuple[int, int], Tensor] = {}

        def once(tensor: Tensor, axis: int) -> Tensor:
            key = (id(tensor), axis)
            if key not in done:
                done[key] = change(tensor, axis)
            return done[key]

        return [self._each(place, found, once) for place, found in enumerate(self._seen.arguments)]

    def _each(self, place: int, arguments: Arguments, change: Callable[[Tensor, int], Tensor]) -> Arguments:
        leaves, tree = tree_flatten(arguments)
        assert self._axes is not None
        changed = [
            leaf if axis is None else change(leaf, axis)
            for leaf, axis in zip(leaves, self._axes[place], strict=True)
        ]
        made: Arguments = tree_unflatten(changed, tree)
        return made

    def _find_axes(self) -> list[list[int | None]]:
        """For every layer and argument the axis of rows, None where it has none; empty where that can't be told."""
        twice = Resumed(self._adapter, self._pack.repeated(2), self._layers[0])
        found = []
        for one, two in zip(self._seen.arguments, twice.arguments, strict=True):
            leaves, tree = tree_flatten(one)
            others, other_tree = tree_flatten(two)
            if tree != other_tree:
                return []
            axes = [_row_axis(a, b) for a, b in zip(leaves, others, strict=True)]
            if any(axis == _UNKNOWN for axis in axes):
                return []
            found.append(axes)
        return found


_UNKNOWN = -1


def _row_axis(one: Any, two: Any) -> int | None:
    """The axis along which ``two`` holds ``one`` twice; None where both are the same; _UNKNOWN for neither."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return None if one is two or (type(one) is type(two) and _same(one, two)) else _UNKNOWN
    if one.shape == two.shape:
        return None if torch.equal(one, two) else _UNKNOWN
    grown = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.dim() != two.dim() or len(grown) != 1 or not torch.equal(torch.cat([one, one], grown[0]), two):
        return _UNKNOWN
    return grown[0]


def _same(one: object, two: object) -> bool:
    try:
        return bool(one == two)
    except Exception:  # an object of the model's own, which may compare in any way
        return False
