"""Watching answers while they are written: every token scored, and corrected or ended where a behavior shows.

It rides on the decoder by what a request's edits are: a :class:`Watched` tuple of edits names the row's watch, and
:class:`WatchingSteering`, in the place of the decoder's own, sees it with every call that it prepares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ValidationError
from ..decode.request import Steer
from ..decode.steering import RowSteering, Span
from ..intervention import Edit
from ..models.adapter import Handles, ModelAdapter
from .behavior import Behavior
from .hook_points import HookPoint, on_point
from .scoring import Scorer

__all__ = ["Action", "Seen", "Watch", "Watched", "WatchingSteering", "check_fits", "forced_edits"]

Action = Literal["correct", "abort", "report"]


@dataclass(frozen=True)
class Seen:
    """One token of an answer.

    Args:
        scores: by behavior, 0 as in negative examples and 1 as in positive ones on average.
        detected: the behaviors that this token shows.
        corrected: those that were corrected in it.
    """

    scores: dict[str, float]
    detected: tuple[str, ...]
    corrected: tuple[str, ...]


@dataclass(eq=False)
class Watch:
    """What is watched in one answer, and what was seen of it so far.

    Args:
        behaviors: the behaviors.
        action: what is done where one is detected: ``"correct"``: from that token to the answer's end; ``"abort"``: the
            answer ends; ``"report"``: nothing.

    Attributes:
        seen: its tokens, in order.
        active: the behaviors that were detected so far.
    """

    behaviors: tuple[Behavior, ...]
    action: Action = "correct"
    seen: list[Seen] = field(default_factory=list)
    active: set[str] = field(default_factory=set)

    @property
    def aborted(self) -> bool:
        """Whether the answer is to end."""
        return self.action == "abort" and bool(self.active)


class Watched(tuple[Steer, ...]):
    """The edits of a request whose answer is watched.

    Args:
        edits: the edits themselves.
        watch: what is watched.
    """

    watch: Watch

    def __new__(cls, edits: Iterable[Steer], watch: Watch) -> Watched:
        made = super().__new__(cls, tuple(edits))
        made.watch = watch
        return made


class WatchingSteering(RowSteering):
    """Row-wise steering that also watches the rows whose edits are :class:`Watched`.

    Tokens of answers are watched as the model reads them, prompts are not.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__(adapter)
        self._model = adapter
        self._hooks = Handles()
        self._points: set[HookPoint] = set()
        self._scorers: dict[tuple[int, ...], Scorer] = {}
        self._rows: list[Watch | None] = []
        self._remembered: list[Watch | None] = []

    @property
    def attached(self) -> bool:
        return super().attached or bool(self._points)

    def prepare(self, spans: Sequence[Span], columns: int, key: object = None) -> None:
        super().prepare(spans, columns, key)
        answers = columns == 1 and all(span.first >= span.prompt_length for span in spans)
        watches = [getattr(span.steering, "watch", None) for span in spans]
        if not answers:
            _refuse_answers_read_again(spans, watches, columns)
        self._rows = watches if answers and any(watches) else []
        self._remembered = self._rows
        for watch in self._rows:
            for behavior in () if watch is None else watch.behaviors:
                if behavior.point not in self._points:
                    self._points.add(behavior.point)
                    self._hooks.add(on_point(self._model, behavior.point, self._watching(behavior.point)))

    def recall(self, key: object) -> bool:
        known = super().recall(key)
        if known:
            self._rows = self._remembered
        return known

    def rest(self) -> None:
        super().rest()
        self._rows = []

    def detach(self) -> None:
        super().detach()
        self._hooks.remove()
        self._points.clear()
        self._rows = self._remembered = []

    def _watching(self, point: HookPoint) -> Any:
        def watch(hidden: Tensor) -> Tensor | None:
            here = [
                (i, w, [b for b in w.behaviors if b.point == point])
                for i, w in enumerate(self._rows)
                if w is not None
            ]
            here = [one for one in here if one[2]]
            return self._watch(hidden, here) if here else None

        return watch

    def _watch(self, hidden: Tensor, here: list[tuple[int, Watch, list[Behavior]]]) -> Tensor | None:
        behaviors = list({id(b): b for _, _, found in here for b in found}.values())
        scorer = self._scorer(behaviors, hidden.device)
        x = hidden.flatten(0, 1) if hidden.dim() == 3 else hidden.flatten(0, 1).flatten(1)
        scores = scorer(x)
        found, hits = scores.tolist(), (scores > scorer.thresholds).tolist()
        place = {id(b): j for j, b in enumerate(behaviors)}
        change: dict[int, list[int]] = {}
        for i, watch, mine in here:
            names = [(b, place[id(b)]) for b in mine]
            detected = tuple(b.name for b, j in names if hits[i][j])
            watch.active.update(detected)
            corrected = tuple(
                b.name for b, _ in names if b.name in watch.active and watch.action == "correct"
            )
            for b, j in names:
                if b.name in corrected:
                    change.setdefault(j, []).append(i)
            watch.seen.append(Seen({b.name: found[i][j] for b, j in names}, detected, corrected))
        if not change:
            return None
        edited = hidden.clone()
        for j, rows in change.items():
            index = torch.tensor(rows, device=hidden.device)
            part = edited.index_select(0, index)
            edited.index_copy_(0, index, behaviors[j].correction(part.flatten(2)).view_as(part))
        return edited

    def _scorer(self, behaviors: list[Behavior], device: torch.device) -> Scorer:
        key = tuple(map(id, behaviors))
        if key not in self._scorers:
            self._scorers[key] = Scorer(behaviors, device)
        return self._scorers[key]


