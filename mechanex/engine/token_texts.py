"""Single tokens as the texts and bytes that they stand for."""

from __future__ import annotations

import re
import threading
from functools import cache
from typing import Any

from .detokenize import special_tokens

__all__ = ["TokenTexts"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Texts of tokens by id, for any thread.

    Args:
        tokenizer: a transformers tokenizer of one's own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._special = frozenset(special_tokens(tokenizer))
        self._known: dict[int, tuple[str, bytes]] = {}
        # Decoders drop a space at the start of a text, so each token is decoded behind another one.
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self._before = self._decode(self._anchor)

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """The token's text and bytes; a text such as ``bytes:\\xe2`` for a part of a character."""
        found = self._known.get(token)
        if found is None:
            with self._lock:
                found = self._known[token] = self._find(token)
        return found

    def is_special(self, token: int) -> bool:
        """Whether texts are decoded without it."""
        return token in self._special

    def _find(self, token: int) -> tuple[str, bytes]:
        text = self._decode([*self._anchor, token])
        text = text[len(self._before) :] if text.startswith(self._before) else self._decode([token])
        if "\ufffd" not in text:
            return text, text.encode("utf-8", "replace")
        raw = _raw_bytes(str(self._tokenizer.convert_ids_to_tokens(token)))
        if raw is None:
            return text, text.encode("utf-8", "replace")
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _raw_bytes(piece: str) -> bytes | None:
    """The bytes of a byte-level or byte-fallback token; None for another kind."""
    single = _BYTE.fullmatch(piece)
    if single is not None:
        return bytes([int(single[1], 16)])
    table = _bytes_by_letter()
    if all(letter in table for letter in piece):
        return bytes(table[letter] for letter in piece)
    return None


@cache
def _bytes_by_letter() -> dict[str, int]:
    """The letters by which byte-level BPE (GPT-2's) writes bytes: printable ones as they are, the rest from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
