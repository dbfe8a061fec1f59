"""A feature at a glance: where it says most, how often it says how much, and which tokens it makes likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..capabilities.unembedding import unembedding_agrees
from ..forward import packs_for
from ..models import adapter_for
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pair
from ..passes import visit_residuals
from ..pauses import pause
from ..token_texts import TokenTexts
from .activations import as_pairs, read_point
from .autoencoder import SparseAutoencoder
from .dashboard import Dashboard, Effect, Passage
from .detectors import FeatureDetector
from .hook_points import HookPoint, on_point

__all__ = ["dashboard"]

_AROUND = 12  # tokens of context on either side
_BARS = 40
_EFFECTS = 10
_CONTEXT = 512


def dashboard(
    model: nn.Module | ModelAdapter,
    sae: SparseAutoencoder,
    feature: int,
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    contexts: int = 10,
    batch_tokens: int | None = None,
) -> Dashboard:
    """Looks at a feature in texts.

    The effect on logits is that of what the feature adds on average where it is active, on the average stream that
    leaves the last block there: what later blocks make of it is left out.

    Args:
        model: the model.
        sae: the autoencoder, with its place.
        feature: its number.
        texts: where to look; the first token of each is left out.
        tokenizer: needed where the model carries none.
        contexts: how many passages, one a text.
        batch_tokens: most tokens of one pass; None for what suits the device.

    Raises:
        ValidationError: there is no such feature, the autoencoder's place isn't known, or no text has two tokens.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < sae.n_features:
        raise ValidationError(f"features are numbered 0 to {sae.n_features - 1}; got {feature!r}.")
    if sae.point is None:
        raise ValidationError("it isn't known where this autoencoder reads: read it with point='resid.…'.")
    asked = FeatureDetector(sae, torch.tensor([feature]), torch.ones(1), 0.0, 1.0, torch.zeros(1))
    pairs = as_pairs(tokenizer, texts, _CONTEXT)
    values: list[Tensor] = [torch.zeros(0)] * len(pairs)
    added = _Added(adapter, sae)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for pack in packs_for(adapter, pairs, batch_tokens=batch_tokens):
            pause()
            x, stream = added.read(pack)
            said = torch.cat([asked.values(part)[:, 0] for part in torch.split(x, 1024)]).float().cpu()
            added.add(said, x, stream)
            for i in set(pack.pair.tolist()):
                values[i] = said[(pack.pair == i).cpu()]
        effects = added.effects(feature, tokenizer)
    every = torch.cat(values)
    active = every[every != 0]
    counts, edges = (
        torch.histogram(active.double(), _BARS) if len(active) else (torch.zeros(0), torch.zeros(0))
    )
    names = TokenTexts(tokenizer)
    best = sorted(range(len(pairs)), key=lambda i: -float(values[i].max()))[:contexts]
    return Dashboard(
        feature=feature,
        source=sae.source,
        point=str(sae.point),
        n_tokens=len(every),
        n_active=len(active),
        counts=tuple(int(one) for one in counts),
        edges=tuple(float(one) for one in edges),
        passages=tuple(_passage(names, pairs[i], values[i]) for i in best if float(values[i].max()) > 0),
        promoted=tuple(effects[:_EFFECTS]),
        suppressed=tuple(effects[: -_EFFECTS - 1 : -1]),
    )


def _passage(names: TokenTexts, pair: Pair, values: Tensor) -> Passage:
    at = int(values.argmax())
    begin, end = max(0, at - _AROUND), at + 1 + _AROUND
    tokens = tuple(names[token][0] for token in pair[1][begin:end])
    return Passage(tokens, tuple(values[begin:end].tolist()), at - begin)


class _Added:
    """What a feature adds where it is active, and the stream that leaves the last block there.

    Args:
        adapter: the model.
        sae: the autoencoder.
    """

    def __init__(self, adapter: ModelAdapter, sae: SparseAutoencoder) -> None:
        self._adapter, self._sae = adapter, sae
        assert sae.point is not None
        self._point: HookPoint = sae.point
        self._sees_logits = (
            adapter.head is not None and sae.d_out == adapter.d_model and unembedding_agrees(adapter)
        )
        self._amount = 0.0
        self._n = 0
        self._stream = torch.zeros(adapter.d_model, dtype=torch.float64)

    def read(self, pack: Any) -> tuple[Tensor, Tensor | None]:
        """[T, d_in] activations of the pack's tokens and [T, d_model] the stream in the end, where that is of use."""
        if not self._sees_logits:
            return read_point(self._adapter, pack, self._point), None
        seen: list[Tensor] = []
        last: list[Tensor] = []
        with Handles() as handles:
            handles.add(on_point(self._adapter, self._point, seen.append))
            visit_residuals(self._adapter, pack, {self._adapter.n_layers: last.append})
        return pack.tokens_of(seen[0].flatten(2)).float(), pack.tokens_of(last[0]).float()

    def add(self, said: Tensor, x: Tensor, stream: Tensor | None) -> None:
        """Takes what the feature says of activations."""
        active = said != 0
        if stream is None or not bool(active.any()):
            return
        amount = said[active]
        size = self._sae.prepare(x[active.to(x.device)]).size
        if size is not None and not self._sae.is_transcoder:
            amount = amount * size[:, 0].float().cpu()
        self._amount += float(amount.double().sum())
        self._n += len(amount)
        self._stream += stream[active.to(stream.device)].double().sum(0).cpu()

    def effects(self, feature: int, tokenizer: Any) -> list[Effect]:
        """Changes of the logits of all tokens, the largest first; none where they can't be told."""
        if not self._n:
            return []
        adapter, sae = self._adapter, self._sae
        direction = sae.decoder[feature].float().cpu()
        if sae.by_decoder_norm:
            direction = direction / direction.norm().clamp_min(torch.finfo(torch.float32).tiny)
        stream = (self._stream / self._n).float()
        both = torch.stack([stream, stream + self._amount / self._n * direction])
        logits = adapter.unembedding.logits(adapter.finish(both.to(adapter.device, adapter.dtype)))
        change = (logits[1].float() - logits[0].float()).cpu()
        change = change[: len(tokenizer)]
        order = change.argsort(descending=True).tolist()
        shown = [*order[:_EFFECTS], *order[max(_EFFECTS, len(order) - _EFFECTS) :]]
        names = TokenTexts(tokenizer)
        return [Effect(names[token][0], float(change[token])) for token in shown]
