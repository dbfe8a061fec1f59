"""Multiple-choice questions: what a model can do, and loses when it is steered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ValidationError
from ..datasets import read_lines
from ..given import as_list
from ..models.adapter import ModelAdapter
from ..text import encode_pair
from .dose import Edited
from .forced import ForcedAnswers
from .questions import as_chats

__all__ = ["ChoiceQuestion", "read_questions", "right_answers"]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: str | os.PathLike[str]) -> list[ChoiceQuestion]:
    """Reads lines of ``question``, ``choices`` and ``answer``, the number of the right choice from 0.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: a bad line, with its number.
    """
    return read_lines(path, _question, None)


def _question(line: dict[str, Any]) -> ChoiceQuestion:
    question, choices, answer = (line.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("it has no 'question' with two 'choices' or more")
    if not all(isinstance(one, str) and one for one in choices):
        raise ValueError("its 'choices' are texts, none of them empty")
    if not isinstance(answer, int) or answer not in range(len(choices)):
        raise ValueError(f"its 'answer' is the number of a choice, 0 to {len(choices) - 1}")
    return ChoiceQuestion(question, tuple(choices), answer)


def right_answers(
    adapter: ModelAdapter, tokenizer: Any, questions: Sequence[ChoiceQuestion], settings: Sequence[Edited]
) -> torch.Tensor:
    """[settings, questions] bool: whether the right choice has the highest log-probability, a mean over its tokens.

    Args:
        adapter: the model.
        tokenizer: its tokenizer.
        questions: what is asked.
        settings: what steers it; () for nothing.

    Raises:
        ValidationError: no questions.
    """
    questions = as_list("questions", questions, "questions")
    for one in questions:
        if not isinstance(one, ChoiceQuestion):
            raise ValidationError(
                f"questions are ChoiceQuestions, as read_questions(path) gives; got {type(one).__name__}."
            )
    prompts = as_chats([one.question for one in questions], tokenizer)
    # A chat's answer begins by itself, a text goes on after a space.
    gap = "" if not isinstance(prompts[0], str) else " "
    pairs = [
        encode_pair(tokenizer, prompt, gap + choice)
        for prompt, one in zip(prompts, questions, strict=True)
        for choice in one.choices
    ]
    forced = ForcedAnswers(adapter, pairs)
    steered = [setting for setting in settings if setting]
    found = iter(forced.under(steered) if steered else [])
    rows = []
    for setting in settings:
        means = forced.by_answer(next(found).logprobs if setting else forced.plain, mean=True)
        parts = torch.split(means, [len(one.choices) for one in questions])
        rows.append([int(part.argmax()) == one.answer for part, one in zip(parts, questions, strict=True)])
    return torch.tensor(rows)
