"""What several requests of the wire contract have in common, checked before it is sent."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ValidationError

if TYPE_CHECKING:
    from ..engine.answering import AnswerRules
    from ..engine.text import Prompt

__all__ = ["example_lists", "examples", "layer_list", "list_of", "plain_whole", "rules_of", "texts"]

T = TypeVar("T")


def example_lists(
    prompts: Iterable[Prompt], positive_answers: Iterable[str], negative_answers: Iterable[str]
) -> tuple[list[Prompt], list[str], list[str]]:
    """Contrastive examples as lists, so that an iterator serves a server and then the local model.

    Raises:
        ValidationError: one of them is a single text, or can't be walked through.
    """
    for name, given in (
        ("prompts", prompts),
        ("positive_answers", positive_answers),
        ("negative_answers", negative_answers),
    ):
        if isinstance(given, str) or not isinstance(given, Iterable):
            got = "a single text" if isinstance(given, str) else type(given).__name__
            raise ValidationError(
                f"prompts and answers are lists, one entry per example; got {got} as {name}."
            )
    return list(prompts), list(positive_answers), list(negative_answers)


def examples(
    prompts: Iterable[Prompt], positive_answers: Iterable[str], negative_answers: Iterable[str]
) -> dict[str, list[Any]]:
    """Contrastive examples as the fields of a request.

    Raises:
        ValidationError: empty lists, lists of unequal length, or what ``example_lists`` refuses.
    """
    names = ("prompts", "positive_answers", "negative_answers")
    lists = example_lists(prompts, positive_answers, negative_answers)
    found: dict[str, list[Any]] = dict(zip(names, lists, strict=True))
    counts = {name: len(given) for name, given in found.items()}
    if len(set(counts.values())) > 1 or not found["prompts"]:
        raise ValidationError(f"prompts and answers are lists of one length, at least 1; got {counts}.")
    return found


def layer_list(layer_idxs: Iterable[int] | None) -> list[int] | None:
    """The layers as a list; None for the default one.

    Raises:
        ValidationError: a single layer, or something else that can't be walked through.
    """
    if layer_idxs is None:
        return None
    if not isinstance(layer_idxs, Iterable):
        raise ValidationError(f"layers is a list of layers; got {layer_idxs!r}: write [{layer_idxs!r}].")
    return [plain_whole(layer) for layer in layer_idxs]


def plain_whole(number: Any) -> Any:
    """An integer of NumPy's, which has no form in JSON, as an int; all else as it is, for others to check."""
    try:
        return number if isinstance(number, int) else operator.index(number)
    except TypeError:
        return number


def list_of(name: str, given: Iterable[T], kind: str) -> list[T]:
    """An argument as a list.

    Raises:
        ValidationError: one text, or something that can't be walked through; names what it is a list of.
    """
    if isinstance(given, str):
        raise ValidationError(f"{name} is a list of {kind}; got the text {given!r}: put it in a list.")
    if not isinstance(given, Iterable):
        raise ValidationError(f"{name} is a list of {kind}; got {type(given).__name__}.")
    return list(given)


def rules_of(call: str, given: Mapping[str, Any]) -> AnswerRules:
    """What answers are held to, checked as where they are written.

    Raises:
        TypeError: an argument of another name.
        ValidationError: one out of its range.
    """
    from ..engine.answering import RULES, AnswerRules

    unknown = [name for name in given if name not in RULES]
    if unknown:
        raise TypeError(f"{call}() got an unexpected keyword argument {unknown[0]!r}")
    return AnswerRules(**given)


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
