"""Calling a model to decode: with a cache of its own making, at stated positions, unembedding what is wanted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..attaching import before
from ..caches import is_cache
from ..models.adapter import Handles, ModelAdapter
from ..positions import Positions, given_positions
from ..regimes import text_lengths

__all__ = ["TOGETHER", "CallForm", "Calls", "Carried", "StepInputs"]

CallForm = Literal["static", "rolling", "unmasked", "masked", "reread"]
"""How a model is called for decoding.

static: rows come and go; every step is over the same tensors, so that a CUDA graph can be captured of it.
rolling: rows come and go; they are padded and masked.
unmasked, masked: one row, going on from the cache that the model made, without a mask or with one.
reread: one row, without a cache: every step reads all of it.
"""

TOGETHER: tuple[CallForm, ...] = ("static", "rolling")
"""The forms in which rows come and go."""

Carried = Mapping[str, Any]
"""What a model returned to be given in its next call, by the names of its arguments: its cache, under whatever name."""


@dataclass
class StepInputs:
    """One call over the rows of a batch; the tensors are what a captured graph would own.

    Args:
        ids: [rows, columns] token ids.
        mask: [rows, past + columns] int64, 0 for padding; for a static step what the model takes in its place.
        positions: [rows, columns] int64 absolute positions, 0 for padding.
        stated: the same for whoever selects tokens.
        text_lengths: [rows, 1] int64 tokens of the rows' whole texts where the call is only a part of them, else None.
    """

    ids: Tensor
    mask: Tensor | dict[str, Tensor]
    positions: Tensor
    stated: Positions
    text_lengths: Tensor | None = None


class Calls:
    """Runs a model's forward for decoding; ``detach`` takes off what it has attached to the model.

    Args:
        adapter: the model; in eval mode, without gradients, and nobody else's while it is called.
        form: how it takes its calls.
    """

    def __init__(self, adapter: ModelAdapter, form: CallForm) -> None:
        self._adapter, self._form = adapter, form
        self._model: Any = adapter.hf_model
        self._accepts = _Names.of(adapter)
        self._handles = Handles()
        self.attached = False
        """Whether it has a hook on the model now."""
        self._last = 0

    def __call__(self, inputs: StepInputs, kept: Carried | None, last: int) -> tuple[Tensor, Carried]:
        """The logits [rows, last, vocabulary] of the last columns, and what to give to the next call.

        Args:
            inputs: the call's tokens.
            kept: from the call before; None for the first one, in which the model makes its own cache.
            last: of how many columns the logits are wanted.
        """
        named: dict[str, Any] = {"input_ids": inputs.ids, **(kept or {})}
        if "attention_mask" in self._accepts and self._form != "unmasked":
            named["attention_mask"] = inputs.mask
        if "position_ids" in self._accepts:
            named["position_ids"] = inputs.positions
        self._attach()
        self._last = last
        try:
            with given_positions(inputs.stated), text_lengths(inputs.text_lengths):
                found = self._model(**named, use_cache=self._form != "reread", return_dict=True)
        finally:
            self._last = 0
        logits: Tensor = found.logits
        if logits.ndim == 2:
            logits = logits.view(inputs.ids.shape[0], -1, logits.shape[-1])
        if self._form == "reread":
            return logits[:, -last:], {}
        same = kept and all(map(is_cache, kept.values()))
        return logits[:, -last:], kept if kept and same else self._kept(found)

    def detach(self) -> None:
        """Leaves the model as it was."""
        self._handles.remove()
        self.attached = False

    def _kept(self, found: Any) -> Carried:
        """What the model gave back under names of its own arguments: its cache alone where there is one."""
        fields = found.items() if isinstance(found, Mapping) else vars(found).items()
        given = {name: value for name, value in fields if name in self._accepts and value is not None}
        caches = {name: value for name, value in given.items() if is_cache(value)}
        return caches or given

    def _attach(self) -> None:
        if self.attached:
            return
        self.attached = True
        head = self._adapter.head
        if head is not None:
            self._handles.add(before(head, self._narrow))

    def _narrow(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the unembedding the wanted columns only, one after another in memory.

        Of a slice with gaps torch's linear copies frozen weights for every row.
        """
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if not self._last or not isinstance(hidden, Tensor):
            return None
        if hidden.ndim == 3:
            hidden = hidden[:, -self._last :]
        hidden = hidden.contiguous()
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): hidden})


class _Names(frozenset[str]):
    """Names of the arguments that a model's forward takes, also those that a wrapper hands on by ``**kwargs``.

    Where none is named, any may be one.
    """

    @classmethod
    def of(cls, adapter: ModelAdapter) -> _Names:
        names: set[str] = set()
        module: nn.Module | None = adapter.hf_model
        while module is not None:
            parameters = inspect.signature(module.forward).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
            module = _inside(module, adapter) if hands_on else None
        return cls(names)

    def __contains__(self, name: object) -> bool:
        return not self or super().__contains__(name)


def _inside(module: nn.Module, adapter: ModelAdapter) -> nn.Module | None:
    """The child that holds both the decoder stack and the language head, if one does."""
    head, trunk = adapter.head, adapter.trunk
    for child in module.children():
        if child is not trunk and head is not None:
            within = set(child.modules())
            if head in within and trunk in within:
                return child
    return None
