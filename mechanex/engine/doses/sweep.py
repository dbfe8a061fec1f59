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

from torch import nn

from ...errors import ValidationError
from ..caa import default_layer
from ..datasets import ContrastivePairs, read_pairs
from ..given import as_finite
from ..methods import check_method, vectors_by
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import Prompt, encode_pair
from ..whole import as_whole
from .dose import EDITS, SHARED, Dose
from .families import Family, families_of
from .forced_rounds import forced_rounds
from .judge import TextJudge
from .kept_work import KeptWork
from .means import stream_means
from .scorers import TextScorer, classifier, numbered
from .swept import Setting, Swept
from .text_rounds import later_texts, text_rounds

__all__ = ["STRENGTHS", "sweep"]

_log = logging.getLogger(__name__)

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
# Mean KL per token of given answers at which texts cost about one nat of log-perplexity per token.
PAIR_KL = 1.0
MORE_REPETITION = 0.1
MEAN_OF = 32  # answers that the mean stream is taken of


def sweep(
    model: nn.Module | ModelAdapter,
    data: ContrastivePairs | str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    edits: Sequence[str] = EDITS,
    tokens: Sequence[str] = ("all", "generated", "prompt"),
    methods: Sequence[str] = ("caa",),
    widths: Sequence[int] | None = None,
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
    the change of the answers' log-odds at one KL per token, between the strengths that were tried. The best kinds of
    dose go on to more pairs, the last few to texts on the validation prompts, judged by the scorer and by perplexity
    under the plain model. There each gets the strength that should cost ``most_perplexity``, and another by what that
    one cost; the best that stays within, and doesn't repeat itself, is chosen and read once more on the test prompts.

    Args:
        model: a Hugging Face or TransformerLens model.
        data: contrastive pairs, or their JSONL file.
        layers: negatives from the end; None for all but the first.
        strengths: multiples of the vectors.
        edits: of ``mechanex.engine.doses.dose.EDITS``.
        tokens: of ``mechanex.engine.terms.TOKENS``.
        methods: how vectors are made, as in ``generate_vectors``.
        widths: over how many layers in a row, from each of ``layers`` on, a strength is shared; None for one, and for a
            quarter of the model's. Only what is added (``add``, ``norm``) is shared.
        scorer: from an answer to how much it shows of what is sought; None for naive Bayes on the pairs' answers.
        validation: prompts for texts; None for the prompts of held-back pairs.
        test: prompts that are read once, at the end; None for held-back ones where ``validation`` is None too.
        most_perplexity: what the chosen dose may cost, as a multiple of plain.
        finalists: how many kinds of dose write texts, the usual one (added to all tokens, two thirds of the way up)
            among them if it is tried; half of them do so twice, and two a third time.
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
    for name, given in (("finalists", finalists), ("max_tokens", max_tokens)):
        if (as_whole(given) or 0) < 1:
            raise ValidationError(f"{name} is a whole number of 1 or more; got {given!r}.")
    for name, number in (("most_evaluations", most_evaluations), ("most_perplexity", most_perplexity)):
        if (as_finite(number) or 0) <= 0:
            raise ValidationError(f"{name} is a number above 0; got {number!r}.")
    pairs = data if isinstance(data, ContrastivePairs) else read_pairs(data)
    doses = _doses(adapter, layers, strengths, edits, tokens, methods, widths)
    fit, check, held = _split(pairs, seed, validation is None and test is None)
    if validation is None:
        validation = check.prompts
        test = held.prompts if test is None and held is not None else test
    if scorer is None:
        scorer = classifier(fit.positive_answers, fit.negative_answers)
    scorer = numbered("scorer", scorer)
    used = sorted({layer for dose in doses for layer in dose.layers})
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
    price = PAIR_KL * math.log(most_perplexity)
    left = most_evaluations - finalists - later_texts(finalists) - 3
    tried, ended = forced_rounds(
        adapter,
        tokenizer,
        check,
        doses,
        vectors,
        kept,
        judge,
        finalists=finalists,
        price=price,
        evaluations=left,
    )
    found = text_rounds(
        judge, _with_usual(ended, tried, adapter, methods[0], finalists), most_perplexity, price
    )
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
    widths: Sequence[int] | None,
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
    if widths is None:
        widths = sorted({1, max(1, adapter.n_layers // 4)})
    if not isinstance(widths, Sequence) or not len(widths) or not all(type(one) is int for one in widths):
        raise ValidationError(f"widths is a list of numbers of layers, with at least one; got {widths!r}.")
    fitting = [
        Dose(layer, float(strength), edit, where, method, width)
        for layer, method, edit, where, width, strength in product(
            found, methods, edits, tokens, widths, strengths
        )
        if width == 1 or (edit in SHARED and layer + width <= adapter.n_layers)
    ]
    if not fitting:
        raise ValidationError(
            f"no dose of widths {list(widths)} fits: to be shared by several layers, an edit is one of "
            f"{', '.join(map(repr, SHARED))}, and as many layers follow from {found[0]} on, of {adapter.n_layers}."
        )
    return fitting


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


def _with_usual(
    best: list[Family], tried: Sequence[Setting], adapter: ModelAdapter, method: str, n: int
) -> list[Family]:
    """The best kinds of dose, and with them the usual one, if it was tried: a recommendation is to be no worse."""
    usual = Dose(default_layer(adapter.n_layers), 1.0, method=method)
    missing = [
        one
        for one in families_of(tried)
        if one.at(1.0) == usual
        and one.strengths[0] > 0
        and one.at(1.0) not in [other.at(1.0) for other in best]
    ]
    return [*best[: max(1, n - 1)], *missing] if missing else best


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
