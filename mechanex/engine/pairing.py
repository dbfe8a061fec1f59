"""Which completions belong to which prompt, in each of the forms that callers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ValidationError
from .chat import Chat
from .text import Prompt

__all__ = ["Completion", "are_prompts", "group_completions"]

Completion = str | Sequence[int]


def group_completions(
    prompts: Prompt | Sequence[Prompt],
    completions: Completion | Sequence[Completion] | Sequence[Sequence[Completion]],
) -> list[tuple[Prompt, list[Completion]]]:
    """Prompts with the list of their completions.

    Args:
        prompts: one prompt (text, token ids or chat messages) or a list of prompts.
        completions: for one prompt, a completion or a list of them; for a list of prompts, one completion or one list
            of completions for each.

    Raises:
        ValidationError: lists of different lengths, empty lists, or something else than these.
    """
    if _is_prompt(prompts):
        several = [completions] if _is_completion(completions) else _several(completions, 0)
        return [(prompts, several)]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValidationError(
            f"prompts is text, token ids or chat messages, or a list of such; got {type(prompts).__name__}."
        )
    if not prompts:
        raise ValidationError("There are no prompts to score completions of.")
    if not isinstance(completions, Sequence) or isinstance(completions, str | bytes):
        raise ValidationError(
            f"{len(prompts)} prompts need a list with one completion, or one list of completions, for each; "
            f"got {type(completions).__name__}."
        )
    if len(prompts) != len(completions):
        raise ValidationError(f"There are {len(prompts)} prompts but {len(completions)} completions.")
    return [
        (prompt, [c] if _is_completion(c) else _several(c, i))  # type: ignore[list-item, misc]
        for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True))
    ]


def are_prompts(value: Any) -> bool:
    """A list of prompts, told from one prompt by what comes first in it."""
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (str, Chat, list, tuple))
    )


def _is_prompt(value: Any) -> bool:
    """One prompt, not a list of them: text, token ids, or chat messages."""
    if isinstance(value, str | Chat):
        return True
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], int | Mapping)


def _is_completion(value: Any) -> bool:
    """One completion, not a list of them: text or token ids."""
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], int)


def _several(completions: Any, prompt: int) -> list[Completion]:
    if not isinstance(completions, Sequence) or isinstance(completions, bytes):
        raise ValidationError(
            f"The completions of prompt {prompt} are a list of texts or of lists of token ids; "
            f"got {type(completions).__name__}."
        )
    if not completions:
        raise ValidationError(f"Prompt {prompt} has no completions; give at least one.")
    return list(completions)
