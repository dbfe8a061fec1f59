"""Watching answers while they are written: every token scored, and corrected or ended where a behavior shows.

It rides on the decoder: a request names its :class:`Watch` as its onlooker, and :class:`WatchingSteering`, in the place
of the decoder's own, sees it with every call that it prepares. A captured step scores inside the graph; one in which
something shows that is to be corrected is run again by the host, and so are the steps of an answer that is corrected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...errors import ValidationError
from ..decode.request import Steer
from ..decode.steering import RowSteering, Span
from ..intervention import Edit
from ..models.adapter import Handles, ModelAdapter
from .behavior import Behavior
from .hook_points import HookPoint, check_point, on_point
from .scorings import Scoring, scorings_of

__all__ = [
    "ACTIONS",
    "Action",
    "Seen",
    "Watch",
    "WatchingSteering",
    "check_fits",
    "check_sizes",
    "forced_edits",
]

Action = Literal["correct", "abort", "report"]
ACTIONS: tuple[Action, ...] = ("correct", "abort", "report")


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
    """What is watched in one answer, and what was seen of it so far; the onlooker of one row.

    Args:
        behaviors: the behaviors.
        action: what is done where one is detected: ``"correct"``: from that token to the answer's end; ``"abort"``: the
            answer ends; ``"report"``: nothing.
        floor: names of behaviors that are corrected whatever the action is, and end no answer.

    Attributes:
        seen: its tokens, in order.
        active: the behaviors that were detected so far.
        altered: whether a token was corrected.
    """

    behaviors: tuple[Behavior, ...]
    action: Action = "correct"
    floor: frozenset[str] = frozenset()
    seen: list[Seen] = field(default_factory=list)
    active: set[str] = field(default_factory=set)
    altered: bool = False
    _counts: dict[HookPoint, int] = field(default_factory=dict)

    @cached_property
    def by_point(self) -> dict[HookPoint, tuple[Behavior, ...]]:
        """The behaviors by the places where they are read."""
        found: dict[HookPoint, tuple[Behavior, ...]] = {}
        for behavior in self.behaviors:
            found[behavior.point] = (*found.get(behavior.point, ()), behavior)
        return found

    @property
    def end(self) -> Literal["behavior"] | None:
        """``"behavior"`` once the answer is to end."""
        return "behavior" if self.action == "abort" and self.active - self.floor else None

    @property
    def detected(self) -> tuple[str, ...]:
        """The behaviors that were detected so far, in the order in which they are watched."""
        return tuple(behavior.name for behavior in self.behaviors if behavior.name in self.active)

    @property
    def to_correct(self) -> set[str]:
        """The behaviors that are corrected from here on."""
        return self.active if self.action == "correct" else self.active & self.floor

    def n_seen(self, point: HookPoint) -> int:
        """Tokens that were scored at a place."""
        return self._counts.get(point, 0)

    def note(self, point: HookPoint, scores: dict[str, float], detected: Sequence[str]) -> tuple[str, ...]:
        """Takes the scores of the next token at a place.

        Returns:
            The behaviors that are to be corrected in it.
        """
        self.active.update(detected)
        to_correct = self.to_correct
        corrected = tuple(name for name in scores if name in to_correct) if to_correct else ()
        self.altered |= bool(corrected)
        place = self._counts[point] = self.n_seen(point) + 1
        if place > len(self.seen):
            self.seen.append(Seen(scores, tuple(detected), corrected))
        else:  # another place of the same token was there before
            one = self.seen[place - 1]
            self.seen[place - 1] = Seen(
                one.scores | scores, (*one.detected, *detected), (*one.corrected, *corrected)
            )
        return corrected


@dataclass(frozen=True)
class _Here:
    """A row with behaviors that are read at one place.

    Args:
        row: of the call.
        watch: what is watched in it.
        behaviors: those that are read here.
        first: which token of the answer stands in the call's first column, negative in the prompt; None for the next.
    """

    row: int
    watch: Watch
    behaviors: tuple[Behavior, ...]
    first: int | None

    def tokens(self, columns: int, point: HookPoint) -> Iterator[tuple[int, int]]:
        """The columns that hold tokens of the answer, and which ones they are."""
        first = self.watch.n_seen(point) if self.first is None else self.first
        return ((column, first + column) for column in range(max(0, -first), columns))


class _Place:
    """What is watched at one place in a call.

    Args:
        rows: the rows with behaviors that are read there.
    """

    def __init__(self, rows: list[_Here]) -> None:
        self.rows = rows
        self._scoring: Scoring | None = None

    def repeated(self) -> _Place:
        """The same for calls that repeat this one, each with the next token."""
        return _Place([replace(one, first=None) for one in self.rows])

    def meet(self, scoring_of: Callable[[Iterable[Behavior]], Scoring]) -> Scoring:
        """What scores the rows' behaviors together."""
        if self._scoring is None:
            self._scoring = scoring_of([b for one in self.rows for b in one.behaviors])
        return self._scoring


