"""Which layer, which edit, which strength: many settings by successive halving, the last few by the texts they make."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...errors import ValidationError
from ..datasets import ContrastivePairs, read_pairs
from ..methods import check_method, vectors_by
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import Prompt, encode_pair
from ..vectors import SteeringVector
from .calibrate import dose_quantile
from .dose import EDITS, Dose
from .forced import ForcedAnswers
from .halving import front, rounds, spread, survivors
from .judge import TextJudge, name_of
from .kept_work import KeptWork
from .means import stream_means
from .scorers import TextScorer, classifier
from .swept import Setting, Swept

__all__ = ["STRENGTHS", "sweep"]

_log = logging.getLogger(__name__)

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
# Of what is left beside the texts, what forced rounds may take: their layout has padding.
FORCED = 0.7
# Steps from the best of the finalists to strengths beside it.
BESIDE = (0.8, 1.2, 1.45)
MORE_REPETITION = 0.1
MEAN_OF = 32  # answers that the mean stream is taken of
CHUNK = 64


def sweep(
    model: nn.Module | ModelAdapter,
    data: ContrastivePairs | str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    edits: Sequence[str] = EDITS,
    tokens: Sequence[str] = ("all", "generated", "prompt"),
    methods: Sequence[str] = ("caa",),
    scorer: TextScorer | None = None,
    validation: Sequence[Prompt] | None = None,
    test: Sequence[Prompt] | None = None,
    most_perplexity: float = 1.5,
    finalists: int = 8,
    most_evaluations: float = 60.0,
    max_tokens: int = 48,
    tokenizer: Any = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Swept:
    """Tries doses of vectors made from contrastive examples, and recommends one.

    Vectors are made from most of the pairs. All settings are tried on few of the rest, answers forced: what counts is
    the change of the answers' log-odds against the KL per token. The best go on to more pairs, the last few to texts
    on the validation prompts, judged by the scorer and by perplexity under the plain model; the best of them at no more
    than ``most_perplexity``, and not repeating itself, is chosen and read once more on the test prompts.

    Args:
        model: a Hugging Face or TransformerLens model.
        data: contrastive pairs, or their JSONL file.
        layers: negatives from the end; None for all but the first.
        strengths: multiples of the vectors.
        edits: of ``mechanex.engine.doses.dose.EDITS``.
        tokens: of ``mechanex.engine.terms.TOKENS``.
        methods: how vectors are made, as in ``generate_vectors``.
        scorer: from an answer to how much it shows of what is sought; None for naive Bayes on the pairs' answers.
        validation: prompts for texts; None for the prompts of held-back pairs.
        test: prompts that are read once, at the end; None for held-back ones where ``validation`` is None too.
        most_perplexity: what the chosen dose may cost, as a multiple of plain.
        finalists: how many settings write texts.
        most_evaluations: what the whole sweep may cost, in whole evaluations of one setting: texts for every validation
            prompt, and their perplexity. The first round shrinks to one pair for it, and no further.
        max_tokens: of a text.
        tokenizer: needed where the model carries none.
        seed: of the split, the order of pairs and the texts.
        checkpoint: a JSON file: what is in it isn't done again, and what is done goes into it.
        progress: show a progress bar.

    Raises:
        ValidationError: too few pairs, an unknown name, a layer that doesn't exist, or a checkpoint of something else.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    pairs = data if isinstance(data, ContrastivePairs) else read_pairs(data)
    doses = _doses(adapter, layers, strengths, edits, tokens, methods)
    fit, check, held = _split(pairs, seed, validation is None and test is None)
    if validation is None:
        validation = check.prompts
        test = held.prompts if test is None and held is not None else test
    if scorer is None:
        scorer = classifier(fit.positive_answers, fit.negative_answers)
    used = sorted({dose.layer for dose in doses})
    vectors = {
        method: vectors_by(method)(
            adapter, fit.prompts, fit.positive_answers, fit.negative_answers, used, tokenizer=tokenizer
        )
        for method in methods
    }
    if "rotate" in edits:
        answered = zip(fit.prompts, fit.positive_answers, fit.negative_answers, strict=True)
        read = [encode_pair(tokenizer, prompt, one) for prompt, *both in answered for one in both]
        means = stream_means(adapter, read[:MEAN_OF], used)
        vectors = {method: vector.rotating(means, 0.0) for method, vector in vectors.items()}
    kept = KeptWork(checkpoint, adapter, vectors, [validation, max_tokens, seed, check.positive_answers])
    options = Options(max_tokens=max_tokens, seed=seed)
    judge = TextJudge(adapter, tokenizer, validation, scorer, options, vectors, kept, progress)
    plain = judge.plain()
    tried, ended = _forced_rounds(
        adapter, tokenizer, check, doses, vectors, kept, judge, finalists, most_perplexity, most_evaluations
    )
    written = judge.texts([one.dose for one in ended])
    found = [replace(one, texts=texts) for one, texts in zip(ended, written, strict=True)]
    best = _best(found, most_perplexity, plain.repetition)
    beside = [
        replace(best, dose=replace(best.dose, strength=best.dose.strength * factor)) for factor in BESIDE
    ]
    more = [
        replace(one, texts=texts, gain=math.nan, kl=math.nan, kl95=math.nan, examples=0)
        for one, texts in zip(beside, judge.texts([one.dose for one in beside]), strict=True)
    ]
    found += more
    chosen = _best(found, most_perplexity, plain.repetition)
    confirmed = None if not test else judge.confirm(chosen.dose, test)
    finished = {one.dose for one in found}
    settings = [one for one in tried if one.dose not in finished] + found
    return Swept(
        adapter.model_id,
        settings,
        chosen,
        most_perplexity,
        confirmed,
        judge.plain_score,
        judge.plain_perplexity,
        judge.work / judge.whole,
        _sentence(chosen, settings, most_perplexity, plain.repetition),
        vectors,
    )


