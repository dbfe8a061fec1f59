"""From a task's generation settings, which are written for transformers' ``generate``, to the engine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ..errors import ValidationError

__all__ = ["generation_options"]

_METHODS = {"top_k": "top-k", "top_p": "top-p", "min_p": "min-p", "typical_p": "typical"}
_OFF = {"top_k": (None, 0), "top_p": (None, 1), "min_p": (None, 0), "typical_p": (None, 1)}
# Settings of transformers' at which they do nothing; at any other, continuations would be others than asked for.
_NEUTRAL = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "use_cache": (None, True, False),
}


def generation_options(settings: Mapping[str, Any], max_tokens: int, end: str) -> dict[str, Any]:
    """Keyword arguments of :class:`mechanex.engine.sampling.Options`.

    Args:
        settings: the ``generation_kwargs`` of a task.
        max_tokens: of a continuation, where they don't say.
        end: the text of the token that ends a text, which is a stop text too.

    Raises:
        ValidationError: settings that the engine doesn't have, or two methods of sampling at once.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), max_tokens))
    options = {"max_tokens": given.pop("max_gen_toks")}
    options["stop"] = [text for text in handle_stop_sequences(given.pop("until"), eos=end) if text]
    sampled, temperature = given.pop("do_sample", False), given.pop("temperature", None)
    methods = {name: value for name in _METHODS if (value := given.pop(name, None)) not in _OFF[name]}
    if (seed := given.pop("seed", None)) is not None:
        options["seed"] = seed
    unknown = {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}
    if unknown:
        raise ValidationError(
            f"The task's generation settings {unknown} are not known here; known are until, max_gen_toks, do_sample, "
            f"temperature, seed, {', '.join(_METHODS)}."
        )
    if not sampled:
        return {**options, "sampling_method": "greedy"}
    if len(methods) > 1:
        raise ValidationError(f"The task's generation settings name several methods, {methods}; keep one.")
    if temperature is not None:
        options["temperature"] = temperature
    ((name, value),) = methods.items() or (("top_p", 1.0),)
    return {**options, "sampling_method": _METHODS[name], name: value}