_Places = dict[HookPoint, _Place]
_Wanted = tuple[tuple[HookPoint, Scoring], ...]


class WatchingSteering(RowSteering):
    """Row-wise steering that also watches the rows whose onlookers are :class:`Watch`.

    Tokens of answers are watched as the model reads them, prompts are not. Where an answer is read again, what was
    corrected in it is corrected again, and what was scored before is not scored.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__(adapter)
        self._model = adapter
        self._hooks = Handles()
        self._points: set[HookPoint] = set()
        self._scorings = scorings_of(adapter)
        self._places: _Places = {}
        self._remembered: _Places = {}
        self._wanted: dict[HookPoint, Scoring] = {}
        self._noted: dict[HookPoint, Tensor] = {}

    @property
    def attached(self) -> bool:
        return super().attached or bool(self._points)

    def prepare(self, spans: Sequence[Span], columns: int, key: object = None) -> None:
        edited = set(self._attached)
        super().prepare(spans, columns, key)
        if self._attached != edited:
            # Hooks run in the order in which they came, and scores are of what the edits make.
            self._unhook()
        self.look_on(spans, columns)
        self._remembered = {point: place.repeated() for point, place in self._places.items()}

    def look_on(self, spans: Sequence[Span], columns: int) -> None:
        rows: dict[HookPoint, list[_Here]] = {}
        for i, span in enumerate(spans):
            watch, first = span.onlooker, span.first - span.prompt_length
            if isinstance(watch, Watch) and first + columns > 0:
                for point, behaviors in watch.by_point.items():
                    rows.setdefault(point, []).append(_Here(i, watch, behaviors, first))
        self._places = {point: _Place(here) for point, here in rows.items()}
        self._hook_on(self._places)

    def foreseen(self, spans: Sequence[Span]) -> Hashable | None:
        wanted: dict[HookPoint, list[Behavior]] = {}
        for span in spans:
            watch = span.onlooker
            if not isinstance(watch, Watch):
                continue
            token = span.first - span.prompt_length
            if watch.to_correct or any(token != watch.n_seen(point) for point in watch.by_point):
                return None
            for point, behaviors in watch.by_point.items():
                wanted.setdefault(point, []).extend(behaviors)
        device = self._model.device
        return tuple((point, self._scorings.of(wanted[point], device)) for point in sorted(wanted, key=str))

    def note_down(self, wanted: Hashable) -> None:
        self._places, self._noted = {}, {}
        self._wanted = dict(cast(_Wanted, wanted))
        self._hook_on(self._wanted)

    def noted(self) -> Mapping[Any, Tensor]:
        return self._noted

    def tell(self, spans: Sequence[Span], wanted: Hashable, noted: Mapping[Any, Tensor]) -> bool:
        scorings = dict(cast(_Wanted, wanted))
        for point, scores in noted.items():  # in the order in which the model came to them
            again = False
            for span, values in zip(spans, scores[: len(spans)].tolist(), strict=True):
                watch = span.onlooker
                if not isinstance(watch, Watch) or point not in watch.by_point:
                    continue
                found, detected = scorings[point].of(watch.by_point[point]).read(values)
                again |= bool(watch.note(point, found, detected))
            if again:
                return False  # what comes after this place in the model is to see the correction
        return True

    def _hook_on(self, points: Iterable[HookPoint]) -> None:
        for point in set(points) - self._points:
            self._hooks.add(on_point(self._model, point, self._watching(point)))
            self._points.add(point)

    def recall(self, key: object) -> bool:
        known = super().recall(key)
        if known:
            self._places = self._remembered
        return known

    def rest(self) -> None:
        super().rest()
        self._places, self._wanted = {}, {}

    def detach(self) -> None:
        super().detach()
        self._unhook()
        self._places = self._remembered = {}

    def _unhook(self) -> None:
        self._hooks.remove()
        self._points.clear()

    def _watching(self, point: HookPoint) -> Any:
        def watch(hidden: Tensor) -> Tensor | None:
            if (scoring := self._wanted.get(point)) is not None:
                self._noted[point] = scoring.scorer(hidden.flatten(0, 1).flatten(1))
                return None
            place = self._places.get(point)
            if place is None:
                return None
            begun = time.perf_counter()
            edited = self._watch(hidden, point, place)
            self.seconds += time.perf_counter() - begun
            return edited

        return watch

    def _watch(self, hidden: Tensor, point: HookPoint, place: _Place) -> Tensor | None:
        columns = hidden.shape[1]
        new: list[tuple[int, _Here]] = []
        change: dict[Behavior, list[int]] = {}
        for one in place.rows:
            for column, token in one.tokens(columns, point):
                index = one.row * columns + column
                if token >= one.watch.n_seen(point):
                    new.append((index, one))
                    continue
                for b in one.behaviors:
                    if b.name in one.watch.seen[token].corrected:
                        change.setdefault(b, []).append(index)
        if new:
            self._score(hidden, point, place, new, change)
        if not change:
            return None
        edited = hidden.clone(memory_format=torch.contiguous_format)
        flat = edited.flatten(0, 1)
        for behavior, indices in change.items():
            chosen = torch.tensor(indices, device=hidden.device)
            part = flat.index_select(0, chosen)
            flat.index_copy_(0, chosen, behavior.correction(part.flatten(1)).view_as(part))
        return edited

    def _score(
        self,
        hidden: Tensor,
        point: HookPoint,
        place: _Place,
        new: Sequence[tuple[int, _Here]],
        change: dict[Behavior, list[int]],
    ) -> None:
        """Scores tokens that the model reads for the first time; adds to ``change`` what is to be corrected."""
        scoring = place.meet(lambda behaviors: self._scorings.of(behaviors, hidden.device))
        x = hidden.flatten(0, 1).flatten(1)
        if len(new) < len(x):
            x = x[torch.tensor([index for index, _ in new], device=x.device)]
        for (index, one), values in zip(new, scoring.scorer(x).tolist(), strict=True):
            scores, detected = scoring.of(one.behaviors).read(values)
            corrected = one.watch.note(point, scores, detected)
            for b in one.behaviors if corrected else ():
                if b.name in corrected:
                    change.setdefault(b, []).append(index)


def check_fits(adapter: ModelAdapter, behavior: Behavior) -> None:
    """Refuses a behavior of another model.

    Raises:
        ValidationError: another family or width, or a layer or a part of it that isn't there.
    """
    check_sizes(behavior, adapter.model_id, adapter.family, adapter.n_layers, adapter.d_model)
    check_point(adapter, behavior.point)


def check_sizes(behavior: Behavior, model_id: str, family: str | None, n_layers: int, width: int) -> None:
    """Refuses a behavior of a model of another family, width (of the residual stream) or depth.

    Raises:
        ValidationError: it is one.
    """
    if None not in (behavior.family, family) and behavior.family != family:
        raise ValidationError(
            f"the behavior {behavior.name!r} was made for {behavior.model}, a model of the family {behavior.family!r}, "
            f"and {model_id} is of {family!r}: make it for this model."
        )
    last = n_layers if behavior.point.kind == "resid" else n_layers - 1
    wide = behavior.point.kind == "resid" and behavior.width != width
    if wide or behavior.point.layer > last:
        raise ValidationError(
            f"the behavior {behavior.name!r} is read at {behavior.point} of {behavior.model}, {behavior.width} wide, "
            f"and {model_id} has {n_layers} layers of width {width}: make it for this model."
        )


_forced: WeakKeyDictionary[Behavior, Steer] = WeakKeyDictionary()


def forced_edits(behaviors: Sequence[Behavior]) -> tuple[Steer, ...]:
    """Edits that take behaviors out of every token, seen or not: their distance along the correction's direction.

    The same behavior gives the same edit, so that rows share it.

    Raises:
        ValidationError: a behavior that isn't read in the residual stream.
    """
    for behavior in behaviors:
        if behavior.point.kind != "resid":
            raise ValidationError(
                f"the behavior {behavior.name!r} is read at {behavior.point}, and steering is forced on the residual "
                "stream alone."
            )
        if behavior not in _forced:
            found = behavior.correction
            edit = Edit.add(-(found.high - found.low) * found.direction)
            _forced[behavior] = Steer(behavior.point.layer, edit)
    return tuple(_forced[behavior] for behavior in behaviors)
