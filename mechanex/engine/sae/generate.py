"""Generation that is watched: whole texts with what was seen in them, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..decode.request import TextRequest
from ..decode.run import decode
from ..generate import Generating
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import Prompt
from ..token_texts import TokenTexts
from .behavior import Behavior
from .traces import TracedToken, WatchedText
from .watching import ACTIONS, Action, Seen, Watch, WatchingSteering, check_fits, forced_edits

__all__ = ["generate_watched", "traced"]


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
        return replace(request, steering=edits, onlooker=watch if watch.behaviors else None)

    def watched(self) -> list[WatchedText]:
        """Runs the call."""
        rows = self.rows(stream=False)
        decode(self.adapter, rows, self.padding, steering=WatchingSteering(self.adapter))
        found, names = [], TokenTexts(self.tokenizer)
        for prompt, row, watch in zip(self.prompts, rows, self.watches, strict=True):
            assert row.result is not None
            trace = traced(row.chosen, [names[token][0] for token in row.chosen], watch.seen)
            reason = row.result.finish_reason
            found.append(WatchedText(prompt + row.text, reason, watch.detected, trace, prompt))
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
        ValidationError: an argument out of its range, or a behavior of another model.
    """
    if action not in ACTIONS:
        raise ValidationError(f"action is correct, abort or report; got {action!r}.")
    return _Watching(model, tokenizer, prompts, Options(**options), behaviors, action, forced).watched()


def traced(tokens: Sequence[int], texts: Sequence[str], seen: Sequence[Seen]) -> tuple[TracedToken, ...]:
    """The trace of an answer.

    Args:
        tokens: what was chosen.
        texts: their texts.
        seen: what was seen of the first of them.
    """
    nothing = Seen({}, (), ())
    found = [*seen[: len(tokens)], *[nothing] * (len(tokens) - len(seen))]
    return tuple(
        TracedToken(token, text, one.scores, one.detected, one.corrected)
        for token, text, one in zip(tokens, texts, found, strict=True)
    )
