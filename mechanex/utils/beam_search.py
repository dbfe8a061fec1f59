"""The documented beam search over completions; the work is in :mod:`mechanex.engine.beam`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.beam import most_likely_completions
from ..engine.text import Prompt
from ..errors import ValidationError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["sample_most_likely_completions_hf"]


@torch.no_grad()
def sample_most_likely_completions_hf(
    model: nn.Module,
    tokenizer: Any,
    dst_prompt: Prompt,
    src_prompt: Prompt | None = None,
    k: int = 5,
    iters: int = 5,
    coldness: float = 1,
    do_one_minus: bool = False,
    gc_interval: int = 3,
    use_total_probs: bool = False,
    reverse: bool = False,
    return_log_probs: bool = False,
    return_token_probs: bool = True,
    **kwargs: Any,
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Finds the completions that a model is most likely to give, by beam search on token ids.

    The search starts from the k best next tokens and then, ``iters`` times, keeps the k best extensions of its beams.
    The score of a token is its probability p after ``dst_prompt``; with ``src_prompt``, p less its probability
    after that. Of beams with equal scores the earlier one comes first, then the one with the lower token id.
    Steering that is attached to the model counts, at the token positions that each completion has alone.

    Args:
        model: a causal Hugging Face model of any architecture; it is left as it was.
        tokenizer: its tokenizer.
        dst_prompt: text, token ids or chat messages to complete.
        src_prompt: another prompt, to find the completions that are likelier after ``dst_prompt`` than after this.
        k: the number of beams and of completions; fewer come back where the vocabulary doesn't hold as many.
        iters: the number of extensions; completions have ``iters + 1`` tokens, end tokens not excepted.
        coldness: multiplies the logits (the inverse temperature).
        do_one_minus: 1 - p takes the place of p, which finds the least likely completions.
        gc_interval: accepted and not needed: only k rows of cache and one position's logits are held per prompt.
        use_total_probs: rank beams by the product of their scores instead of by their last token's score, and return
            the products.
        reverse: multiply every score by -1. Scores are negative then, and products of an even number of them are
            positive, also where ``use_total_probs`` ranks by them.
        return_log_probs: return natural logs.
        return_token_probs: return every token's score; if False, each completion's product.
        **kwargs: for every call of the model; ``use_cache=False`` runs every sequence from its start.

    Returns:
        (completions, scores), best first: the k texts that follow ``dst_prompt``, and a float64 array of the scores of
        their tokens, [k, iters + 1], or, with ``use_total_probs`` or without ``return_token_probs``, of the
        products, [k]. In the texts special tokens go by their names, and a character that is cut off is U+FFFD.

    Raises:
        ValueError: ``return_log_probs`` with ``src_prompt`` or ``reverse``, whose scores can be negative; an empty
            prompt; k, iters or coldness out of range (a :class:`mechanex.ValidationError`, which is a ValueError).
        MechanexError: the model's logits are NaN.
    """
    if return_log_probs and (src_prompt is not None or reverse):
        raise ValidationError(
            "return_log_probs=True needs scores that are probabilities; with src_prompt or reverse they can be "
            "negative and have no logarithm. Leave return_log_probs out."
        )
    found = most_likely_completions(
        model,
        dst_prompt,
        src_prompt,
        tokenizer,
        k=k,
        iters=iters,
        coldness=coldness,
        do_one_minus=do_one_minus,
        use_total_probs=use_total_probs,
        reverse=reverse,
        model_kwargs=kwargs,
    )
    joint = use_total_probs or not return_token_probs
    if return_log_probs:
        assert found.log_scores is not None
        return found.texts, (found.log_scores.sum(1) if joint else found.log_scores).numpy()
    return found.texts, (found.joint if joint else found.scores).numpy()
