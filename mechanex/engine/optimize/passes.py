"""Forward and backward passes: losses of completions, and their gradient by the steering parameters of every job.

Jobs over one layout share a pass. Their copies of the rows are stacked along the batch, lowest layer first, and each
copy joins at the layer where its job first edits it. All edits of a pass are one table; at every steered layer one row
index says which token gets which edit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory import tensor_bytes, total_bytes
from ..models.adapter import ModelAdapter
from ..pauses import pause
from ..ranks import current_ranks
from .layout import Layout, LayoutSpec, StepPack
from .objective import Objective
from .parameters import Parameters, Table
from .replay import Replay
from .settings import LossOptions
from .stack import EditHooks, Stack, StepGraphs

__all__ = ["Evaluation", "EvaluationRequest", "Passes"]

_log = logging.getLogger(__name__)

# A CUDA graph keeps the memory of its pass: with more packs than this their memory is shared instead.
MOST_CAPTURED = 4


@dataclass(frozen=True, eq=False)
class EvaluationRequest:
    """What a job wants to know of one θ.

    Args:
        spec: the completions.
        layers: where the edits are made, in order.
        options: of the losses.
        parameters: the meaning of θ.
        theta: [n].
        objective: what the gradient is of; None for the losses alone.
        noise: [K, d] added to the effect of each slot, or None.
        by_effect: the gradient by the effect of each slot, [K, d], where noise would be added, instead of by θ.
        prompts: the datapoints whose completions are wanted, None for all.
    """

    spec: LayoutSpec
    layers: tuple[int, ...]
    options: LossOptions
    parameters: Parameters
    theta: Tensor
    objective: Objective | None = None
    noise: Tensor | None = None
    by_effect: bool = False
    prompts: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The answer to a request.

    Attributes:
        losses: of all completions in order; NaN for those that weren't asked for.
        gradient: [n] by θ or [K, d] by the slots' effects, None unless asked for.
        finite: whether losses and gradient hold neither NaN nor infinities.
    """

    losses: list[float]
    gradient: Tensor | None
    finite: bool


