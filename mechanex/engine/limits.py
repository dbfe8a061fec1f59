"""How long a model's texts may be, and at which lengths it changes what it does."""

from __future__ import annotations

import logging

from ..errors import ValidationError
from .models.adapter import ModelAdapter
from .models.configuration import rotary_tables
from .regimes import first_change

__all__ = ["PROBE_TOKENS", "check_context", "check_length", "check_prompt", "outgrown_length", "window_of"]

_log = logging.getLogger(__name__)

_WINDOW_SETTINGS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention_window")
# Lengths at which models were seen to change what they do.
_LENGTH_SETTINGS = ("original_max_position_embeddings", "seq_length", "max_position_embeddings")
PROBE_TOKENS = 13  # the longest path that is tried of every model


def window_of(adapter: ModelAdapter) -> int | None:
    """The model's smallest attention window in tokens, or None."""
    config = adapter.config
    sizes = [getattr(config, name, None) for name in _WINDOW_SETTINGS]
    if getattr(config, "use_sliding_window", True) is False:
        sizes[0] = None
    return min((s for s in sizes if isinstance(s, int) and s > 0), default=None)


def outgrown_length(adapter: ModelAdapter, longest: int) -> int | None:
    """The largest number of tokens below ``longest`` at which the model may change what it does; None for none.

    That is its attention window, where its rotary factors change, and what its configuration names.
    """
    config = adapter.config
    named = [getattr(config, name, None) for name in _LENGTH_SETTINGS]
    named += [table.get(name) for _, table in rotary_tables(config) for name in _LENGTH_SETTINGS]
    lengths = [
        n for n in (*named, window_of(adapter)) if isinstance(n, int) and 0 < n < max(longest, PROBE_TOKENS)
    ]
    change = first_change(adapter.hf_model)
    if change is not None and change < longest:
        lengths.append(change)
    return max(lengths, default=None)


def check_length(adapter: ModelAdapter, longest: int) -> None:
    """Refuses text past the end of a table of positions; rotary models go on, which is logged once for each model."""
    config = adapter.config
    limit = adapter.context
    rotary = any(
        getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling", "alibi")
    )
    if limit is None or limit >= longest:
        return
    if not rotary:
        raise ValidationError(
            f"The longest prompt and completion have {longest} tokens, but {adapter.model_id} has {limit} positions; "
            "shorten them."
        )
    if "past the context" not in adapter.findings:
        adapter.findings["past the context"] = True
        _log.warning(
            "a text of %d tokens runs past the context of %s, which is %d: it is read on as the model computes it, and "
            "what it says there may be worth little",
            longest,
            adapter.model_id,
            limit,
        )


def check_prompt(adapter: ModelAdapter, n_tokens: int, max_tokens: int) -> None:
    """Refuses a prompt of so many tokens that fills the model's context, or passes it where nothing is added."""
    context = adapter.context
    if context is not None and n_tokens + min(max_tokens, 1) > context:
        raise ValidationError(
            f"the prompt has {n_tokens} tokens and {adapter.model_id} has a context of {context}: "
            "shorten the prompt.",
            details={"code": "context_length_exceeded"},
        )


def check_context(adapter: ModelAdapter, longest: int, max_tokens: int) -> None:
    """Refuses a prompt that fills the model's context, and logs where an answer will end at it.

    Args:
        adapter: the model.
        longest: tokens of the longest prompt.
        max_tokens: most tokens that are to be added.
    """
    check_prompt(adapter, longest, max_tokens)
    context = adapter.context
    if context is not None and longest + max_tokens > context:
        _log.warning(
            "stopping after %d tokens, not %d: the context of %s has %d and the prompt %d",
            context - longest,
            max_tokens,
            adapter.model_id,
            context,
            longest,
        )
