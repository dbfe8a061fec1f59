"""What is kept on a model between two looks at it: it goes when the model goes, and never holds the model itself."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

__all__ = ["Kept", "keep", "kept_on"]

_KEY = "_mechanex_kept"


@dataclass(eq=False)
class Kept:
    """What adapters of one model share, of which there is one at a time.

    Args:
        layers: the decoder layers that the rest is true of.
        findings: what :mod:`mechanex.engine.capabilities` found out, and what each depends on; read through
            :class:`mechanex.engine.capabilities.findings.Findings`.
        tokenizer: the model's tokenizer, or None.
        model_id: its name or path.
        override: the user's dotted path of the decoder layers.
        following: who follows the model's calls, if someone does.
        applied: plans that steer the model now (``mechanex.engine.hooks.Applied``), in order.
        step: what an idle decoder has left for the next one (``mechanex.engine.decode.static_step.StaticStep``), or
            None.
        scorings: what scored behaviors lately (``mechanex.engine.sae.scorings.Scorings``), or None.
        grammars: what compiles grammars for a tokenizer, with that one; or None.
    """

    layers: list[nn.Module] = field(default_factory=list)
    findings: dict[str, tuple[Hashable, Any]] = field(default_factory=dict)
    tokenizer: Any = None
    model_id: str = ""
    override: str | None = None
    following: Any = None
    applied: list[Any] = field(default_factory=list)
    step: Any = None
    scorings: Any = None
    grammars: Any = None
    owner: weakref.ref[nn.Module] | None = None
    adapter: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled or copied model goes without it.
        return (type(None), ())


class HasKept(Protocol):
    """An adapter, as far as its model keeps it."""

    kept: Kept


def kept_on(model: nn.Module) -> Kept | None:
    """What is kept on this very model, not on one that it is a copy of."""
    found = model.__dict__.get(_KEY)
    return found if isinstance(found, Kept) and found.owner is not None and found.owner() is model else None


def keep(model: nn.Module, adapter: HasKept) -> None:
    """Keeps an adapter's knowledge on its model, and the adapter itself for as long as somebody has it."""
    adapter.kept.owner, adapter.kept.adapter = weakref.ref(model), weakref.ref(adapter)
    model.__dict__[_KEY] = adapter.kept
