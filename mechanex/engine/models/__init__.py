"""Model adapters: one view of every model, whatever library built it."""

from __future__ import annotations

from torch import nn

from ...errors import ValidationError
from .adapter import ModelAdapter
from .huggingface import HuggingFaceAdapter

__all__ = ["ModelAdapter", "adapter_for"]

_KEY = "_mechanex_adapter"  # kept on the model, so that it goes when the model goes


def adapter_for(model: nn.Module | ModelAdapter, *, layers: str | None = None) -> ModelAdapter:
    """The engine's view of a model; the same object each time for the same model.

    Args:
        model: a Hugging Face causal model, a TransformerLens model, or an adapter (returned as it is).
        layers: dotted path of the list of decoder layers, for models whose structure isn't recognised. It is
            remembered for this model.

    Raises:
        ValidationError: not a model, no decoder layers found, or an encoder-decoder model.
    """
    if isinstance(model, ModelAdapter):
        return model
    if not isinstance(model, nn.Module):
        raise ValidationError(
            f"Expected a Hugging Face or TransformerLens model; got {type(model).__name__}. "
            "Load one by name with mechanex.load(name)."
        )
    known = model.__dict__.get(_KEY)
    if not isinstance(known, ModelAdapter) or known.model is not model:
        known = None
    if known is not None and layers is None and known.is_current():
        return known
    from .transformer_lens import TransformerLensAdapter, is_transformer_lens

    lens, override = is_transformer_lens(model), getattr(known, "override", None)
    adapter = TransformerLensAdapter(model) if lens else HuggingFaceAdapter(model, layers=layers or override)
    if known is not None:
        adapter.tokenizer, adapter.model_id = known.tokenizer, known.model_id
    model.__dict__[_KEY] = adapter
    return adapter
