"""Fast plain torch: every op on any device that torch serves, differentiable to any order.

A row picks its edit in one of two ways. Few edits: multiply every row by all of them and keep its own
(`_MASKED_MAX` bounds the waste). Many edits: gather each row's own table, a bounded number of rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mechanex.errors import ValidationError
from mechanex.ops.gate import NONE, NORM, RELU, SIGMOID, STEP, Gate

__all__ = [
    "bias_gradient",
    "check_rows",
    "compute_dtype",
    "many_dtype",
    "openings",
    "steer",
    "steer_many",
    "steer_many_unchecked",
    "table_gradients",
    "with_norm_of",
    "without_autocast",
]

# Up to this many edits, one matrix product with all of them beats reading a gathered table.
_MASKED_MAX = 32
# Elements of a gathered table that are alive at once.
_GATHER_ELEMENTS = 1 << 24


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


@without_autocast
def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    On the CPU a row index out of range raises; on other devices, where the check would wait for the device,
    it gives NaN rows.

    Raises:
        ValidationError: a row index is out of range (CPU).
    """
    dtype = hidden.dtype
    if rows is None and left is None and bias is not None and bias.dtype == dtype:
        # One rounding of the float32 sum, as the op promises: torch adds half types in float32.
        return hidden + bias
    wide = compute_dtype(hidden, bias, left, right)
    x = hidden.to(wide)
    if rows is None:
        y = x if bias is None else x + bias.to(wide)
        if left is not None and right is not None:
            y = torch.addmm(y, x @ right[0].to(wide).T, left[0].to(wide))
        return y.to(dtype) if y is not hidden else hidden.clone()
    table = bias if bias is not None else left
    assert table is not None, "an edit has a bias or a rank"
    n_edits = table.shape[0]
    if rows.device.type == "cpu":
        check_rows(rows, n_edits)
        index = rows.clamp(min=0)
    else:
        index = rows.clamp(min=0, max=max(n_edits - 1, 0))
    if n_edits == 0:
        return hidden.clone()
    y = x if bias is None else x + bias.to(wide).index_select(0, index)
    if left is not None and right is not None:
        y = y + _expand(_project(x, rows, index, right.to(wide)), index, left.to(wide))
    edited = torch.where((rows == -1).unsqueeze(1), hidden, y.to(dtype))
    if rows.device.type == "cpu":
        return edited
    outside = ((rows < -1) | (rows >= n_edits)).unsqueeze(1)
    return edited.masked_fill(outside, float("nan"))


