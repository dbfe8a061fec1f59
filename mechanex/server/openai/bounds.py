"""How much one answer may tell: log-probabilities, and numbers of the model's inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..http.answers import MOST_NUMBERS
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import TextRequest
from .bodies import GenerationBody

__all__ = ["within_bounds"]


@dataclass(frozen=True)
class _Told:
    """Numbers that each of the answers to a prompt tells: of every token of its own, and of the prompt."""

    each: int
    prompt: int = 0

    def of(self, request: TextRequest) -> int:
        """Of an answer as long as it may be."""
        return self.prompt + self.each * request.max_tokens


def within_bounds(
    engine: ServingEngine,
    prompts: Sequence[TextRequest],
    body: GenerationBody,
    watching: Watching,
) -> tuple[list[TextRequest], int]:
    """Requests whose answers tell no more together than the server tells at once, and how many numbers that is.

    Answers that no length was asked for end where there would be more.

    Args:
        engine: whose settings and model.
        prompts: each is drawn ``body.n_drawn`` times.
        body: says what is told.
        watching: whose scores may be told.

    Raises:
        ValidationError: more was asked for, with the field that has to ask for less.
    """
    found, answers = list(prompts), len(prompts) * body.n_drawn
    most_logprobs = engine.settings.max_logprobs
    logprobs = [_logprobs(one) for one in found]
    inside = [_inside(engine, body, watching, one) for one in found]
    if body.asked_length is None:
        for told, most in ((logprobs, most_logprobs), (inside, MOST_NUMBERS)):
            found = [_shortened(one, each, most // answers) for one, each in zip(found, told, strict=True)]
    n_logprobs = body.n_drawn * sum(told.of(one) for told, one in zip(logprobs, found, strict=True))
    if n_logprobs > most_logprobs:
        raise invalid(
            f"{n_logprobs} log-probabilities were asked for (answers x tokens x (top + 1)), and this server tells "
            f"{most_logprobs} at once: ask for fewer answers, tokens or top_logprobs.",
            "logprobs",
        )
    n_inside = body.n_drawn * sum(told.of(one) for told, one in zip(inside, found, strict=True))
    if n_inside > MOST_NUMBERS:
        raise invalid(
            f"{n_inside} numbers of the model's inside were asked for (residual streams, projections, differences of "
            f"logits, scores of behaviors), and this server tells {MOST_NUMBERS} at once: ask for fewer tokens, "
            "layers, vectors or answers.",
            "behavior_scores" if body.returned is None else "return",
        )
    return found, n_logprobs + n_inside


def _shortened(request: TextRequest, told: _Told, most: int) -> TextRequest:
    if not told.each:
        return request
    return replace(request, max_tokens=min(request.max_tokens, max(1, (most - told.prompt) // told.each)))


def _logprobs(request: TextRequest) -> _Told:
    if request.logprobs is None:
        return _Told(0)
    each = request.logprobs + 1
    return _Told(each, each * len(request.ids) if request.prompt_logprobs else 0)


def _inside(engine: ServingEngine, body: GenerationBody, watching: Watching, request: TextRequest) -> _Told:
    wanted, each, prompt = body.returned, 0, 0
    if wanted is not None:
        for item in wanted.activations or ():
            numbers = len(item.vector_ids or ()) + (engine.adapter.d_model if item.raw else 0)
            each += numbers
            prompt += numbers * len(request.ids) if item.prompt else 0
        if wanted.logit_differences is not None:
            each += (
                2 * wanted.logit_differences + 3
            )  # the token, its change, the divergence, and others either way
    if body.behavior_scores:
        each += len(watching.behaviors) + len(watching.floor) + 1
    return _Told(each, prompt)
