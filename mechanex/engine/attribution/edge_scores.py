"""Scores of a model's edges for a pair of prompts, and circuits made of the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..structure.graph import structure_of
from ..text import Prompt
from ..whole import as_whole
from .circuits import SHARES, Circuit, Curve, Selection, choose_edges, curve_of, measured
from .edges import Edge, EdgeRuns, edge_runs, exact_edges, gradient_edges
from .metrics import Answer, Metric
from .prompts import Align, prompt_pair
from .runs import alone
from .scores import Method, attribution_scores, check_method, metric_dict, texts_of

__all__ = ["EdgeScores", "attribution_edges", "scores_answer"]


@dataclass(eq=False)
class EdgeScores:
    """What each edge is worth to the metric: how much it would gain from carrying what it carries in the clean run.

    Attributes:
        adapter: the model.
        tokenizer: the model's, or None.
        method: ``"gradient"`` or ``"exact"``.
        steps: gradients that were averaged; 0 for exact scores.
        runs: both runs.
        scores: by edge, in the order in which the model's components run.
    """

    adapter: ModelAdapter
    tokenizer: Any
    method: Method
    steps: int
    runs: EdgeRuns
    scores: dict[Edge, float]

    def circuit(
        self, n_edges: int | None = None, *, share: float | None = None, how: Selection = "greedy"
    ) -> Circuit:
        """The edges of the highest absolute scores, and how faithful they are.

        Args:
            n_edges: how many; or
            share: what share of all edges.
            how: ``"greedy"`` from the logits backwards, or ``"threshold"``: the best of all that lead to the logits.

        Raises:
            ValidationError: neither or both of ``n_edges`` and ``share``, or one out of its range.
        """
        if (n_edges is None) == (share is None):
            raise ValidationError("a circuit has n_edges edges or a share of all: give one of the two.")
        if share is not None and not 0 < share <= 1:
            raise ValidationError(f"share is above 0 and up to 1; got {share!r}.")
        n = as_whole(n_edges) if share is None else max(1, round(share * len(self.scores)))
        if n is None or n < 0:
            raise ValidationError(f"n_edges is an int of 0 or more; got {n_edges!r}.")
        with alone(self.adapter):
            (found,) = measured(self.adapter, self.runs, [choose_edges(self.scores, n, how)])
        return found

    def curve(
        self, *, how: Selection = "greedy", by_gain: bool = False, shares: Sequence[float] = SHARES
    ) -> Curve:
        """Faithfulness of circuits of growing size; see :func:`mechanex.engine.attribution.circuits.curve_of`."""
        with alone(self.adapter):
            return curve_of(self.adapter, self.runs, self.scores, how, by_gain=by_gain, shares=shares)

    def to_dict(self, circuit: Circuit | None = None) -> dict[str, Any]:
        """Everything as JSON has it, edges best first; of a circuit only its edges."""
        runs = self.runs
        shown = self.scores if circuit is None else {edge: self.scores[edge] for edge in circuit.edges}
        ordered = sorted(shown, key=lambda edge: -abs(shown[edge]))
        found: dict[str, Any] = {
            "method": self.method,
            "steps": self.steps,
            "metric": metric_dict(self.tokenizer, runs.metric, runs.clean_metric, runs.corrupted_metric),
            "tokens": {
                "clean": texts_of(self.tokenizer, runs.pair.clean),
                "corrupted": texts_of(self.tokenizer, runs.pair.corrupted),
            },
            "roles": {one.path: one.role for one in runs.structure.components},
            "n_edges": len(self.scores),
            "edges": [
                {"source": edge.source, "target": edge.target, "score": shown[edge]} for edge in ordered
            ],
        }
        if circuit is not None:
            found["faithfulness"] = circuit.faithfulness
        return found


def attribution_edges(
    model: nn.Module | ModelAdapter,
    clean_prompt: Prompt,
    corrupted_prompt: Prompt,
    *,
    tokenizer: Any = None,
    method: Method = "gradient",
    steps: int = 1,
    metric: Metric | Sequence[Answer] | None = None,
    align: Align = None,
) -> EdgeScores:
    """Scores of all edges: from what the embedding and each attention and MLP write to what a later one reads.

    Args:
        model: a Hugging Face or TransformerLens model or its adapter.
        clean_prompt, corrupted_prompt, tokenizer, metric, align: as for ``attribution_scores``.
        method: ``"gradient"``: edge attribution patching (EAP, arXiv:2310.10348); ``"exact"``: a run for each edge.
        steps: of integrated gradients over the inputs (EAP-IG, arXiv:2403.17806); 1 for the corrupted run's gradient.

    Raises:
        ValidationError: a model without one residual stream, and what ``attribution_scores`` refuses.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    steps = check_method(method, steps)
    pair = prompt_pair(adapter, tokenizer, clean_prompt, corrupted_prompt, align)
    structure = structure_of(adapter)
    with alone(adapter):
        runs = edge_runs(adapter, tokenizer, structure, pair, metric)
        if method == "gradient":
            scores = gradient_edges(adapter, runs, steps)
        else:
            scores, steps = exact_edges(adapter, runs, runs.edges), 0
    return EdgeScores(adapter, tokenizer, method, steps, runs, scores)


def scores_answer(
    model: nn.Module | ModelAdapter,
    clean_prompt: Prompt,
    corrupted_prompt: Prompt,
    target_module_paths: Sequence[str] | None = None,
    *,
    edges: bool = False,
    positions: bool = True,
    recompute_attention: bool = False,
    drop_layers: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What ``attribution.compute_scores`` returns: scores of modules, with those of edges where they are asked for.

    Args:
        model, clean_prompt, corrupted_prompt: as for ``attribution_scores``.
        target_module_paths, positions, recompute_attention, drop_layers: of the modules.
        edges: score all edges too.
        options: further arguments of both.

    Raises:
        ValidationError: what ``attribution_scores`` refuses; a model without edges where they are asked for.
    """
    prompts = clean_prompt, corrupted_prompt
    found = attribution_scores(
        model,
        *prompts,
        target_module_paths,
        positions=positions,
        recompute_attention=recompute_attention,
        drop_layers=drop_layers,
        **options,
    ).to_dict()
    if edges:
        found["edges"] = attribution_edges(model, *prompts, **options).to_dict()["edges"]
    return found
