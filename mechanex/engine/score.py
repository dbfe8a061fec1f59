"""How likely a model finds given completions: log-probabilities, a ranking of choices, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import MechanexError, ValidationError
from .models import adapter_for
from .models.adapter import ModelAdapter
from .pairing import Completion, group_completions
from .score_pairs import CompletionLogprobs, Edits, score_pairs
from .text import Prompt, encode_pairs, encode_prompt, prompt_text

__all__ = [
    "CompletionLogprobs",
    "RankedChoice",
    "completion_logprobs",
    "perplexity",
    "rank_completions",
]

Normalization = Literal["tokens", "bytes", "unconditional"]


def completion_logprobs(
    model: nn.Module | ModelAdapter,
    prompts: Prompt | Sequence[Prompt],
    completions: Completion | Sequence[Completion] | Sequence[Sequence[Completion]],
    tokenizer: Any = None,
    *,
    coldness: float = 1.0,
    edits: Edits | None = None,
    differentiable: bool = False,
    greedy: bool = False,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> CompletionLogprobs:
    """Log-probabilities of completions after their prompts, many at once, each prompt run once.

    Three forms: one prompt and a list of completions; a list of prompts and one completion for each; a list
    of prompts and a list of completions for each. Any lengths, any order; the result is what scoring one after
    another gives.

    Args:
        model: a Hugging Face or TransformerLens model; steering that is applied to it counts.
        prompts: text, token ids or chat messages, or a list of such.
        completions: texts or lists of token ids, none of them empty.
        tokenizer: needed for text when the model carries none.
        coldness: inverse temperature, multiplies the logits.
        edits: steers during this call: a :class:`SteeringPlan`, interventions, a :class:`SteeringVector`, or
            ``{layer: tensor [d_model]}``, which is added and may require gradients.
        differentiable: keep the graph, so that gradients flow to the tensors of the edits. The model's weights
            get none. All activations above the lowest edit stay in memory until the result goes.
        greedy: also tell of each token whether it was the likeliest one.
        batch_tokens: most tokens in one pass; None for what suits the device.
        progress: show a progress bar.

    Returns:
        Sums and per-token values on the model's device.

    Raises:
        ValidationError: lists that don't belong together, an empty completion, an empty prompt without a BOS,
            a token id or position that the model doesn't have, edits that don't fit the model, or
            ``differentiable`` where nothing requires gradients.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    grouped = group_completions(prompts, completions)
    pairs = encode_pairs(tokenizer, [(prompt, c) for prompt, group in grouped for c in group])
    return score_pairs(
        adapter,
        pairs,
        counts=[len(group) for _, group in grouped],
        coldness=coldness,
        edits=edits,
        differentiable=differentiable,
        greedy=greedy,
        batch_tokens=batch_tokens,
        progress=progress,
    )


@dataclass(frozen=True)
class RankedChoice:
    """One choice of :func:`rank_completions`.

    Attributes:
        choice: the completion as it was given.
        index: its place in the input.
        score: what choices are ranked by: the log-probability, normalized as asked.
        probability: softmax of the scores over the choices.
        logprob: log-probability of the completion, the sum over its tokens.
        n_tokens: number of its tokens.
    """

    choice: Completion
    index: int
    score: float
    probability: float
    logprob: float
    n_tokens: int