def _refuse_answers_read_again(spans: Sequence[Span], watches: Sequence[Watch | None], columns: int) -> None:
    """A text that is read anew would lose the corrections of what was read before."""
    for span, watch in zip(spans, watches, strict=True):
        if watch is not None and watch.seen and span.first + columns > span.prompt_length:
            raise ValidationError(
                "the answer grew to where this model reads its text anew, and corrections of what it read before would "
                "be lost: ask for fewer tokens, or don't watch it."
            )


def check_fits(adapter: ModelAdapter, behavior: Behavior) -> None:
    """Refuses a behavior of another model.

    Raises:
        ValidationError: another family or width, or a layer that isn't there.
    """
    if None not in (behavior.family, adapter.family) and behavior.family != adapter.family:
        raise ValidationError(
            f"the behavior {behavior.name!r} was made for {behavior.model}, a model of the family {behavior.family!r}, "
            f"and {adapter.model_id} is of {adapter.family!r}: make it for this model."
        )
    last = adapter.n_layers if behavior.point.kind == "resid" else adapter.n_layers - 1
    wide = behavior.point.kind == "resid" and behavior.width != adapter.d_model
    if wide or behavior.point.layer > last:
        raise ValidationError(
            f"the behavior {behavior.name!r} is read at {behavior.point} of {behavior.model}, {behavior.width} wide, "
            f"and {adapter.model_id} has {adapter.n_layers} layers of width {adapter.d_model}: make it for this model."
        )


def forced_edits(behaviors: Sequence[Behavior]) -> tuple[Steer, ...]:
    """Edits that take behaviors out of every token, seen or not: their distance along the correction's direction.

    Raises:
        ValidationError: a behavior that isn't read in the residual stream.
    """
    edits = []
    for behavior in behaviors:
        if behavior.point.kind != "resid":
            raise ValidationError(
                f"the behavior {behavior.name!r} is read at {behavior.point}, and steering is forced on the residual "
                "stream alone."
            )
        found = behavior.correction
        edits.append(Steer(behavior.point.layer, Edit.add(-(found.high - found.low) * found.direction)))
    return tuple(edits)