class Passes:
    """Runs requests on a model; a context manager, inside of which the model carries the hooks that steer it.

    Args:
        adapter: the model, frozen and in eval mode for as long.
        members: the layers that each job's requests edit, in order.
        batch_tokens: most tokens of a pass, unless one pack alone has more.
        most_bytes: most memory for what is kept of the layers below the edits; packs beyond it run whole each time.
            None for a quarter of the device's memory.

    Attributes:
        kept_bytes: memory of what is kept.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        members: Sequence[Sequence[int]],
        batch_tokens: int,
        *,
        most_bytes: int | None = None,
    ) -> None:
        self.adapter = adapter
        self._most_bytes = total_bytes(adapter.device) // 4 if most_bytes is None else most_bytes
        self.kept_bytes = 0
        self._starts = sorted({min(layers[0], adapter.n_layers - 1) for layers in members})
        self._batch_tokens = batch_tokens
        self._hooks, self._graphs = (
            EditHooks(adapter, {n for layers in members for n in layers}),
            StepGraphs(),
        )
        self._layouts: dict[LayoutSpec, Layout] = {}
        self._replays: dict[StepPack, Replay] = {}
        self._stacks: dict[Any, Stack] = {}
        self._ranks = current_ranks(adapter)

    def __enter__(self) -> Passes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def layout(self, spec: LayoutSpec) -> Layout:
        """The packs of a spec, made on first use: one layout for all specs whose completions and edits agree."""
        if spec not in self._layouts:
            agreeing = (layout for layout in self._layouts.values() if layout.spec.key == spec.key)
            self._layouts[spec] = next(agreeing, None) or Layout(self.adapter, spec)
        return self._layouts[spec]

    def forget(self) -> None:
        """Drops what is kept for combinations of jobs that don't come again."""
        self._stacks.clear()

    def run(self, requests: Sequence[EvaluationRequest]) -> list[Evaluation]:
        """Answers requests, those that can share passes together."""
        companies: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            companies.setdefault(self._company(request), []).append(i)
        answers: dict[int, Evaluation] = {}
        for members in companies.values():
            members.sort(key=lambda i: requests[i].layers[0])
            step = 1 if len(members) == 1 else self._how_many(self.layout(requests[members[0]].spec))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                answers.update(zip(part, self._together([requests[i] for i in part]), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _company(self, request: EvaluationRequest) -> tuple[Any, ...]:
        """Requests that share a pass agree in this."""
        alone = id(request) if request.prompts is not None else None
        return self.layout(request.spec), request.options, request.objective is None, alone

    def _how_many(self, layout: Layout) -> int:
        """How many jobs fit in a pass over this layout."""
        mine = [layout.packs[i] for i in self._share(layout.packs)]
        stackable = all(self.replay(p).stackable or not self.replay(p).possible for p in mine)
        if not all(self._ranks.gathered(stackable)):
            return 1
        return max(1, self._batch_tokens // max(p.n_tokens for p in layout.packs))

    def replay(self, step_pack: StepPack) -> Replay:
        """What is kept of a pack's lower layers; made on first use."""
        if step_pack not in self._replays:
            pause()
            made = self._replays[step_pack] = Replay(self.adapter, step_pack.pack, self._starts)
            size = tensor_bytes(made.tensors)
            if self.kept_bytes + size > self._most_bytes:
                made.give_up()
                _log.info("Residuals fill %d MiB; another pack runs whole each time.", self.kept_bytes >> 20)
            else:
                self.kept_bytes += size
        return self._replays[step_pack]

    def residual(
        self, step_pack: StepPack, layers: tuple[int, ...], table: Table | None, layer: int
    ) -> Tensor:
        """[B, T, d_model] entering ``layer`` under the edits of a table, or under none.

        Args:
            step_pack: what is run.
            layers: where the edits are made.
            table: the edits; gradients flow to it.
            layer: above the lowest of ``layers``.
        """
        key = (step_pack, (layers,))
        if key not in self._stacks:
            self._stacks[key] = Stack(self._hooks, step_pack, (layers,), 1, self.replay(step_pack))
        return self._stacks[key].residual(table, layer)

    def _together(self, requests: list[EvaluationRequest]) -> list[Evaluation]:
        """One company's answers; its requests in the order of their lowest layers."""
        first = requests[0]
        learning = first.objective is not None
        with torch.set_grad_enabled(learning):
            signs = self.layout(first.spec).signs
            leaves, tables = zip(*(_leaf_and_table(r, signs, learning) for r in requests), strict=True)
            made = _joined(list(tables))
        table = tuple(t.detach().requires_grad_(learning) for t in made)
        sums: list[Tensor] = []
        found: list[tuple[Tensor, Tensor]] = []
        with self._ranks.together():
            for stack in self._stacks_for(requests):
                pause()
                with torch.set_grad_enabled(learning):
                    losses = stack.losses(table, first.options)
                completions = stack.step_pack.order.completions
                found.append((losses.detach(), completions))
                if learning:
                    slopes = [
                        r.objective(losses.detach()[q], completions)  # type: ignore[misc]
                        for q, r in enumerate(requests)
                    ]
                    grads = torch.autograd.grad(losses, table, torch.stack(slopes))
                    sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
        if self._ranks.sharing > 1:
            found = self._of_all(found)
            mine = sums or [torch.zeros_like(t) for t in table]
            sums = [self._ranks.total(one) for one in mine] if learning else []
        if not learning:
            return _answers(requests, found, [])
        # Where gradients are by effects alone, no more than the biases depend on them.
        depending = [(t, s) for t, s in zip(made, sums, strict=True) if t.requires_grad]
        gradients = torch.autograd.grad([t for t, _ in depending], leaves, [s for _, s in depending])
        return _answers(requests, found, list(gradients))

    def _of_all(self, found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The losses that every process found of its completions."""
        device = self.adapter.device
        by_rank = self._ranks.gathered([(losses.cpu(), completions.cpu()) for losses, completions in found])
        return [(a.to(device), b.to(device)) for parts in by_rank for a, b in parts]

    def _share(self, packs: Sequence[StepPack]) -> list[int]:
        return self._ranks.share([one.n_tokens for one in packs])

    def _stacks_for(self, requests: list[EvaluationRequest]) -> list[Stack]:
        """The requests' copies of every pack that is wanted of this process."""
        layout = self.layout(requests[0].spec)
        n_slots = len(layout.signs)
        members = tuple(r.layers for r in requests)
        if requests[0].prompts is not None:
            selected = layout.selected(requests[0].prompts)
            return [
                Stack(self._hooks, part, members, n_slots, self.replay(whole), rows=rows)
                for whole, part, rows in (selected[i] for i in self._share([part for _, part, _ in selected]))
            ]
        stacks = []
        for step_pack in (layout.packs[i] for i in self._share(layout.packs)):
            key = (step_pack, members)
            if key not in self._stacks:
                graphs = self._graphs if len(layout.packs) <= MOST_CAPTURED else None
                replay = self.replay(step_pack)
                self._stacks[key] = Stack(self._hooks, step_pack, members, n_slots, replay, graphs=graphs)
            stacks.append(self._stacks[key])
        return stacks


def _leaf_and_table(request: EvaluationRequest, signs: Tensor, learning: bool) -> tuple[Tensor, Table]:
    """What a request's gradient is taken by, and the edits that are made of it."""
    theta, noise = request.theta.detach(), request.noise
    if request.by_effect:
        drawn = theta.new_zeros(len(signs), request.parameters.width) if noise is None else noise.detach()
        leaf = noise = drawn.requires_grad_(learning)
    else:
        leaf = theta.requires_grad_(learning)
    return leaf, request.parameters.table(theta, signs, noise)


def _joined(tables: list[Table]) -> Table:
    """One table of all edits; those of lower rank are filled up with zero rows."""
    if len(tables) == 1:
        return tables[0]
    rank = max(table[1].shape[1] if len(table) > 1 else 0 for table in tables)
    if not rank:
        return (torch.cat([table[0] for table in tables]),)
    full = []
    for bias, *factors in tables:
        missing = rank - (factors[0].shape[1] if factors else 0)
        zeros = bias.new_zeros(bias.shape[0], missing, bias.shape[1])
        full.append((bias, *(torch.cat([f, zeros], 1) for f in factors or [zeros[:, :0]] * 2)))
    return tuple(torch.cat(parts) for parts in zip(*full, strict=True))


def _answers(
    requests: list[EvaluationRequest], found: list[tuple[Tensor, Tensor]], gradients: list[Tensor]
) -> list[Evaluation]:
    """Evaluations of what was computed, fetched from the device at once."""
    n = len(requests)
    squares = [g.square().sum() for g in gradients] or [found[0][0].new_zeros(())] * n
    numbers = torch.cat(
        [torch.cat([losses for losses, _ in found], 1), torch.stack(squares)[:, None]], 1
    ).tolist()
    places = [i for _, completions in found for i in completions.tolist()]
    answers = []
    for q, request in enumerate(requests):
        *values, square = numbers[q]
        losses = [float("nan")] * len(request.spec.completions)
        for place, value in zip(places, values, strict=True):
            losses[place] = value
        finite = all(abs(v) < float("inf") for v in values) and square < float("inf")
        answers.append(Evaluation(losses, gradients[q] if gradients else None, finite))
    return answers
