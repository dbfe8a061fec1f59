"""One request at a time through transformers' own ``generate``: for models whose rows can't be put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.hooks import Intervention, SteeringPlan
from ..engine.models.adapter import ModelAdapter
from ..errors import MechanexError
from .batch import Outcome
from .row import Row
from .sampler import are_sound, choose, logprobs_of, not_finite

__all__ = ["answer"]


def answer(
    adapter: ModelAdapter, row: Row, padding: int, tell: Callable[[Outcome], None], ended: Callable[[], bool]
) -> None:
    """Writes one answer to its end.

    Args:
        adapter: the model, in eval mode, without gradients, and nobody else's meanwhile.
        row: the answer.
        padding: a token id that ``generate`` asks for.
        tell: is given what each step brings.
        ended: asked after every step; True stops the answer where it is.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    hf: Any = adapter.hf_model
    ids = torch.tensor([row.ids], device=adapter.device)
    plan = SteeringPlan(Intervention(s.layer, s.edit, tokens=s.tokens) for s in row.request.steering)
    with plan.apply(adapter):
        if row.request.prompt_logprobs:
            following = row.ids[1:]
            logits = adapter.call(input_ids=ids).logits[0, :-1]
            if len(logits) and not are_sound(logits):
                tell((row, not_finite(row)))
                return
            row.prompt_logprobs = [
                None,
                *logprobs_of(logits, following, [row.request.logprobs or 0] * len(following)),
            ]
        if row.max_tokens < 1:
            tell((row, row.finish_unread()))
            return
        chooser = _Chooser(row)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=row.max_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=None,
            pad_token_id=padding,
        )

        def follow(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            token, logprob = chooser.chosen
            tell((row, row.take(token, logprob)))
            return torch.tensor([row.result is not None or ended()], device=input_ids.device)

        hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([follow]),
        )


class _Chooser:
    """A logits processor that chooses as the batch does, so that ``generate`` only takes the likeliest token."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self.chosen: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        (found,) = choose([self._row], scores)
        if isinstance(found, MechanexError):
            raise found
        self.chosen = found
        forced = torch.full_like(scores, -torch.inf)
        forced[0, found[0]] = 0.0
        return forced
