"""The registry of backends: who computes the ops, which of them run here, and why the others don't.

``MECHANEX_BACKEND=auto|eager|native|triton|clusters`` chooses for the process, :func:`use` in code. ``auto`` takes the
first backend of the device's list that runs here and may fall back, logging once why; an explicit choice
never falls back: it raises, naming what is missing and how to get it.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mechanex.errors import MechanexError, ValidationError

from . import eager, native, reference, triton
from .backend import Backend, Kernel

__all__ = [
    "Backend",
    "Kernel",
    "active",
    "backends",
    "direct_steer",
    "get",
    "gradients",
    "kernel",
    "prefers_torch",
    "select",
    "selection",
    "use",
]

_LOG = logging.getLogger(__name__)


_REGISTRY = {
    b.name: b
    for b in (
        reference.BACKEND,
        eager.BACKEND,
        native.BACKEND,
        triton.BACKEND,
        native.clusters.BACKEND,
    )
}

# What `auto` tries on a device, first to last; eager ends every list.
_AUTO = {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")}
# Up to this many numbers a GPU is done with an edit before the next launch can be ready, so that the way with the
# cheaper launch is the quicker one. An H100 moves as many in bfloat16 in 5 µs; a native launch was seen to cost 17 to
# 19, one through Triton's look-up 53 to 57.
LAUNCH_BOUND = 1 << 22
# Up to this many numbers of a half type native is the quicker way for one edit that serves every row. With rank 1 a
# call took 30 µs natively and 49 by triton at [4096, 4096] (28 and 29 in a graph), and 51 and 48 to 51 at [8192, 4096].
ONE_EDIT_BOUND = 1 << 24
_BY_SIZE = ("steer", "steer_many")
# What edits larger hidden states on a GPU. Shares of a copy of the same bytes on an H100, [8192, 4096], native beside
# triton (benchmarks/gpu/steer.py prints them and what `auto` takes at every size):
#   bfloat16  add .97 .95 · rank 1 .90 .98 · rank 4 .82 .58 (float32 edits .70 .52) · 16 edits of rank 1 by row .78 .63
#   float32   rank 4 .73 .80
_LARGE = (
    "native, but triton for one edit of rank 1 for every row, and of any rank for float32 rows",
    "steer_many: triton",
)
# Above this rank one edit on a GPU is two matrix products; the usual way decides.
_DIRECT_RANK = 16

_setting: str | None = None


def backends() -> tuple[Backend, ...]:
    """Every registered backend, whether it runs here or not."""
    return tuple(_REGISTRY.values())


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValidationError: no such backend; the message lists those registered.
    """
    try:
        return _REGISTRY[name]
    except (KeyError, TypeError):
        known = ", ".join(f"{b.name} ({', '.join(b.devices) or 'any device'})" for b in _REGISTRY.values())
        raise ValidationError(f"unknown backend {name!r}: choose auto or one of {known}") from None


def active() -> str:
    """The choice in force: ``"auto"`` or a backend's name.

    Raises:
        ValidationError: ``MECHANEX_BACKEND`` names no backend.
    """
    global _setting
    if _setting is None:
        name = os.environ.get("MECHANEX_BACKEND", "").strip().lower() or "auto"
        if name != "auto":
            get(name)
        _setting = name
    return _setting


class use:
    """Choose the backend of the whole process, for good or for a ``with`` block.

    ``use("eager")`` sets it; ``with use("eager"):`` sets it and puts the former choice back at the end.

    Args:
        name: ``"auto"`` or a registered backend.

    Raises:
        ValidationError: no such backend.
        MechanexError: the backend can't run here; the message says what is missing and how to get it.
    """

    def __init__(self, name: str) -> None:
        global _setting
        if name != "auto":
            _require(get(name))
        self._former = _setting
        _setting = name

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _setting
        _setting = self._former


def selection() -> str:
    """What ``auto`` takes on each device, first to last, and what it leaves to plain torch; for people."""
    lines = [f"{device}: {', '.join(names)}" for device, names in _AUTO.items()]
    lines += [
        f"cuda, steer of hidden states of at most {LAUNCH_BOUND} numbers: native, triton, eager",
        f"cuda, steer of larger ones: {'; '.join(_LARGE)}",
        f"cuda, one edit of a half type of at most {ONE_EDIT_BOUND} numbers: native, triton, eager",
        "other devices: eager",
        "one vector for every row, in hidden's own dtype: a plain torch addition",
        f"one edit on a CPU, of rank above {native.TORCH_RANK}, or on one row with factors of more than "
        f"{native.TORCH_TABLE} numbers: eager",
        "completion_logprob: no size is left to eager; whole logits and torch.log_softmax save tens of microseconds a "
        "call up to about 2^18 logits, and lose the digits of 1 − p",
        f"sae_features and sae_top_features: eager from {triton.TORCH_ROWS} rows on a GPU, and on a CPU from "
        + ", ".join(f"{n} ({str(t).removeprefix('torch.')})" for t, n in native.TORCH_ROWS.items()),
    ]
    return "\n".join(lines)


def prefers_torch() -> bool:
    """Whether plain torch may serve whatever it serves best: the choice in force is ``auto`` or ``eager``."""
    return (_setting or active()) in ("auto", "eager")


def kernel(op: str, name: str | None, tensor: Tensor, *rest: Any) -> Callable[..., Tensor]:
    """The function that computes ``op``, one with a single result: ``run`` of what :func:`select` gives."""
    return _select(op, name, True, (tensor, *rest)).run


