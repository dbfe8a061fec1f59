"""The completions that a model finds likeliest, or likelier after one prompt than after another: beam search on ids."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import MechanexError, ValidationError
from ..ops.logprob import log1mexp
from .beam_rows import Rows
from .caches import is_cache
from .capabilities.beams import beam_form
from .given import as_finite
from .limits import check_length
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .text import Prompt, encode_prompt
from .whole import as_whole

__all__ = ["LikelyCompletions", "most_likely_completions"]

# Arguments of the model that the search sets itself.
RESERVED = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "cache_params",
    "cache_position",
)
_CONTEXT = 6  # tokens of the prompt that decide how a completion's first token is written (a space, a byte)


@dataclass(frozen=True, eq=False)
class LikelyCompletions:
    """What a beam search found, best first.

    Attributes:
        token_ids: the tokens of each completion, all of one length.
        texts: the completions decoded, special tokens by their names; a character that is cut off is U+FFFD.
        scores: [n, length] float64 on the CPU, the score of every token (see :func:`most_likely_completions`).
        log_scores: [n, length] natural logs of the scores, exact where a score is too small for a float; None where
            scores can be negative.
    """

    token_ids: list[list[int]]
    texts: list[str]
    scores: Tensor
    log_scores: Tensor | None

    @property
    def joint(self) -> Tensor:
        """[n] float64: the product of each completion's scores."""
        return self.scores.prod(1)


