"""The components of a model that read the residual stream and write to it, found by following what a pass computes.

A layer's output is a sum: the stream that entered it, and what its components wrote. Autograd's record of a pass over a
few tokens shows the terms of that sum, so neither names of modules nor the order of norms matter. In a second pass
every write is cut off from what comes after it, which checks the terms and their factors, and shows who reads whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attaching import after
from ..models.adapter import ModelAdapter
from ..stream import given_out, with_given_out
from .observing import N_ROWS, N_TOKENS, Call, Observed, entry_hooks, probing

__all__ = ["Component", "Heads", "find_components"]

Role = Literal["embedding", "attention", "mixer", "mlp", "block"]

# What autograd calls operations that hand a term of a sum on, whole or times a number.
_PASSING = (
    *("AddBackward0", "MulBackward0", "DivBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
)
_HEAD_COUNTS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads")


@dataclass(frozen=True, eq=False)
class Heads:
    """Attention heads, side by side where their output projection reads them.

    Args:
        path: the projection's path.
        module: the projection; its input is [B, T, n_heads * width of a head].
        n_heads: query heads, whatever keys and values they share.
    """

    path: str
    module: nn.Module
    n_heads: int


@dataclass(frozen=True, eq=False)
class Component:
    """A component of a model that writes to the residual stream.

    Args:
        path: the module whose output is written.
        module: that module.
        role: ``"attention"`` looks at other tokens and has heads, ``"mixer"`` looks at other tokens and has none,
            ``"mlp"`` looks at its own token alone; ``"block"`` is a whole layer, whose sum isn't of modules' outputs.
        layer: its layer; None for the embedding.
        scale: what its output is multiplied by on its way into the stream.
        within: paths of the components of its own layer that it reads; none for components that run in parallel.
        heads: its heads, where it has any.
    """

    path: str
    module: nn.Module
    role: Role
    layer: int | None = None
    scale: float = 1.0
    within: tuple[str, ...] = ()
    heads: Heads | None = None

    def reads(self, other: Component) -> bool:
        """Whether it reads what the other component wrote."""
        mine, theirs = (-1 if one.layer is None else one.layer for one in (self, other))
        return other.path in self.within if mine == theirs else mine > theirs


def find_components(adapter: ModelAdapter, observed: Observed) -> list[Component]:
    """The embedding and the components of each layer, in the order in which they run.

    Args:
        adapter: the model.
        observed: a pass of it.
    """
    paths = {id(module): path for path, module in adapter.hf_model.named_modules(remove_duplicate=False)}
    terms = [_terms_of(adapter, observed, index) for index in range(adapter.n_layers)]
    components: list[Component] = []
    embedding = adapter.embedding
    if embedding is not None and id(embedding) in paths:
        components.append(Component(paths[id(embedding)], embedding, "embedding"))
    seen = _cut_pass(adapter, [calls or [] for calls in terms])
    # A write of nothing but zeros, as of weights that are zero, has the role of its like in other layers.
    known = {
        _name(call): role
        for calls, cut in zip(terms, seen, strict=True)
        for call, role in zip(calls or [], cut.roles, strict=False)
        if role is not None
    }
    for index, layer in enumerate(adapter.layers):
        calls, cut = terms[index], seen[index]
        if calls is None or not cut.sound:
            components.append(Component(paths[id(layer)], layer, "block", index))
            continue
        for n, call in enumerate(calls):
            role = cut.roles[n] or known.get(_name(call), "mlp")
            within = tuple(calls[j].path for j in cut.reads[n])
            components.append(Component(call.path, call.module, role, index, cut.scales[n], within))
    return [
        _with_heads(adapter, observed, component) if component.role == "mixer" else component
        for component in components
    ]


def _name(call: Call) -> str:
    return call.path.rpartition(".")[2]


def _terms_of(adapter: ModelAdapter, observed: Observed, index: int) -> list[Call] | None:
    """The calls whose outputs a layer adds to its stream, in the order of running; None where that isn't the sum."""
    entry, leaving = observed.entries.get(index), observed.exits.get(index)
    if entry is None or leaving is None:
        return None
    layer = adapter.layers[index]
    inside = [c for c in observed.calls if c.layer == index and c.module is not layer and c.node is not None]
    outputs: dict[Any, Call] = {}
    for call in sorted(inside, key=lambda c: (c.path.count("."), c.began)):
        outputs.setdefault(call.node, call)
    found = _terms(leaving, entry, outputs)
    calls = [term for term in found if isinstance(term, Call)]
    if found.count("stream") != 1 or None in found or not calls or len(set(calls)) != len(calls):
        return None
    return sorted(calls, key=lambda c: c.ended)


_Term = Call | Literal["stream"] | None


