"""What a behavior's features are about: the contexts in which each says most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import packs_for
from ..models import adapter_for
from ..models.adapter import ModelAdapter, exclusive, undisturbed
from ..pauses import pause
from .activations import as_pairs, read_point
from .behavior import Behavior

__all__ = ["Context", "Explained", "explain"]

_AROUND = 8  # tokens of context on either side


@dataclass(frozen=True)
class Context:
    """Where a feature said much.

    Args:
        before, token, after: the text around, the token itself apart.
        value: what the feature said.
    """

    before: str
    token: str
    after: str
    value: float


@dataclass(frozen=True)
class Explained:
    """A feature of a behavior.

    Args:
        feature: its number in the autoencoder; -1 for the probe, the component along the direction.
        weight: its share in the score.
        contexts: where it says most, the strongest first, one a text.
    """

    feature: int
    weight: float
    contexts: list[Context]


def explain(
    model: nn.Module | ModelAdapter,
    behavior: Behavior,
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    features: int = 5,
    contexts: int = 5,
    batch_tokens: int | None = None,
) -> list[Explained]:
    """The features that count most in a behavior, with the contexts in ``texts`` in which each says most.

    Args:
        model: the model.
        behavior: the behavior; of one without features the probe is explained.
        texts: where to look.
        tokenizer: needed where the model carries none.
        features: how many features.
        contexts: how many contexts of each.
        batch_tokens: most tokens of one pass; None for what suits the device.

    Raises:
        ValidationError: no text has two tokens.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    pairs = as_pairs(tokenizer, texts, 512)
    found = behavior.features
    if found is None:
        order, shares, names = [0], [1.0], [-1]
    else:
        order = found.weights.abs().argsort(descending=True)[:features].tolist()
        shares = [float(found.weights[i]) for i in order]
        names = [found.names[i] for i in order]
    values: list[Tensor] = [torch.zeros(len(answer), len(order)) for _, answer in pairs]
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for pack in packs_for(adapter, pairs, batch_tokens=batch_tokens):
            pause()
            x = read_point(adapter, pack, behavior.point).cpu()
            said = behavior.probe.scores(x)[:, None] if found is None else found.values(x)[:, order]
            for i in set(pack.pair.tolist()):
                values[i] = said[(pack.pair == i).cpu()]
    explained = []
    for place, (name, share) in enumerate(zip(names, shares, strict=True)):
        best = [(float(v[:, place].max()), i, int(v[:, place].argmax())) for i, v in enumerate(values)]
        chosen = sorted((one for one in best if one[0] > 0), reverse=True)[:contexts]
        explained.append(
            Explained(name, share, [_context(tokenizer, pairs[i], at, v) for v, i, at in chosen])
        )
    return explained


def _context(tokenizer: Any, pair: Any, at: int, value: float) -> Context:
    ids = [*pair[0], *pair[1]]
    place = at + len(pair[0])
    before, after = ids[max(0, place - _AROUND) : place], ids[place + 1 : place + 1 + _AROUND]
    return Context(tokenizer.decode(before), tokenizer.decode([ids[place]]), tokenizer.decode(after), value)
