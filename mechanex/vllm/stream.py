"""The residual stream of a model of vLLM, edited from tables of static size by wrapped layers.

A layer there takes and gives the stream as one tensor [T, d], or as two whose sum it is: what the last module made, and
what it is to be added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.intervention import Edit, compute_dtype
from ..engine.steer_table import SteerTable
from ..errors import ValidationError
from .capacity import Capacity
from .plan import StepPlan
from .watch_op import Look
from .watched import WatchedStream

__all__ = ["SteeredStream", "decoder_layers"]


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of a model's layers; those of other pipeline ranks stand in it as placeholders.

    Raises:
        ValidationError: no list of modules has this length, or several have.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValidationError(
            f"{type(model).__name__} has {len(outer)} lists of {n_layers} modules ({', '.join(outer) or 'none'}), "
            "where one, of its decoder layers, was looked for: this model can't be steered in vLLM."
        )
    return found[outer[0]]


class SteeredStream:
    """What edits the residual stream, layer by layer, and which edits the tokens of the running step take.

    Args:
        layers: all of the model's, in order; None for those of other pipeline ranks.
        width: d_model.
        capacity: of the tables.
        n_tokens: most tokens of a step, padding included.
        device: of the stream.
        dtype: of the stream.

    Attributes:
        watched: the requests of the running step that are watched.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module | None],
        width: int,
        capacity: Capacity,
        n_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.width, self.capacity, self.n_layers = width, capacity, len(layers)
        here = [i for i, layer in enumerate(layers) if layer is not None]
        # Site L is the stream that enters layer L; but for the first it is edited where layer L − 1 leaves it.
        sites = [*([0] if here[:1] == [0] else []), *(i + 1 for i in here)]
        self.tables = {
            site: SteerTable(
                capacity.slots,
                width,
                capacity.rank,
                gates=capacity.gates,
                device=device,
                dtype=compute_dtype(dtype),
            )
            for site in sites
        }
        self._rows = torch.full((n_tokens, capacity.per_token), -1, dtype=torch.int32, device=device)
        self._strength = torch.ones(n_tokens, capacity.per_token, dtype=torch.float32, device=device)
        self._filled: dict[int, Mapping[int, Edit]] = {}
        # Of the running step, for code that isn't captured.
        self._now: tuple[Tensor, Tensor] | None = None
        self._busy: frozenset[int] = frozenset()
        self._only_adds = False
        self.watched = WatchedStream()
        self._look = Look(self._look_into) if capacity.behaviors else None

    def wrap(self, layers: Sequence[nn.Module | None], takes_two: Callable[[nn.Module], bool]) -> None:
        """Has the layers edit what they leave behind, and the first one what it is given.

        Args:
            layers: as for the class.
            takes_two: whether a layer, which gives two tensors, takes both for the stream.
        """
        for i, layer in enumerate(layers):
            if layer is not None:
                _wrap(layer, self, i, takes_two(layer))

    def fill(self, slot: int, edits: Mapping[int, Edit]) -> None:
        """Puts edits, by the layer that they enter, into a slot; what was there goes.

        Raises:
            ValidationError: an edit that the tables have no room for.
        """
        for site in self._filled.pop(slot, {}):
            if site not in edits and site in self.tables:
                self.tables[site].clear(slot)
        for site, edit in edits.items():
            if site in self.tables:
                self.tables[site].write(slot, edit)
        self._filled[slot] = edits

    def stage(self, plan: StepPlan) -> None:
        """Makes these the edits of the tokens of the next pass."""
        rows, strength = torch.from_numpy(plan.rows), torch.from_numpy(plan.strength)
        n, columns = rows.shape
        if n > self._rows.shape[0] or columns > self._rows.shape[1]:
            raise ValidationError(
                f"a step has {n} tokens of {columns} edits, and there is room for {list(self._rows.shape)}."
            )
        self._rows[:n].fill_(-1)
        self._rows[:n, :columns].copy_(rows)
        self._strength[:n, :columns].copy_(strength)
        edits = [self._filled[slot] for slot in plan.slots]
        self._busy = frozenset(site for one in edits for site in one)
        self._only_adds = all(_only_adds(edit) for one in edits for edit in one.values())
        self._now = rows.to(self._rows.device), strength.to(self._rows.device)

    def clear(self) -> None:
        """Ends the pass: what runs next, such as a warm-up, is not edited."""
        if self._now is not None:
            self._rows[: self._now[0].shape[0]].fill_(-1)
        self._now, self._busy, self._only_adds = None, frozenset(), False
        self.watched.clear()

    def edit(self, site: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream at a site as the step has it edited, of the tensors that it is the sum of.

        Rows that nothing edits come back bit for bit.

        Args:
            site: the layer that the stream enters.
            hidden: [T, d], or [1, T, d] where vLLM runs a model of transformers.
            residual: likewise, or None.
        """
        if hidden.dim() > 2:
            flat, _ = self.edit(site, hidden.reshape(-1, self.width), None)
            return flat.view(hidden.shape), residual
        table = self.tables[site]
        if _captured(hidden):
            n = hidden.shape[0]
            hidden, residual = _edited(table, hidden, residual, self._rows[:n], self._strength[:n], False)
            if self._look is not None:
                self._look(site, *((hidden, None) if residual is None else (residual, hidden)))
            return hidden, residual
        if site in self._busy and self._now is not None:
            rows, strength = self._now
            if rows.shape[0] != hidden.shape[0]:  # padded to the size of some graph
                rows, strength = self._rows[: hidden.shape[0]], self._strength[: hidden.shape[0]]
            hidden, residual = _edited(table, hidden, residual, rows, strength, self._only_adds)
        if self.watched.looks_at(site):
            target, other = (hidden, None) if residual is None else (residual, hidden)
            target = target.clone()
            self._look_into(site, target, other)
            return (target, None) if residual is None else (hidden, target)
        return hidden, residual

    def _look_into(self, site: int, target: Tensor, other: Tensor | None) -> None:
        """Scores a site's watched tokens, and writes into ``target`` what is corrected of its sum with ``other``."""
        if not self.watched.looks_at(site):
            return
        wide = compute_dtype(target.dtype)

        def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device)).to(wide)

        def stream(index: Tensor) -> Tensor:
            found = rows_of(target, index)
            return found if other is None else found + rows_of(other, index)

        changed = self.watched.changed(site, stream)
        if changed is not None:
            index, x = changed
            x = x if other is None else x - rows_of(other, index)
            target.index_copy_(0, index.to(target.device), x.to(target.dtype))

    @property
    def n_bytes(self) -> int:
        """Memory that the tables take."""
        return sum(table.n_bytes for table in self.tables.values())


