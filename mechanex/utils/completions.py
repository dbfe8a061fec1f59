"""The documented functions that score one completion of one prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.given import as_finite
from ..engine.models import adapter_for
from ..engine.score_pairs import score_pairs
from ..engine.text import Prompt, encode_pair
from ..errors import ValidationError
from ..ops.logprob import log1mexp, log_add_eps

__all__ = ["get_completion_logprob", "get_completion_logprob_hf"]

# What the engine itself gives to the model; and what changes no score, so that it may be said and is not needed.
_GIVEN = frozenset(
    {
        "attention_mask",
        "cache",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "labels",
        "past_key_values",
        "position_ids",
    }
)
_WITHOUT_EFFECT = frozenset({"use_cache", "return_dict", "logits_to_keep"})


def get_completion_logprob(
    model: nn.Module,
    prompt: Prompt,
    completion: str,
    tokenizer: Any = None,
    coldness: float = 1,
    return_all_probs: bool = False,
    do_one_minus: bool = False,
    do_log: bool = True,
    eps: float = 0,
    use_transformer_lens: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, list[float]]:
    """The model's log-probability of a completion after a prompt, steered by whatever is attached to the model.

    Prompt and completion are encoded together and split where the prompt's tokens end; where a token would
    span the join, the completion's tokens are those that continue the prompt's. Whitespace that ends a text prompt
    counts as the completion's. For many completions, :func:`mechanex.engine.score.completion_logprobs` runs each
    prompt once.

    Args:
        model: a TransformerLens or Hugging Face model; its mode, flags and hooks are kept.
        prompt: text, token ids or chat messages.
        completion: text or token ids, not empty.
        tokenizer: the model's tokenizer; None where the model carries it, as TransformerLens models and those of
            ``mechanex.load`` do.
        coldness: inverse temperature, multiplies the logits.
        return_all_probs: return the tokens' values too.
        do_one_minus: each token's probability p becomes 1 − p.
        do_log: natural logarithms; False for probabilities.
        eps: added to each token's probability, in log space: log(p + eps).
        use_transformer_lens: kept for its documented meaning; either kind of model is recognised by itself.
        **kwargs: further keyword arguments of the model's call.

    Returns:
        The joint, a 0-d tensor: the sum of the tokens' logs, or the product of their probabilities with
        ``do_log=False``. It carries gradient when gradients are on. With ``return_all_probs``, (joint, list
        of floats).

    Raises:
        ValidationError: an empty completion, an empty prompt where the tokenizer adds no BOS, no tokenizer, a
            negative or infinite ``eps``, or a keyword argument that the engine itself gives to the model.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    added = as_finite(eps)
    if added is None or added < 0:
        raise ValidationError(f"eps is a finite number of 0 or more; got {eps!r}.")
    if taken := sorted(_GIVEN & kwargs.keys()):
        raise ValidationError(
            f"{', '.join(taken)} can't be passed on: prompt and completion decide what the model is called with."
        )
    found = score_pairs(
        adapter,
        [encode_pair(tokenizer, prompt, completion)],
        coldness=coldness,
        differentiable=torch.is_grad_enabled(),
        plain=True,
        model_kwargs={name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT},
    )
    values, joint = _transformed(found.tokens[0], do_one_minus, do_log, added)
    return (joint, values.tolist()) if return_all_probs else joint


def _transformed(logprobs: Tensor, do_one_minus: bool, do_log: bool, eps: float) -> tuple[Tensor, Tensor]:
    """The tokens' values [n_tokens] and their joint."""
    if do_log:
        logs = log_add_eps(log1mexp(logprobs) if do_one_minus else logprobs, eps)
        return logs, logs.sum()
    probabilities = (-logprobs.expm1() if do_one_minus else logprobs.exp()) + eps
    return probabilities, probabilities.prod()


def get_completion_logprob_hf(
    model: nn.Module, prompt: Prompt, completion: str, tokenizer: Any, **kwargs: Any
) -> Tensor | tuple[Tensor, list[float]]:
    """A Hugging Face model's log-probability of a completion after a prompt.

    Args:
        model: a Hugging Face model; its mode, flags and hooks are kept.
        prompt: text, token ids or chat messages.
        completion: text or token ids, not empty.
        tokenizer: the model's tokenizer.
        **kwargs: ``coldness``, ``return_all_probs``, ``do_one_minus``, ``do_log`` and ``eps`` as in
            :func:`get_completion_logprob`; any other goes to the model's call.

    Returns:
        As :func:`get_completion_logprob`.

    Raises:
        ValidationError: as :func:`get_completion_logprob`.

    Example::

        vector.requires_grad_()
        with hf_hooks_contextmanager(model, [(10, make_steering_hook_hf(vector))]):
            logprob = get_completion_logprob_hf(model, "The capital of France is", " Paris", tokenizer)
        logprob.backward()
    """
    kwargs["use_transformer_lens"] = False
    return get_completion_logprob(model, prompt, completion, tokenizer, **kwargs)