def _doses(
    adapter: ModelAdapter,
    layers: Sequence[int] | None,
    strengths: Sequence[float],
    edits: Sequence[str],
    tokens: Sequence[str],
    methods: Sequence[str],
) -> list[Dose]:
    for method in methods:
        check_method(method)
    found = list(range(1, adapter.n_layers)) if layers is None else adapter.layer_indices(layers)
    for name, given in (("strengths", strengths), ("edits", edits), ("tokens", tokens), ("methods", methods)):
        if isinstance(given, str) or not len(given):
            raise ValidationError(f"{name} is a list with at least one entry; got {given!r}.")
    if not found:
        raise ValidationError("layers is a list with at least one layer, or None for all but the first.")
    if not all(math.isfinite(one) and one != 0 for one in strengths):
        raise ValidationError(f"strengths are finite numbers other than 0; got {list(strengths)}.")
    return [
        Dose(layer, float(strength), edit, where, method)
        for layer, method, edit, where, strength in product(found, methods, edits, tokens, strengths)
    ]


def _split(
    pairs: ContrastivePairs, seed: int, three: bool
) -> tuple[ContrastivePairs, ContrastivePairs, ContrastivePairs | None]:
    """Pairs to make vectors from, pairs to try settings on, and perhaps pairs that are held back to the end."""
    n = len(pairs)
    if n < 6:
        raise ValidationError(f"a sweep holds pairs back to try settings on, and needs 6 or more; got {n}.")
    order = list(range(n))
    random.Random(seed).shuffle(order)
    fifth = max(2, n // 5)
    parts = (
        [order[2 * fifth :], order[:fifth], order[fifth : 2 * fifth]]
        if three
        else [order[2 * fifth :], order[: 2 * fifth]]
    )
    made = [
        ContrastivePairs(
            [pairs.prompts[i] for i in part],
            [pairs.positive_answers[i] for i in part],
            [pairs.negative_answers[i] for i in part],
        )
        for part in parts
    ]
    return made[0], made[1], made[2] if three else None


def _forced_rounds(
    adapter: ModelAdapter,
    tokenizer: Any,
    check: ContrastivePairs,
    doses: list[Dose],
    vectors: dict[str, SteeringVector],
    kept: KeptWork,
    judge: TextJudge,
    finalists: int,
    most: float,
    evaluations: float,
) -> tuple[list[Setting], list[Setting]]:
    """All settings that were tried, as far as they came, and those that write texts."""
    encoded = [
        [encode_pair(tokenizer, prompt, answer) for answer in both]
        for prompt, *both in zip(check.prompts, check.positive_answers, check.negative_answers, strict=True)
    ]
    lengths = [len(both[0][0]) + sum(len(answer) for _, answer in both) for both in encoded]
    each = sum(lengths) / len(lengths) * adapter.n_layers * _depth(adapter, doses)
    allowed = FORCED * max(0.0, evaluations - finalists - len(BESIDE) - 3)
    plan = rounds(len(doses), len(encoded), finalists, allowed * judge.whole / each)
    # By length, from the middle out: a first round on one pair takes a usual one.
    middle = sorted(range(len(encoded)), key=lambda i: abs(lengths[i] - sorted(lengths)[len(lengths) // 2]))
    results: dict[Dose, Setting] = {}
    left = doses
    for number, (size, examples) in enumerate(plan):
        assert size == len(left)
        part = [pair for i in middle[:examples] for pair in encoded[i]]
        found = _forced(adapter, part, left, vectors, kept, judge, number)
        results |= {one.dose: one for one in found}
        wanted = plan[number + 1][0] if number + 1 < len(plan) else min(finalists, len(left))
        gains, prices = [one.gain for one in found], [one.kl for one in found]
        cap = 4 * math.log(most)
        if number + 1 == len(plan):
            among = [i for i in range(len(found)) if prices[i] <= cap] or None
            best = front(gains, prices, among)
            best = spread([i for i in best if gains[i] >= gains[best[-1]] / 3] or best, wanted)
            rest = [i for i in survivors(gains, prices, len(found), cap) if i not in best]
            rest.sort(key=lambda i: (prices[i] > cap, -gains[i] if prices[i] <= cap else prices[i]))
            chosen = sorted([*best, *rest[: wanted - len(best)]])
        else:
            chosen = survivors(gains, prices, wanted, cap)
        left = [left[i] for i in chosen]
    return list(results.values()), [results[dose] for dose in left]


def _depth(adapter: ModelAdapter, doses: list[Dose]) -> float:
    """Mean share of the layers that run again for a dose."""
    return sum(max(1, adapter.n_layers - dose.layer) for dose in doses) / len(doses) / adapter.n_layers


def _forced(
    adapter: ModelAdapter,
    part: list[Any],
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


def _best(found: Sequence[Setting], most: float, plain_repetition: float) -> Setting:
    """The largest effect at a bearable price; of settings that are all too dear, the cheapest."""

    def bearable(one: Setting) -> bool:
        texts = one.texts
        assert texts is not None
        return texts.perplexity <= most and texts.repetition <= plain_repetition + MORE_REPETITION

    allowed = [one for one in found if bearable(one)]
    if not allowed:
        _log.warning(
            "no setting stays within %.3g × the plain model's perplexity: the cheapest is taken", most
        )
        return min(found, key=lambda one: one.texts.perplexity if one.texts else math.inf)
    return max(allowed, key=lambda one: one.texts.effect if one.texts else -math.inf)


def _sentence(chosen: Setting, settings: Sequence[Setting], most: float, plain_repetition: float) -> str:
    dose, texts = chosen.dose, chosen.texts
    assert texts is not None
    said = f"{dose}: {texts.effect:+.2g} for {texts.perplexity:.2g} × perplexity"

    def breaks(one: Setting) -> bool:
        if one.texts is not None:
            return (
                one.texts.perplexity > 2 * most
                or one.texts.repetition > plain_repetition + 2 * MORE_REPETITION
            )
        return one.kl > 4 * math.log(most)

    same = [one for one in settings if replace(one.dose, strength=dose.strength) == dose]
    beyond = [
        one.dose.strength for one in same if abs(one.dose.strength) > abs(dose.strength) and breaks(one)
    ]
    return said + (f"; past {min(beyond, key=abs):.3g} it breaks" if beyond else "")
