"""From tokens to text while they come: whole characters only, spaces as written, stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Continuation"]

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
        stop: texts that end the continuation; the first one found is cut off with all that follows.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._context, self._read = 0, len(self._ids)
        self._stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._ended = False
        self._given = 0

    @property
    def given(self) -> int:
        """Characters that were given out as pieces."""
        return self._given

    def feed(self, token: int) -> None:
        """Takes one more token; ``stopped`` tells whether a stop text has come."""
        self._ids.append(token)
        self._advance(final=False)

    def piece(self) -> str:
        """The text since the last piece; an end that may be the start of a stop text is kept back."""
        safe = len(self.text) - (0 if self.stopped or self._ended else self._pending())
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
        if len(now) <= len(before) or (now.endswith(_INCOMPLETE) and not final):
            return
        start = max(len(self.text) - max(map(len, self._stop), default=0), 0)
        self.text += now[len(before) :]
        self._context, self._read = self._read, len(self._ids)
        found = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _pending(self) -> int:
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
