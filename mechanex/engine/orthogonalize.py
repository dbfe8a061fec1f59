"""A direction taken out of all that a model writes to its residual stream: by hooks while it runs, or in its weights.

(Arditi et al., arXiv:2406.11717, sections 2.4 and 4.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ValidationError
from .attaching import after
from .hooks import Intervention, SteeringPlan, attach, listed
from .intervention import Edit, EditTable, widest
from .models import adapter_for
from .models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from .sharded import check_whole
from .stream import given_out, with_given_out
from .structure.graph import structure_of
from .vectors import SteeringVector

__all__ = ["ablate_everywhere", "orthogonalize", "put_back"]

# How far the weights may be from doing what the ablation does: of what that changes in the logits, and in roundings.
_CLOSE, _ROUNDINGS = 0.01, 16
# How much of the direction a write may have left, of the products that its share is the sum of: so many roundings.
_LEFT, _LEAST_LEFT = 4, 1e-4


def ablate_everywhere(model: nn.Module | ModelAdapter, vector: SteeringVector) -> Handles:
    """Takes the vector's direction out of the stream wherever it is read, until the handle is removed.

    That is at every site, the stream that leaves the last block included, and in what attention and MLPs write within a
    block.

    Args:
        model: a Hugging Face or TransformerLens model.
        vector: of one layer; its direction is taken out at all of them.

    Raises:
        ValidationError: a vector of several layers, of another width, or zero.
    """
    adapter = adapter_for(model)
    check_whole(adapter.hf_model, "A direction can't be ablated everywhere in the layers")
    direction = _direction(adapter, vector)
    sites = [Intervention(layer, Edit.ablate(direction)) for layer in range(adapter.n_layers + 1)]
    handles = SteeringPlan(sites).apply(adapter)

    def within() -> Handles:
        inside = Handles()
        for module in _writers(adapter):
            inside.add(after(module, _without(EditTable([Edit.ablate(direction)]))))
        return inside

    handles.add(listed(adapter, within))
    return handles


def orthogonalize(model: nn.Module | ModelAdapter, vector: SteeringVector) -> Handles:
    """Takes the vector's direction out of every weight that writes to the stream; the same as ``ablate_everywhere``.

    Embeddings that the head shares become its own. The result is compared with the ablation on a few tokens.

    Args:
        model: a Hugging Face or TransformerLens model, changed in place.
        vector: of one layer.

    Returns:
        A handle; ``remove()`` puts the weights back as they were.

    Raises:
        ValidationError: a vector of several layers, of another width, or zero; or a model of which this isn't the
            same, as where a norm follows what is written. Its weights are then as before.
    """
    adapter = adapter_for(model)
    check_whole(adapter.hf_model, "Weights can't be made orthogonal")
    direction = _direction(adapter, vector)
    plain = _logits(adapter)
    with ablate_everywhere(adapter, vector):
        ablated = _logits(adapter)
    change = _Change(adapter, direction)
    handles = Handles()
    handles.add(change)
    try:
        change.make()
        eps = torch.finfo(adapter.dtype).eps
        left: list[float] = []
        with _looking(adapter, direction, left):
            found = _logits(adapter)
        off, moved = (found - ablated).norm(), (ablated - plain).norm()
        close = float(off) <= _CLOSE * float(moved) + _ROUNDINGS * eps * float(plain.norm())
        # The logits of a narrow dtype are too coarse to show what is left; each write by itself isn't.
        if not (close and max(left) <= max(_LEFT * eps, _LEAST_LEFT)):
            raise ValidationError(
                f"orthogonal weights don't do in {adapter.model_id} what the ablation does (a norm or a scale may "
                "follow what its parts write, or their weights are of another kind): use ablate_everywhere."
            )
    except BaseException:
        handles.remove()
        raise
    return handles


def put_back(adapter: ModelAdapter) -> None:
    """Puts the weights of a model back as they were before anything was taken out of them."""
    for one in reversed(_CHANGES.pop(adapter.model, [])):
        one.put_back()


class _Change:
    """A direction that is taken out of a model's weights, and how they were before.

    Args:
        adapter: whose weights.
        direction: [d_model].
    """

    def __init__(self, adapter: ModelAdapter, direction: Tensor) -> None:
        self._model, self._direction = ref(adapter.model), direction
        self._steps: list[Callable[[], object]] = []

    def make(self) -> None:
        """Takes the direction out."""
        model = self._model()
        if model is None:
            return
        adapter = adapter_for(model)
        _CHANGES.setdefault(model, []).append(self)
        with exclusive(adapter), torch.no_grad():
            _untie(adapter, self)
            for weight, along in _written(adapter):
                self.keep(weight)
                weight.copy_(_projected(weight, self._direction, along))

    def keep(self, weight: Tensor) -> None:
        before = weight.detach().clone()
        self._steps.append(lambda: weight.detach().copy_(before))

    def later(self, step: Callable[[], object]) -> None:
        self._steps.append(step)

    def remove(self) -> None:
        """Puts the weights back; directions that were taken out later are taken out of those again."""
        model = self._model()
        made = _CHANGES.get(model, []) if model is not None else []
        if self not in made:
            return
        later = made[made.index(self) + 1 :]
        for one in (*reversed(later), self):
            one.put_back()
            made.remove(one)
        for one in later:
            one.make()

    def put_back(self) -> None:
        """Writes what was there before, latest first."""
        with torch.no_grad():
            while self._steps:
                self._steps.pop()()


_CHANGES: WeakKeyDictionary[nn.Module, list[_Change]] = WeakKeyDictionary()
"""What was taken out of each model's weights, in order."""


