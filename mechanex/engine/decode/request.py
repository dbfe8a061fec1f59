"""What is asked of the decoder for one row, and what comes of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..intervention import Edit
from ..positions import TokenSelector
from ..prompt_conditions import PromptCondition
from ..sampling import Sampling
from ..schedules import Varying
from .grammar import Grammar

__all__ = ["GuardedToken", "Onlooker", "Result", "Steer", "Step", "TextRequest", "TokenLogprob"]

_MADE: WeakKeyDictionary[Edit, WeakValueDictionary[tuple[float, tuple[int, ...]], Edit]] = WeakKeyDictionary()
"""Edits at other strengths than 1, as long as a call or a table has them."""


@dataclass(frozen=True)
class Steer:
    """One edit of a request: of its tokens at a layer.

    Args:
        layer: 0 … n_layers.
        edit: what is done at strength 1.
        tokens: absolute positions (int, slice, None for all), as in :class:`mechanex.engine.hooks.Intervention`.
        varying: edits by place that stand in for ``edit``.
        condition: has to be met by the prompt for the row to be edited.
        strength: multiplies what ``edit`` does; edits by place have theirs in them.
    """

    layer: int
    edit: Edit
    tokens: TokenSelector = None
    varying: Varying | None = None
    condition: PromptCondition | None = None
    strength: float = 1.0

    def made(self) -> Edit:
        """The edit at its strength; the same object for all that have both, while somebody has it."""
        if self.strength == 1:
            return self.edit
        versions = self.edit.versions()
        at = _MADE.setdefault(self.edit, WeakValueDictionary())
        found = at.get((self.strength, versions))
        if found is None:
            found = at[self.strength, versions] = self.edit.scaled(self.strength)
        return found

    @property
    def is_fixed(self) -> bool:
        """Whether it does the same to every token."""
        return self.tokens is None and self.varying is None


class Onlooker(Protocol):
    """Who looks on while an answer is written, through the steering of the decoder."""

    @property
    def end(self) -> Literal["behavior"] | None:
        """The reason for which the answer ends before its next token, if it does."""

    @property
    def altered(self) -> bool:
        """Whether what was read of the answer isn't what its edits alone make of it."""


@dataclass(frozen=True)
class TextRequest:
    """One prompt and how to continue it.

    Args:
        ids: token ids of the prompt, at least one.
        max_tokens: most tokens to add; fewer where the model's context ends before. 0 only reads the prompt.
        sampling: the method, as in ``generation.generate``.
        seed: of the draws; None draws one.
        stops: texts that end the answer and are cut off.
        stop_token_ids: further tokens that end the answer and are cut off.
        include_stop: whether what ended the answer, of ``stops`` and ``stop_token_ids``, stays in it.
        ignore_ends: whether the answer goes on behind the model's own end tokens.
        min_tokens: tokens before which no end token is chosen and no stop text ends the answer.
        skip_special_tokens: whether special tokens are left out of the text.
        steering: the request's edits, in order; empty for none.
        frequency_penalty: taken off a token's logit for every time that the answer has it.
        presence_penalty: taken off once for a token that the answer has.
        repetition_penalty: divides the logits above 0 of tokens that prompt or answer have, and multiplies those below.
        logit_bias: pairs of a token id and what is added to its logit.
        grammar: what the answer follows to its end; None for anything.
        logprobs: None, or how many of the likeliest tokens to report with each chosen one's log-probability.
        prompt_logprobs: whether to report them for the prompt's tokens too.
        owner: whose it is: texts of others are not gone on from.
        guard: most nats of KL(steered‖plain) of a token, then chosen at a smaller strength; by ``decode`` only.
        onlooker: one of its own, who may change or end the answer; the decoder's steering must know the kind.
        stream: whether the answer is read step by step; without it, everything comes as one step at the end.
    """

    ids: Sequence[int]
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=lambda: Sampling("greedy"))
    seed: int | None = None
    stops: tuple[str, ...] = ()
    steering: tuple[Steer, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_ends: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stream: bool = False
    owner: Hashable = None
    onlooker: Onlooker | None = None
    guard: float | None = None


@dataclass(frozen=True)
class GuardedToken:
    """What a guard did about one token of an answer.

    Args:
        share: of the edits' strength at the token that it is chosen from; 0 leaves that token alone.
        kl: KL(steered‖plain) at that share in nats, of the logits before temperature.
        full_kl: the same at the whole strength.
        plain: whether no share was within the bound, so that the token is the plain row's.
    """

    share: float
    kl: float
    full_kl: float
    plain: bool


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability under the steered model, and the likeliest ones in order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """What came since the last step: text (perhaps none yet) and, where asked for, log-probabilities.

    Args:
        text: to be joined to what came before.
        logprobs: those of its tokens.
        prompt_logprobs: those of the prompt's tokens, in the first step.
        tokens: ids of what was chosen since, whether or not its text is out.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished answer.

    Args:
        text: without the prompt.
        finish_reason: ``"stop"``: an end token or a stop text; ``"length"``: no more tokens were allowed;
            ``"behavior"``: one was detected on which the answer was to end.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens that the model chose, an end token included.
        logprobs: one per token of the text, where asked for.
        prompt_logprobs: one per token of the prompt, the first None, where asked for.
        cached_tokens: tokens of the prompt that were not read, since a text before began alike.
        tokens: ids of what was chosen.
        stop: the stop text, or the id among ``stop_token_ids``, that ended it; None for anything else.
    """

    text: str
    finish_reason: Literal["stop", "length", "behavior"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0
    tokens: tuple[int, ...] = ()
    stop: str | int | None = None
