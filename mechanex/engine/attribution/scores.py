"""Scores of a model's modules, heads and positions for a pair of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..structure.graph import Structure, structure_of
from ..text import Prompt
from ..whole import as_whole
from .attention import InAttention, inside_attention, recomputed_scores
from .exact import Patch, exact_scores
from .metrics import Answer, LogprobDifference, Metric
from .nodes import by_head, gradients
from .prompts import Align, prompt_pair
from .runs import Runs, alone, run_pair
from .sites import Site, sites_of

__all__ = [
    "Method",
    "NodeScores",
    "attribution_scores",
    "check_method",
    "default_paths",
    "metric_dict",
    "texts_of",
]

Method = Literal["gradient", "exact"]


@dataclass(eq=False)
class NodeScores:
    """What each module is worth to the metric: how much it would gain from the module's clean activations.

    Attributes:
        tokenizer: the model's, or None.
        method: ``"gradient"`` or ``"exact"``.
        steps: gradients that were averaged; 0 for exact scores.
        runs: both runs; without activations.
        scores: by path, all positions together.
        positions: by path, [T corrupted] float32; empty where they weren't asked for.
        heads: by path of attention, [n_heads] float32, all positions together.
        head_positions: by path of attention, [n_heads, T corrupted] float32.
        roles: by path, ``"attention"`` and the like, of those that write to the residual stream.
        layers: by path, the layer of those.
    """

    tokenizer: Any
    method: Method
    steps: int
    runs: Runs
    scores: dict[str, float] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    head_positions: dict[str, Tensor] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    layers: dict[str, int | None] = field(default_factory=dict)

    @property
    def tokens(self) -> list[Any]:
        """The corrupted prompt's tokens: text where there is a tokenizer, else ids."""
        return texts_of(self.tokenizer, self.runs.pair.corrupted)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        runs = self.runs
        return {
            "method": self.method,
            "steps": self.steps,
            "metric": metric_dict(self.tokenizer, runs.metric, runs.clean_metric, runs.corrupted_metric),
            "tokens": {"clean": texts_of(self.tokenizer, runs.pair.clean), "corrupted": self.tokens},
            "scores": dict(self.scores),
            "positions": {path: found.tolist() for path, found in self.positions.items()},
            "heads": {path: found.tolist() for path, found in self.heads.items()},
            "head_positions": {path: found.tolist() for path, found in self.head_positions.items()},
            "roles": dict(self.roles),
            "layers": dict(self.layers),
        }


def metric_dict(tokenizer: Any, metric: Metric, clean: float, corrupted: float) -> dict[str, Any]:
    """What was attributed, as JSON has it."""
    known = metric if isinstance(metric, LogprobDifference) else None
    ids = [] if known is None else [known.answer] + ([] if known.other is None else [known.other])
    return {
        "name": "custom" if known is None else known.name,
        "answers": texts_of(tokenizer, ids),
        "clean": clean,
        "corrupted": corrupted,
    }


def default_paths(structure: Structure) -> list[str]:
    """What writes to the residual stream: the embedding, and the components of each layer."""
    return [component.path for component in structure.components]


