"""The walk over the vocabulary that computes completion log-probabilities: products by torch, reductions by a backend.

Rows are taken a block at a time, and for each block the vocabulary a chunk at a time, so that the logits alive at once
are bounded whatever their number (:func:`blocks_for`). Every row keeps a running maximum and a running sum of
exponentials over the tokens *other than its target*. What remains at the end is the target's log-odds, of which log p
is the log-sigmoid and 1 − p the sigmoid of the negative: exact also where p rounds to 1.

The gradient of a row's log-probability with respect to its own hidden state (its slope) needs nothing from later
layers. So it is summed during the same walk, as attention sums its values, and a backward pass is a multiplication.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mechanex.errors import ValidationError
from mechanex.ops.head import Head

from .arithmetic import add_wide_product, compute_dtype, wide_product, widens, without_autocast
from .backend import Kernel

__all__ = [
    "MOST_BYTES",
    "ROOM",
    "Blocks",
    "Chunked",
    "Finish",
    "Found",
    "Reduce",
    "Walk",
    "blocks_for",
    "check_target",
    "share_unit",
]

MOST_BYTES = 16 << 20
"""What a call may take beside its arguments and results on a device, in bytes."""
ROOM = 1 << 19
"""Of those, for what there is one number of for a row."""
# Of those, for looking up the weights of targets where a backend has no kernel for it.
_PIECE = 11 << 19
# Most rows of a block. On a CPU logits and columns of a chunk, so that it stays in the cache between the product and
# the reduction, and one row of it in the first level.
_ROWS = 1024
_LOGITS_CPU = 1 << 20
_COLUMNS_CPU = 1 << 13
# A chunk is whole tiles of a matrix product.
_TILE = 128
_HALF = (torch.bfloat16, torch.float16)
# What float16 shares, at most 1, are multiplied by on their way through a product: those under 2⁻²⁵ would be 0, and a
# large vocabulary has many.
_FLOAT16_UNIT = 2.0**15


# Folds a chunk of products `[n, c]`, which it may overwrite, into each row's running maximum and sum over the tokens
# that are not its target: (head, products, first token, target, maximum, total, sums, shares). Given sums `[n, d]` are
# multiplied by what the maximum's growth asks for. Given shares `[n, c]`, of the dtype that is multiplied, become
# exp(logit − maximum) times the softcap's derivative, 0 at the target, times :func:`share_unit`. They may be the
# products themselves, and from `Chunked.in_place_rows` on narrower numbers at the start of each row of them.
Reduce = Callable[[Head, Tensor, int, Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"], None]

# The whole vocabulary at once, for a gradient: (head, hidden, target) gives each row's maximum and sum as above, and
# the sums `[n, d]`; None where it doesn't serve these arguments.
Walk = Callable[[Head, Tensor, Tensor], "tuple[Tensor, Tensor, Tensor] | None"]


class Found(NamedTuple):
    """What a walk gives, written a block of rows at a time.

    Attributes:
        logprob, lse: ``[N]``.
        slope: ``[N, d]``, in hidden's dtype where devices multiply it as it is; None where no gradient is wanted.
        size: ``[N]``: the gradient of a row's log-probability is its slope times this.
    """

    logprob: Tensor
    lse: Tensor
    slope: Tensor | None = None
    size: Tensor | None = None

    def of(self, rows: slice) -> Found:
        """Those of some rows."""
        return Found(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


# What a walk left of the other tokens, and the target's own, into results: (head, hidden, target, maximum, total, sums
# or None, found). The slope may be the sums' own memory.
Finish = Callable[[Head, Tensor, Tensor, Tensor, Tensor, "Tensor | None", Found], None]


class Blocks(NamedTuple):
    """How much of the rows and of the vocabulary is worked on at a time."""

    rows: int
    columns: int


def blocks_for(n_rows: int, n_vocab: int, *, row: int, logit: int, most: int, token: int = 0) -> Blocks:
    """Blocks of about equal size that stay within ``most`` bytes; none is empty.

    Rows come first, as many as half of the bytes hold: the more there are, the less often the vocabulary is read.

    Args:
        n_rows, n_vocab: of the call.
        row: bytes that a row of the block takes whatever the number of tokens: its sums.
        logit: bytes of one row at one token.
        most: bytes in all.
        token: bytes that a token of the chunk takes whatever the number of rows: copies of its weights and its bias.
    """
    limit = min(_ROWS, max(1, most * 8 // 15 // max(row, 1)))
    rows = _even(n_rows, limit, 64)
    limit = max(1, (most - rows * row) // max(rows * logit + token, 1))
    # Rows of a chunk begin where wide accesses can.
    return Blocks(rows, _even(-(-n_vocab // 64) * 64, limit, _TILE))


def _even(n: int, most: int, step: int) -> int:
    """The size of parts of ``n`` of at most ``most``, about equal, multiples of ``step`` where there is room."""
    if most >= n:
        return n
    most = most // step * step or most
    each = -(-n // -(-n // most))
    return min(most, -(-each // step) * step)


@dataclass(frozen=True)
class Chunked:
    """The op ``completion_logprob`` by the walk with one reduction; arguments are the op's, checked already.

    On the CPU a target out of range is a :class:`ValidationError`; on other devices, where the check would wait for the
    device, its row is NaN.

    Attributes:
        reduce: the reduction.
        walk: what may do a gradient's whole walk, or None.
        finish: what makes results of a walk's; None: plain torch.
        spare: tensors of a chunk's size, in the dtype of the arithmetic, that the reduction makes.
        padded: ``reduce`` takes products whose rows lie apart, so that each begins where wide accesses can.
        in_place_rows: from this many rows of a block on ``reduce`` narrows shares in the products' memory; None: never.
    """

    reduce: Reduce
    walk: Walk | None = None
    finish: Finish | None = None
    spare: int = 0
    padded: bool = True
    in_place_rows: int | None = None

    def run(self, hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exps, ``[N]`` each; see :mod:`mechanex.backends.reference`."""
        found = _walk(self, hidden, head, target, False)
        return found.logprob, found.lse

    def with_slope(
        self, hidden: Tensor, head: Head, target: Tensor, blocks: Blocks | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`run`, and each row's slope ``[N, d]`` and size ``[N]``, whose product is its gradient for hidden.

        Args:
            hidden, head, target: the op's.
            blocks: how much at a time, whatever memory that takes; None: as the bound of memory allows.
        """
        logprob, lse, slope, size = _walk(self, hidden, head, target, True, blocks)
        assert slope is not None and size is not None
        return logprob, lse, slope, size

    def gradients(self, grad: Tensor, hidden: Tensor, head: Head, target: Tensor, lse: Tensor) -> Tensor:
        """The gradient for ``hidden``, from a walk of its own."""
        _, _, slope, size = self.with_slope(hidden, head, target)
        return slope.mul_((size * grad).unsqueeze(1)).to(hidden.dtype)

    def narrows_in_place(self, blocks: Blocks) -> bool:
        """Whether shares of such blocks lie in the products' memory."""
        return self.in_place_rows is not None and blocks.rows >= self.in_place_rows

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


def share_unit(shares: Tensor, products: Tensor) -> float:
    """What shares are multiplied by where they are narrower than the products."""
    return _FLOAT16_UNIT if shares.dtype is torch.float16 and products.dtype is not torch.float16 else 1.0


@without_autocast
def _walk(
    by: Chunked,
    hidden: Tensor,
    head: Head,
    target: Tensor,
    with_slope: bool,
    blocks: Blocks | None = None,
) -> Found:
    n_rows, n_vocab = hidden.shape[0], head.weight.shape[0]
    if target.device.type == "cpu":
        check_target(target, n_vocab)
    work = _Work(by, hidden, head, with_slope, blocks)
    found = work.results()
    if n_rows == 0 or n_vocab == 0:
        for tensor in found:
            if tensor is not None:
                tensor.fill_(math.nan)
        return found
    finish = by.finish or _finish
    if found.slope is not None and by.walk is not None:
        whole = by.walk(head, hidden, target)
        if whole is not None:
            finish(head, hidden, target, *whole, found)
            return found
    for start in range(0, n_rows, work.blocks.rows):
        rows = slice(start, start + work.blocks.rows)
        part = found.of(rows)
        summed = None if part.slope is None else work.sums(part.slope)
        left = _walk_block(by.reduce, work, hidden[rows], head, target[rows], summed)
        finish(head, hidden[rows], target[rows], *left, summed, part)
    return found


def _walk_block(
    reduce: Reduce, work: _Work, hidden: Tensor, head: Head, target: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maxima and sums of exponentials of one block of rows; the sums of a slope are written."""
    n_rows, n_vocab = hidden.shape[0], head.weight.shape[0]
    maximum = hidden.new_full((n_rows,), -math.inf, dtype=compute_dtype(hidden))
    total = torch.zeros_like(maximum)
    x = hidden.to(work.dtype)
    for first in range(0, n_vocab, work.blocks.columns):
        products = work.of(x, first)
        shares = None if sums is None else work.shares(products)
        reduce(head, products, first, target, maximum, total, sums if first else None, shares)
        if sums is not None and shares is not None:
            work.add_back(shares, sums, first == 0)
    return maximum, total


def _finish(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    found: Found,
) -> None:
    """See :data:`Finish`; a piece of the rows at a time."""
    step = max(1, _PIECE // (20 * max(hidden.shape[1], 1)))
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        some = None if sums is None else sums[rows]
        _finish_piece(head, hidden[rows], target[rows], maximum[rows], total[rows], some, found.of(rows))


def _finish_piece(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    found: Found,
) -> None:
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
    found.logprob.copy_(functional.logsigmoid(odds))
    found.lse.copy_(torch.logaddexp(own, others))
    if sums is None or found.slope is None or found.size is None:
        return
    # The probability of another token is 1 − p of the target times the token's share of the others.
    torch.sigmoid(-odds, out=found.size).mul_(head.scale * head.coldness)
    sums.div_(total.clamp_min(torch.finfo(wide).tiny).unsqueeze(1)).neg_()
    sums.add_(direction if bend is None else direction.mul_(bend.unsqueeze(1)))
    if found.slope.data_ptr() != sums.data_ptr():
        found.slope.copy_(sums)


class _Work:
    """Chunks of ``hidden @ weight.T`` and their way back, in memory that is used again and again.

    float32 and float64 are multiplied as they are. So are half types where that is fast, with float32 results where the
    device gives them; otherwise the weights are widened a chunk at a time, which is exact.

    Attributes:
        dtype: of what is multiplied.
        blocks: how much at a time.
    """

    def __init__(
        self, by: Chunked, hidden: Tensor, head: Head, with_slope: bool, blocks: Blocks | None
    ) -> None:
        self._hidden, self._weight, self._chunk, self._bias = hidden, head.weight, head.weight, head.bias
        self._with_slope, self._wide = with_slope, compute_dtype(hidden)
        self._sums: Tensor | None = None
        half, on_cpu = hidden.dtype in _HALF, hidden.device.type == "cpu"
        self._widens = half and widens(hidden.device, hidden.dtype)
        kept = (
            not half
            or self._widens
            or hidden.is_cuda
            or (hidden.dtype is torch.bfloat16 and on_cpu and _multiplies_bf16())
        )
        self.dtype = hidden.dtype if kept else torch.float32
        # Float32 slopes would be twice what the gradient takes.
        self._slope_dtype = hidden.dtype if self._widens or hidden.is_cuda else self._wide
        self._products_dtype = self._wide if self._widens else self.dtype
        # On a CPU the cache bounds a chunk, not the memory.
        self._cached = on_cpu and not self._widens
        self._padded = by.padded and not self._cached
        self.blocks = blocks or self._planned(by)
        self._narrows = self._widens and with_slope and not by.narrows_in_place(self.blocks)

    def _planned(self, by: Chunked) -> Blocks:
        """Blocks of rows and tokens within the bounds of memory."""
        n_rows, width = self._hidden.shape
        n_vocab = self._weight.shape[0]
        widened = self.dtype is not self._hidden.dtype
        if self._cached:
            return _blocks_cpu(n_rows, n_vocab, width if widened else 1)
        weights = 4 * width if widened else 0
        sums = self._wide.itemsize * width if self._with_slope and self._slope_dtype is not self._wide else 0
        if sums and not self._widens:
            # The product that is added to them.
            sums += self.dtype.itemsize * width
        bias = self._wide.itemsize if self._bias is not None else 0
        plan = functools.partial(
            blocks_for,
            n_rows,
            n_vocab,
            row=weights + sums,
            most=MOST_BYTES - ROOM - (0 if by.finish else _PIECE),
            token=weights + bias,
        )
        logit = self._products_dtype.itemsize + by.spare * self._wide.itemsize
        blocks = plan(logit=logit)
        if self._widens and self._with_slope and not by.narrows_in_place(blocks):
            blocks = plan(logit=logit + self.dtype.itemsize)
        return blocks

    @functools.cached_property
    def _products(self) -> Tensor:
        return self._hidden.new_empty(self.blocks.rows * self.blocks.columns, dtype=self._products_dtype)

    @functools.cached_property
    def _shares(self) -> Tensor:
        return self._hidden.new_empty(self.blocks.rows * self.blocks.columns, dtype=self.dtype)

    @functools.cached_property
    def _copy(self) -> Tensor:
        return self._hidden.new_empty(self.blocks.columns * self._weight.shape[1], dtype=self.dtype)

    def results(self) -> Found:
        """Memory for the results."""
        hidden = self._hidden
        logprob, lse = (hidden.new_empty(hidden.shape[0], dtype=self._wide) for _ in range(2))
        if not self._with_slope:
            return Found(logprob, lse)
        slope = hidden.new_empty(hidden.shape, dtype=self._slope_dtype)
        return Found(logprob, lse, slope, torch.empty_like(logprob))

    def sums(self, slope: Tensor) -> Tensor:
        """Where the slope of a block is summed, in the dtype of the arithmetic: its own memory if that serves."""
        if slope.dtype is self._wide:
            return slope
        if self._sums is None:
            self._sums = slope.new_empty(slope.shape, dtype=self._wide)
        return self._sums[: slope.shape[0]]

    def of(self, hidden: Tensor, first: int) -> Tensor:
        """``[n, c]``: ``hidden``, in :attr:`dtype`, times the tokens from ``first``; the next call overwrites it."""
        chunk = self._weight[first : first + self.blocks.columns]
        if self.dtype is not chunk.dtype:
            chunk = self._copy[: chunk.numel()].view(chunk.shape).copy_(chunk)
        self._chunk = chunk
        out = self._placed(self._products, hidden.shape[0], chunk.shape[0])
        if self._widens:
            return wide_product(hidden, chunk.T, out)
        return torch.mm(hidden, chunk.T, out=out)

    def shares(self, products: Tensor) -> Tensor:
        """Where the shares of a chunk go: the products' own memory if they fit there."""
        if self._narrows:
            return self._placed(self._shares, *products.shape)
        if products.dtype is self.dtype:
            return products
        return products.view(self.dtype)[:, : products.shape[1]]

    def _placed(self, memory: Tensor, n_rows: int, n_columns: int) -> Tensor:
        if self._padded:
            return memory.view(-1, self.blocks.columns)[:n_rows, :n_columns]
        return memory[: n_rows * n_columns].view(n_rows, n_columns)

    def add_back(self, shares: Tensor, out: Tensor, is_first: bool) -> None:
        """``out += shares @ weight`` with the chunk that :meth:`of` gave last; at first ``out`` holds nothing."""
        if self._widens:
            add_wide_product(out, shares, self._chunk, 1 / share_unit(shares, out), 0 if is_first else 1)
        elif out.dtype is not self.dtype:
            product = torch.mm(shares, self._chunk)
            out.copy_(product) if is_first else out.add_(product)
        elif is_first:
            torch.mm(shares, self._chunk, out=out)
        else:
            out.addmm_(shares, self._chunk)


def _blocks_cpu(n_rows: int, n_vocab: int, least: int) -> Blocks:
    """Blocks whose chunk stays in the cache; ``least`` stands for the rows where a chunk of weights is widened."""
    rows = min(n_rows, _ROWS)
    columns = min(_LOGITS_CPU // max(rows, least), _COLUMNS_CPU)
    return Blocks(max(rows, 1), min(max(columns // 64 * 64, 64), max(n_vocab, 1)))


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    questions = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(ask is not None and ask() for ask in questions)