def _terms(node: Any, entry: Any, outputs: Mapping[Any, Call]) -> list[_Term]:
    """What a value is the sum of: the stream that entered, outputs of calls, and None for anything else."""
    if node is entry:
        return ["stream"]
    came = _came_from(node)
    if came:
        found = [term for one in came for term in _terms(one, entry, outputs)]
        if "stream" in found or node not in outputs:
            return found
    return [outputs.get(node)]


def _came_from(node: Any) -> list[Any]:
    """The nodes of the terms of a value that is a sum or one thing times a number; none for other values."""
    if node.name() not in _PASSING:
        return []
    came = [one for one, _ in node.next_functions if one is not None]
    return came if len(came) == 1 or node.name() == "AddBackward0" else []


@dataclass
class _Cut:
    """What a layer showed of its writes once each was cut off from what comes after it."""

    scales: list[float]
    roles: list[Role | None]
    reads: list[list[int]]
    sound: bool = True


def _cut_pass(adapter: ModelAdapter, terms: Sequence[Sequence[Call]]) -> list[_Cut]:
    """Runs the model once with every write replaced by a leaf of the same values."""
    found = [_Cut([], [], [], False) for _ in terms]
    written: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, Tensor] = {}

    def write(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        value = given_out(output)
        leaf = value.detach().requires_grad_(True)
        written[id(module)] = (value, leaf)
        return with_given_out(leaf.clone(), output)

    def leave(index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            pairs = [written.pop(id(call.module)) for call in terms[index]]
            found[index] = _looked_at(given_out(output), entered[index], pairs)

        return hook

    with probing(adapter) as ids, entry_hooks(adapter, entered) as handles:
        for index, calls in enumerate(terms):
            for call in calls:
                handles.add(after(call.module, write))
            if calls:
                handles.add(after(adapter.layers[index], leave(index)))
        adapter.call(input_ids=ids)
    return found


def _looked_at(leaving: Tensor, entered: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> _Cut:
    """Factors, roles and reads of a layer's writes, each given with the leaf that stands for it."""
    weights = torch.randn(leaving.shape, generator=torch.Generator().manual_seed(0)).to(leaving)
    leaves = [leaf for _, leaf in pairs]
    stream, *grads = torch.autograd.grad(leaving, [entered, *leaves], weights, retain_graph=True)
    if any(grad.numel() != weights.numel() for grad in grads):
        return _Cut([], [], [], False)
    grads = [grad.reshape(weights.shape) for grad in grads]
    scales = [float((grad * weights).sum() / (weights * weights).sum()) for grad in grads]
    close = 1e-3 if leaving.dtype in (torch.float32, torch.float64) else 2e-2
    sound = torch.allclose(stream, weights, rtol=close, atol=close)
    for grad, scale in zip(grads, scales, strict=True):
        sound = sound and scale != 0 and torch.allclose(grad, weights * scale, rtol=close, atol=close)
    roles: list[Role | None] = []
    reads: list[list[int]] = []
    last = torch.zeros_like(weights)
    last[:, -1] = weights[:, -1]
    for n, (value, _) in enumerate(pairs):
        given = torch.autograd.grad(
            value, [entered, *leaves], last.reshape(value.shape), retain_graph=True, allow_unused=True
        )
        reads.append([j for j in range(n) if given[1 + j] is not None])
        seen = [grad.reshape(weights.shape) for grad in given if grad is not None]
        elsewhere = any(bool(grad[:, :-1].any()) for grad in seen)
        here = any(bool(grad[:, -1].any()) for grad in seen)
        roles.append("mixer" if elsewhere else "mlp" if here else None)
    return _Cut([_plain(scale) for scale in scales], roles, reads, sound)


def _plain(scale: float) -> float:
    """A factor without the rounding of the dtype that it was seen in."""
    return float(round(scale)) if abs(scale - round(scale)) < 1e-3 else scale


def _with_heads(adapter: ModelAdapter, observed: Observed, component: Component) -> Component:
    """The component with its heads, if the last matrix on its way out reads as many widths as there are heads."""
    (write,) = [call for call in observed.calls if call.module is component.module]
    matrices = [
        call
        for call in observed.calls
        if call.layer == component.layer
        and call.ended <= write.ended
        and isinstance(weight := getattr(call.module, "weight", None), Tensor)
        and weight.ndim == 2
        and call.given is not None
        and call.given[:2] == (N_ROWS, N_TOKENS)
        and call.gave == (N_ROWS, N_TOKENS, adapter.d_model)
    ]
    n_heads = _n_heads(adapter, component.layer or 0)
    if not matrices or n_heads is None:
        return component
    last = max(matrices, key=lambda call: call.ended)
    if last.given is None or len(last.given) != 3 or last.given[-1] % n_heads:
        return component
    heads = Heads(last.path, last.module, n_heads)
    return replace(component, role="attention", heads=heads)


def _n_heads(adapter: ModelAdapter, layer: int) -> int | None:
    for name in _HEAD_COUNTS:
        found = getattr(adapter.config, name, None)
        found = found[layer] if isinstance(found, (list, tuple)) and layer < len(found) else found
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None