def most_likely_completions(
    model: nn.Module | ModelAdapter,
    prompt: Prompt,
    src_prompt: Prompt | None = None,
    tokenizer: Any = None,
    *,
    k: int = 5,
    iters: int = 5,
    coldness: float = 1.0,
    do_one_minus: bool = False,
    use_total_probs: bool = False,
    reverse: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> LikelyCompletions:
    """Beam search: the k best next tokens, then ``iters`` times the k best extensions of those.

    The score of a token is its probability p, or p after ``prompt`` less p after ``src_prompt``. Beams are ranked by
    the score of their last token, or by the product of all their scores; among equals the earlier beam is first,
    then the lower token id. An end token is a token like any other. Steering that is applied to the model counts,
    token positions included.

    Args:
        model: a Hugging Face or TransformerLens model; its mode and flags are kept.
        prompt: text, token ids or chat messages.
        src_prompt: another prompt, to find what is likelier after the first one than after this one.
        tokenizer: the model's; None where the model carries it.
        k: number of beams. Fewer completions come back only where there are not as many.
        iters: extensions, 0 or more: completions have ``iters + 1`` tokens.
        coldness: multiplies the logits.
        do_one_minus: 1 - p takes the place of p.
        use_total_probs: rank by the product of the scores.
        reverse: negate every score: -p, or the difference the other way round. Products of an even number of
            negative scores are positive, also where ``use_total_probs`` ranks by them.
        model_kwargs: more arguments of every call of the model; ``use_cache=False`` recomputes every sequence.
        progress: show a progress bar.

    Raises:
        ValidationError: an argument out of its range, an empty prompt, one that leaves no room in the model's context,
            or a model argument that the search sets itself.
        MechanexError: the model's logits are NaN.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    if tokenizer is None:
        raise ValidationError("completions are decoded with the model's tokenizer: pass tokenizer=….")
    _check(k, iters, coldness)
    k, iters = operator.index(k), operator.index(iters)
    extra = dict(model_kwargs or {})
    extra.pop("return_dict", None)
    taken = [n for n, v in extra.items() if v is not None and (n in RESERVED or is_cache(v))]
    if taken:
        raise ValidationError(f"The beam search sets {', '.join(taken)} itself; leave it out.")
    given = [prompt] if src_prompt is None else [prompt, src_prompt]
    prompts = [_encode(adapter, tokenizer, p) for p in given]
    check_length(adapter, max(map(len, prompts)) + iters)
    scoring = _Scoring(float(coldness), do_one_minus, reverse)

    beams: _Beams | None = None
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        rows = _rows_for(adapter, prompts, iters, extra)
        for _ in tqdm(range(iters + 1), desc="beam search", unit="token", disable=not progress):
            if beams is not None:
                for batch in rows:
                    batch.extend(beams.parents, beams.tokens[:, -1])
            scores, logs = scoring(torch.cat([_wide(batch.logits()) for batch in rows]))
            beams = _extended(beams, scores, logs, k, by_product=use_total_probs)
    assert beams is not None
    ids = beams.tokens.tolist()
    texts = [_text(tokenizer, prompts[0], completion) for completion in ids]
    return LikelyCompletions(ids, texts, beams.scores.cpu(), None if beams.logs is None else beams.logs.cpu())


def _check(k: int, iters: int, coldness: float) -> None:
    for name, value, least in (("k", k, 1), ("iters", iters, 0)):
        if (found := as_whole(value)) is None or found < least:
            raise ValidationError(f"{name} is a whole number, {least} or more; got {value!r}.")
    if as_finite(coldness) is None:
        raise ValidationError(f"coldness is a finite number; got {coldness!r}.")


def _encode(adapter: ModelAdapter, tokenizer: Any, prompt: Prompt) -> list[int]:
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise ValidationError("a prompt is empty and the tokenizer adds no BOS: give at least one token.")
    adapter.check_token_ids(ids)
    return ids


def _wide(logits: Tensor) -> Tensor:
    """The logits in float64; Apple's GPUs have none."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


@dataclass(frozen=True)
class _Scoring:
    """From logits [prompts, beams, n_vocab], of one prompt or two, to the scores of every extension of every beam."""

    coldness: float
    do_one_minus: bool
    reverse: bool

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """[beams, n_vocab] scores and their logs, or None where scores can be negative."""
        barred = logits == -math.inf  # stays impossible, also at coldness 0
        log_p = (logits * self.coldness).masked_fill_(barred, -math.inf).log_softmax(-1)
        if bool(log_p.isnan().any()):
            raise MechanexError(
                "the model's logits are NaN: the steering is too strong for the model's dtype, or the "
                "weights are damaged; try a smaller strength, bfloat16 or float32."
            )
        if len(log_p) == 2:
            # (1 - p) - (1 - q) without the two ones, beside which small probabilities are lost.
            scores = log_p[0].exp() - log_p[1].exp()
            return (-scores if self.do_one_minus != self.reverse else scores), None
        logs = log1mexp(log_p[0]) if self.do_one_minus else log_p[0]
        return (-logs.exp(), None) if self.reverse else (logs.exp(), logs)


@dataclass(frozen=True)
class _Beams:
    """The beams after a step, best first; ``parents`` are their places among the beams of the step before.

    ``tokens``, ``scores`` and ``logs`` are [n, tokens so far].
    """

    parents: Tensor
    tokens: Tensor
    scores: Tensor
    logs: Tensor | None

    def factors(self) -> Tensor:
        """[n] the product of each beam's scores, as a share of the largest: products of many would leave float64."""
        size = self.scores.abs().log().sum(1)
        return self.scores.sign().prod(1) * (size - size.max().clamp_min(-1e300)).exp()


def _extended(
    before: _Beams | None, scores: Tensor, logs: Tensor | None, k: int, *, by_product: bool
) -> _Beams:
    """The k best extensions of ``before`` by scores [beams, n_vocab], or the k best tokens to start with."""
    rank = scores if logs is None else logs
    if by_product and before is not None:
        rank = (
            before.factors()[:, None] * rank
            if before.logs is None
            else before.logs.sum(1, keepdim=True) + rank
        )
    best = _best(rank.flatten(), k)
    parents, tokens = best // rank.shape[1], best % rank.shape[1]

    def append(name: str, new: Tensor) -> Tensor:
        return (
            new[:, None] if before is None else torch.cat([getattr(before, name)[parents], new[:, None]], 1)
        )

    return _Beams(
        parents,
        append("tokens", tokens),
        append("scores", scores[parents, tokens]),
        None if logs is None else append("logs", logs[parents, tokens]),
    )


def _best(rank: Tensor, k: int) -> Tensor:
    """Indices of the k largest of ``rank`` [N], largest first, among equals the lowest index first, as topk doesn't."""
    least = rank.topk(min(k, len(rank))).values[-1]
    above = (rank > least).nonzero()[:, 0]
    at = (rank == least).nonzero()[: k - len(above), 0]
    chosen = torch.cat([above, at]).sort().values
    return chosen[rank[chosen].sort(descending=True, stable=True).indices]


def _text(tokenizer: Any, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """The completion as text: what it adds to the prompt's, or by itself where the two share a character."""
    context = list(prompt[-_CONTEXT:])
    before, whole = _decode(tokenizer, context), _decode(tokenizer, [*context, *completion])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, completion)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of these tokens; a model may have ids that its tokenizer doesn't, which add nothing to it."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    try:
        return str(tokenizer.decode(list(ids), **options))
    except Exception:  # tokenizers written in Python fail on such ids in ways of their own
        known = set(tokenizer.get_vocab().values())
        return str(tokenizer.decode([i for i in ids if i in known], **options))


def _rows_for(
    adapter: ModelAdapter,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> list[Rows]:
    """Rows for these prompts in the fastest form that is right for the model: one batch, or one per prompt.

    Args:
        adapter: the model.
        prompts: token ids, none empty.
        n_tokens: how many tokens the rows will grow by.
        extra: more keyword arguments of every call of the model; ``use_cache=False`` is heeded.
    """
    extra = dict(extra or {})
    use_cache = extra.pop("use_cache", True)
    form = (
        beam_form(adapter, max(map(len, prompts)) + n_tokens) if use_cache or use_cache is None else "whole"
    )
    if form == "together":
        return [Rows(adapter, prompts, cached=True, extra=extra)]
    return [Rows(adapter, [prompt], cached=form == "apart", extra=extra) for prompt in prompts]