def _captured(hidden: Tensor) -> bool:
    """Whether this code runs once for many steps, whose edits it can't know."""
    return torch.compiler.is_compiling() or (hidden.is_cuda and torch.cuda.is_current_stream_capturing())


def _edited(
    table: SteerTable,
    hidden: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    strength: Tensor,
    only_adds: bool,
) -> tuple[Tensor, Tensor | None]:
    if residual is None:
        return table.apply(hidden, rows, strength, only_adds=only_adds), None
    if only_adds:  # which tensor it is added to makes no difference
        return hidden, table.apply(residual, rows, strength, only_adds=True)
    wide = compute_dtype(hidden.dtype)
    x = hidden.to(wide) + residual.to(wide)
    change = table.apply(x, rows, strength) - x
    return hidden, (residual.to(wide) + change).to(residual.dtype)


def _only_adds(edit: Edit) -> bool:
    return edit.rank == 0 and edit.gate is None


def _wrap(layer: nn.Module, stream: SteeredStream, index: int, takes_two: bool) -> None:
    inner: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if index == 0:
            args, kwargs = _with_input_edited(stream, args, kwargs)
        out = inner(*args, **kwargs)
        if isinstance(out, Tensor):
            return stream.edit(index + 1, out, None)[0]
        # A layer that isn't given a second tensor gives the whole stream in the first.
        second = out[1] if len(out) > 1 else None
        hidden, residual = stream.edit(index + 1, out[0], second if takes_two else None)
        return (hidden, residual, *out[2:]) if takes_two else (hidden, *out[1:])

    layer.forward = forward


def _with_input_edited(
    stream: SteeredStream, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first layer, the stream among them edited: the first that is shaped like one."""

    def is_stream(given: Any) -> bool:
        return isinstance(given, Tensor) and given.is_floating_point() and given.shape[-1] == stream.width

    for i, given in enumerate(args):
        if is_stream(given):
            return (*args[:i], stream.edit(0, given, None)[0], *args[i + 1 :]), kwargs
    for name, given in kwargs.items():
        if is_stream(given):
            return args, kwargs | {name: stream.edit(0, given, None)[0]}
    raise ValidationError(f"the model's first layer was given no tensor [T, {stream.width}].")


def check_edits(edits: Mapping[int, Edit], width: int, n_layers: int, capacity: Capacity) -> None:
    """Raises a ValidationError unless the tables of such a model have room for these edits."""
    _check_layers(edits, n_layers)
    for layer, edit in edits.items():
        if edit.width != width:
            raise ValidationError(
                f"the vector is {edit.width} wide at layer {layer}, and the model's residual stream {width}: it was "
                "made for another model."
            )
        if edit.matrix is not None:
            raise ValidationError("a dense matrix can't be placed in vLLM: give the edit as left and right.")
        if edit.rank > capacity.rank:
            raise ValidationError(
                f"the edit at layer {layer} has rank {edit.rank}, and the tables have room for {capacity.rank}: start "
                f"with steering_rank={edit.rank}."
            )
        if edit.gate is not None and not capacity.gates:
            raise ValidationError(
                f"the edit at layer {layer} has a gate, and the tables were made without: start with "
                "steering_gates=True."
            )
        edit.check_finite()


def _check_layers(layers: Iterable[int], n_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer <= n_layers:
            raise ValidationError(f"layers are 0 to {n_layers} in this model; got {layer}.")
