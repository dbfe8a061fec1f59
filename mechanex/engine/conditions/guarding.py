"""Generation under a guard, with what the guard did: which tokens were held back, and how far each was moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..decode.request import GuardedToken
from ..decode.run import decode
from ..generate import Generating
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import Prompt

__all__ = ["GuardedText", "generate_guarded"]


@dataclass(frozen=True)
class GuardedText:
    """A text that was written under a guard.

    Args:
        text: the prompt with its continuation.
        prompt: the prompt.
        prompt_ids: its token ids.
        tokens: ids of what was chosen.
        trace: what the guard did at each of them.
    """

    text: str
    prompt: str
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    trace: tuple[GuardedToken, ...]

    @property
    def held_back(self) -> int:
        """How many tokens were chosen at less than the whole strength."""
        return sum(one.share < 1 for one in self.trace)


def generate_guarded(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    guard: float,
    **options: Any,
) -> list[GuardedText]:
    """Continues prompts together, no token of which is moved further than the guard allows.

    Args:
        model: a Hugging Face or TransformerLens model.
        tokenizer: its tokenizer; None where the model carries one.
        prompts: text, token ids or chat messages, of two tokens or more.
        guard: most nats of KL(steered‖plain) of a token's distribution, before temperature.
        options: keyword arguments of ``generate.Options``; ``vector`` is needed.

    Raises:
        ValidationError: no vector, an argument out of its range, or a model in which several strengths can't be tried
            at one token.
    """
    if options.get("vector") is None:
        raise ValidationError("a guard bounds what a vector does: give a vector.")
    call = Generating(model, tokenizer, prompts, Options(guard=guard, **options))
    rows = call.rows(stream=False)
    decode(call.adapter, rows, call.padding)
    return [
        GuardedText(prompt + row.text, prompt, tuple(row.ids), tuple(row.chosen), tuple(row.guarded))
        for prompt, row in zip(call.prompts, rows, strict=True)
    ]
