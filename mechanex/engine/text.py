"""From text, token ids or chat messages to token ids, with the boundary between prompt and completion."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ValidationError
from .chat import Chat, chat_ids, chat_text
from .encode import check_characters, encode_text
from .joins import continue_ids, split_texts
from .whole import as_whole

__all__ = ["Prompt", "as_chat", "encode_pair", "encode_pairs", "encode_prompt", "prompt_text"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Chat


def as_chat(prompt: Prompt) -> Chat | None:
    """The prompt as a chat, or None where it is text or token ids."""
    if isinstance(prompt, Chat):
        return prompt
    if isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
        return Chat(prompt)  # type: ignore[arg-type]
    return None


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as text: itself, the chat template's rendering of messages, or the decoded ids.

    Raises:
        ValidationError: a chat that the tokenizer has no template for or that its template refuses, or something
            else than a prompt.
    """
    if isinstance(prompt, str):
        return prompt
    chat = as_chat(prompt)
    if chat is not None:
        return chat_text(_needed(tokenizer), chat)
    return str(_needed(tokenizer).decode(_ids(prompt)))


def _ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValidationError(
            f"A prompt is text, token ids or chat messages, a completion text or token ids; got "
            f"{type(prompt).__name__}."
        )
    # Most ids are Python's own ints, and a list of thousands is told at once.
    if set(map(type, prompt)) == {int} and min(prompt) >= 0:
        return list(prompt)
    ids = []
    for token in prompt:
        found = as_whole(token)
        if found is None or found < 0:
            raise ValidationError(f"A prompt given as token ids must hold ints of 0 or more; got {token!r}.")
        ids.append(found)
    return ids


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: the tokenizer's special tokens once, no EOS at its end.

    Args:
        tokenizer: a transformers tokenizer; not needed for token ids.
        prompt: text, token ids (taken as they are) or chat messages (as the tokenizer's template writes them).

    Raises:
        ValidationError: not a prompt, or a chat without a template or that the template refuses.
    """
    if isinstance(prompt, str):
        return encode_text(_needed(tokenizer), prompt)
    chat = as_chat(prompt)
    if chat is None:
        return _ids(prompt)
    for message in chat.messages:
        if isinstance(content := message.get("content"), str):
            check_characters(content)
    # A chat template writes the special tokens that it wants.
    return chat_ids(_needed(tokenizer), chat)


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValidationError(
            "This needs a tokenizer: pass tokenizer=… (a client gets one by set_local_model(model, tokenizer)), or "
            "give prompts and completions as token ids."
        )
    return tokenizer


def encode_pair(
    tokenizer: Any, prompt: Prompt, completion: str | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion.

    Both are encoded together and split where the prompt's tokens end. Whitespace that ends a text prompt, newlines too,
    goes to the completion; token ids and chats end as they are. Where a token would span the join, the completion's
    tokens are those that continue the prompt's, which is logged once per tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text, token ids or chat messages.
        completion: text or token ids.

    Returns:
        (prompt ids, completion ids), neither empty.

    Raises:
        ValidationError: the completion is empty, or the prompt is and there is no BOS to predict from.
    """
    return encode_pairs(tokenizer, [(prompt, completion)])[0]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]
) -> list[tuple[list[int], list[int]]]:
    """:func:`encode_pair` of each pair; a prompt that comes again is encoded once."""
    text_ids = functools.cache(lambda text: encode_text(tokenizer, text))
    known: dict[int, list[int]] = {}

    def prompt_ids(prompt: Prompt) -> list[int]:
        if id(prompt) not in known:
            known[id(prompt)] = encode_prompt(tokenizer, prompt)
        return known[id(prompt)]

    found = []
    for prompt, completion in pairs:
        if not isinstance(completion, str):
            ids, answer = prompt_ids(prompt), _ids(completion)
        elif isinstance(prompt, str):
            ids, answer = split_texts(_needed(tokenizer), prompt, completion, text_ids)
        else:
            ids = prompt_ids(prompt)
            answer = continue_ids(_needed(tokenizer), ids, completion) if completion else []
        if not answer:
            raise ValidationError(f"The completion {completion!r} has no tokens; give at least one.")
        if not ids:
            raise ValidationError(
                "The prompt has no tokens and the tokenizer adds no BOS, so nothing comes before the completion; "
                "give a prompt."
            )
        found.append((ids, answer))
    return found
