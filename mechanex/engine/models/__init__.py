"""Model adapters: one view of every model, whatever library built it."""

from __future__ import annotations

from torch import nn

from ...errors import ValidationError
from .adapter import ModelAdapter
from .huggingface import HuggingFaceAdapter
from .kept import keep, kept_on

__all__ = ["ModelAdapter", "adapter_for"]


def adapter_for(model: nn.Module | ModelAdapter, *, layers: str | None = None) -> ModelAdapter:
    """The engine's view of a model; the same object for the same model, while somebody has it.

    It holds its model; what was found out about the model is kept on the model itself, and stays when the view goes.

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
    kept = kept_on(model)
    known: ModelAdapter | None = None if kept is None or kept.adapter is None else kept.adapter()
    if known is not None and layers is None and known.is_current():
        return known
    from .transformer_lens import TransformerLensAdapter, is_transformer_lens

    lens, override = is_transformer_lens(model), None if kept is None else kept.override
    adapter = TransformerLensAdapter(model) if lens else HuggingFaceAdapter(model, layers=layers or override)
    adapter.kept.layers = adapter.layers
    if kept is not None and kept.layers == adapter.layers and layers is None:
        adapter.kept = kept
    elif kept is not None:
        adapter.tokenizer, adapter.model_id = kept.tokenizer, kept.model_id
    keep(model, adapter)
    return adapter
