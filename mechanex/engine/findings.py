"""What was found out about a model by trying it, for as long as what it depends on stays the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._private.torch import writes
from .attaching import KEY, hooks_of_others, own_class

if TYPE_CHECKING:
    from .models.adapter import ModelAdapter

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


class Findings(MutableMapping[str, Any]):
    """Verdicts by name; one whose model has changed since in what it depends on is not there any more.

    All depend on the model's build: its layers and what wraps them, its dtype, device, attention implementation and
    settings. Names that begin with "unembedding" also depend on the language head and the modules around the decoder
    stack: an adapter on the head that was zero when it was tried may not be so now.

    Args:
        adapter: whose findings they are.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter, self._found = adapter, adapter.kept.findings

    def _depends(self, name: str) -> Hashable:
        adapter = self._adapter
        return _build(adapter), _way_out(adapter) if name.startswith("unembedding") else None

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


def _build(adapter: ModelAdapter) -> Hashable:
    """What the form of a model's calls depends on."""
    config = adapter.config
    settings = tuple(repr(getattr(config, name, None)) for name in _SETTINGS)
    layers = tuple((id(layer), _wrapping(layer)) for layer in adapter.layers)
    return adapter.dtype, adapter.device, settings, layers, _wrapping(adapter.hf_model)


def _wrapping(module: nn.Module) -> Hashable:
    """What stands between a module's call and its class's forward, hooks aside."""
    return own_class(module), id(vars(module).get("forward")), id(vars(module).get("_compiled_call_impl"))


def _way_out(adapter: ModelAdapter) -> Hashable:
    """What the way from the final hidden state to logits depends on.

    The weights that the adapter unembeds with count by identity, since they are read anew each time; other tensors,
    which are small, by what they hold.
    """
    head = adapter.head
    if head is None:
        return None
    unembedding = adapter.unembedding
    read = {t.data_ptr() for t in (unembedding.weight, unembedding.bias) if t is not None and not t.is_meta}
    modules = [*_around(adapter.hf_model, adapter.trunk), *head.modules()]
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
            torch.linalg.vector_norm(t, dtype=torch.float32)
            for t in tensors
            if t.is_floating_point() and not t.is_meta
        ]
        sizes = tuple(repr(float(n)) for n in norms)
    return tuple((id(t), writes(t)) for t in tensors), sizes
