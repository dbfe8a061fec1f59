"""What several requests of the wire contract have in common, checked before it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ValidationError

if TYPE_CHECKING:
    from ..engine.text import Prompt

__all__ = ["examples", "texts"]


def examples(
    prompts: Sequence[Prompt], positive_answers: Sequence[str], negative_answers: Sequence[str]
) -> dict[str, list[Any]]:
    """Contrastive examples as the fields of a request.

    Raises:
        ValidationError: empty lists, or lists of unequal length.
    """
    found: dict[str, list[Any]] = {}
    for name, given in (
        ("prompts", prompts),
        ("positive_answers", positive_answers),
        ("negative_answers", negative_answers),
    ):
        if isinstance(given, str):
            raise ValidationError(f"{name} is a list of texts; got one text: put it in a list.")
        found[name] = list(given)
    counts = {name: len(given) for name, given in found.items()}
    if len(set(counts.values())) > 1 or not found["prompts"]:
        raise ValidationError(f"prompts and answers are lists of one length, at least 1; got {counts}.")
    return found


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts, which must be texts.

    Raises:
        ValidationError: token ids or chat messages among them.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise ValidationError(
                f"example {number} has a prompt that isn't a text, and only texts can be sent."
            )
    return [prompt for prompt in prompts if isinstance(prompt, str)]
