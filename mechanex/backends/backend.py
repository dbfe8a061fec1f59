"""What a backend is: where it runs, what it lacks here, and its kernel for each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["NEGATED", "Backend", "Kernel", "is_negated"]

NEGATED = "an argument is a lazily negated view, whose memory holds other values: call resolve_neg()"
"""Why kernels that take raw pointers refuse an argument."""


def is_negated(
    first: Tensor | None,
    second: Tensor | None = None,
    third: Tensor | None = None,
    fourth: Tensor | None = None,
) -> bool:
    """Whether one of them is a lazily negated view."""
    # Spelled out: this is asked before every launch.
    return (
        (first is not None and first.is_neg())
        or (second is not None and second.is_neg())
        or (third is not None and third.is_neg())
        or (fourth is not None and fourth.is_neg())
    )


def _never(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One op of one backend.

    Attributes:
        run: computes the op; its arguments are those of :mod:`mechanex.backends.reference`, already checked.
        refuses: why it can't serve these arguments, or None.
        declines: why it leaves these arguments to plain torch under ``auto`` (torch is faster), or None.
        gradients: computes gradients that ``run`` itself can't give, or None where plain torch does.
        with_slope: as ``run``, with two more results, a row of numbers and one number for each row, whose product is
            the gradient; None: there is none.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _never
    declines: Callable[..., str | None] = _never
    gradients: Callable[..., Any] | None = None
    with_slope: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: what ``MECHANEX_BACKEND`` and ``backend=`` call it.
        summary: one line for people.
        devices: torch device types that it serves; empty for every one.
        ops: op name to kernel.
        missing: what it lacks on this machine and how to get it, or None when it runs.
        describe: what it found here, for people.
        missing_on: device type to what it lacks for that one device, where it may run without it.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    ops: Mapping[str, Kernel]
    missing: Callable[[], str | None] = _never
    describe: Callable[[], str] | None = None
    missing_on: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)

    def lacks(self, device: str) -> str | None:
        """What it lacks to serve tensors on ``device``, a torch device type, or None."""
        if self.devices and device not in self.devices:
            return f"it serves tensors on {', '.join(self.devices)}"
        return self.missing() or self.missing_on.get(device, _never)()
