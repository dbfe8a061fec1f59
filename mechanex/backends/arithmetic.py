"""The arithmetic that backends share: its dtype, the rows that it may look up, products without autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mechanex.errors import ValidationError

__all__ = ["add_wide_product", "check_rows", "compute_dtype", "wide_product", "widens", "without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast from turning the float32 products of ``function`` into half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any tensor is, float32 otherwise."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def check_rows(rows: Tensor, n_edits: int) -> None:
    """Raise :class:`ValidationError` when a value of ``rows`` is outside ``[-1, n_edits)``; a GPU waits."""
    if rows.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < -1 or high >= n_edits:
        raise ValidationError(
            f"rows has values from {low} to {high}, but the table holds {n_edits} edit(s): "
            f"give -1 (no edit) or an index from 0 to {n_edits - 1}"
        )


@functools.cache
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` on ``device`` can be had in float32, unrounded: CUDA, from torch 2.8 on."""
    if device.type != "cuda":
        return False
    left, right = (torch.ones(8, 8, dtype=dtype, device=device) for _ in range(2))
    try:
        return torch.mm(left, right, out_dtype=torch.float32).dtype is torch.float32
    except (TypeError, RuntimeError):
        return False


@functools.cache
def _in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether such products can be written and added to rows of given memory; they are tried once."""
    memory = torch.ones(8, 16, dtype=torch.float32, device=device)[:, :8]
    left, right = (torch.ones(8, 8, dtype=dtype, device=device) for _ in range(2))
    try:
        torch.mm(left, right, out_dtype=torch.float32, out=memory)
        torch.addmm(memory, left, right, out_dtype=torch.float32, alpha=0.5, out=memory)
    except (TypeError, RuntimeError):
        return False
    return bool((memory == 12).all())


def wide_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` of a half type into ``out`` in float32, where :func:`widens` says that it can be had."""
    if _in_place(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(torch.mm(left, right, out_dtype=torch.float32))


def add_wide_product(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: int) -> None:
    """``out = beta · out + alpha · left @ right``, likewise; with ``beta`` 0 whatever ``out`` holds."""
    if _in_place(left.device, left.dtype):
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
        return
    product = torch.mm(left, right, out_dtype=torch.float32).mul_(alpha)
    out.add_(product) if beta else out.copy_(product)
