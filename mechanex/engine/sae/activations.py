"""Activations of texts at a place in a model, through the packed path: in rounds that are shuffled, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ValidationError
from ..forward import packs_for
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pack, Pair
from ..passes import scored_hidden, visit_residuals
from ..ranks import Ranks, current_ranks, dealt
from ..text import encode_prompt
from .hook_points import HookPoint, on_point

__all__ = ["Round", "Rounds", "as_pairs", "read_point"]


@dataclass(frozen=True, eq=False)
class Round:
    """Shuffled activations, of which each process of a job holds those that it has read itself.

    Args:
        x: [m, width] float32, this process's, on the model's device.
        place: [m] int64, ascending, where each stands among all; all of them in one process.
        ranks: the processes.
    """

    x: Tensor
    place: Tensor
    ranks: Ranks

    def part(self, first: int, end: int) -> Tensor:
        """[k, width], this process's of the activations from ``first`` to ``end``."""
        bounds = torch.tensor([first, end], device=self.place.device)
        begin, stop = torch.searchsorted(self.place, bounds).tolist()
        return self.x[begin:stop]

    def whole(self, end: int) -> Tensor:
        """[≤ end, width], the first activations of all processes, in order, on the CPU."""
        mine = self.part(0, end)
        parts = self.ranks.gathered((self.place[: len(mine)].cpu(), mine.cpu()))
        place, x = (torch.cat(both) for both in zip(*parts, strict=True))
        return x[place.argsort()]


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
        self._width = 0  # of the place, once something was read there

    def at(self, cursor: int) -> tuple[Round, int]:
        """The round that begins with the text number ``cursor``, counted over all epochs.

        Returns:
            ``buffer`` shuffled activations, and where the next round begins.

        Raises:
            ValidationError: activations that aren't finite.
        """
        chosen: list[Pair] = []
        missing, place = self._buffer, cursor
        while missing > 0:
            pair = self._pairs[self._text(place)]
            chosen.append(pair)
            missing -= len(pair[1])
            place += 1
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + cursor) % 2**63)
        lengths = torch.tensor([len(rest) for _, rest in chosen])
        order = torch.randperm(int(lengths.sum()), generator=generator)[: self._buffer]
        # By text and token, so that the order doesn't hang on how texts were packed and dealt.
        places = torch.full((int(lengths.sum()),), -1)
        places[order] = torch.arange(len(order))
        return self._read(chosen, lengths.cumsum(0) - lengths, places), place

    def _text(self, place: int) -> int:
        epoch, index = divmod(place, len(self._pairs))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self._seed * 7_919 + epoch) % 2**63)
            self._order = epoch, torch.randperm(len(self._pairs), generator=generator).tolist()
        return self._order[1][index]

    def _read(self, pairs: Sequence[Pair], first: Tensor, places: Tensor) -> Round:
        """The activations of texts, of which the first tokens have the numbers ``first``, put in their places."""
        adapter, ranks = self._adapter, current_ranks(self._adapter)
        found = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, self._width, device=adapter.device))]
        with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
            packs = packs_for(adapter, pairs, batch_tokens=self._batch_tokens, processes=ranks.sharing)
            for pack in dealt(packs, ranks, "Activations"):
                x = read_point(adapter, pack, self._point)
                self._width = x.shape[1]
                token = pack.tokens_of(pack.position_ids) - pack.tokens_of(pack.prompt_length)
                mine = places[first[pack.pair.cpu()] + token.cpu()]
                kept = mine >= 0
                found.append((mine[kept], x[kept.to(x.device)]))
            if not all(bool(torch.isfinite(x).all()) for _, x in found):
                raise ValidationError(
                    "the activations are not finite: check the model's dtype, and steering that is attached to it."
                )
        self._width = max(ranks.gathered(self._width))
        found[0] = found[0][0], torch.zeros(0, self._width, device=adapter.device)
        place, x = (torch.cat(both) for both in zip(*found, strict=True))
        place, order = place.sort()
        return Round(x[order.to(x.device)], place, ranks)
