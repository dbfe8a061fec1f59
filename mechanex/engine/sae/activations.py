"""Activations of texts at a place in a model, through the packed path: in rounds that are shuffled, for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import ValidationError
from ..forward import packs_for
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pack, Pair
from ..passes import scored_hidden, visit_residuals
from ..pauses import pause
from ..text import encode_prompt
from .hook_points import HookPoint, on_point

__all__ = ["Rounds", "as_pairs", "read_point"]


def read_point(adapter: ModelAdapter, pack: Pack, point: HookPoint) -> Tensor:
    """[T, width] float32 activations of a pack's tokens at a place, in one pass; steering that is applied is seen."""
    seen: list[Tensor] = []
    if point.kind == "resid":
        visit_residuals(adapter, pack, {point.layer: seen.append})
    else:
        with Handles() as handles:
            handles.add(on_point(adapter, point, seen.append))
            scored_hidden(adapter, pack)
    return pack.tokens_of(seen[0].flatten(2)).float()


def as_pairs(tokenizer: object, texts: Sequence[str], context: int) -> list[Pair]:
    """Texts as the packed path takes them: the first token, whose activations are unlike all others, and the rest.

    Args:
        tokenizer: the model's.
        texts: those of a single token are left out.
        context: tokens after which a text is cut.

    Raises:
        ValidationError: no text has two tokens.
    """
    ids = [encode_prompt(tokenizer, text)[:context] for text in texts]
    pairs: list[Pair] = [(one[:1], one[1:]) for one in ids if len(one) > 1]
    if not pairs:
        raise ValidationError("there is nothing to read: no text has two tokens or more.")
    return pairs


class Rounds:
    """Texts' activations, a buffer full at a time, each buffer shuffled; which texts come when depends on a seed alone.

    Args:
        adapter: the model.
        pairs: the texts, as ``as_pairs`` gives them; they are gone through in another order every time.
        point: the place.
        buffer: activations of a round.
        seed: of the orders.
        batch_tokens: most tokens of one pass; None for what suits the device.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        pairs: Sequence[Pair],
        point: HookPoint,
        buffer: int,
        seed: int,
        batch_tokens: int | None = None,
    ) -> None:
        self._adapter, self._pairs, self._point = adapter, pairs, point
        self._buffer, self._seed, self._batch_tokens = buffer, seed, batch_tokens
        self._order: tuple[int, list[int]] | None = None

    def at(self, cursor: int) -> tuple[Tensor, int]:
        """The round that begins with the text number ``cursor``, counted over all epochs.

        Returns:
            Shuffled activations [buffer, width], float32 on the model's device, and where the next round begins.
        """
        chosen: list[Pair] = []
        missing, place = self._buffer, cursor
        while missing > 0:
            pair = self._pairs[self._text(place)]
            chosen.append(pair)
            missing -= len(pair[1])
            place += 1
        found = torch.cat(list(self._read(chosen)))
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + cursor) % 2**63)
        order = torch.randperm(len(found), generator=generator)[: self._buffer]
        return found[order.to(found.device)], place

    def _text(self, place: int) -> int:
        epoch, index = divmod(place, len(self._pairs))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self._seed * 7_919 + epoch) % 2**63)
            self._order = epoch, torch.randperm(len(self._pairs), generator=generator).tolist()
        return self._order[1][index]

    def _read(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        adapter = self._adapter
        with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
            for pack in packs_for(adapter, pairs, batch_tokens=self._batch_tokens):
                pause()
                yield read_point(adapter, pack, self._point)
