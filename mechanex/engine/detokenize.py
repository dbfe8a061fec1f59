"""From tokens to text while they come: whole characters only, spaces as written, stop texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Continuation", "special_tokens"]

# Enough tokens of the prompt to decide how the first new one is joined to it (a space, a byte of a
# character).
_CONTEXT = 6
_INCOMPLETE = "\ufffd"


class Continuation:
    """The text that follows a prompt, built token by token.

    New tokens are decoded behind some earlier ones and the difference is taken, because tokenizers drop the
    space at the start of what they decode, and because a character may take several tokens.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: the tokens that come before.
        stop: texts that end the continuation; the first one found is cut off with all that follows. Special tokens,
            which are no part of the text, are found by a stop text that has one in it, such as ``<|im_end|>``.
        include_stop: whether the stop text that ends the continuation stays in it.
        skip_special_tokens: whether special tokens are no part of the text.
        min_tokens: new tokens in whose text no stop text is looked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer, self._skips_special = tokenizer, skip_special_tokens
        self._includes_stop, self._n_exempt = include_stop, min_tokens
        # Characters of the text, and of that with special tokens, in which no stop text is looked for.
        self._exempt, self._exempt_marked = 0, 0
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._context, self._read = 0, len(self._ids)
        marks = special_tokens(tokenizer) if stop else {}
        # Only those that decoding leaves out: the others are text.
        self._marks = {
            token: mark
            for token, mark in marks.items()
            if any(mark in text for text in stop) and not self._decode([token])
        }
        self._marked_stops = tuple(
            text for text in stop if any(mark in text for mark in self._marks.values())
        )
        self._stops = tuple(text for text in stop if text not in self._marked_stops)
        # The text with those special tokens written out, and where they stand in it.
        self._marked, self._spans = "", list[tuple[int, int]]()
        self.text = ""
        self.stopped = False
        self.stop: str | None = None
        """The stop text that ended it."""
        self._ended = False
        self._given = 0

    @property
    def given(self) -> int:
        """Characters that were given out as pieces."""
        return self._given

    def feed(self, token: int) -> int:
        """Takes one more token; ``stopped`` tells whether a stop text has come.

        Returns:
            The place in the text where the token's own text begins.
        """
        mark, begin = self._marks.get(token), len(self.text)
        self._ids.append(token)
        self._n_exempt -= 1
        # No character goes on behind a special token.
        self._advance(final=mark is not None)
        if mark is None or self.stopped:
            return begin
        begin = len(self.text)
        self._spans.append((len(self._marked), len(self._marked) + len(mark)))
        self._add("", mark)
        return begin

    def feed_all(self, tokens: Sequence[int]) -> None:
        """Takes tokens whose texts nobody needs one by one, where there are no stop texts."""
        self._ids += tokens
        self._advance(final=False)

    def piece(self) -> str:
        """The text since the last piece; an end that may be the start of a stop text is kept back."""
        safe = len(self.text) if self.stopped or self._ended else self._safe()
        piece, self._given = self.text[self._given : safe], max(self._given, safe)
        return piece

    def finish(self) -> None:
        """Ends the text; an incomplete last character becomes U+FFFD."""
        if not self.stopped:
            self._advance(final=True)
        self._ended = True

    def _advance(self, *, final: bool) -> None:
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_INCOMPLETE) and not final:
            return
        begin = len(before)
        if not now.startswith(before):  # the prompt ends in the middle of a character, which is whole now
            begin = len(before.rstrip(_INCOMPLETE))
        if len(now) <= begin:
            return
        self._context, self._read = self._read, len(self._ids)
        self._add(now[begin:], now[begin:])

    def _add(self, text: str, marked: str) -> None:
        """Adds to the text, and to the one with special tokens, and ends it at the first stop text that came."""
        found: list[tuple[int, int, str]] = []  # where it begins in the text and where it ends
        if self._marked_stops:
            start = max(len(self._marked) - max(map(len, self._marked_stops)), self._exempt_marked)
            self._marked += marked
            places = ((self._marked.find(stop, start), stop) for stop in self._marked_stops)
            found += [
                (self._unmarked(at), self._unmarked(at + len(stop)), stop) for at, stop in places if at >= 0
            ]
        start = max(len(self.text) - max(map(len, self._stops), default=0), self._exempt)
        self.text += text
        places = ((self.text.find(stop, start), stop) for stop in self._stops)
        found += [(at, at + len(stop), stop) for at, stop in places if at >= 0]
        if self._n_exempt >= 0:
            self._exempt, self._exempt_marked = len(self.text), len(self._marked)
        elif found:
            begin, end, self.stop = min(found)
            self.text, self.stopped = self.text[: end if self._includes_stop else begin], True

    def _unmarked(self, place: int) -> int:
        """The place in the text of one in the text with special tokens."""
        return place - sum(min(end, place) - begin for begin, end in self._spans if begin < place)

    def _safe(self) -> int:
        """How much of the text can't be part of a stop text that is still to come whole."""
        safe = len(self.text) - _begun(self.text, self._stops)
        if self._marked_stops:
            safe = min(safe, self._unmarked(len(self._marked) - _begun(self._marked, self._marked_stops)))
        return safe

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False
            )
        )


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the text's end that one of the stop texts begins with."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """A tokenizer's special tokens by id, as they are written."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    try:
        added = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # mistral-common's has none
        return found
    if isinstance(added, Mapping):
        found |= {int(token): mark.content for token, mark in added.items() if mark.special}
    return found
