"""Between texts and tokens: prompts encoded off the model's thread."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from typing import Any

from ...engine.chat import Chat, has_chat_template
from ...engine.chat_content import chat_as_text, check_roles, known_roles
from ...engine.encode import encode_bare
from ...engine.text import Prompt, as_chat, encode_pair, encode_prompt, prompt_text
from ...errors import ValidationError

__all__ = ["PromptEncoder"]

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
        self._roles = known_roles(self._tokenizer)
        # The most characters that one token can stand for.
        self._longest = max((len(text) for text in self._tokenizer.get_vocab()), default=1)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ValidationError as :func:`mechanex.engine.text.encode_prompt`, or a text too long."""
        chat = as_chat(prompt)
        if isinstance(prompt, str):
            self.check_size(prompt)
        elif chat is not None:
            check_roles(chat, self._roles)
            said = "".join(str(message.get("content", "")) for message in chat.messages)
            self.check_size(said + json.dumps([*chat.tools]))
        with self._lock:
            if chat is not None and has_chat_template(self._tokenizer):
                return chat_as_text(self._tokenizer, chat)
            return encode_prompt(self._tokenizer, prompt)

    def encode_bare(self, text: str) -> list[int]:
        """Token ids of a text without what the tokenizer adds; errors as ``encode``."""
        self.check_size(text)
        with self._lock:
            return encode_bare(self._tokenizer, text)

    def n_tokens(self, text: str) -> int:
        """How many tokens a text has, or those of so much of its begin as fills the context."""
        begin = text if self._context is None else text[: (self._context + 1) * self._longest]
        with self._lock:
            return len(encode_bare(self._tokenizer, begin))

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

    def pair(self, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of an answer to it; ValidationError as :func:`mechanex.engine.text.encode_pair`, or
        one that the context can't hold."""
        self.check_size(answer)
        if isinstance(prompt, str):
            self.check_size(prompt)
        with self._lock:
            ids, more = encode_pair(self._tokenizer, prompt, answer)
        self.check_fits(len(ids) + len(more))
        return ids, more

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        with self._lock:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        with self._lock:
            return str(
                self._tokenizer.decode(
                    list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )

    def check_fits(self, tokens: int) -> None:
        """Refuses an example of more tokens than the model's context has: a ValidationError."""
        if self._context is not None and tokens > self._context:
            raise ValidationError(
                f"an example has {tokens} tokens with its answer, and {self._model_name}'s context {self._context}: "
                "shorten it.",
                details={"code": "context_length_exceeded"},
            )

    def check_size(self, text: str) -> None:
        """Refuses a text that can't fit before it is encoded, which may take seconds: a ValidationError."""
        if self._context is not None and len(text) > (self._context + 1) * self._longest:
            raise ValidationError(
                f"the prompt has {len(text)} characters, more than the {self._context} tokens of "
                f"{self._model_name}'s context can hold: shorten the prompt.",
                details={"code": "context_length_exceeded"},
            )
