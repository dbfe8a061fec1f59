"""Generation that is watched: whole texts with what was seen in them, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..capabilities.decoding import form
from ..decode.request import TextRequest
from ..decode.run import decode
from ..generate import Generating
from ..models.adapter import ModelAdapter, exclusive
from ..sampling import Options
from ..text import Prompt
from .behavior import Behavior
from .watching import Action, Seen, Watch, Watched, WatchingSteering, check_fits, forced_edits

__all__ = ["TracedToken", "WatchedText", "generate_watched"]


@dataclass(frozen=True)
class TracedToken:
    """A token of an answer.

    Args:
        token: its id.
        text: its text, as the tokenizer decodes it alone.
        scores: by behavior; empty for the last token, which the model did not read.
        detected: behaviors that it shows.
        corrected: behaviors that were corrected in it.
    """

    token: int
    text: str
    scores: dict[str, float]
    detected: tuple[str, ...]
    corrected: tuple[str, ...]


@dataclass(frozen=True)
class WatchedText:
    """A text and what was seen while it was written.

    Args:
        text: the prompt and its continuation.
        finish_reason: ``"stop"``, ``"length"``, or ``"behavior"`` where one ended it.
        detected: the behaviors that showed.
        trace: the tokens of the answer.
    """

    text: str
    finish_reason: str
    detected: tuple[str, ...]
    trace: tuple[TracedToken, ...]


class _Watching(Generating):
    """One checked call whose answers are watched."""

    def __init__(
        self,
        model: nn.Module | ModelAdapter,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        options: Options,
        behaviors: Sequence[Behavior],
        action: Action,
        forced: Sequence[Behavior],
    ) -> None:
        super().__init__(model, tokenizer, prompts, options)
        for behavior in (*behaviors, *forced):
            check_fits(self.adapter, behavior)
        self.watches = [Watch(tuple(behaviors), action) for _ in prompts]
        self._forced = forced_edits(forced)

    def request(self, i: int, request: TextRequest) -> TextRequest:
        watch = self.watches[i]
        edits = (*request.steering, *self._forced)
        return replace(
            request,
            steering=Watched(edits, watch) if watch.behaviors else edits,
            until=lambda: "behavior" if watch.aborted else None,
        )

    def watched(self) -> list[WatchedText]:
        """Runs the call."""
        rows = self.rows(stream=False)
        with exclusive(self.adapter):
            if any(watch.behaviors for watch in self.watches) and form(self.adapter, len(rows)) == "reread":
                raise ValidationError(
                    f"{self.adapter.model_id} has no cache to go on from and reads its whole text for every token, "
                    "so that its answers can't be watched."
                )
            decode(self.adapter, rows, self.padding, steering=WatchingSteering(self.adapter))
        found = []
        for prompt, row, watch in zip(self.prompts, rows, self.watches, strict=True):
            assert row.result is not None
            trace = _traced(self.tokenizer, row.chosen, watch.seen)
            names = tuple(b.name for b in watch.behaviors if b.name in watch.active)
            found.append(WatchedText(prompt + row.text, row.result.finish_reason, names, trace))
        return found


def generate_watched(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    behaviors: Sequence[Behavior],
    *,
    action: Action = "correct",
    forced: Sequence[Behavior] = (),
    **options: Any,
) -> list[WatchedText]:
    """Continues prompts together, every token of every answer scored for every behavior.

    Args:
        model: a Hugging Face or TransformerLens model.
        tokenizer: its tokenizer; None where the model carries one.
        prompts: text, token ids or chat messages.
        behaviors: what is watched.
        action: what is done where one is detected: ``"correct"``: from that token to the answer's end; ``"abort"``:
            the answer ends with that token; ``"report"``: nothing.
        forced: behaviors that are taken out of every token, prompts' too, seen or not.
        options: keyword arguments of ``generate.Options``.

    Raises:
        ValidationError: an argument out of its range, a behavior of another model, or a model without a cache.
    """
    if action not in ("correct", "abort", "report"):
        raise ValidationError(f"action is correct, abort or report; got {action!r}.")
    return _Watching(model, tokenizer, prompts, Options(**options), behaviors, action, forced).watched()


def _traced(tokenizer: Any, chosen: Sequence[int], seen: Sequence[Seen]) -> tuple[TracedToken, ...]:
    texts = [tokenizer.decode([token]) for token in chosen]
    nothing = Seen({}, (), ())
    found = [*seen, *[nothing] * (len(chosen) - len(seen))]
    return tuple(
        TracedToken(token, text, one.scores, one.detected, one.corrected)
        for token, text, one in zip(chosen, texts, found, strict=False)
    )
