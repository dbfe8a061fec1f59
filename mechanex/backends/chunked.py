"""The walk over the vocabulary that computes completion log-probabilities: products by torch, reductions by a backend.

Rows are taken a block at a time, and for each block the vocabulary a chunk at a time, so that the logits alive at once
are bounded whatever their number. Every row keeps a running maximum and a running sum of exponentials over the tokens
*other than its target*. What remains at the end is the target's log-odds, of which log p is the log-sigmoid and 1 − p
the sigmoid of the negative: exact also where p rounds to 1.

The gradient of a row's log-probability with respect to its own hidden state (its slope) needs nothing from later
layers. So it is summed during the same walk, as attention sums its values, and a backward pass is a multiplication.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mechanex.errors import ValidationError
from mechanex.ops.head import Head

from .arithmetic import compute_dtype, wide_product, widens, without_autocast
from .backend import Kernel

__all__ = ["Chunked", "Reduce", "Walk", "check_target"]

# Rows of a block, logits of a chunk, columns of a chunk. On a CPU the chunk stays in the cache between the product and
# the reduction, and one row of it in the first level; elsewhere few launches count for more.
_ROWS = 1024
_LOGITS, _LOGITS_CPU = 1 << 24, 1 << 20
_COLUMNS_CPU = 1 << 13
# What float16 shares, at most 1, are multiplied by on their way through a product: those under 2⁻²⁵ would be 0, and a
# large vocabulary has many.
_FLOAT16_UNIT = 2.0**15


# Folds a chunk of products `[n, c]`, which it may overwrite, into each row's running maximum and sum over the tokens
# that are not its target: (head, products, first token, target, maximum, total, with_slope). With a slope the products
# become exp(logit − maximum) times the softcap's derivative, 0 at the target, and the result, `[n]`, is what sums that
# were taken under the former maximum must be multiplied by.
Reduce = Callable[[Head, Tensor, int, Tensor, Tensor, Tensor, bool], "Tensor | None"]

# The whole vocabulary at once, for a gradient: (head, hidden, target, sums `[n, d]`, which it writes) gives each row's
# maximum and sum as above; None where it doesn't serve these arguments.
Walk = Callable[[Head, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]


@dataclass(frozen=True)
class Chunked:
    """The op ``completion_logprob`` by the walk with one reduction; arguments are the op's, checked already.

    On the CPU a target out of range is a :class:`ValidationError`; on other devices, where the check would wait for the
    device, its row is NaN.

    Attributes:
        reduce: the reduction.
        walk: what may do a gradient's whole walk, or None.
    """

    reduce: Reduce
    walk: Walk | None = None

    def run(self, hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exps, ``[N]`` each; see :mod:`mechanex.backends.reference`."""
        return _walk(self, hidden, head, target, None)

    def with_slope(self, hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`run`, and each row's gradient for its hidden state, ``[N, d]``, float32 or float64."""
        slope = hidden.new_empty(hidden.shape, dtype=compute_dtype(hidden))
        return *_walk(self, hidden, head, target, slope), slope

    def gradients(self, grad: Tensor, hidden: Tensor, head: Head, target: Tensor, lse: Tensor) -> Tensor:
        """The gradient for ``hidden``, from a walk of its own."""
        return self.with_slope(hidden, head, target)[2].mul_(grad.unsqueeze(1)).to(hidden.dtype)

    def kernel(self) -> Kernel:
        """The op, as a backend offers it."""
        return Kernel(self.run, gradients=self.gradients, with_slope=self.with_slope)


def check_target(target: Tensor, n_vocab: int) -> None:
    """Raise :class:`ValidationError` when a value of ``target`` is outside ``[0, n_vocab)``; a GPU waits."""
    if target.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low < 0 or high >= n_vocab:
        raise ValidationError(
            f"target has values from {low} to {high}, but the vocabulary holds {n_vocab} token(s): "
            f"give token ids from 0 to {n_vocab - 1}"
        )


@without_autocast
def _walk(
    by: Chunked, hidden: Tensor, head: Head, target: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    n_rows, n_vocab = hidden.shape[0], head.weight.shape[0]
    if target.device.type == "cpu":
        check_target(target, n_vocab)
    if n_rows == 0 or n_vocab == 0:
        nothing = hidden.new_full((n_rows,), math.nan, dtype=compute_dtype(hidden))
        return nothing, nothing.clone()
    if slope is not None and by.walk is not None:
        found = by.walk(head, hidden, target, slope)
        if found is not None:
            return _finish(hidden, head, target, *found, slope)
    products = _Products(min(n_rows, _ROWS), hidden, head.weight)
    if n_rows <= _ROWS:
        return _walk_block(by.reduce, products, hidden, head, target, slope)
    parts = []
    for start in range(0, n_rows, _ROWS):
        rows = slice(start, start + _ROWS)
        part = None if slope is None else slope[rows]
        parts.append(_walk_block(by.reduce, products, hidden[rows], head, target[rows], part))
    logprob, lse = (torch.cat(kept) for kept in zip(*parts, strict=True))
    return logprob, lse


def _walk_block(
    reduce: Reduce, products: _Products, hidden: Tensor, head: Head, target: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block of rows; the slope is written."""
    n_rows, n_vocab = hidden.shape[0], head.weight.shape[0]
    maximum = hidden.new_full((n_rows,), -math.inf, dtype=compute_dtype(hidden))
    total = torch.zeros_like(maximum)
    sums = None if slope is None else slope.zero_()
    x = hidden.to(products.dtype)
    for first in range(0, n_vocab, products.n_columns):
        chunk = products.of(x, first)
        factor = reduce(head, chunk, first, target, maximum, total, sums is not None)
        if sums is not None and factor is not None:
            products.add_back(chunk, sums.mul_(factor.unsqueeze(1)))
    return _finish(hidden, head, target, maximum, total, sums)


def _finish(
    hidden: Tensor, head: Head, target: Tensor, maximum: Tensor, total: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exps of what the walk left of the other tokens; sums become the slope."""
    wide, n_vocab = compute_dtype(hidden), head.weight.shape[0]
    # The target's own logit in full precision, whatever the precision of the products.
    index = target if target.device.type == "cpu" else target.clamp(0, n_vocab - 1)
    direction = head.weight.index_select(0, index).to(wide)
    bias = None if head.bias is None else head.bias.index_select(0, index)
    own, bend = head.bounded((hidden.to(wide) * direction).sum(1), bias)
    if index is not target:
        own = own.masked_fill(index != target, math.nan)
    # An infinite logit is an overflow, not a certainty.
    own = own.nan_to_num(math.nan, math.nan, -math.inf)
    others = total.log().add_(maximum)
    odds = own - others
    if sums is not None:
        # The probability of another token is 1 − p of the target times the token's share of the others.
        sums.div_(total.clamp_min(torch.finfo(wide).tiny).unsqueeze(1)).neg_()
        sums.add_(direction if bend is None else direction * bend.unsqueeze(1))
        sums.mul_((torch.sigmoid(-odds) * (head.scale * head.coldness)).unsqueeze(1))
    return functional.logsigmoid(odds), torch.logaddexp(own, others)


class _Products:
    """Chunks of ``hidden @ weight.T`` and their way back, in memory that is used again and again.

    float32 and float64 are multiplied as they are. So are half types where that is fast, with float32 results where the
    device gives them; otherwise the weights are widened a chunk at a time, which is exact.

    Attributes:
        dtype: of what is multiplied.
        n_columns: tokens of a chunk.
    """

    def __init__(self, n_rows: int, hidden: Tensor, weight: Tensor) -> None:
        n_vocab, width = weight.shape
        on_cpu = hidden.device.type == "cpu"
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        self._widens = half and widens(hidden.device, hidden.dtype)
        kept = (
            not half
            or self._widens
            or hidden.is_cuda
            or (hidden.dtype is torch.bfloat16 and on_cpu and _multiplies_bf16())
        )
        self._weight = self._chunk = weight
        self.dtype = hidden.dtype if kept else torch.float32
        columns = (_LOGITS_CPU if on_cpu else _LOGITS) // max(n_rows, 1 if kept else width)
        if on_cpu:
            columns = min(columns, _COLUMNS_CPU)
        self.n_columns = min(max(columns // 64 * 64, 64), n_vocab)
        self._products = hidden.new_empty(0 if self._widens else n_rows * self.n_columns, dtype=self.dtype)
        self._wide = None if kept else hidden.new_empty(self.n_columns * width, dtype=torch.float32)

    def of(self, hidden: Tensor, first: int) -> Tensor:
        """``[n, c]``: ``hidden``, in :attr:`dtype`, times the tokens from ``first``; the next call overwrites it."""
        chunk = self._weight[first : first + self.n_columns]
        if self._wide is not None:
            chunk = self._wide[: chunk.numel()].view(chunk.shape).copy_(chunk)
        self._chunk = chunk
        if self._widens:
            return wide_product(hidden, chunk.T)
        shape = hidden.shape[0], chunk.shape[0]
        return torch.mm(hidden, chunk.T, out=self._products[: shape[0] * shape[1]].view(shape))

    def add_back(self, shares: Tensor, out: Tensor) -> None:
        """``out += shares @ weight``, with the chunk that :meth:`of` gave last."""
        if self._widens:
            unit = _FLOAT16_UNIT if self.dtype is torch.float16 else 1.0
            narrow = torch.empty_like(shares, dtype=self.dtype)
            torch.mul(shares, unit, out=narrow)
            out.add_(wide_product(narrow, self._chunk), alpha=1 / unit)
        elif out.dtype is self.dtype:
            out.addmm_(shares, self._chunk)
        else:
            out.add_(torch.mm(shares, self._chunk))


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    questions = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(ask is not None and ask() for ask in questions)
