"""Forward and backward passes: losses of completions, and their gradient by the steering parameters of every job.

Jobs over one layout share a pass. Each brings rows, all of a pack's or those of its minibatch or its own data. They are
stacked along the batch, lowest layer first, and join at the layer where their job first edits them. All edits of a pass
are one table; at every steered layer one row index says which token gets which edit.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory import tensor_bytes, total_bytes
from ..models.adapter import ModelAdapter
from ..pauses import pause
from ..ranks import current_ranks
from .layout import MINIBATCH_PACK_TOKENS, Layout, LayoutSpec, StepPack
from .objective import Objective
from .parameters import Parameters, Table
from .replay import Replay
from .settings import LossOptions
from .stack import EditHooks, Member, Stack, StepGraphs

__all__ = ["Evaluation", "EvaluationRequest", "Passes"]

_log = logging.getLogger(__name__)

# A CUDA graph keeps the memory of its pass: with more packs than this their memory is shared instead.
MOST_CAPTURED = 4

_Found = tuple[Tensor, list[int]]
"""Losses of some completions of a request, and which of them these are."""


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
        self._places: dict[LayoutSpec, _LaidOut] = {}
        self._replays: dict[StepPack, Replay] = {}
        self._stacks: dict[Any, Stack] = {}
        self._ranks = current_ranks(adapter)

    def __enter__(self) -> Passes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def prepare(self, specs: Sequence[LayoutSpec]) -> None:
        """Lays out what is going to be asked for: specs that fit into one pass together, so that jobs over other data
        share it; others by themselves.

        A pass that isn't full costs as much as one that is: its launches, and the bytes of the weights.
        """
        kinds: dict[Hashable, dict[Hashable, LayoutSpec]] = {}
        for spec in specs:
            # Where every completion has an edit of its own, edits are as many as completions.
            kind = id(spec) if spec.apart else (spec.only_prompt, spec.by_prompt, spec.batch_tokens)
            kinds.setdefault((kind, spec.to_the_end), {}).setdefault(spec.key, spec)
        for found in kinds.values():
            if len(found) > 1:
                self._prepare_together(list(found.values()))
        for spec in specs:
            self.place(spec)

    def _prepare_together(self, specs: list[LayoutSpec]) -> None:
        most = MINIBATCH_PACK_TOKENS if specs[0].by_prompt else self._batch_tokens
        if sum(len(c.ids) for spec in specs for c in spec.completions) > most:
            return  # the completions alone are too long
        joint = Layout(self.adapter, LayoutSpec.joined(specs))
        if len(joint.packs) > 1 or joint.packs[0].n_tokens > most:
            return
        first = prompt = 0
        for spec in specs:
            end = prompt + spec.n_datapoints
            self._places[spec] = _LaidOut(joint, tuple(range(prompt, end)), first)
            first, prompt = first + len(spec.completions), end

    def place(self, spec: LayoutSpec) -> _LaidOut:
        """Where a spec's completions are laid out, made on first use: one place for all whose keys agree."""
        if spec not in self._places:
            agreeing = (place for other, place in self._places.items() if other.key == spec.key)
            self._places[spec] = next(agreeing, None) or _LaidOut(Layout(self.adapter, spec))
        return self._places[spec]

    def layout(self, spec: LayoutSpec) -> Layout:
        """The packs that hold a spec's completions, among others perhaps."""
        return self.place(spec).layout

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
            found = self._together([requests[i] for i in members])
            for i, answer in zip(members, found, strict=True):
                # In sums over all rows of a pass, one job's NaN is everybody's: 0 · NaN is NaN.
                stands = answer.finite or len(members) == 1
                answers[i] = answer if stands else self._together([requests[i]])[0]
        return [answers[i] for i in range(len(requests))]

    def _company(self, request: EvaluationRequest) -> tuple[Any, ...]:
        """Requests that share a pass agree in this."""
        return self.layout(request.spec), request.options, request.objective is None

    def _units(self, requests: list[EvaluationRequest]) -> list[_Unit]:
        """What is run in one pass each, for one company."""
        layout = self.layout(requests[0].spec)
        several = len(requests) == 1 or self._stackable(layout)
        units: list[_Unit] = []
        for i, whole in enumerate(layout.packs):
            room = 0
            for q, request in enumerate(requests):
                prompts = self.place(request.spec).prompts_of(request)
                taken = layout.part(i, prompts)
                if taken is None:
                    continue
                member = Member(request.layers, *taken)
                size = taken[0].n_tokens
                if size > room or not several:
                    units.append(_Unit(whole, [], []))
                    room = self._batch_tokens
                units[-1].takers.append(q)
                units[-1].members.append(member)
                room -= size
        return units

    def _stackable(self, layout: Layout) -> bool:
        """Whether rows of several jobs can be in one pass over this layout."""
        mine = [layout.packs[i] for i in self._share(layout.packs)]
        stackable = all(self.replay(p).stackable or not self.replay(p).possible for p in mine)
        return all(self._ranks.gathered(stackable))

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
            self._stacks[key] = Stack(self._hooks, [Member(layers, step_pack)], 1, self.replay(step_pack))
        return self._stacks[key].residual(table, layer)

    def _together(self, requests: list[EvaluationRequest]) -> list[Evaluation]:
        """One company's answers; its requests in the order of their lowest layers."""
        options, learning = requests[0].options, requests[0].objective is not None
        layout = self.layout(requests[0].spec)
        with torch.set_grad_enabled(learning):
            leaves, tables = zip(*(_leaf_and_table(r, layout.signs, learning) for r in requests), strict=True)
        sums: list[Table] = [()] * len(requests)
        found: list[list[_Found]] = [[] for _ in requests]
        units = self._units(requests)
        with self._ranks.together():
            for unit in (units[i] for i in self._ranks.share([one.n_tokens for one in units])):
                stack = self._stack(unit, requests, layout)
                pause()
                with torch.set_grad_enabled(learning):
                    made = _joined([tables[q] for q in unit.takers])
                table = tuple(t.detach().requires_grad_(learning) for t in made)
                with torch.set_grad_enabled(learning):
                    losses = stack.losses(table, options)
                parts = torch.split(losses.detach(), [len(one.part.order.places) for one in unit.members])
                slopes = []
                for q, part, member in zip(unit.takers, parts, unit.members, strict=True):
                    first, order = self.place(requests[q].spec).first, member.part.order
                    found[q].append((part, [place - first for place in order.places]))
                    if learning:
                        own = order.completions - first if first else order.completions
                        slopes.append(requests[q].objective(part, own))  # type: ignore[misc]
                if learning:
                    grads = torch.autograd.grad(losses, table, torch.cat(slopes))
                    for n, q in enumerate(unit.takers):
                        mine = _share_of(grads, n, tables[q])
                        sums[q] = (
                            tuple(a + b for a, b in zip(sums[q], mine, strict=True)) if sums[q] else mine
                        )
        if self._ranks.sharing > 1:
            found = self._of_all(found)
            if learning:
                whole = [one or tuple(map(torch.zeros_like, t)) for one, t in zip(sums, tables, strict=True)]
                sums = [tuple(map(self._ranks.total, one)) for one in whole]
        if not learning:
            return _answers(requests, found, [])
        # Where gradients are by effects alone, no more than the biases depend on them.
        depending = [
            (t, s)
            for table, own in zip(tables, sums, strict=True)
            for t, s in zip(table, own, strict=True)
            if t.requires_grad
        ]
        gradients = torch.autograd.grad([t for t, _ in depending], leaves, [s for _, s in depending])
        return _answers(requests, found, list(gradients))

    def _of_all(self, found: list[list[_Found]]) -> list[list[_Found]]:
        """For every request the losses that every process found of its completions."""
        device = self.adapter.device
        by_rank = self._ranks.gathered([[(part.cpu(), places) for part, places in own] for own in found])
        return [
            [(part.to(device), places) for theirs in by_rank for part, places in theirs[q]]
            for q in range(len(found))
        ]

    def _share(self, packs: Sequence[StepPack]) -> list[int]:
        return self._ranks.share([one.n_tokens for one in packs])

    def _stack(self, unit: _Unit, requests: Sequence[EvaluationRequest], layout: Layout) -> Stack:
        """What runs a unit; kept where the same comes with every step."""
        asked = [requests[q] for q in unit.takers]
        key = (unit.pack, tuple((one.layers, self.place(one.spec)) for one in asked))
        stays = all(one.prompts is None for one in asked)
        if stays and key in self._stacks:
            return self._stacks[key]
        graphs = self._graphs if stays and len(layout.packs) <= MOST_CAPTURED else None
        stack = Stack(self._hooks, unit.members, len(layout.signs), self.replay(unit.pack), graphs)
        if stays:
            self._stacks[key] = stack
        return stack