def _direction(adapter: ModelAdapter, vector: SteeringVector) -> Tensor:
    if len(vector) != 1:
        raise ValidationError(
            f"one direction is taken out everywhere, and the vector has {len(vector)}: choose a layer, such as "
            f"vector.restricted([{vector.layers[0]}])."
        )
    vector.plan(adapter)  # checks the width and the family
    return vector[vector.layers[0]]


def _writers(adapter: ModelAdapter) -> list[nn.Module]:
    """What writes to the stream within the layers, as far as it is known."""
    components = structure_of(adapter).components
    return [one.module for one in components if one.role not in ("embedding", "block")]


def _without(table: EditTable) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        given = given_out(output)
        return None if given is None else with_given_out(table.apply(given), output)

    return hook


@contextmanager
def _looking(adapter: ModelAdapter, direction: Tensor, left: list[float]) -> Iterator[None]:
    """A block in which is noted how much of the direction each write has, and the stream at each site."""

    def look(hidden: Tensor) -> None:
        wide = hidden.detach().to(widest(hidden.device))
        products = wide * direction.to(wide)
        left.append(float(products.sum(-1).norm() / products.norm().clamp(min=torch.finfo(wide.dtype).tiny)))

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        given = given_out(output)
        if given is not None:
            look(given)

    with Handles() as handles:
        handles.add(attach(adapter, [(layer, look) for layer in range(adapter.n_layers + 1)]))
        for module in _writers(adapter):
            handles.add(after(module, hook))
        yield


def _written(adapter: ModelAdapter) -> list[tuple[Tensor, int]]:
    """Weights whose products are written to the stream, and their dimension of d_model; biases too."""
    structure = structure_of(adapter)
    found: dict[int, tuple[Tensor, int]] = {}
    head = adapter.head
    for module in adapter.hf_model.modules():
        if (
            isinstance(module, nn.Embedding)
            and module is not head
            and module.embedding_dim == adapter.d_model
        ):
            found[id(module.weight)] = (module.weight, 1)
    for component in structure.components:
        if component.role in ("embedding", "block"):
            continue
        inside = [
            call
            for call in structure.observed.calls
            if (call.path == component.path or call.path.startswith(component.path + "."))
            and not list(call.module.children())
            and isinstance(getattr(call.module, "weight", None), Tensor)
            and call.module.weight.ndim == 2
        ]
        if not inside:
            continue
        last: Any = max(inside, key=lambda call: call.ended).module
        # nn.Linear has [out, in], GPT-2's Conv1D [in, out].
        found[id(last.weight)] = (last.weight, 1 if isinstance(last, Conv1D) else 0)
        if isinstance(getattr(last, "bias", None), Tensor):
            found[id(last.bias)] = (last.bias, 0)
    return [one for one in found.values() if one[0].shape[one[1]] == adapter.d_model]


def _projected(weight: Tensor, direction: Tensor, along: int) -> Tensor:
    wide = weight.detach().to(widest(weight.device))
    v = direction.to(wide)
    v = v / v.norm()
    if along == 0:
        kept: Tensor = wide - torch.tensordot(v, v @ wide, 0)
    else:
        kept = wide - torch.outer(wide @ v, v)
    return kept.to(weight.dtype)


def _untie(adapter: ModelAdapter, undo: _Change) -> None:
    """Gives the head weights of its own, where it shares those of the embeddings."""
    head: Any = adapter.head
    shared: Any = getattr(head, "weight", None)
    is_tied = shared is getattr(adapter.embedding, "weight", None)
    if shared is None or not is_tied:
        return
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    undo.later(lambda: setattr(head, "weight", shared))
    whole: Any = adapter.hf_model.config  # what reads images too has a text model's inside its own
    configs = {id(one): one for one in (whole, adapter.config)}.values()
    for config in configs:
        tied = getattr(config, "tie_word_embeddings", None)
        if tied is not None:
            config.tie_word_embeddings = False
            undo.later(partial(setattr, config, "tie_word_embeddings", tied))


def _logits(adapter: ModelAdapter) -> Tensor:
    vocabulary = int(getattr(adapter.config, "vocab_size", 97))
    ids = (torch.arange(16) * 7 % min(vocabulary, 97)).reshape(2, 8).to(adapter.device)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        logits: Tensor = adapter.call(input_ids=ids).logits
        return logits.double().cpu()
