"""A model's modules as nodes, the way of its residual stream among them, and the paths that can be patched."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ...errors import ValidationError
from ..models.adapter import ModelAdapter
from .components import Component, find_components
from .observing import N_ROWS, N_TOKENS, Call, Observed, observe

__all__ = ["Structure", "model_graph", "model_paths", "structure_of"]


@dataclass(frozen=True, eq=False)
class Structure:
    """What a model is made of.

    Attributes:
        observed: a pass over a few tokens.
        components: what writes to the residual stream, in order; none where a model has several streams.
        paths: modules whose output for each token can be patched, in the model's order.
    """

    observed: Observed
    components: list[Component]
    paths: list[str]

    def component(self, path: str) -> Component | None:
        """The component that is written by this module."""
        return next((component for component in self.components if component.path == path), None)

    def check(self, paths: Sequence[str]) -> None:
        """Refuses paths that can't be patched.

        Raises:
            ValidationError: names paths like it.
        """
        known = set(self.paths)
        for path in paths:
            if not isinstance(path, str):
                raise ValidationError(f"a module path is a text such as {self.paths[0]!r}; got {path!r}.")
            if path not in known:
                raise ValidationError(f"{path!r} {self._why_not(path)} model.get_paths() lists all.")

    def _why_not(self, path: str) -> str:
        near = difflib.get_close_matches(path, self.paths, n=3, cutoff=0.5)
        near = near or [p for p in self.paths if path and path in p][:3] or self.paths[:3]
        like = "Paths like it: " + ", ".join(near) + "."
        if any(call.path == path for call in self.observed.calls):
            return f"gives out nothing that could be patched token by token, once in a pass. {like}"
        return f"is no module of this model that a pass goes through. {like}"


def structure_of(adapter: ModelAdapter) -> Structure:
    """What a model is made of, found by running it over a few tokens; kept while the model's build stays the same."""
    if "structure" not in adapter.findings:
        adapter.findings["structure"] = _found(adapter)
    return cast(Structure, adapter.findings["structure"])


def _found(adapter: ModelAdapter) -> Structure:
    observed = observe(adapter)
    components = find_components(adapter, observed) if observed.one_stream else []
    n_calls: dict[int, int] = {}
    for call in observed.calls:
        n_calls[id(call.module)] = n_calls.get(id(call.module), 0) + 1
    once = {
        call.path: call
        for call in observed.calls
        if n_calls[id(call.module)] == 1
        and _patchable(adapter, call)
        and not _holds(call.module, adapter.head)
    }
    order = [path for path, _ in adapter.hf_model.named_modules() if path in once]
    observed.forget()
    return Structure(observed, components, order)


def _patchable(adapter: ModelAdapter, call: Call) -> bool:
    """Whether a call gives out numbers for each token that hang on the embeddings, or those themselves."""
    depends = call.node is not None or call.module is adapter.embedding
    return depends and call.by_token is not None


def _holds(module: nn.Module, inner: nn.Module | None) -> bool:
    return inner is not None and any(one is inner for one in module.modules())


def model_paths(adapter: ModelAdapter) -> list[str]:
    """The modules whose output can be patched, in the model's order."""
    return list(structure_of(adapter).paths)


def model_graph(adapter: ModelAdapter) -> list[dict[str, Any]]:
    """A model's modules as nodes, parents before their children.

    Args:
        adapter: the model.

    Returns:
        For each module a dict: ``path``; ``type``, its class; ``parameters``, those of what is inside counted too;
        ``input_shape`` and ``output_shape`` of the first tensors in and out, with ``"batch"``, ``"tokens"`` or
        ``"batch*tokens"`` for those sizes, or None where the pass showed none; ``children``, paths; ``layer``, an int
        or None; ``role`` of what writes to or reads the stream (``"embedding"``, ``"attention"``, ``"mixer"``,
        ``"mlp"``, ``"block"``, ``"unembedding"``), else None; ``reads``, the paths whose writes it reads there, or None
        without a role; ``heads``, query heads or None; ``parallel``, whether another of its layer runs beside it.
    """
    structure = structure_of(adapter)
    calls: dict[int, Call] = {}
    for call in structure.observed.calls:
        calls.setdefault(id(call.module), call)
    nodes = []
    for path, module in adapter.hf_model.named_modules():
        if not path:
            continue
        seen = calls.get(id(module))
        children = [f"{path}.{name}" for name, _ in module.named_children()]
        nodes.append(
            {
                "path": path,
                "type": type(module).__name__,
                "parameters": sum(p.numel() for p in module.parameters()),
                "input_shape": None if seen is None else _shape(seen.given),
                "output_shape": None if seen is None else _shape(seen.gave),
                "children": children,
                "layer": None if seen is None else seen.layer,
                **_stream(adapter, structure, path, module),
            }
        )
    return nodes


def _shape(shape: tuple[int, ...] | None) -> list[int | str] | None:
    if shape is None:
        return None
    if shape[:2] == (N_ROWS, N_TOKENS):
        return ["batch", "tokens", *shape[2:]]
    if shape[:1] == (N_ROWS * N_TOKENS,):
        return ["batch*tokens", *shape[1:]]
    return list(shape)


def _stream(adapter: ModelAdapter, structure: Structure, path: str, module: nn.Module) -> dict[str, Any]:
    """A node's place on the residual stream."""
    component = structure.component(path)
    found: dict[str, Any] = {"role": None, "reads": None, "heads": None, "parallel": False}
    if component is not None:
        found["role"] = component.role
        found["reads"] = [other.path for other in structure.components if component.reads(other)]
        found["heads"] = None if component.heads is None else component.heads.n_heads
        found["parallel"] = any(
            other is not component
            and other.layer == component.layer
            and not (component.reads(other) or other.reads(component))
            for other in structure.components
        )
    elif module is adapter.head:
        found["role"] = "unembedding"
        found["reads"] = [other.path for other in structure.components]
    return found