@dataclass(frozen=True, eq=False)
class _LaidOut:
    """Where the completions of a spec are.

    Args:
        layout: that holds them.
        prompts: its datapoints that are the spec's, in order; None for all.
        first: of its completions the first that is the spec's.
    """

    layout: Layout
    prompts: tuple[int, ...] | None = None
    first: int = 0

    def prompts_of(self, request: EvaluationRequest) -> tuple[int, ...] | None:
        """The layout's datapoints that a request is about, None for all."""
        if request.prompts is None or self.prompts is None:
            return self.prompts if request.prompts is None else request.prompts
        return tuple(self.prompts[i] for i in request.prompts)


@dataclass(frozen=True, eq=False)
class _Unit:
    """One pass: rows of a pack, and which requests take which."""

    pack: StepPack
    takers: list[int]
    members: list[Member]

    @property
    def n_tokens(self) -> int:
        return sum(one.part.n_tokens for one in self.members)


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


def _share_of(grads: Sequence[Tensor], n: int, table: Table) -> Table:
    """The gradient by the n-th of the tables that were joined."""
    k = table[0].shape[0]
    return tuple(
        grad[n * k : (n + 1) * k] if t.dim() == 2 else grad[n * k : (n + 1) * k, : t.shape[1]]
        for t, grad in zip(table, grads, strict=False)
    )


def _answers(
    requests: list[EvaluationRequest], found: list[list[_Found]], gradients: list[Tensor]
) -> list[Evaluation]:
    """Evaluations of what was computed, fetched from the device at once."""
    parts = [part for own in found for part, _ in own]
    squares = [torch.stack([g.square().sum() for g in gradients])] if gradients else []
    numbers = torch.cat([*parts, *squares]).tolist()
    sizes = numbers[len(numbers) - len(gradients) :] or [0.0] * len(requests)
    values = iter(numbers)
    answers = []
    for q, (request, own, square) in enumerate(zip(requests, found, sizes, strict=True)):
        losses = [float("nan")] * len(request.spec.completions)
        finite = square < float("inf")
        for _, places in own:
            for place in places:
                losses[place] = value = next(values)
                finite = finite and abs(value) < float("inf")
        answers.append(Evaluation(losses, gradients[q] if gradients else None, finite))
    return answers
