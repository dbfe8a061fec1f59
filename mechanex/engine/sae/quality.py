"""What a sparse autoencoder is worth on texts: how much it reconstructs, with how many features, and at what price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ValidationError
from ..forward import packs_for, scored_logprobs
from ..intervention import widest
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pack, Pair
from ..ranks import Ranks, current_ranks, dealt
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
    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        with ranks.together():
            packs = packs_for(adapter, pairs, batch_tokens=batch_tokens, processes=ranks.sharing)
        found = _reconstruction(adapter, sae, packs, ranks)
        if sae.is_transcoder:
            return found
        losses = {
            "loss": _loss(adapter, packs, sae, None, ranks),
            "loss_spliced": _loss(adapter, packs, sae, sae.reconstruct, ranks),
            "loss_zeroed": _loss(adapter, packs, sae, torch.zeros_like, ranks),
        }
    gap = losses["loss_zeroed"] - losses["loss"]
    recovered = (losses["loss_zeroed"] - losses["loss_spliced"]) / gap if gap else math.nan
    return {**found, **losses, "loss_recovered": recovered}


def _reconstruction(
    adapter: ModelAdapter, sae: SparseAutoencoder, packs: Sequence[Pack], ranks: Ranks
) -> dict[str, float]:
    error, squares, count = 0.0, 0.0, 0
    wide = widest(adapter.device)
    total = torch.zeros(sae.d_in, dtype=wide, device=adapter.device)
    said = torch.zeros(sae.n_features, dtype=wide, device=adapter.device)
    point = sae.point
    assert point is not None
    with ranks.together():
        for pack in dealt(packs, ranks, "Reading"):
            x = read_point(adapter, pack, point)
            said += (sae.encode(x) != 0).sum(0)
            if not sae.is_transcoder:
                error += float((x - sae.reconstruct(x)).to(wide).square().sum())
            total += x.to(wide).sum(0)
            squares += float(x.to(wide).square().sum())
            count += len(x)
    error, squares, count = ranks.total(
        torch.tensor([error, squares, float(count)], dtype=torch.float64)
    ).tolist()
    total, said = ranks.total(total), ranks.total(said)
    variance = squares - float(total.square().sum()) / count
    found = {"l0": float(said.sum()) / count, "dead": float((said == 0).float().mean())}
    return found if sae.is_transcoder else {"variance_explained": 1 - error / variance, **found}


def _loss(
    adapter: ModelAdapter,
    packs: Sequence[Pack],
    sae: SparseAutoencoder,
    instead: Callable[[Tensor], Tensor] | None,
    ranks: Ranks,
) -> float:
    """Mean negative log-likelihood with something in the activations' place, first tokens apart."""
    point = sae.point
    assert point is not None
    count = sum(len(pack.target) for pack in packs)

    def run(pack: Pack) -> float:
        def splice(hidden: Tensor) -> Tensor | None:
            if instead is None:
                return None
            first = (pack.position_ids == 0).to(hidden.device)
            first = first.view(*first.shape, *(1,) * (hidden.dim() - 2))
            return torch.where(first, hidden, instead(hidden).to(hidden.dtype))

        with Handles() as handles:
            handles.add(on_point(adapter, point, splice))
            return -float(scored_logprobs(adapter, pack).double().sum())

    with ranks.together():
        total = sum(run(pack) for pack in dealt(packs, ranks, "Scoring"))
    return float(ranks.total(torch.tensor(total, dtype=torch.float64))) / count
