"""The oracle: the shortest correct code of every op, in float32 at least. Read this file first."""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.errors import ValidationError

__all__ = ["steer"]


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """Edit one row at a time: ``y = x + b + Lᵀ(R x)`` with the row's own ``b``, ``L`` and ``R``.

    Args:
        hidden: residual stream, ``[T, d]``.
        rows: edit of each row, ``[T]`` integers, -1 for none; None: edit 0 for every row.
        bias: ``[K, d]``, or None for zeros.
        left: ``[K, r, d]``, or None for rank 0.
        right: ``[K, r, d]``, given exactly when ``left`` is.

    Returns:
        ``[T, d]`` in ``hidden``'s dtype; always new memory.

    Raises:
        ValidationError: a row index is outside ``[-1, K)``.
    """
    tables = [table for table in (bias, left, right) if table is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (hidden, *tables)) else torch.float32
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for t in range(hidden.shape[0]):
        k = 0 if rows is None else int(rows[t])
        if not -1 <= k < tables[0].shape[0]:
            raise ValidationError(f"rows[{t}] is {k}, but the table holds {tables[0].shape[0]} edit(s)")
        if k == -1:
            out[t] = hidden[t]
            continue
        x = hidden[t].to(wide)
        y = x.clone()
        if bias is not None:
            y += bias[k].to(wide)
        if left is not None and right is not None:
            y += left[k].to(wide).T @ (right[k].to(wide) @ x)
        out[t] = y.to(hidden.dtype)
    return out
