"""What steering does and what it costs: effect, perplexity, KL, repetition, ability, each with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import nn

from ..given import as_list
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..models.packaged import PACKAGED
from ..sampling import Options
from ..text import Prompt, prompt_text
from ..vectors import SteeringVector
from .ability import ChoiceQuestion, right_answers
from .dose import Edited, edited_by, kind_of
from .dose_report import Change, DoseReport, KLFigures, SideBySide
from .forced import ForcedAnswers
from .intervals import Interval, bootstrap, mean_of, ratio_of
from .scorers import Scores, TextScorer, as_scorers
from .variants import VARIANTS, varied
from .written import Written, mean_logprobs, write

__all__ = ["measure"]

POSITIONS = 32  # of answers, that KL is told for one by one


def measure(
    model: nn.Module | ModelAdapter,
    steering: Any,
    prompts: Sequence[Prompt],
    scorers: Scores,
    *,
    strength: float = 1.0,
    questions: Sequence[ChoiceQuestion] | None = None,
    brittleness: bool = True,
    tokenizer: Any = None,
    max_tokens: int = 48,
    sampling_method: str = "top-k",
    temperature: float = 1.0,
    seed: int = 0,
) -> DoseReport:
    """Answers prompts with and without steering, and reports what it changed and what it costs.

    Args:
        model: a Hugging Face or TransformerLens model.
        steering: a vector, ``{layer: tensor}``, a plan or interventions; of a vector its edit and tokens count.
        prompts: text, token ids or chat messages.
        scorers: from an answer to a number; one, several, or by name. None should be a judgement of the model itself.
        strength: multiplies a vector.
        questions: multiple-choice questions, for the ability that is lost; None: not measured.
        brittleness: also ask the prompts paraphrased, longer, and of another role, and report the effect there.
        tokenizer: needed where the model carries none.
        max_tokens, sampling_method, temperature, seed: of the answers, steered and not; as in ``generate``.

    Returns:
        Effects by scorer, perplexity of the answers under the plain model, KL(steered‖plain) per token of the plain
        answers, repetition, ability; intervals are of the bootstrap over prompts (over questions for ability). KL and
        ability are None for a vector under a condition on prompts, which is decided where text is written.

    Raises:
        ValidationError: steering that doesn't fit the model, no prompts, no scorers, or an option out of its range.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    judges = as_scorers(scorers)
    prompts = as_list("prompts", prompts, "prompts")
    edited = edited_by(adapter, steering, strength)
    options = Options(
        max_tokens=max_tokens, sampling_method=sampling_method, temperature=temperature, seed=seed
    )
    plain, steered = write(adapter, tokenizer, prompts, [(), edited], options)
    ability = None
    # Conditions are decided where text is written: given answers can't be looked at under them.
    conditional = any(one.condition is not None for one in edited)
    if questions is not None and not conditional:
        right = right_answers(adapter, tokenizer, questions, [(), edited]).double().tolist()
        ability = _change(right[0], right[1])
    variants: dict[str, dict[str, Interval]] = {}
    for name in VARIANTS if brittleness else ():
        asked = varied(prompts, name)
        if asked:
            both = write(adapter, tokenizer, asked, [(), edited], options)
            variants[name] = {key: one.change for key, one in _effects(judges, *both).items()}
    return DoseReport(
        model=adapter.model_id,
        weights=weights_hash(adapter),
        steering=_told(steering, edited, strength),
        prompts=len(prompts),
        max_tokens=max_tokens,
        seed=seed,
        effects=_effects(judges, plain, steered),
        perplexity=_perplexity(adapter, plain, steered),
        repetition=_change([one.repetition for one in plain], [one.repetition for one in steered]),
        kl=None if conditional else _kl(adapter, plain, edited),
        ability=ability,
        brittleness=variants,
        texts=[
            SideBySide(prompt_text(tokenizer, prompt), before.text, after.text)
            for prompt, before, after in zip(prompts, plain, steered, strict=True)
        ],
    )


def _effects(
    judges: Mapping[str, TextScorer], plain: Sequence[Written], steered: Sequence[Written]
) -> dict[str, Change]:
    return {
        name: _change([judge(one.text) for one in plain], [judge(one.text) for one in steered])
        for name, judge in judges.items()
    }


def _change(before: Sequence[float], after: Sequence[float]) -> Change:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return Change(mean_of(before), mean_of(after), mean_of(differences))


def _perplexity(adapter: ModelAdapter, plain: Sequence[Written], steered: Sequence[Written]) -> Change:
    """Of both answers under the plain model; the change is their ratio."""
    (sums, counts), (steered_sums, steered_counts) = (
        [part.numpy() for part in mean_logprobs(adapter, answers)] for answers in (plain, steered)
    )

    def of(above: numpy.ndarray, below: numpy.ndarray) -> float:
        return math.exp(min(-float(above.sum()) / float(below.sum()), 700)) if below.sum() else math.nan

    return Change(
        ratio_of(sums.tolist(), counts.tolist(), lambda mean: math.exp(min(-mean, 700))),
        ratio_of(steered_sums.tolist(), steered_counts.tolist(), lambda mean: math.exp(min(-mean, 700))),
        bootstrap(lambda at: of(steered_sums[at], steered_counts[at]) / of(sums[at], counts[at]), len(sums)),
    )


def _kl(adapter: ModelAdapter, plain: Sequence[Written], edited: Edited) -> KLFigures | None:
    """Of the plain answers' tokens; None where there are none, or nothing steers."""
    pairs = [one.pair for one in plain if one.pair is not None]
    if not pairs:
        return None
    forced = ForcedAnswers(adapter, pairs)
    kl = torch.zeros(len(forced), dtype=torch.float64)
    if edited:
        kl = forced.under([edited])[0].kl.double()
    by_answer = [kl[forced.answer == i].numpy() for i in range(len(pairs))]

    def quantile(share: float) -> Interval:
        return bootstrap(
            lambda at: float(numpy.quantile(numpy.concatenate([by_answer[i] for i in at]), share)),
            len(pairs),
            resamples=300,
        )

    by_position = [
        float(kl[forced.place == place].median())
        for place in range(min(POSITIONS, int(forced.place.max()) + 1))
    ]
    return KLFigures(quantile(0.5), quantile(0.95), by_position, len(forced))


def _told(steering: Any, edited: Edited, strength: float) -> str:
    layers = sorted({one.layer for one in edited})
    how = f"{len(edited)} edits"
    if isinstance(steering, SteeringVector):
        how = f"{kind_of(steering)}, {steering.tokens} tokens, strength {strength:g}"
    return f"layers {', '.join(map(str, layers)) or 'none'}: {how}"


def weights_hash(adapter: ModelAdapter) -> str | None:
    """The hash of the model's weights where they are a packaged model's."""
    known = PACKAGED.get(adapter.model_id)
    return None if known is None else known.weights_sha256
