"""Whether the TransformerLens that is installed wraps models of the transformers that is installed."""

from __future__ import annotations

from functools import cache

from families import FAMILIES, build, tiny_tokenizer

from mechanex.engine.models import lens


@cache
def bridges_fit() -> bool:
    """Whether a bridge is there and computes what the plain model does, with and without a cache."""
    if not lens.installed():
        return False
    try:
        lens.same(lens.wrap(FAMILIES["llama"](), "llama", tiny_tokenizer()), lens.watched(build("llama")))
    except (RuntimeError, ImportError):
        return False
    return True