def rank_completions(
    model: nn.Module | ModelAdapter,
    prompt: Prompt,
    choices: Sequence[Completion],
    tokenizer: Any = None,
    *,
    normalize: Normalization | None = None,
    neutral_prompt: Prompt | None = None,
    coldness: float = 1.0,
    edits: Edits | None = None,
    batch_tokens: int | None = None,
) -> list[RankedChoice]:
    """Which of several completions a model finds likeliest after a prompt.

    Args:
        model: a Hugging Face or TransformerLens model; steering that is applied to it counts.
        prompt: text, token ids or chat messages.
        choices: texts or lists of token ids.
        tokenizer: needed for text when the model carries none.
        normalize: None ranks by log p(choice | prompt); "tokens" by its mean over tokens, "bytes" by its mean over
            the UTF-8 bytes of the choice; "unconditional" by log p(choice | prompt) − log p(choice | neutral
            prompt), which takes away what makes a choice likely anywhere (arXiv:2104.08315, section 3).
        neutral_prompt: for "unconditional"; None for the tokenizer's BOS alone. The paper uses the end of the
            prompt, such as ``"Answer:"``.
        coldness: inverse temperature, multiplies the logits.
        edits: steers during this call, under both prompts, as in :func:`completion_logprobs`.
        batch_tokens: most tokens in one pass; None for what suits the device.

    Returns:
        The choices, best first; equal scores stay in the order given.

    Raises:
        ValidationError: as :func:`completion_logprobs`; an unknown normalization; a neutral prompt that is not
            used, or needed and not to be had.
    """
    if normalize not in (None, "tokens", "bytes", "unconditional"):
        raise ValidationError(f"normalize is None, 'tokens', 'bytes' or 'unconditional'; got {normalize!r}.")
    if neutral_prompt is not None and normalize != "unconditional":
        raise ValidationError("neutral_prompt goes with normalize='unconditional'.")
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise ValidationError(
            f"choices is a list of texts or of lists of token ids; got {type(choices).__name__}."
        )
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    ((prompt, choices),) = group_completions([prompt], [choices])
    pairs = encode_pairs(tokenizer, [(prompt, choice) for choice in choices])
    n = len(pairs)
    if normalize == "unconditional":
        neutral = _neutral(tokenizer, neutral_prompt)
        pairs += [(neutral, ids) for _, ids in pairs]
    found = score_pairs(adapter, pairs, coldness=coldness, edits=edits, batch_tokens=batch_tokens)
    sums = found.sums.cpu().double()
    scores = sums[:n]
    if normalize == "unconditional":
        scores = scores - sums[n:]
    elif normalize is not None:
        by_token = normalize == "tokens"
        sizes = [
            len(ids) if by_token else _n_bytes(tokenizer, choices[i]) for i, (_, ids) in enumerate(pairs)
        ]
        scores = scores / torch.tensor(sizes, dtype=scores.dtype)
    if bool(scores.isnan().any()):
        raise MechanexError(
            f"The log-probabilities of {adapter.model_id} are NaN; check its weights, its dtype and the steering."
        )
    shares = scores.softmax(0)
    return [
        RankedChoice(choices[i], i, float(scores[i]), float(shares[i]), float(sums[i]), len(pairs[i][1]))
        for i in scores.argsort(descending=True, stable=True).tolist()
    ]


def _neutral(tokenizer: Any, prompt: Prompt | None) -> list[int]:
    """Token ids that say nothing about the choices."""
    if prompt is None:
        bos = getattr(tokenizer, "bos_token_id", None)
        ids = [] if bos is None else [int(bos)]
    else:
        ids = encode_prompt(tokenizer, prompt)
    if not ids:
        missing = "the tokenizer has no BOS to stand for it" if prompt is None else "it has no tokens"
        raise ValidationError(
            f"normalize='unconditional' needs a neutral prompt, but {missing}: "
            "pass one, such as neutral_prompt='Answer:'."
        )
    return ids


def _n_bytes(tokenizer: Any, choice: Completion) -> int:
    return max(1, len(prompt_text(tokenizer, choice).encode()))


def perplexity(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: Any = None,
    *,
    batch_tokens: int | None = None,
) -> float:
    """The perplexity of completions after their prompts: exp of the mean negative log-probability of their tokens.

    Args:
        model: a Hugging Face or TransformerLens model; steering that is applied to it counts.
        prompts: text, token ids or chat messages, one per completion.
        completions: texts or lists of token ids, none of them empty.
        tokenizer: needed for text when the model carries none.
        batch_tokens: most tokens in one pass; None for what suits the device.

    Returns:
        1 or more; the mean is over tokens, not over completions.

    Raises:
        ValidationError: lists of unequal length or empty, or an empty completion.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise ValidationError(
            "prompts and completions are lists, one prompt per completion; got a single text."
        )
    found = completion_logprobs(model, prompts, completions, tokenizer, batch_tokens=batch_tokens)
    mean = -float(found.sums.cpu().double().sum()) / sum(map(len, found.token_ids))
    return math.exp(mean) if mean < 700 else math.inf