def attribution_scores(
    model: nn.Module | ModelAdapter,
    clean_prompt: Prompt,
    corrupted_prompt: Prompt,
    target_module_paths: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    method: Method = "gradient",
    steps: int = 1,
    metric: Metric | Sequence[Answer] | None = None,
    align: Align = None,
    heads: bool = True,
    positions: bool = True,
    recompute_attention: bool = False,
    drop_layers: bool = False,
) -> NodeScores:
    """Scores of modules: what the metric of the corrupted run would gain from their activations of the clean run.

    Args:
        model: a Hugging Face or TransformerLens model or its adapter.
        clean_prompt, corrupted_prompt: text, token ids or chat messages, of as many tokens each.
        target_module_paths: from ``model_paths``; None for what writes to the residual stream.
        tokenizer: the model's; the adapter's own by default.
        method: ``"gradient"``: attribution patching (arXiv:2310.10348); ``"exact"``: one run for each score.
        steps: of integrated gradients over the inputs (EAP-IG, arXiv:2403.17806); 1 for the corrupted run's gradient.
        metric: a function from logits [B, n_vocab] at the prompt's end to [B]; two answers, text or token ids; or None:
            the difference of log-probability between the two runs' top tokens.
        align: ``"tokens"`` for prompts of different lengths.
        heads: score attention heads too.
        positions: score positions too; with ``"exact"`` that is a run for each position of each module and head.
        recompute_attention: follow what is patched inside an attention, such as queries and keys, to the outputs of its
            heads by running the attention again, and only from there by the gradient, which a saturated softmax lets
            vanish (AtP*, arXiv:2403.00745). A run of the attention for each module and position. At least one of the
            targets lies inside an attention.
        drop_layers: take a gradient for each layer that nothing comes back through, and give the mean of the scores'
            absolute values, so that effects that cancel each other are not overlooked (GradDrop of AtP*). All scores
            are at least 0 then. As many gradients as layers.

    Raises:
        ValidationError: an unknown path, prompts that don't align, or another argument out of its range.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    steps = check_method(method, steps)
    pair = prompt_pair(adapter, tokenizer, clean_prompt, corrupted_prompt, align)
    structure = structure_of(adapter)
    paths = default_paths(structure) if target_module_paths is None else list(target_module_paths)
    structure.check(paths)
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValidationError(
            "target_module_paths is empty: name at least one, or pass None for the usual ones."
        )
    if method == "exact" and (recompute_attention or drop_layers):
        raise ValidationError(
            "recompute_attention and drop_layers mend gradients: exact scores need neither."
        )
    if drop_layers and adapter.n_layers < 2:
        raise ValidationError("drop_layers needs a model of at least two layers.")
    embedding = _embedding(adapter)
    with alone(adapter):
        sites = sites_of(adapter, structure, paths, heads)
        inside = _inside(adapter, structure, sites) if recompute_attention else []
        dropped = _layers_of(adapter, structure) if drop_layers else []
        recorded = [embedding, *sites, *(one.heads for one in inside)]
        once = embedding if method == "gradient" and steps == 1 and not drop_layers else None
        runs = run_pair(adapter, tokenizer, pair, recorded, metric, once)
        found = NodeScores(tokenizer, method, steps if method == "gradient" else 0, runs)
        if method == "exact":
            _fill_exact(found, sites, positions, lambda patches: exact_scores(adapter, runs, patches))
        else:
            slopes = gradients(adapter, runs, recorded[1:], embedding, steps, dropped)
            again = recomputed_scores(adapter, runs, inside, slopes, positions)
            own = _own_layers(adapter)
            for site in sites:
                if site in again:
                    whole, each = again[site]
                    if not heads:
                        whole, each = whole.sum(-1, keepdim=True), _summed(each)
                else:
                    gain = by_head(site, runs.delta(site) * slopes[site])
                    whole, each = gain.sum(1), gain if positions else None
                counted = _n_counted(slopes[site], own.get(site.module)) if drop_layers else None
                _fill(found, site, whole, each, counted)
    runs.forget()
    for one in structure.components:
        if one.path in found.scores:
            found.roles[one.path], found.layers[one.path] = one.role, one.layer
    return found


def check_method(method: str, steps: int) -> int:
    """The number of steps.

    Raises:
        ValidationError: an unknown method, or steps that it hasn't.
    """
    if method not in get_args(Method):
        raise ValidationError(f"method is one of {', '.join(get_args(Method))}; got {method!r}.")
    n = as_whole(steps)
    if n is None or n < 1:
        raise ValidationError(f"steps is an int of at least 1; got {steps!r}.")
    if method == "exact" and n != 1:
        raise ValidationError("steps are those of method='gradient': exact scores have none.")
    return n


def _embedding(adapter: ModelAdapter) -> Site:
    if adapter.embedding is None:
        raise ValidationError(
            f"{adapter.model_id} doesn't say which module embeds its tokens (get_input_embeddings), and attribution "
            "begins there."
        )
    return Site("", adapter.embedding)


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[Any]:
    """Each token as text; the ids themselves where there is no tokenizer."""
    return list(ids) if tokenizer is None else [tokenizer.decode([token]) for token in ids]


def _layers_of(adapter: ModelAdapter, structure: Structure) -> list[list[Site]]:
    """What each layer writes."""
    written = [
        [one for one in structure.components if one.layer == layer] for layer in range(adapter.n_layers)
    ]
    if any(one.role == "block" for ones in written for one in ones):
        raise ValidationError(
            f"{adapter.model_id} has layers whose output isn't the stream and what was added to it, so drop_layers has "
            "nothing to drop."
        )
    return [[Site(one.path, one.module) for one in ones] for ones in written]


def _inside(adapter: ModelAdapter, structure: Structure, sites: Sequence[Site]) -> list[InAttention]:
    """The sites that lie inside an attention, at least one.

    Raises:
        ValidationError: none does, so that no attention is to be run again.
    """
    if found := inside_attention(adapter, structure, sites):
        return found
    possible = inside_attention(adapter, structure, sites_of(adapter, structure, structure.paths, False))
    example = (
        f"name some in target_module_paths, such as {possible[-1].site.path!r}, or leave it out."
        if possible
        else f"and {adapter.model_id} has none: leave it out."
    )
    raise ValidationError(
        "recompute_attention is for modules inside an attention, such as those that make queries and keys, and none of "
        f"the target modules is one: {example}"
    )


def _summed(each: Tensor | None) -> Tensor | None:
    return None if each is None else each.sum(-1, keepdim=True)


def _own_layers(adapter: ModelAdapter) -> dict[nn.Module, int]:
    """The layer of each module that lies in one."""
    return {
        module: index
        for index, layer in enumerate(adapter.layers)
        for module in layer.modules()
        if module is not layer
    }


def _n_counted(slopes: Tensor, layer: int | None) -> int:
    """How many of a site's gradients [n, T, width], one for each dropped layer, say something of it.

    What acts through its own layer's writes alone has nothing where those are dropped, whatever it is worth.
    """
    return len(slopes) - (layer is not None and not bool(slopes[layer].any()))


def _fill(found: NodeScores, site: Site, whole: Tensor, each: Tensor | None, counted: int | None) -> None:
    """Notes the scores of a site.

    Args:
        found: where.
        site: whose.
        whole: [n, heads], of all positions together.
        each: [n, T, heads], of each position.
        counted: with dropped layers, how many of the n say something of the site; None for one plain gradient.
    """

    def merged(values: Tensor) -> Tensor:
        return (values[0] if counted is None else values.abs().sum(0) / counted).cpu()

    if not site.n_heads:
        found.scores[site.path] = float(merged(whole.sum(-1)))
        if each is not None:
            found.positions[site.path] = merged(each.sum(-1))
    if whole.shape[-1] > 1 or site.n_heads:
        found.heads[site.path] = merged(whole)
        if each is not None:
            found.head_positions[site.path] = merged(each).T


def _fill_exact(
    found: NodeScores,
    sites: Sequence[Site],
    positions: bool,
    scored: Callable[[Sequence[Patch]], Tensor],
) -> None:
    tokens = len(found.runs.pair.corrupted)
    patches = [
        Patch(site, head) for site in sites for head in (range(site.n_heads) if site.n_heads else [None])
    ]
    wholes = dict(zip(patches, scored(patches), strict=True))
    each = [Patch(p.site, p.head, at) for p in patches for at in range(tokens)] if positions else []
    at_each = dict(zip(patches, scored(each).reshape(-1, tokens), strict=True)) if each else {}
    for site in sites:
        mine = [patch for patch in patches if patch.site is site]
        if not site.n_heads:
            found.scores[site.path] = float(wholes[mine[0]])
            if each:
                found.positions[site.path] = at_each[mine[0]]
            continue
        found.heads[site.path] = torch.stack([wholes[patch] for patch in mine])
        if each:
            found.head_positions[site.path] = torch.stack([at_each[patch] for patch in mine])
