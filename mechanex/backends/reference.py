"""The oracle: the shortest correct code of every op, in float32 at least. Read this file first."""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.errors import ValidationError
from mechanex.ops.edits import StackedEdits
from mechanex.ops.encoder import FeatureEncoder
from mechanex.ops.gate import KINDS
from mechanex.ops.head import Head

from .backend import Backend, Kernel

__all__ = [
    "BACKEND",
    "completion_logprob",
    "completion_logprob_gradients",
    "sae_features",
    "sae_top_features",
    "steer",
    "steer_many",
]


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


def steer_many(hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits) -> Tensor:
    """Edit one row at a time, one edit after another: ``x ← x + s · a(w·x + c) · (b + Lᵀ(R x))``.

    Args:
        hidden: residual stream, ``[T, d]``.
        rows: edits of each row in order, ``[T, m]`` integers, -1 for none; None: edit 0 for every row, m = 1.
        strength: s, ``[T, m]``; None: 1.
        edits: the table of K edits.

    Returns:
        ``[T, d]`` in ``hidden``'s dtype, rounded once; always new memory. A row without any edit is copied.

    Raises:
        ValidationError: a row index is outside ``[-1, K)``.
    """
    bias, left, right, gate = edits
    wide = edits.dtype_for(hidden, strength)
    out = []
    for t in range(hidden.shape[0]):
        chain = [0] if rows is None else rows[t].tolist()
        x = hidden[t].to(wide)
        for i, k in enumerate(chain):
            if not -1 <= k < bias.shape[0]:
                raise ValidationError(f"rows[{t}, {i}] is {k}, but the table holds {bias.shape[0]} edit(s)")
            if k == -1:
                continue
            change = bias[k].to(wide)
            if left is not None and right is not None:
                change = change + left[k].to(wide).T @ (right[k].to(wide) @ x)
            code = 0 if gate is None else int(gate.kinds[k])
            kind = KINDS[code] if 0 <= code < len(KINDS) else "unknown"
            amount = x.new_ones(()) if strength is None else strength[t, i].to(wide)
            if gate is not None and kind not in ("none", "norm"):
                q = gate.weight[k].to(wide) @ x + gate.offset[k].to(wide)
                openings = {"step": (q > 0).to(wide), "sigmoid": q.sigmoid(), "relu": q.relu()}
                amount = amount * openings.get(kind, float("nan"))
            y = x + amount * change
            if kind == "norm" and y.norm() > 0:
                y = y * (x.norm() / y.norm())
            x = y
        out.append(hidden[t] if all(k == -1 for k in chain) else x.to(hidden.dtype))
    return torch.stack(out) if out else torch.empty_like(hidden, memory_format=torch.contiguous_format)


def completion_logprob(hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target: ``z_t − log Σ_v exp z_v`` with ``z = coldness·cap(scale·(Wh + bias))``.

    Args:
        hidden: ``[N, d]``.
        head: W ``[V, d]``, bias, scale, ``cap(z) = softcap·tanh(z/softcap)`` (without softcap: no cap) and coldness.
        target: ``[N]`` int64.

    Returns:
        The log-probabilities and the log-sum-exps, ``[N]`` each, float32 (float64 for float64).

    Raises:
        ValidationError: a target is outside ``[0, V)``.
    """
    n_vocab = head.weight.shape[0]
    for n, t in enumerate(target.tolist()):
        if not 0 <= t < n_vocab:
            raise ValidationError(f"target[{n}] is {t}, but the vocabulary holds {n_vocab} token(s)")
    z, _ = _logits(hidden, head)
    return torch.log_softmax(z, 1).gather(1, target.unsqueeze(1)).squeeze(1), torch.logsumexp(z, 1)


def completion_logprob_gradients(
    grad: Tensor, hidden: Tensor, head: Head, target: Tensor, lse: Tensor
) -> Tensor:
    """Gradient of :func:`completion_logprob` for ``hidden``: ``onehot − p`` through the logits' derivatives."""
    z, slope = _logits(hidden, head)
    d_z = torch.nn.functional.one_hot(target, head.weight.shape[0]) - torch.softmax(z, 1)
    return ((grad.unsqueeze(1) * d_z * slope) @ head.weight.to(z.dtype)).to(hidden.dtype)


def _logits(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The logits that are compared, ``[N, V]``, and their derivatives for the products ``Wh``."""
    weight, bias, scale, softcap, coldness = head
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        z = z + bias.to(wide)
    z = scale * z
    if softcap is None:
        return coldness * z, torch.full_like(z, scale * coldness)
    return coldness * softcap * torch.tanh(z / softcap), scale * coldness * (1 - torch.tanh(z / softcap) ** 2)


def sae_features(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    """What each feature says of each row: ``relu(gain·p + offset)`` where ``p + bias > threshold``; ``p = scale·(Ex)``.

    Args:
        hidden: ``[T, d]``.
        encoder: of F features; its norms are not read.

    Returns:
        ``[T, F]`` float32 (float64 where ``hidden`` or the encoder is).
    """
    p = _products(hidden, encoder)
    z = p + encoder.bias.to(p)
    said = z
    if encoder.gain is not None and encoder.offset is not None:
        said = encoder.gain.to(p) * p + encoder.offset.to(p)
    level = 0.0 if encoder.threshold is None else encoder.threshold.to(p)
    return torch.where(z > level, said.relu(), torch.where(torch.isnan(z), torch.nan, 0.0).to(p))


def sae_top_features(hidden: Tensor, encoder: FeatureEncoder, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The k largest of ``z = (p + bias)·norms`` in every row, not below 0, or by size with their signs.

    Args:
        hidden, encoder: as for :func:`sae_features`; threshold, gain and offset are not read.
        k: how many.
        signed: keep those of largest size, with their signs.

    Returns:
        Values ``[T, k]``, largest first, and their features, int64; of equal ones the first.
    """
    p = _products(hidden, encoder)
    z = p + encoder.bias.to(p)
    z = z if encoder.norms is None else z * encoder.norms.to(z)
    places = torch.sort(z.abs() if signed else z, dim=1, descending=True, stable=True).indices[:, :k]
    values = z.gather(1, places)
    return values if signed else values.relu(), places


def _products(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    wide = torch.float64 if torch.float64 in (hidden.dtype, encoder.weight.dtype) else torch.float32
    products = hidden.to(wide) @ encoder.weight.to(wide).T
    return products if encoder.scale is None else products * encoder.scale.to(wide)


BACKEND = Backend(
    "reference",
    "the oracle of the tests; slow",
    (),
    {
        "steer": Kernel(steer),
        "steer_many": Kernel(steer_many),
        "completion_logprob": Kernel(completion_logprob, gradients=completion_logprob_gradients),
        "sae_features": Kernel(sae_features),
        "sae_top_features": Kernel(sae_top_features),
    },
)
