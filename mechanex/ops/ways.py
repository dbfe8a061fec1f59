"""Three ways lead from an op to a backend.

Plain tensors go to the backend itself, or through :class:`torch.autograd.Function` where gradients are wanted: a
library op costs microseconds, and a decode step makes one call per layer. Compilation, export, traces of torch.jit,
tensor subclasses and dispatch modes take the library op; that is also safety, because a fake tensor has no memory to
point at. Transforms of ``torch.func`` and forward-mode differentiation see the op as plain torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from mechanex._private.torch import dispatch_modes, jit_is_tracing, transforms_are_active

__all__ = ["PLAIN", "way"]

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
"""Types of arguments that have memory to point at, or aren't there."""


def way(tensors: Iterable[Tensor | None]) -> Literal["backend", "library", "torch"]:
    """The way that these arguments of an op take."""
    if torch.compiler.is_compiling() or jit_is_tracing():
        return "library"
    if transforms_are_active():
        return "torch"
    # A generator would cost as much as the kernel of a decode step.
    if not PLAIN.issuperset(map(type, tensors)) or dispatch_modes():
        return "library"
    return "backend"
