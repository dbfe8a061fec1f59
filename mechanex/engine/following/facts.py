"""What the arguments of a decoder layer say about the tokens of a call, by shape, type and values, never by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["contradiction", "flat", "keeps_a_list", "new_tokens", "old_tokens", "without"]

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
    # Masks of queries and keys first: ones and zeros, one a token, may also be positions, which these tell apart.
    for value in sorted(values, key=lambda v: isinstance(v, Tensor) and v.ndim < 4):
        found = _new_by(value, batch, length, past)
        if found is None:
            continue
        found = found.expand(batch, length)
        if real is None:
            real = found
        elif not (value.ndim == 2 and not past and bool(_fits(value, real, real.cumsum(1) - 1).all())):
            real = real & found.to(real.device)
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


def without(values: Iterable[Any], taken: Iterable[Tensor]) -> list[Any]:
    """The values that share no element with these tensors; one buffer may hold ids and positions side by side."""
    spans = [_span(tensor) for tensor in taken]

    def is_taken(value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        device, first, end = _span(value)
        return any(device == there and first < stop and start < end for there, start, stop in spans)

    return [value for value in values if not is_taken(value)]


def _span(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Where a tensor's elements begin and end in a device's memory."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return tensor.device, first, first
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, first, first + (reach + 1) * tensor.element_size()


def keeps_a_list(values: Iterable[Any]) -> bool:
    """Whether states of earlier tokens may come in a list, which doesn't tell of how many."""
    return any(isinstance(v, list) and any(isinstance(part, Tensor) for part in v) for v in values)


def contradiction(
    given: Iterable[Any], around: Iterable[Any], before: Tensor, real: Tensor, *, counted: bool
) -> str | None:
    """Why position ids among a call's arguments can't be those of the tokens that masks and cache tell of, or None.

    Args:
        given: arguments of the first decoder layer, without token ids.
        around: arguments of the decoder stack, without token ids.
        before: [B, past] bool, which cached tokens are no padding.
        real: [B, T] bool, which tokens of the call are none.
        counted: whether the cache counts its tokens; else ids of one dimension are places in something of its own.
    """
    (batch, length), past = real.shape, before.shape[1]
    index = before.sum(1, keepdim=True) + real.cumsum(1) - 1
    for ids in _position_ids(given, around, batch, length, counted):
        ids = ids.to(real.device).expand(batch, length)
        fits = _fits(ids, real, index, past)
        if not bool(fits.all()):
            row = int((~fits).nonzero()[0, 0])
            return _contradicted(ids[row], real[row], int(before[row].sum()))
    return None


def _position_ids(
    given: Iterable[Any], around: Iterable[Any], batch: int, length: int, counted: bool
) -> Iterator[Tensor]:
    """[B or 1, T] each: integers, one a token, that are no mask and no kinds of tokens."""
    for in_layer, values in ((True, given), (False, around)):
        for value in values:
            if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
                continue
            if value.ndim == 1 and not counted:
                continue
            ids = value[None] if value.ndim == 1 else value
            if ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                continue
            # Layers get no kinds of tokens, which are ones and zeros too.
            if _is_row_mask(ids, length) or not (in_layer or bool(((ids < 0) | (ids > 1)).any())):
                continue
            distances = length > 1 and ids.shape[0] == length and bool((ids == -ids.T).all())
            if not distances:
                yield ids


def _fits(ids: Tensor, real: Tensor, index: Tensor, past: int = 0) -> Tensor:
    """[B] bool: whether ids count real tokens or columns, from 0 or from 1, in every real token of a row."""
    ids = ids.to(real.device)
    columns = torch.arange(past, past + real.shape[1], device=real.device)
    found = [((ids - counted == start) | ~real).all(1) for counted in (index, columns) for start in (0, 1)]
    return torch.stack(found).any(0)


def _contradicted(ids: Tensor, real: Tensor, past: int) -> str:
    steps = ids[real].diff()
    if bool(((ids[real][1:] == 0) & (steps < 0)).any()) and bool(((steps == 1) | (steps < 0)).all()):
        return (
            "a row holds several sequences, each with positions of its own, as continuous batching makes them; give "
            "each a row, or steer without naming tokens or rows"
        )
    shown = ", ".join(map(str, ids[real][:8].tolist())) + (", …" if int(real.sum()) > 8 else "")
    told = (
        f"a cache and masks tell of {past} tokens before them"
        if past
        else "no cache tells of tokens before them"
    )
    return (
        f"a row's position ids are {shown} for tokens that no mask says are padding, and {told}; mark padding by an "
        "attention_mask, and leave position_ids out or count each row's tokens on from there"
    )
