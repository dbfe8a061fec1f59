"""Many settings by rounds in which answers are given: each round the best kinds of dose at one price go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..datasets import ContrastivePairs
from ..models.adapter import ModelAdapter
from ..pack import Pair
from ..text import encode_pair
from ..vectors import SteeringVector
from .calibrate import dose_quantile
from .dose import Dose
from .families import Family, apart, around, families_of, worth
from .forced import ForcedAnswers
from .halving import rounds
from .judge import TextJudge, name_of
from .kept_work import KeptWork
from .swept import Setting

__all__ = ["forced_rounds"]

# Of the evaluations that texts leave, what these rounds may take: their layout has padding.
SHARE = 0.7
CHUNK = 64
NEARBY = 8  # kinds of dose whose layers are nearer than this share of the model's are alike


def forced_rounds(
    adapter: ModelAdapter,
    tokenizer: Any,
    check: ContrastivePairs,
    doses: list[Dose],
    vectors: dict[str, SteeringVector],
    kept: KeptWork,
    judge: TextJudge,
    *,
    finalists: int,
    price: float,
    evaluations: float,
) -> tuple[list[Setting], list[Family]]:
    """All settings that were tried, as far as they came, and the best families of doses, the best first.

    Args:
        check: pairs whose answers are given.
        doses: what is tried.
        finalists: how many families stay.
        price: mean KL per token, nats, at which families are compared.
        evaluations: what all rounds may cost, in whole evaluations of a setting.
    """
    encoded: list[list[Pair]] = [
        [encode_pair(tokenizer, prompt, answer) for answer in both]
        for prompt, *both in zip(check.prompts, check.positive_answers, check.negative_answers, strict=True)
    ]
    lengths = [len(both[0][0]) + sum(len(answer) for _, answer in both) for both in encoded]
    each = (
        sum(lengths) / len(lengths) * sum(max(1, adapter.n_layers - one.layer) for one in doses) / len(doses)
    )
    plan = rounds(len(doses), len(encoded), 2 * finalists, max(0.0, SHARE * evaluations) * judge.whole / each)
    # By length, from the middle out: a first round on one pair takes a usual one.
    middle = sorted(range(len(encoded)), key=lambda i: abs(lengths[i] - sorted(lengths)[len(lengths) // 2]))
    results: dict[Dose, Setting] = {}
    left, best = doses, list[Family]()
    for number, (_, examples) in enumerate(plan):
        part = [pair for i in middle[:examples] for pair in encoded[i]]
        found = _round(adapter, part, left, vectors, kept, judge, number)
        results |= {one.dose: one for one in found}
        wanted = plan[number + 1][0] if number + 1 < len(plan) else 2 * finalists
        best = _ranked(found, price)[: max(2 * finalists, wanted // 2)]
        left = [one.dose for family in best for one in family.settings]
    # Answers that are given tell kinds of dose apart, and their neighbours hardly.
    return list(results.values()), apart(best, finalists, math.ceil(adapter.n_layers / NEARBY))


def _ranked(found: Sequence[Setting], price: float) -> list[Family]:
    """Families by their gain at the price, each with its two settings nearest to that; those too dear come last."""
    ranked = []
    for family in families_of(found):
        prices, gains = [one.kl for one in family.settings], [one.gain for one in family.settings]
        strength, gain, within = worth(family.strengths, prices, gains, price)
        ranked.append((not within, -gain, Family(around(family, strength))))
    return [family for *_, family in sorted(ranked, key=lambda one: one[:2])]


def _round(
    adapter: ModelAdapter,
    part: list[Pair],
    doses: list[Dose],
    vectors: dict[str, SteeringVector],
    kept: KeptWork,
    judge: TextJudge,
    number: int,
) -> list[Setting]:
    """One round: pairs of (positive, negative) answers in turn, under every dose."""
    known = kept.forced(number)
    todo = [dose for dose in doses if name_of(dose) not in known]
    todo.sort(key=lambda dose: dose.layer)
    if todo:
        answers = ForcedAnswers(adapter, part)

        def odds(logprobs: torch.Tensor) -> float:
            found = answers.by_answer(logprobs, mean=True)
            return float((found[::2] - found[1::2]).mean())

        plain = odds(answers.plain)
        bar = tqdm(total=len(todo), desc=f"Round {number + 1}", disable=not judge.progress)
        for first in range(0, len(todo), CHUNK):
            chunk = todo[first : first + CHUNK]
            for dose, one in zip(
                chunk, answers.under([dose.of(vectors[dose.method]) for dose in chunk]), strict=True
            ):
                known[name_of(dose)] = [
                    odds(one.logprobs) - plain,
                    float(one.kl.mean()),
                    dose_quantile(one.kl),
                ]
            kept.save()
            bar.update(len(chunk))
        bar.close()
        judge.work += answers.work
    found = []
    for dose in doses:
        gain, kl, kl95 = known[name_of(dose)]
        found.append(Setting(dose, gain, kl, kl95, len(part) // 2))
    return found
