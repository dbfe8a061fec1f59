"""Fast plain torch: every op on any device that torch serves; edits are differentiable to any order.

A row picks its edit in one of two ways. Few edits: multiply every row by all of them and keep its own
(`_MASKED_MAX` bounds the waste). Many edits: gather each row's own table, a bounded number of rows at a time. Of a
sparse autoencoder's encoder a piece at a time is widened, never the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mechanex.ops.edits import StackedEdits
from mechanex.ops.encoder import FeatureEncoder
from mechanex.ops.gate import NORM, openings, with_norm_of
from mechanex.ops.head import Head

from .arithmetic import check_rows, compute_dtype, without_autocast
from .backend import Backend, Kernel
from .chunked import Chunked, share_unit

__all__ = [
    "BACKEND",
    "LOGPROB",
    "bias_gradient",
    "logprobs_of_whole_logits",
    "sae_features",
    "sae_top_features",
    "steer",
    "steer_many",
    "steer_many_unchecked",
    "table_gradients",
    "top_of",
]

# Up to this many edits, one matrix product with all of them beats reading a gathered table.
_MASKED_MAX = 32
# Elements of a gathered table that are alive at once.
_GATHER_ELEMENTS = 1 << 24
# Numbers of an encoder that are held widened, and of products that are held, at once.
_PIECE = 1 << 22


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


def steer_many(hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Raises:
        ValidationError: a row index is out of range (CPU; on other devices that row becomes NaN).
    """
    if rows is not None and rows.device.type == "cpu":
        check_rows(rows, edits.bias.shape[0])
    return steer_many_unchecked(hidden, rows, strength, edits)


@without_autocast
def steer_many_unchecked(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits
) -> Tensor:
    """As :func:`steer_many`, but no value is looked at: for what traces, captures or differentiates it.

    Rows with an index out of range become NaN.
    """
    n_edits, wide = edits.bias.shape[0], edits.dtype_for(hidden, strength)
    if rows is None:
        rows = torch.zeros(hidden.shape[0], 1, dtype=torch.int32, device=hidden.device)
    if n_edits == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    strength, edits = None if strength is None else strength.to(wide), edits.to(wide)
    x = hidden.to(wide)
    for i in range(rows.shape[1]):
        x = _edited(x, rows[:, i], None if strength is None else strength[:, i], edits)
    edited = torch.where((rows == -1).all(1, keepdim=True), hidden, x.to(hidden.dtype))
    outside = ((rows < -1) | (rows >= n_edits)).any(1, keepdim=True)
    return edited.masked_fill(outside, float("nan"))


def _edited(x: Tensor, rows: Tensor, strength: Tensor | None, edits: StackedEdits) -> Tensor:
    """One edit of each row ``[T, d]``, all of one dtype; rows without one as they are."""
    bias, left, right, gate = edits
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


def _reduce(
    head: Head,
    products: Tensor,
    first: int,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    shares: Tensor | None,
) -> None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    bias = None if head.bias is None else head.bias[first : first + products.shape[1]]
    logits, bend = head.bounded(products.to(maximum.dtype), bias)
    local = target.unsqueeze(1) - first
    inside = (local >= 0) & (local < products.shape[1])
    local = local.clamp(0, products.shape[1] - 1)
    logits.scatter_(1, local, logits.gather(1, local).masked_fill(inside, -math.inf))
    highest = torch.maximum(maximum, logits.amax(1))
    # While every logit is −inf, any finite number serves: each share is 0.
    reference = highest.masked_fill(highest == -math.inf, 0)
    factor = torch.exp(maximum - reference)
    found = logits.sub_(reference.unsqueeze(1)).exp_()
    total.mul_(factor).add_(found.sum(1))
    maximum.copy_(highest)
    if sums is not None:
        sums.mul_(factor.unsqueeze(1))
    if shares is not None:
        if bend is not None:
            found.mul_(bend)
        unit = share_unit(shares, products)
        shares.copy_(found if unit == 1 else found.mul_(unit))


