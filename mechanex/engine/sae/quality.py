"""What a sparse autoencoder is worth on texts: how much it reconstructs, with how many features, and at what price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ValidationError
from ..forward import packs_for, scored_logprobs
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pack, Pair
from ..pauses import pause
from .activations import read_point
from .autoencoder import SparseAutoencoder
from .hook_points import on_point

__all__ = ["measured"]


def measured(
    adapter: ModelAdapter,
    sae: SparseAutoencoder,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int | None = None,
) -> dict[str, float]:
    """Measures an autoencoder on texts that it was not trained on.

    Args:
        adapter: the model.
        sae: the autoencoder; its ``point`` says where it reads.
        pairs: texts as ``as_pairs`` gives them. First tokens are left as they are, here as in training.
        batch_tokens: most tokens of one pass; None for what suits the device.

    Returns:
        ``variance_explained``: 1 minus the squared error over the squared distance to the mean; ``l0``: features a
        token; ``dead``: share of features that no token has; ``loss``: mean negative log-likelihood of a token, natural
        logs, as the model is; ``loss_spliced``: with reconstructions in the activations' place; ``loss_zeroed``: with
        zeros there; ``loss_recovered``: (zeroed − spliced) / (zeroed − loss). A transcoder's reconstruction belongs
        elsewhere and is not spliced: the last four are left out.

    Raises:
        ValidationError: it isn't known where the autoencoder reads.
    """
    point = sae.point
    if point is None:
        raise ValidationError("it isn't known where this autoencoder reads: read it with point='resid.…'.")
    sae = sae.to(adapter.device)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        packs = packs_for(adapter, pairs, batch_tokens=batch_tokens)
        found = _reconstruction(adapter, sae, packs)
        if sae.is_transcoder:
            return found
        losses = {
            "loss": _loss(adapter, packs, sae, None),
            "loss_spliced": _loss(adapter, packs, sae, sae.reconstruct),
            "loss_zeroed": _loss(adapter, packs, sae, torch.zeros_like),
        }
    gap = losses["loss_zeroed"] - losses["loss"]
    recovered = (losses["loss_zeroed"] - losses["loss_spliced"]) / gap if gap else math.nan
    return {**found, **losses, "loss_recovered": recovered}


def _reconstruction(adapter: ModelAdapter, sae: SparseAutoencoder, packs: Sequence[Pack]) -> dict[str, float]:
    error, squares, count, active = 0.0, 0.0, 0, 0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=adapter.device)
    said = torch.zeros(sae.n_features, dtype=torch.bool, device=adapter.device)
    point = sae.point
    assert point is not None
    for pack in packs:
        pause()
        x = read_point(adapter, pack, point)
        features = sae.encode(x)
        said |= (features != 0).any(0)
        active += int((features != 0).sum())
        if not sae.is_transcoder:
            error += float((x - sae.reconstruct(x)).double().square().sum())
        total += x.double().sum(0)
        squares += float(x.double().square().sum())
        count += len(x)
    variance = squares - float(total.square().sum()) / count
    found = {"l0": active / count, "dead": 1 - float(said.float().mean())}
    return found if sae.is_transcoder else {"variance_explained": 1 - error / variance, **found}


def _loss(
    adapter: ModelAdapter,
    packs: Sequence[Pack],
    sae: SparseAutoencoder,
    instead: Callable[[Tensor], Tensor] | None,
) -> float:
    """Mean negative log-likelihood with something in the activations' place, first tokens apart."""
    assert sae.point is not None
    total, count = 0.0, 0
    for pack in packs:
        pause()

        def splice(hidden: Tensor, pack: Pack = pack) -> Tensor | None:
            if instead is None:
                return None
            first = (pack.position_ids == 0).to(hidden.device)
            first = first.view(*first.shape, *(1,) * (hidden.dim() - 2))
            return torch.where(first, hidden, instead(hidden).to(hidden.dtype))

        with Handles() as handles:
            handles.add(on_point(adapter, sae.point, splice))
            total -= float(scored_logprobs(adapter, pack).double().sum())
        count += len(pack.target)
    return total / count
