"""What was found out about a model by trying it, for as long as what it depends on stays the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..._private.torch import writes
from ...ops.head import Head
from ..attaching import KEY, hooks_of_others, own_class
from ..sharded import of_this_process

__all__ = ["Findings"]

_PLAIN = (bool, int, float, str, bytes, type(None))
# What says nothing of logits and changes by itself.
_UNREAD = ("training", "warnings_issued")
_SETTINGS = (
    "_attn_implementation",
    "sliding_window",
    "use_sliding_window",
    "window_size",
    "attention_chunk_size",
    "rope_parameters",
    "max_position_embeddings",
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
)


class Tried(Protocol):
    """A model, as far as findings depend on it; an adapter is one."""

    hf_model: nn.Module
    layers: list[nn.Module]

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def trunk(self) -> nn.Module: ...
    @property
    def head(self) -> nn.Module | None: ...
    @property
    def unembedding(self) -> Head: ...
    @property
    def unembeds(self) -> bool: ...


class Findings(MutableMapping[str, Any]):
    """Verdicts by name; one whose model has changed since in what it depends on is not there any more.

    All depend on the model's build: its layers and what wraps them, its dtype, device, attention implementation and
    settings. Names that begin with "unembedding" also depend on the language head and the modules around the decoder
    stack: an adapter on the head that was zero when it was tried may not be so now.

    Args:
        model: whose findings they are.
        found: by name what they depended on when they were made, and the verdict.
    """

    def __init__(self, model: Tried, found: dict[str, tuple[Hashable, Any]]) -> None:
        self._model, self._found = model, found

    def _depends(self, name: str) -> Hashable:
        return _build(self._model), _way_out(self._model) if name.startswith("unembedding") else None

    def __getitem__(self, name: str) -> Any:
        depended, value = self._found[name]
        if depended != self._depends(name):
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self._found[name] = (self._depends(name), value)

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(self._found) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _build(model: Tried) -> Hashable:
    """What the form of a model's calls depends on."""
    config = model.config
    settings = tuple(repr(getattr(config, name, None)) for name in _SETTINGS)
    layers = tuple((id(layer), _wrapping(layer)) for layer in model.layers)
    return model.dtype, model.device, settings, layers, _wrapping(model.hf_model)


def _wrapping(module: nn.Module) -> Hashable:
    """What stands between a module's call and its class's forward, hooks aside."""
    return own_class(module), id(vars(module).get("forward")), id(vars(module).get("_compiled_call_impl"))


def _way_out(model: Tried) -> Hashable:
    """What the way from the final hidden state to logits depends on.

    The weights that the adapter unembeds with count by identity, since they are read anew each time; other tensors,
    which are small, by what they hold.
    """
    head = model.head
    if head is None:
        return None
    read = set()
    if model.unembeds:
        unembedding = model.unembedding
        read = {t.data_ptr() for t in (unembedding.weight, unembedding.bias) if t is not None}
    modules = [*_around(model.hf_model, model.trunk), *head.modules()]
    plain = tuple((id(m), _wrapping(m), *_attributes(m)) for m in modules)
    tensors = [
        t
        for m in modules
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None and (t.is_meta or t.data_ptr() not in read)
    ]
    return plain, hooks_of_others(head), tuple(sorted(read)), _contents(tensors)


def _around(module: nn.Module, trunk: nn.Module) -> list[nn.Module]:
    """The modules that the decoder stack is inside of, outermost first."""
    if module is trunk:
        return []
    for child in module.children():
        if child is trunk or any(m is trunk for m in child.modules()):
            return [module, *_around(child, trunk)]
    return [module]


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Attributes that are plain values or collections of such: switches of an adapter, say."""
    for name, value in vars(module).items():
        items = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list | tuple | set)
            else ()
        )
        if (
            name not in (*_UNREAD, KEY)
            and not name.endswith(("_hooks", "_hooks_with_kwargs"))
            and (isinstance(value, _PLAIN) or (items and all(isinstance(item, _PLAIN) for item in items)))
        ):
            yield name, repr(value)


def _contents(tensors: list[Tensor]) -> Hashable:
    """Identity, version and size of each: writes through ``.data`` leave the version as it is."""
    with torch.no_grad():
        norms = [
            torch.linalg.vector_norm(of_this_process(t), dtype=torch.float32)
            for t in tensors
            if t.is_floating_point() and not t.is_meta
        ]
        sizes = tuple(repr(float(n)) for n in norms)
    return tuple((id(t), writes(t)) for t in tensors), sizes