def many_dtype(
    hidden: Tensor,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> torch.dtype:
    """The dtype of the arithmetic of :func:`steer_many`."""
    gates = () if gate is None else (gate.weight, gate.offset)
    return compute_dtype(hidden, strength, bias, left, right, *gates)


def steer_many(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Raises:
        ValidationError: a row index is out of range (CPU; on other devices that row becomes NaN).
    """
    if rows is not None and rows.device.type == "cpu":
        check_rows(rows, bias.shape[0])
    return steer_many_unchecked(hidden, rows, strength, bias, left, right, gate)


@without_autocast
def steer_many_unchecked(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> Tensor:
    """As :func:`steer_many`, but no value is looked at: for what traces, captures or differentiates it.

    Rows with an index out of range become NaN.
    """
    n_edits = bias.shape[0]
    wide = many_dtype(hidden, strength, bias, left, right, gate)
    if rows is None:
        rows = torch.zeros(hidden.shape[0], 1, dtype=torch.int32, device=hidden.device)
    if n_edits == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    strength, left, right = (None if t is None else t.to(wide) for t in (strength, left, right))
    bias, gate = bias.to(wide), None if gate is None else gate.to(hidden.device, wide)
    x = hidden.to(wide)
    for i in range(rows.shape[1]):
        x = _edited(x, rows[:, i], None if strength is None else strength[:, i], bias, left, right, gate)
    edited = torch.where((rows == -1).all(1, keepdim=True), hidden, x.to(hidden.dtype))
    outside = ((rows < -1) | (rows >= n_edits)).any(1, keepdim=True)
    return edited.masked_fill(outside, float("nan"))


def _edited(
    x: Tensor,
    rows: Tensor,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> Tensor:
    """One edit of each row ``[T, d]``, all of one dtype; rows without one as they are."""
    index = _index(rows, bias.shape)
    change = bias.index_select(0, index)
    if left is not None and right is not None:
        change = change + _expand(_project(x, rows, index, right), index, left)
    amount = strength
    kinds = None
    if gate is not None:
        kinds = gate.kinds.index_select(0, index)
        q = (x * gate.weight.index_select(0, index)).sum(1) + gate.offset.index_select(0, index)
        opening = openings(kinds, q)
        amount = opening if strength is None else strength * opening
    y = x + (change if amount is None else change * amount.unsqueeze(1))
    if kinds is not None:
        y = torch.where((kinds == NORM).unsqueeze(1), with_norm_of(x, y), y)
    return torch.where((rows >= 0).unsqueeze(1), y, x)


def openings(kinds: Tensor, q: Tensor) -> Tensor:
    """What gates of these kinds ``[T]`` make of ``q`` ``[T]``; NaN for an unknown kind."""
    opening = torch.where((kinds == NONE) | (kinds == NORM), 1.0, torch.full_like(q, float("nan")))
    opening = torch.where(kinds == STEP, (q > 0).to(q.dtype), opening)
    opening = torch.where(kinds == SIGMOID, q.sigmoid(), opening)
    return torch.where(kinds == RELU, q.relu(), opening)


def with_norm_of(x: Tensor, y: Tensor) -> Tensor:
    """Rows of ``y`` scaled to the norms of those of ``x``, both ``[T, d]``; zero rows stay zero."""
    before, after = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (x, y))
    none = after == 0
    return y * torch.where(none, 1.0, before / torch.where(none, 1.0, after))


@without_autocast
def bias_gradient(rows: Tensor | None, grad: Tensor, bias: Tensor) -> Tensor:
    """Gradient of :func:`steer` with respect to ``bias``: the sum of each edit's rows.

    Args:
        rows: ``[T]`` or None.
        grad: ``[T, d]``, the output's gradient.
        bias: ``[K, d]``.

    Returns:
        ``[K, d]`` in ``bias``'s dtype.
    """
    wide = compute_dtype(grad, bias)
    if rows is None:
        return grad.sum(0, keepdim=True, dtype=wide).to(bias.dtype)
    ones = bias.new_ones(grad.shape[0], 1, 1, dtype=wide)
    shape = torch.Size((bias.shape[0], 1, bias.shape[1]))
    return _accumulate(_own(rows, ones, shape), _index(rows, shape), grad.to(wide), shape)[:, 0].to(
        bias.dtype
    )


@without_autocast
def table_gradients(
    hidden: Tensor, rows: Tensor | None, left: Tensor, right: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`steer` with respect to ``left`` and ``right``.

    Args:
        hidden: ``[T, d]``.
        rows: ``[T]`` or None.
        left: ``[K, r, d]``.
        right: ``[K, r, d]``.
        grad: ``[T, d]``, the output's gradient.

    Returns:
        Two ``[K, r, d]`` tensors in the dtypes of ``left`` and ``right``.
    """
    dtypes = left.dtype, right.dtype
    wide = compute_dtype(hidden, left, right, grad)
    x, g = hidden.to(wide), grad.to(wide)
    left, right = left.to(wide), right.to(wide)
    if rows is None:
        d_left, d_right = ((x @ right[0].T).T @ g)[None], ((g @ left[0].T).T @ x)[None]
    else:
        index = _index(rows, left.shape)
        d_left = _accumulate(_project(x, rows, index, right), index, g, left.shape)
        d_right = _accumulate(_project(g, rows, index, left), index, x, right.shape)
    return d_left.to(dtypes[0]), d_right.to(dtypes[1])


def _index(rows: Tensor, shape: torch.Size) -> Tensor:
    """Row indices that are safe to gather with, whatever ``rows`` holds."""
    return rows.clamp(min=0, max=max(shape[0] - 1, 0))


def _own(rows: Tensor, coordinates: Tensor, shape: torch.Size) -> Tensor:
    """Each row's own coordinates: ``[T, K or 1, r]`` to ``[T, K·r]`` (few edits) or ``[T, r]`` (many)."""
    n_edits, rank = shape[0], coordinates.shape[2]
    if n_edits > _MASKED_MAX:
        return torch.where((rows >= 0).unsqueeze(1), coordinates[:, 0], 0.0)
    own = rows.unsqueeze(1) == torch.arange(n_edits, device=rows.device)
    return torch.where(own.unsqueeze(2), coordinates, 0.0).reshape(-1, n_edits * rank)


def _project(x: Tensor, rows: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Coordinates of each row in its own table, laid out as by :func:`_own`."""
    n_edits, rank, width = table.shape
    if n_edits <= _MASKED_MAX:
        every = x @ table.reshape(n_edits * rank, width).T
        return _own(rows, every.view(-1, n_edits, rank), table.shape)
    step = _rows_at_once(rank, width)
    parts = [
        torch.einsum("td,trd->tr", x[s : s + step], table.index_select(0, index[s : s + step]))
        for s in range(0, max(x.shape[0], 1), step)
    ]
    return _own(rows, torch.cat(parts).unsqueeze(1), table.shape)


def _expand(coordinates: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Back from coordinates to ``[T, d]``."""
    n_edits, rank, width = table.shape
    if n_edits <= _MASKED_MAX:
        return coordinates @ table.reshape(n_edits * rank, width)
    step = _rows_at_once(rank, width)
    parts = [
        torch.einsum("tr,trd->td", coordinates[s : s + step], table.index_select(0, index[s : s + step]))
        for s in range(0, max(index.shape[0], 1), step)
    ]
    return torch.cat(parts)


def _accumulate(coordinates: Tensor, index: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Sum of ``coordinate ⊗ x`` over the rows of each edit: ``[K, r, d]``."""
    n_edits, rank, width = shape
    if n_edits <= _MASKED_MAX:
        return (coordinates.T @ x).view(n_edits, rank, width)
    out = x.new_zeros(n_edits, rank, width)
    step = _rows_at_once(rank, width)
    for s in range(0, x.shape[0], step):
        outer = coordinates[s : s + step].unsqueeze(2) * x[s : s + step].unsqueeze(1)
        out = out.index_add(0, index[s : s + step], outer)
    return out


def _rows_at_once(rank: int, width: int) -> int:
    return max(1, _GATHER_ELEMENTS // max(1, rank * width))