def gradients(
    op: str, name: str | None, tensor: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """What computes the gradients of ``op`` on the backend of these arguments; None: plain torch.

    Args and raises as for :func:`select`.
    """
    return _select(op, name, False, (tensor, *rest)).gradients


def select(op: str, name: str | None, tensor: Tensor, *rest: Any) -> Kernel:
    """The kernel of ``op`` for these arguments.

    Args:
        op: name of the op.
        name: backend asked for by the caller, ``"auto"``, or None for the choice in force.
        tensor: the op's first argument; its device and dtype decide.
        rest: the op's other arguments, since what is fastest depends on them too.

    Raises:
        ValidationError: no such backend, or an explicitly chosen one that does not serve these arguments.
        MechanexError: an explicitly chosen backend can't run here.
    """
    return _select(op, name, True, (tensor, *rest))


def _select(op: str, name: str | None, by_size: bool, args: tuple[Any, ...]) -> Kernel:
    """As :func:`select`; the size of a call counts where asked for: gradients keep to the kernels that repeat bits."""
    chosen, tensor = name or _setting or active(), args[0]
    if chosen == "auto":
        if tensor.is_cuda and by_size and op in _BY_SIZE and _is_native_quicker(op, tensor, args[1], args[3]):
            quick = _native(op)
            if quick and quick.refuses(*args) is None and quick.declines(*args) is None:
                return quick
        for candidate in _candidates(op, "cpu" if tensor.is_cpu else tensor.device.type):
            if candidate.refuses(*args) is None and candidate.declines(*args) is None:
                return candidate
        return _REGISTRY["eager"].ops[op]
    backend = get(chosen)
    _require(backend)
    if op not in backend.ops:
        raise MechanexError(f"backend {chosen!r} has no {op} op in this version: choose auto or eager")
    device = tensor.device.type
    if backend.devices and device not in backend.devices:
        raise ValidationError(
            f"backend {chosen!r} serves tensors on {', '.join(backend.devices)}, got one on {device}: "
            "move the tensor, or choose auto or eager"
        )
    reason = backend.lacks(device)
    if reason is not None:
        raise MechanexError(f"backend {chosen!r} can't run on {device} here: {reason}")
    found = backend.ops[op]
    reason = found.refuses(*args)
    if reason is not None:
        raise ValidationError(f"backend {chosen!r} can't compute this {op}: {reason}; choose auto or eager")
    return found


def direct_steer(
    name: str | None,
    hidden: Tensor,
    rows: Tensor | None,
    left: Tensor | None,
    strength: Tensor | None = None,
) -> Callable[..., Tensor | None] | None:
    """What may edit these plain tensors as they are given, unchecked; it gives None for what it doesn't take.

    Args:
        name: as for :func:`select`.
        hidden, rows, left, strength: the op's arguments.
    """
    chosen, on_gpu = name or _setting or active(), _is_on_gpu(hidden)
    if chosen == "auto":
        if left is not None:
            most = _DIRECT_RANK if on_gpu else native.TORCH_RANK
            if not isinstance(left, Tensor) or len(shape := left.shape) != 3 or shape[1] > most:
                return None
            if not on_gpu and left.numel() > native.TORCH_TABLE:
                return None
        op = "steer" if strength is None else "steer_many"
        if not on_gpu or _is_native_quicker(op, hidden, rows, left):
            found = native.direct("cuda" if on_gpu else "cpu")
            if found is not None or not on_gpu:
                return found
        return triton.direct()
    if chosen == "native":
        return native.direct("cuda" if on_gpu else "cpu")
    return triton.direct() if chosen == "triton" and on_gpu else None


_is_on_gpu = operator.attrgetter("is_cuda")


def _is_native_quicker(op: str, hidden: Tensor, rows: Tensor | None, left: Tensor | None) -> bool:
    """Whether the compiled kernel is the quicker one on a GPU, as was measured (see above)."""
    numbers = hidden.numel()
    if numbers <= LAUNCH_BOUND:
        return True
    if op != "steer":
        return False
    if numbers <= ONE_EDIT_BOUND and hidden.dtype.itemsize == 2:
        return True
    one_edit = rows is None and left is not None
    return not one_edit or (left is not None and left.shape[1] > 1 and hidden.dtype is not torch.float32)


@functools.cache
def _native(op: str) -> Kernel | None:
    """The compiled kernel of an op on a GPU, if it can run. Trying Triton takes seconds."""
    backend = _REGISTRY["native"]
    return backend.ops.get(op) if backend.lacks("cuda") is None else None


@functools.cache
def _candidates(op: str, device: str) -> tuple[Kernel, ...]:
    found: list[Kernel] = []
    reasons: list[str] = []
    first = "plain torch"
    for name in _AUTO.get(device, ("eager",)):
        backend = _REGISTRY[name]
        reason = backend.lacks(device)
        if reason is not None:
            reasons += [] if found else [reason]
            continue
        if op not in backend.ops:
            continue
        if not found and name != "eager":
            first = name
        found.append(backend.ops[op])
    if reasons:
        _LOG.warning("%s on %s falls back to %s: %s", op, device, first, "; ".join(reasons))
    return tuple(found)


def _require(backend: Backend) -> None:
    reason = backend.missing()
    if reason is not None:
        raise MechanexError(f"backend {backend.name!r} can't run here: {reason}")
