"""What the arguments of a decoder layer say about the tokens of a call, by shape, type and values, never by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["flat", "new_tokens", "old_tokens", "unreadable"]

_MASKED = -5e3  # an additive mask bars with the dtype's lowest number, -1e4 or -inf; biases are smaller


def flat(*groups: Iterable[Any]) -> list[Any]:
    """The values of a call's arguments, those of dicts among them (masks come as a dict of kinds too)."""

    def walk(values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            if isinstance(value, Mapping):
                yield from walk(value.values())
            elif value is not None:
                yield value

    return list(walk(value for group in groups for value in group))


def new_tokens(values: Iterable[Any], batch: int, length: int, past: int) -> Tensor | None:
    """[B, T] bool: which tokens of this call are real, as every mask among ``values`` says; None where none is there.

    Args:
        values: arguments of a decoder layer.
        batch, length: of the hidden state.
        past: tokens in the cache before the call, padding included.
    """
    real: Tensor | None = None
    for value in values:
        found = _new_by(value, batch, length, past)
        if found is not None:
            found = found.expand(batch, length)
            real = found if real is None else real & found.to(real.device)
    return real


def _new_by(value: Any, batch: int, length: int, past: int) -> Tensor | None:
    if callable(getattr(value, "mask_mod", None)):
        # Flex attention's mask is a function of batch row, head, query and key; queries count from the cache's start.
        at = torch.arange(past, past + length, device=value.kv_num_blocks.device)
        rows = torch.arange(batch, device=at.device)[:, None, None]
        zero = torch.zeros((), dtype=torch.long, device=at.device)
        return _seen_by_some(value.mask_mod(rows, zero, at[:, None] - past, at).expand(batch, length, length))
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] not in (1, batch):
        return None
    width = value.shape[-1]
    start = min(past, width - length)
    if start < 0:
        return None
    if value.ndim == 4 and value.shape[-2] in (1, length) and not value.is_complex():
        if value.is_floating_point():
            visible = value[:, 0] > _MASKED
        elif value.dtype == torch.bool:
            visible = _upright(value[:, 0], start)
        else:
            return None
        return _seen_by_some(visible[..., start : start + length])
    if value.ndim == 2 and _is_row_mask(value, length):
        return value[:, start : start + length] != 0
    return None


def _upright(visible: Tensor, start: int) -> Tensor:
    """The mask with True for what is visible: some models' masks have True for what is not."""
    block = visible[..., start:]
    last = block.shape[-2] - 1
    unseen = ~block[:, last, last] if last else ~visible[:, 0, -1]
    turned = unseen & block[:, 0, last] if last else unseen.all()
    return ~visible if bool(turned.any()) else visible


def _seen_by_some(block: Tensor) -> Tensor:
    """[B, T] bool: columns of ``block`` [B, 1 or T, T] that a query sees.

    A padded query that would see nothing is made to see everything by some models, which says nothing.
    """
    everything = block.all(-1)
    honest = block & (~everything | everything[:, -1:])[..., None]
    return honest.any(1)


def _is_row_mask(value: Tensor, length: int) -> bool:
    """Whether these are ones and zeros that mark tokens and padding, and no positions."""
    if value.is_floating_point() or value.is_complex():
        return False
    if value.dtype == torch.bool:
        return True
    if bool(((value < 0) | (value > 1)).any()) or not bool(value.any(1).all()):
        return False
    # [0, 1] in every row is the positions of a prompt of two tokens: no batch needs a column of nothing but padding.
    return not (value.shape[1] == length == 2 and not bool(value[:, 0].any()))


def old_tokens(values: Iterable[Any], batch: int, length: int, past: int | None) -> Tensor | None:
    """[B, past] bool: which cached tokens are real, by a mask over them and this call's; None where none tells.

    Args:
        values: arguments of the decoder stack and of its first layer.
        batch, length: of the hidden state.
        past: tokens in the cache, or None: then a mask that is wider than the call tells that too.
    """
    for value in values:
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != batch:
            continue
        before = value.shape[1] - length
        enough = before > 0 if past is None else before >= past
        if enough and _is_row_mask(value, length):
            return value[:, : before if past is None else past] != 0
    return None


def unreadable(values: Iterable[Any], real: Tensor, *, cached: bool) -> str | None:
    """Why the facts of a call don't tell where its tokens stand, or None.

    Args:
        values: arguments of the first decoder layer.
        real: [B, T] bool, which tokens of the call are no padding.
        cached: whether a cache tells how many tokens came before.
    """
    batch, length = real.shape
    for value in values:
        if isinstance(value, list) and any(isinstance(part, Tensor) for part in value) and not cached:
            return "its layers keep states in a list, which doesn't tell what came before"
        if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        ids = value[None] if value.ndim == 1 else value
        if ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
            continue
        ids = ids.expand(batch, length).to(real.device)
        steps, both = ids.diff(dim=1), real[:, 1:] & real[:, :-1]
        runs, restarts = (steps == 1) | ~both, (ids[:, 1:] == 0) & (steps < 0) & both
        if not bool((runs | restarts).all()) or bool(((ids <= 1) | ~real).all()):
            continue  # no positions, or too few to tell
        if bool(restarts.any()):
            return "a row holds several sequences, each with positions of its own"
        # Positions count from 0 or 1, at the row's first column or at its first token.
        start = (ids - torch.arange(length, device=ids.device)).masked_fill(~real, 0).amax(1)
        if not cached and bool((start > 1).any()):
            return f"its positions start at {int(start.max())}, but no cache tells of the tokens before"
    return None