# Logits with a bias, bounded ones, their slopes and what makes those.
LOGPROB = Chunked(_reduce, spare=5)


@without_autocast
def logprobs_of_whole_logits(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    """The log-probabilities as mathematics: every logit is stored, and torch may differentiate and transform it."""
    wide = compute_dtype(hidden)
    logits, _ = head.bounded(hidden.to(wide) @ head.weight.to(wide).T, head.bias)
    return torch.log_softmax(logits, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


@without_autocast
def sae_features(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    """See :func:`mechanex.backends.reference.sae_features`."""
    x = hidden.to(encoder.dtype_for(hidden))
    found = [_said(x, part) for _, part in _pieces(encoder, encoder.weight.shape[1])]
    if len(found) == 1:
        return found[0]
    return torch.cat(found, 1) if found else x.new_empty(x.shape[0], 0)


def _said(x: Tensor, encoder: FeatureEncoder) -> Tensor:
    """What features say."""
    products = _products(x, encoder)
    z = products + encoder.bias.to(x.dtype)
    said = z
    if encoder.gain is not None and encoder.offset is not None:
        said = products * encoder.gain.to(z) + encoder.offset.to(z)
    level: Tensor | float = 0.0 if encoder.threshold is None else encoder.threshold.to(z)
    # 0 · NaN is NaN and 0 · z is 0 for every number: what is shut says 0, and NaN stays.
    return torch.where(z > level, said.relu(), torch.where(z.isnan(), z, 0.0))


@without_autocast
def sae_top_features(hidden: Tensor, encoder: FeatureEncoder, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`; of equal ones any."""
    x = hidden.to(encoder.dtype_for(hidden))

    def scores() -> Iterator[tuple[int, Tensor]]:
        for first, part in _pieces(encoder, max(encoder.weight.shape[1], x.shape[0])):
            z = _products(x, part) + part.bias.to(x.dtype)
            yield first, z if part.norms is None else z * part.norms.to(x.dtype)

    return top_of(scores(), k, signed)


def top_of(scores: Iterable[tuple[int, Tensor]], k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The k largest of scores that come a piece of the features at a time, largest first.

    Args:
        scores: pieces in order, at least one: the first feature, and the scores ``[T, n]`` from there.
        k: how many to keep.
        signed: compare sizes, and keep what is below 0.
    """
    values = places = None
    for first, z in scores:
        kept = (z.abs() if signed else z).topk(min(k, z.shape[1]), dim=1).indices
        mine, here = z.gather(1, kept), kept + first
        if values is not None and places is not None:
            mine, here = torch.cat([values, mine], 1), torch.cat([places, here], 1)
            kept = (mine.abs() if signed else mine).topk(min(k, mine.shape[1]), dim=1).indices
            mine, here = mine.gather(1, kept), here.gather(1, kept)
        values, places = mine, here
    assert values is not None and places is not None
    return values if signed else values.relu(), places


def _pieces(encoder: FeatureEncoder, numbers: int) -> Iterator[tuple[int, FeatureEncoder]]:
    """The features in pieces, each with its first; ``numbers`` is what one feature takes."""
    step = max(1, _PIECE // max(numbers, 1))
    for first in range(0, encoder.weight.shape[0], step):
        yield first, encoder.part(slice(first, first + step))


def _products(x: Tensor, encoder: FeatureEncoder) -> Tensor:
    products = x @ encoder.weight.to(x.dtype).T
    return products if encoder.scale is None else products * encoder.scale.to(x.dtype)


BACKEND = Backend(
    "eager",
    "plain torch",
    (),
    {
        "steer": Kernel(steer),
        "steer_many": Kernel(steer_many),
        "completion_logprob": LOGPROB.kernel(),
        "sae_features": Kernel(sae_features),
        "sae_top_features": Kernel(sae_top_features),
    },
)
