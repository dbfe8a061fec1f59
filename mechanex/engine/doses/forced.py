"""Given answers under many settings at once: how far each moves every token's distribution, and the answers' odds.

Settings are copies of a pack's rows in one batch, each joining at its own lowest layer; what lies below runs once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import MechanexError
from ..capabilities.unembedding import unembedding_agrees
from ..divergence import log_probabilities, shift
from ..forward import packs_for, scored_logits
from ..hooks import Intervention, SteeringPlan
from ..models.adapter import ModelAdapter, exclusive, undisturbed
from ..optimize.replay import Replay
from ..pack import Pack, Pair
from ..passes import scored_hidden
from ..pauses import pass_tokens, pause
from ..positions import given_positions, selects
from ..ranks import current_ranks, dealt
from ..regimes import text_lengths
from .dose import Edited

__all__ = ["Forced", "ForcedAnswers"]

PACK_TOKENS = 512
PASS_TOKENS, PASS_TOKENS_GPU = 4096, 32768
KEPT_BYTES = 1 << 30  # of what the layers below the edits gave; packs beyond run whole
LOGITS = 1 << 23  # numbers that are held at once


@dataclass(frozen=True, eq=False)
class Forced:
    """What one setting does to given answers, by token, answers in the order given.

    Attributes:
        kl: [N] nats, KL(steered‖plain) of the distribution that each token was predicted from, before temperature.
        logprobs: [N] the tokens' natural log-probabilities under the setting.
    """

    kl: Tensor
    logprobs: Tensor


class ForcedAnswers:
    """Answers that a model is made to give, to see what steering does to them.

    Args:
        adapter: the model.
        pairs: (prompt ids, answer ids), neither empty.

    Attributes:
        answer: [N] int64, the pair that each token is of.
        place: [N] int64, which token of its answer it is.
        plain: [N] log-probabilities without steering.
        passes: how often settings were run.
        work: tokens times layers that were run so far.
    """

    def __init__(self, adapter: ModelAdapter, pairs: Sequence[Pair]) -> None:
        self._adapter = adapter
        self.passes, self.work = 0, 0
        self.packs: list[Pack] = []
        self._replays: dict[int, tuple[set[int], Replay]] = {}
        lengths = [len(answer) for _, answer in pairs]
        self.answer = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(lengths))
        self.place = torch.cat([torch.arange(n) for n in lengths])
        self._plain: list[Tensor] = []
        self._ranks = current_ranks(adapter)
        logprobs = [torch.zeros(1, 0, dtype=torch.float64)]
        with _alone(self._adapter), self._ranks.together():
            self._whole = not unembedding_agrees(adapter)
            packs = packs_for(
                adapter,
                pairs,
                batch_tokens=pass_tokens(PACK_TOKENS),
                scoring=True,
                processes=self._ranks.sharing,
            )
            for pack in dealt(packs, self._ranks, "Answers"):
                self.packs.append(pack)
                rows = (scored_logits if self._whole else scored_hidden)(adapter, pack)
                self._count(pack, adapter.n_layers)
                self._plain.append(rows)
                logprobs.append(self._each(pack, rows, rows[None])[1].double())
        pairs_here = torch.cat([torch.zeros(0, dtype=torch.long), *(pack.pair.cpu() for pack in self.packs)])
        # Tokens of one pair are all in one pack and in order there.
        self._order = torch.cat(self._ranks.gathered(pairs_here)).argsort(stable=True)
        self.plain = self._of_all(logprobs)[0]

    def __len__(self) -> int:
        return len(self.answer)

    def _of_all(self, found: list[Tensor]) -> Tensor:
        """[…, N] in the order of the answers, of what each process found of its packs."""
        return torch.cat(self._ranks.gathered(torch.cat(found, -1)), -1)[..., self._order]

    def by_answer(self, tokens: Tensor, *, mean: bool = False) -> Tensor:
        """[n pairs] sums, or means, of one number per token."""
        n = int(self.answer.max()) + 1
        found = torch.zeros(n, dtype=torch.float64).index_add(0, self.answer, tokens.double())
        return found / torch.bincount(self.answer, minlength=n) if mean else found

    def under(self, settings: Sequence[Edited]) -> list[Forced]:
        """What each setting does; together they are rows of one batch, or of several where that would be too long.

        Args:
            settings: of interventions that name no rows and no mask.

        Raises:
            MechanexError: a setting makes the logits NaN or infinite.
        """
        self.passes += 1
        adapter, n = self._adapter, len(settings)
        starts = [self._start(one) for one in settings]
        order = sorted(range(n), key=starts.__getitem__)
        found_of = [torch.zeros(2, n, 0, dtype=torch.float64)]
        with _alone(self._adapter), self._ranks.together():
            for number, (pack, plain) in enumerate(zip(self.packs, self._plain, strict=True)):
                found = torch.empty(2, n, len(pack.target), dtype=torch.float64)
                # What the model can do is found out before it is steered.
                replay = self._replay(number, pack, starts)
                for chosen in self._passes(order, pack):
                    pause()
                    parts = [settings[i] for i in chosen]
                    rows = self._run(pack, replay, parts, [starts[i] for i in chosen])
                    rows = rows.view(len(chosen), len(pack.target), -1)
                    kl, logprob = self._each(pack, plain, rows)
                    found[0, chosen], found[1, chosen] = kl.double(), logprob.double()
                found_of.append(found)
        kl, logprob = self._of_all(found_of)
        if not bool(torch.isfinite(kl).all()):
            raise MechanexError(
                f"The steered logits of {adapter.model_id} are NaN or infinite: steer less, or check the vector."
            )
        return [Forced(kl[i], logprob[i]) for i in range(n)]

    def norm(self, layer: int) -> float:
        """The median norm of the stream that enters a layer, over the first pack."""
        return self._ranks.from_first(lambda: self._norm(layer))

    def _norm(self, layer: int) -> float:
        replay = self._replay(0, self.packs[0], [min(layer, self._adapter.n_layers - 1)])
        if not replay.possible:
            return math.sqrt(self._adapter.d_model)
        kept = replay.residual(min(layer, self._adapter.n_layers - 1))
        return float(kept[self.packs[0].segment.to(kept.device) >= 0].float().norm(dim=-1).median())

    def _count(self, pack: Pack, layers: int, copies: int = 1) -> None:
        self.work += pack.input_ids.numel() * layers * copies

    def _start(self, setting: Edited) -> int:
        top = self._adapter.n_layers - 1
        return min([top, *(self._adapter.layer_index(one.layer) for one in setting)])

    def _replay(self, number: int, pack: Pack, starts: Sequence[int]) -> Replay:
        layers, known = self._replays.get(number, (set[int](), None))
        if known is not None and (not known.possible or set(starts) <= layers):
            return known
        layers = {*starts, *layers}
        with _alone(self._adapter):
            pause()
            made = Replay(self._adapter, pack, sorted(layers))
            if made.possible:
                pause()
                self._count(pack, self._adapter.n_layers, 3)
                if not made.stackable:
                    made.give_up()
        self._replays[number] = (layers, made)
        if sum(t.nbytes for t in made.tensors) > KEPT_BYTES // max(1, len(self.packs)):
            made.give_up()
        return made

    def _passes(self, order: list[int], pack: Pack) -> Iterator[list[int]]:
        tokens = pass_tokens(PASS_TOKENS if self._adapter.device.type == "cpu" else PASS_TOKENS_GPU)
        room = max(1, tokens // pack.input_ids.numel())
        for first in range(0, len(order), room):
            yield order[first : first + room]

    def _run(self, pack: Pack, replay: Replay, settings: list[Edited], starts: list[int]) -> Tensor:
        """[J·N, …] what predicts the answers' tokens under each of J settings, which begin at ascending layers."""
        adapter, n = self._adapter, len(settings)
        present = [
            n if not replay.possible else sum(start <= layer for start in starts)
            for layer in range(adapter.n_layers + 1)
        ]
        plan = SteeringPlan(
            replace(one, tokens=None, mask=self._mask(pack, one, q, present[adapter.layer_index(one.layer)]))
            for q, setting in enumerate(settings)
            for one in setting
        )
        copies = pack.repeated(n)
        with plan.apply(adapter):
            if not replay.possible:
                self._count(pack, adapter.n_layers, n)
                return (scored_logits if self._whole else scored_hidden)(adapter, copies)
            hidden: Tensor | None = None
            here = copies
            for layer in range(starts[0], adapter.n_layers):
                joins = starts.count(layer)
                if joins:
                    fresh = replay.residual(layer).repeat(joins, 1, 1)
                    hidden = fresh if hidden is None else torch.cat([hidden, fresh.to(hidden.device)])
                    here = pack.repeated(present[layer])
                args, kwargs = replay.arguments(layer, present[layer], n)
                with given_positions(here.positions), text_lengths(here.text_length):
                    out = adapter.layers[layer](hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
                self._count(pack, 1, present[layer])
        assert hidden is not None
        return adapter.finish(copies.predictors_of(hidden))

    @staticmethod
    def _mask(pack: Pack, one: Intervention, place: int, copies: int) -> Tensor:
        """[copies·B, T] bool: the tokens that an edit reaches, all in one of the copies."""
        positions = pack.positions
        chosen = selects(one.tokens, positions.index, lambda: positions.prompt_lengths)
        mask = torch.zeros(copies, *chosen.shape, dtype=torch.bool, device=chosen.device)
        mask[place] = chosen
        return mask.flatten(0, 1)

    def _each(self, pack: Pack, plain: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[J, N] KL to plain, and log-probabilities of the targets, from what predicts them under J settings."""
        unembed: Callable[[Tensor], Tensor] = (
            torch.Tensor.detach if self._whole else self._adapter.unembedding.logits
        )
        n_settings, n = rows.shape[:2]
        vocabulary = rows.shape[-1] if self._whole else self._adapter.unembedding.weight.shape[0]
        step = max(1, LOGITS // (vocabulary * n_settings))
        kls, logprobs = [], []
        for first in range(0, n, step):
            part = slice(first, first + step)
            before = log_probabilities(unembed(plain[part]))
            after = log_probabilities(unembed(rows[:, part].flatten(0, 1)))
            after = after.view(n_settings, -1, before.shape[-1])
            target = pack.target[part].to(after.device).expand(n_settings, -1)[..., None]
            kls.append(shift(after, before).cpu())
            logprobs.append(after.gather(-1, target)[..., 0].cpu())
        return torch.cat(kls, 1), torch.cat(logprobs, 1)


@contextmanager
def _alone(adapter: ModelAdapter) -> Iterator[None]:
    """A block alone on the model, without gradients, with every row as it is alone."""
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
        yield
