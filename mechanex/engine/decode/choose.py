"""Choosing the next token of every row of a batch, each by its own rules, as each would choose alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import MechanexError, ValidationError
from .adjust import Adjustments
from .draw import Draws
from .grammar import Masks
from .request import TokenLogprob
from .row import Row

__all__ = ["Choice", "Chooser", "are_sound", "logprobs_of", "not_finite"]

Found = tuple[int, "TokenLogprob | None"]


class Chooser:
    """Chooses for the same rows step after step; all that it needs of them is on the device beforehand.

    Args:
        rows: the rows of the batch; their answers so far are read now and not again.
        device: where logits are.
        unread: [rows] tokens that the rows are yet to be given, or None.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, unread: Tensor | None = None) -> None:
        self.rows = list(rows)
        requests = [row.request for row in rows]
        self._adjust = Adjustments(rows, device, unread)
        self._masks = Masks([row.following for row in rows], device)
        drawn = [i for i, r in enumerate(requests) if r.sampling.sampling_method != "greedy"]
        self._draws = Draws([requests[i].sampling for i in drawn], device) if drawn else None
        self._drawn = [self.rows[i] for i in drawn]
        self._where = None if len(drawn) == len(rows) else torch.tensor(drawn, device=device)
        self._asked = [i for i, r in enumerate(requests) if r.logprobs is not None]
        self._depth = max((requests[i].logprobs or 0 for i in self._asked), default=0)
        self._asked_at = torch.tensor(self._asked, device=device) if self._asked else None

    def __call__(self, logits: Tensor) -> Choice:
        """Chooses from [rows, vocabulary] logits of any floating dtype; nothing waits for the device.

        Log-probabilities are those of the model, before penalties, biases, temperature and sampling.
        """
        logits = logits.float()
        scores, failed = self._masks(self._adjust(logits))
        # An infinite edit or a damaged weight shows as NaN or infinity at the top.
        best, tokens = scores.max(-1)
        if self._draws is not None:
            uniform = torch.tensor([row.uniform() for row in self._drawn])
            if self._where is None:
                tokens = self._draws(scores, best, uniform)
            else:
                part = scores.index_select(0, self._where), best.index_select(0, self._where)
                tokens = tokens.index_copy(0, self._where, self._draws(*part, uniform))
        self._adjust.note(tokens)
        logprobs = None
        if self._asked_at is not None:
            found = tokens.index_select(0, self._asked_at)
            logprobs = _logprobs(logits.index_select(0, self._asked_at), found, self._depth)
        return Choice(self.rows, self._asked, tokens, best.isfinite(), logprobs, failed)


class Choice:
    """The tokens of one step, on the device at once and for the host when they have arrived.

    Attributes:
        rows: whose they are.
        tokens: [rows] int64 on the device.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        asked: Sequence[int],
        tokens: Tensor,
        sound: Tensor,
        logprobs: tuple[Tensor, Tensor, Tensor] | None,
        failed: Mapping[int, MechanexError],
    ) -> None:
        self.rows, self.tokens, self._failed = list(rows), tokens, failed
        self._all, self._order, self._asked = self.rows, list(range(len(rows))), asked
        parts = (tokens, sound, *(logprobs or ()))
        self._arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            parts = tuple(part.to("cpu", non_blocking=True) for part in parts)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tokens.device))
        self._parts = parts

    def read(self) -> list[Found | MechanexError]:
        """For each row its token and, where asked for, the log-probability; an error where its grammar can't be
        followed or the logits aren't finite.

        Waits for the device.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, sound, *logprobs = self._parts
        chosen, sane = tokens.tolist(), sound.tolist()
        named: dict[int, TokenLogprob] = {}
        if logprobs:
            most = [self._all[i].request.logprobs or 0 for i in self._asked]
            found = _named([chosen[i] for i in self._asked], most, *logprobs)
            named = dict(zip(self._asked, found, strict=True))
        sound = [
            (token, named.get(i)) if sane[i] else not_finite(self._all[i]) for i, token in enumerate(chosen)
        ]
        return [self._failed.get(i, sound[i]) for i in self._order]

    def among(self, order: Sequence[int]) -> Choice:
        """The same for these of its rows alone, in this order."""
        part = copy.copy(self)
        part.rows, part._order = [self.rows[i] for i in order], [self._order[i] for i in order]
        part.tokens = self.tokens.index_select(0, torch.tensor(order, device=self.tokens.device))
        return part


def are_sound(logits: Tensor) -> bool:
    """Whether logits [n, vocabulary] are numbers; single ones of minus infinity are, some models mask tokens so."""
    return bool(logits.amax(-1).isfinite().all())


def not_finite(row: Row) -> MechanexError:
    """The end of a row whose logits are NaN or infinite."""
    what = "the model's logits are not finite but infinite or NaN: "
    if not row.steering:
        return MechanexError(
            f"{what}its weights are damaged, or steering that was attached to the model is too strong.", 500
        )
    return ValidationError(
        f"{what}the steering is too strong for the model's dtype; try a smaller strength, bfloat16 or float32.",
        400,
        {"param": "steering_strength"},
    )


def logprobs_of(logits: Tensor, tokens: Sequence[int], most: Sequence[int]) -> list[TokenLogprob]:
    """Natural log-probabilities of the tokens, and of the ``most[i]`` likeliest ones.

    Args:
        logits: [n, vocabulary].
        tokens: n token ids.
        most: how many of the likeliest to name, for each.
    """
    found = _logprobs(logits.float(), torch.tensor(tokens, device=logits.device), max(most, default=0))
    return _named(tokens, most, *found)


def _logprobs(logits: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n] of the tokens, and the ``depth`` likeliest ones' [n, depth] with their ids."""
    shares = logits.log_softmax(-1)
    top = shares.topk(min(depth, shares.shape[-1]), dim=-1)
    return shares.gather(1, tokens[:, None])[:, 0], top.values, top.indices


def _named(
    tokens: Sequence[int], most: Sequence[int], own: Tensor, values: Tensor, ids: Tensor
) -> list[TokenLogprob]:
    rows = zip(tokens, most, own.tolist(), values.tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(best[:n], shares[:n], strict=True)))
        for token, n, logprob, shares, best in rows
    ]
