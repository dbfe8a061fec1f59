"""Answers that follow a grammar: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MechanexError, ValidationError
from ...extras import install_line
from ..answering import Form, FormKind
from ..models.adapter import ModelAdapter

__all__ = ["Grammar", "GrammarState", "Grammars", "Masks", "grammars_for"]

_MOST_CHARACTERS = 100_000
_KEPT = 64
# Seconds of the processor that one mask, and the masks of one grammar's rows in a step, may take: the batch waits.
_MASK_SECONDS, _STEP_SECONDS = 0.1, 0.5
# As json.dumps writes: where whitespace is free, a model may write nothing else.
_JSON: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar that was compiled for a tokenizer; any number of rows may follow it.

    Args:
        matcher: at the begin of an answer.
        n_vocab: of the masks.
    """

    matcher: Any
    n_vocab: int

    def begin(self) -> GrammarState:
        """The state of an answer without tokens."""
        return GrammarState(self, self.matcher.deep_copy())


class GrammarState:
    """How far an answer has come in its grammar; for one thread.

    Args:
        grammar: what is followed.
        matcher: the answer's own.
    """

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self.grammar, self._matcher = grammar, matcher

    @property
    def complete(self) -> bool:
        """Whether nothing but an end can come."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """Takes the token that was chosen.

        Raises:
            MechanexError: the grammar has become too complex to follow.
        """
        if not self._matcher.consume_token(token):
            raise MechanexError(f"the answer's grammar can't be followed: {_told(self._matcher)}", 400)

    def allowed(self) -> Tensor:
        """[n_vocab] bool, which tokens may come next.

        Raises:
            MechanexError: the grammar has become too complex to follow.
        """
        words = torch.zeros((self.grammar.n_vocab + 31) // 32, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error():
            raise MechanexError(f"the answer's grammar can't be followed: {_told(self._matcher)}", 400)
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        return bits.flatten()[: self.grammar.n_vocab].bool()


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest; its methods block, and may be called from any thread.

    Args:
        tokenizer: a fast transformers tokenizer.
        n_vocab: of the model's logits.
        ends: ids of the tokens that end an answer.

    Raises:
        ValidationError: llguidance is not installed, or can't work with this tokenizer.
    """

    def __init__(self, tokenizer: Any, n_vocab: int, ends: Sequence[int]) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise ValidationError(
                f"answers in a given form need llguidance: {install_line('serve')}."
            ) from None
        if not ends:
            raise ValidationError(
                "answers in a given form need a model with an end token, and this one has none."
            )
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=n_vocab, eos_token=list(ends))
        except Exception as error:  # a tokenizer of another kind: what it raises is the library's affair
            raise ValidationError(
                f"answers in a given form need a fast tokenizer of transformers, and this model's "
                f"{type(tokenizer).__name__} can't be used: {error}"
            ) from error
        self._n_vocab = n_vocab
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[FormKind, str], Grammar] = OrderedDict()

    def compiled(self, kind: FormKind, given: Mapping[str, Any] | str | Sequence[str]) -> Grammar:
        """A grammar.

        Args:
            kind: what ``given`` is.
            given: a JSON schema, a regular expression, texts to choose from, or a grammar in Lark's form or GBNF.

        Raises:
            ValidationError: it is none, uses what llguidance can't do, or is too large.
        """
        text = given if isinstance(given, str) else json.dumps(given)
        if len(text) > _MOST_CHARACTERS:
            raise ValidationError(f"it has {len(text)} characters, and {_MOST_CHARACTERS} are taken at most.")
        key = (kind, text)
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        made = self._made(kind, given)
        with self._lock:
            self._known[key] = made
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return made

    def of_form(self, form: Form) -> Grammar:
        """As ``compiled``, of a form that an argument gives, which errors name and have as ``param``."""
        name, kind, given = form
        try:
            return self.compiled(kind, given)
        except ValidationError as error:
            raise ValidationError(
                f"Invalid value for '{name}': {error.message}", details={"param": name}
            ) from error

    def _made(self, kind: FormKind, given: Any) -> Grammar:
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json":
                source = LLMatcher.grammar_from_json_schema(given, overrides=_JSON)
            elif kind == "regex":
                source = LLMatcher.grammar_from_regex(given)
            elif kind == "choice":
                source = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in given))
            else:
                source = grammar_from("gbnf" if "::=" in given else "lark", given)
        except Exception as error:  # its own kinds, and those of its parser
            raise ValidationError(str(error)[:500]) from error
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValidationError(_told(matcher))
        made = Grammar(matcher, self._n_vocab)
        try:
            begun = time.thread_time()
            made.begin().allowed()
            if time.thread_time() - begun > 10 * _MASK_SECONDS:  # the first one is paid once
                raise _too_slow()
        except MechanexError as error:
            raise ValidationError(error.message) from error
        return made


def grammars_for(adapter: ModelAdapter, tokenizer: Any, ends: Sequence[int]) -> Grammars:
    """What compiles grammars for a model and a tokenizer, kept on the model.

    Raises:
        ValidationError: as ``Grammars``.
    """
    known: tuple[Any, tuple[int, ...], Grammars] | None = adapter.kept.grammars
    if known is None or known[0] is not tokenizer or known[1] != tuple(ends):
        made = Grammars(tokenizer, int(adapter.config.vocab_size), ends)
        known = adapter.kept.grammars = (tokenizer, tuple(ends), made)
    return known[2]


class Masks:
    """Rules out what the grammars of a batch's rows don't allow.

    Args:
        followings: one per row, or None where anything may come.
        device: where logits are.
    """

    def __init__(self, followings: Sequence[GrammarState | None], device: torch.device) -> None:
        self._rows = [i for i, one in enumerate(followings) if one is not None]
        self._followings = [one for one in followings if one is not None]
        self._device = device
        self._at = torch.tensor(self._rows, device=device) if self._rows else None

    def __call__(self, scores: Tensor) -> tuple[Tensor, dict[int, MechanexError]]:
        """The scores [rows, vocabulary] with -inf for what can't come now; rows whose grammars can't be followed.

        A grammar that would hold up the batch ends the rows that follow it, and no others.
        """
        failed: dict[int, MechanexError] = {}
        if self._at is None:
            return scores, failed
        allowed = torch.ones(len(self._rows), scores.shape[-1], dtype=torch.bool)
        spent: defaultdict[int, float] = defaultdict(float)
        for i, row, one in zip(self._rows, allowed, self._followings, strict=True):
            key = id(one.grammar)
            try:
                if spent[key] > _STEP_SECONDS:
                    raise _too_slow()
                begun = time.thread_time()
                found = one.allowed()[: scores.shape[-1]]
                took = time.thread_time() - begun
                spent[key] += math.inf if took > _MASK_SECONDS else took
                if took > _MASK_SECONDS:
                    raise _too_slow()
            except MechanexError as error:
                failed[i] = error
            else:
                row[: len(found)], row[len(found) :] = found, False
        part = scores.index_select(0, self._at).masked_fill(~allowed.to(self._device), -torch.inf)
        return scores.index_copy(0, self._at, part), failed


def _too_slow() -> MechanexError:
    return MechanexError(
        "the answer's grammar takes too long to follow: allow fewer things at once, such as fewer optional properties.",
        400,
    )


def _told(matcher: Any) -> str:
    # Behind the reason llguidance writes all of its state.
    return str(matcher.get_error()).partition("\n<state>")[0][:500] or "it went wrong"
