"""Between texts and tokens: prompts encoded off the model's thread, single tokens as what they stand for."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from ...engine.chat import Chat, has_chat_template
from ...engine.detokenize import special_tokens
from ...engine.text import Prompt, as_chat, encode_prompt, prompt_text
from ...errors import ValidationError

__all__ = ["PromptEncoder", "TokenTexts"]

_SHORT = 1000  # characters or tokens


class PromptEncoder:
    """Encodes and decodes; its methods block, and may be called from any thread.

    Args:
        tokenizer: a copy is used, since a tokenizer changes while it encodes.
        context: tokens that the model takes, or None.
        model_name: for messages.
    """

    def __init__(self, tokenizer: Any, context: int | None, model_name: str) -> None:
        self._tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()
        self._context, self._model_name = context, model_name
        # The most characters that one token can stand for.
        self._longest = max((len(text) for text in self._tokenizer.get_vocab()), default=1)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ValidationError as :func:`mechanex.engine.text.encode_prompt`, or a text too long."""
        if isinstance(prompt, str):
            self.check_size(prompt)
        elif (chat := as_chat(prompt)) is not None:
            self.check_size("".join(str(message.get("content", "")) for message in chat.messages))
        with self._lock:
            return encode_prompt(self._tokenizer, prompt)

    def encode_soon(self, prompt: Prompt) -> list[int] | None:
        """As ``encode``, for a prompt that takes no longer than handing it to another thread; None for one that may."""
        if isinstance(prompt, Chat) or as_chat(prompt) is not None or len(prompt) > _SHORT:
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return encode_prompt(self._tokenizer, prompt)
        finally:
            self._lock.release()

    def text(self, prompt: Prompt) -> str:
        """A prompt that ``encode`` took, as text: itself, the template's rendering of messages, or decoded ids."""
        with self._lock:
            return prompt_text(self._tokenizer, prompt)

    def encode_chat(self, chat: Chat) -> list[int]:
        """Token ids of a chat: by the model's template, or as lines of roles where it has none.

        Raises:
            ValidationError: messages that the template refuses.
        """
        if has_chat_template(self._tokenizer):
            return self.encode(chat)
        lines = [f"{message['role'].capitalize()}: {message['content']}" for message in chat.messages]
        if chat.begins_answer:
            lines.append("Assistant:")
        return self.encode(
            "\n".join(lines) + ("" if chat.begins_answer or chat.continue_final_message else "\n")
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        with self._lock:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def check_size(self, text: str) -> None:
        """Refuses a text that can't fit before it is encoded, which may take seconds: a ValidationError."""
        if self._context is not None and len(text) > (self._context + 1) * self._longest:
            raise ValidationError(
                f"the prompt has {len(text)} characters, more than the {self._context} tokens of "
                f"{self._model_name}'s context can hold: shorten the prompt.",
                details={"code": "context_length_exceeded"},
            )


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Texts of tokens by id; for one thread.

    Args:
        tokenizer: a transformers tokenizer of one's own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(special_tokens(tokenizer))
        self._known: dict[int, tuple[str, bytes]] = {}
        # Decoders drop a space at the start of a text, so each token is decoded behind another one.
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self._before = self._decode(self._anchor)

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """The token's text and bytes; a text such as ``bytes:\\xe2`` for a part of a character."""
        found = self._known.get(token)
        if found is None:
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
