"""What is patched inside an attention is followed to what its heads hand on by running that attention again.

A query or key acts through a softmax, and where that is saturated a gradient says that nothing changes. Up to the
heads' outputs the attention is therefore recomputed, as AtP* does (arXiv:2403.00745); from there on gradients count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..attaching import before
from ..models.adapter import Handles, ModelAdapter
from ..pauses import pause
from ..structure.graph import Structure
from .exact import Patch, put
from .nodes import by_head
from .runs import Runs, ids_of
from .sites import Site, last_logits, tapped

__all__ = ["InAttention", "inside_attention", "recomputed_scores"]

_CLOSE = 1e-3  # of the largest number: what a pass alone may differ by from one in the model


@dataclass(frozen=True, eq=False)
class InAttention:
    """A module inside an attention.

    Args:
        site: what is patched.
        heads: what the attention's heads hand on.
        attention: the module that holds both.
    """

    site: Site
    heads: Site
    attention: nn.Module


def inside_attention(adapter: ModelAdapter, structure: Structure, sites: Sequence[Site]) -> list[InAttention]:
    """Those of the sites that lie inside an attention, in front of its output projection."""
    modules = dict(adapter.hf_model.named_modules(remove_duplicate=False))
    layers = set(adapter.layers)
    found = []
    for site in sites:
        for component in structure.components:
            heads = component.heads
            if heads is None or site.n_heads or f"{site.path}.".startswith(f"{heads.path}."):
                continue
            around = heads.path.rpartition(".")[0]
            while around and not site.path.startswith(f"{around}."):
                around = around.rpartition(".")[0]
            holds_a_layer = any(module in layers for module in modules[around].modules())
            if not around or holds_a_layer or component.path == site.path:
                continue
            found.append(InAttention(site, Site(heads.path, heads.module, heads.n_heads), modules[around]))
    return found


def recomputed_scores(
    adapter: ModelAdapter,
    runs: Runs,
    inside: Sequence[InAttention],
    found: dict[Site, Tensor],
    positions: bool,
) -> dict[Site, tuple[Tensor, Tensor | None]]:
    """What the metric would gain from clean activations inside attentions.

    Args:
        adapter: the model.
        runs: both runs, with the sites recorded.
        inside: what is patched.
        found: the gradients [n, T, width] of the heads' outputs.
        positions: whether each position is patched alone too.

    Returns:
        For each site [n, n_heads], patched at all positions, and [n, T, n_heads], patched at one.

    Raises:
        ValidationError: an attention that gives something else when it is run again.
    """
    attentions = {one.attention: None for one in inside}
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    with torch.no_grad(), Handles() as handles:
        for attention in attentions:
            handles.add(before(attention, _keeping(calls)))
        last_logits(adapter, ids_of(adapter, runs.pair.corrupted))
    tokens = len(runs.pair.corrupted)
    scores: dict[Site, tuple[Tensor, Tensor | None]] = {}
    for one in inside:
        plain = runs.corrupted.values[one.heads].float()
        again = _handed_on(runs, one, calls, None)
        if not float((again - plain).abs().max()) <= _CLOSE * float(plain.abs().max()):
            raise ValidationError(
                f"the attention that holds {one.site.path} gives something else when it is run again by itself: leave "
                "recompute_attention out, or use method='exact'."
            )
        gradient = found[one.heads]

        def gain(position: int | None, one: InAttention = one, gradient: Tensor = gradient) -> Tensor:
            pause()
            changed = _handed_on(runs, one, calls, Patch(one.site, position=position)) - plain  # noqa: B023
            return by_head(one.heads, changed.to(gradient.device) * gradient).sum(1)

        each = torch.stack([gain(at) for at in range(tokens)], 1) if positions else None
        scores[one.site] = gain(None), each
    return scores


def _keeping(calls: dict[nn.Module, tuple[Any, Any]]) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies: the model may go on in the same memory.
        copied = [value.clone() if isinstance(value, Tensor) else value for value in args]
        named = {k: value.clone() if isinstance(value, Tensor) else value for k, value in kwargs.items()}
        calls[module] = copied, named

    return keep


def _handed_on(
    runs: Runs, one: InAttention, calls: dict[nn.Module, tuple[Any, Any]], patch: Patch | None
) -> Tensor:
    """[T, width] float32 of the heads' outputs when the attention runs alone, with a patch in place."""
    tokens, kept = len(runs.pair.corrupted), []

    def keep(value: Tensor) -> None:
        kept.append(value.flatten(2)[0].float().clone())

    args, kwargs = calls[one.attention]
    with torch.no_grad(), Handles() as handles:
        if patch is not None:
            handles.add(tapped(one.site, 1, tokens, put(runs, one.site, {0: patch})))
        handles.add(tapped(one.heads, 1, tokens, keep))
        one.attention(*args, **kwargs)
    return kept[0]
