"""The two prompts of an attribution, token beside token."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ValidationError
from ..models.adapter import ModelAdapter
from ..text import Prompt, encode_prompt

__all__ = ["Align", "PromptPair", "prompt_pair"]

Align = Literal["tokens"] | None


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean and a corrupted prompt.

    Args:
        clean, corrupted: token ids.
        clean_at, corrupted_at: [n] int64, positions that stand for one another, ascending; the last ones do.
    """

    clean: list[int]
    corrupted: list[int]
    clean_at: Tensor
    corrupted_at: Tensor

    def delta(self, clean: Tensor, corrupted: Tensor) -> Tensor:
        """[T corrupted, …] float32, clean minus corrupted values; 0 where no position of the clean prompt corresponds.

        Args:
            clean: [T clean, …].
            corrupted: [T corrupted, …].
        """
        found = torch.zeros(corrupted.shape, dtype=torch.float32, device=corrupted.device)
        mine, theirs = (at.to(corrupted.device) for at in (self.corrupted_at, self.clean_at))
        found[mine] = clean[theirs].float() - corrupted[mine].float()
        return found


def prompt_pair(
    adapter: ModelAdapter, tokenizer: Any, clean: Prompt, corrupted: Prompt, align: Align = None
) -> PromptPair:
    """The two prompts as token ids whose positions correspond.

    Args:
        adapter: the model.
        tokenizer: its tokenizer; not needed for token ids.
        clean, corrupted: text, token ids or chat messages.
        align: None: both must have as many tokens. ``"tokens"``: tokens that are the same correspond, and what stands
            between them from its end; what is left over has no counterpart, and nothing is patched there.

    Raises:
        ValidationError: prompts without tokens, with too many or with unknown ones, or of different lengths.
    """
    if align not in (None, "tokens"):
        raise ValidationError(f"align is None or 'tokens'; got {align!r}.")
    ids = [encode_prompt(tokenizer, prompt) for prompt in (clean, corrupted)]
    for name, found in zip(("clean_prompt", "corrupted_prompt"), ids, strict=True):
        if not found:
            raise ValidationError(f"{name} has no tokens: give a text with at least one.")
        adapter.check_token_ids(found)
    one, other = ids
    if len(one) == len(other):
        at = torch.arange(len(one))
        return PromptPair(one, other, at, at)
    if align is None:
        raise ValidationError(
            f"clean_prompt has {len(one)} tokens and corrupted_prompt {len(other)}, and what is patched goes from "
            f"position to position. {_where(tokenizer, one, other)} Word them so that both have as many tokens, or "
            "pass align='tokens'."
        )
    pairs = _aligned(one, other)
    return PromptPair(one, other, *(torch.tensor(side) for side in zip(*pairs, strict=True)))


def _aligned(one: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Positions that correspond; the last tokens do, whatever they are, since the answer is read there."""
    pairs: list[tuple[int, int]] = []
    matcher = difflib.SequenceMatcher(None, one[:-1], other[:-1], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind in ("equal", "replace"):
            n = min(b - a, d - c)
            pairs += zip(range(b - n, b), range(d - n, d), strict=True)
    return [*pairs, (len(one) - 1, len(other) - 1)]


def _where(tokenizer: Any, one: list[int], other: list[int]) -> str:
    first = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if first is None:
        return f"They are the same up to token {min(len(one), len(other))}."

    def shown(ids: list[int]) -> str:
        return repr(tokenizer.decode(ids[first : first + 3])) if tokenizer is not None else str(ids[first])

    return f"They differ from token {first} on: {shown(one)} and {shown(other)}."
