"""From text, token ids or chat messages to token ids, with the boundary between prompt and completion."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ValidationError

__all__ = ["Prompt", "encode_pair", "encode_prompt", "prompt_text"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

_log = logging.getLogger(__name__)
_warned_joins: set[str] = set()


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as text: itself, the chat template's rendering of messages, or the decoded ids.

    Raises:
        ValidationError: chat messages for a tokenizer without a template, or something else than a prompt.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValidationError(f"A prompt is text, token ids or chat messages; got {type(prompt).__name__}.")
    if _is_chat(prompt):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValidationError(
                "The prompt is chat messages, but the tokenizer has no chat template; pass text."
            )
        return str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
    return str(tokenizer.decode(_ids(prompt)))


def _ids(prompt: Sequence[Any]) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValidationError(f"Expected text or a list of token ids; got {type(prompt).__name__}.")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValidationError(f"A prompt given as token ids must hold ints of 0 or more; got {token!r}.")
    return list(prompt)


def _raw_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationError(
            f"A text holds half of a surrogate pair at character {error.start}, which is no character: check how it "
            "was decoded."
        ) from None
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids, with the tokenizer's own special tokens but never a second BOS, and no EOS that it appended."""
    ids = _raw_ids(tokenizer, text, special)
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    while special and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        del ids[0]
    if eos is None:
        return ids
    written, mark = text, getattr(tokenizer, "eos_token", None)
    ends = 0
    while mark and written.endswith(mark):
        written, ends = written[: -len(mark)], ends + 1
    # With one token for both ends, a single one is the BOS of an empty text and stays.
    if ids[-1 - ends :] == [eos] * (ends + 1) and (len(ids) > 1 or eos != bos):
        del ids[-1]
    return ids


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: the tokenizer's special tokens once, no EOS at its end.

    Args:
        tokenizer: a transformers tokenizer; not needed for token ids.
        prompt: text, token ids (taken as they are) or chat messages (rendered by the tokenizer's template).

    Raises:
        ValidationError: not a prompt, or chat messages without a template.
    """
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and not _is_chat(prompt):
        return _ids(prompt)
    # A chat template writes the special tokens that it wants.
    return _encode(_needed(tokenizer), prompt_text(tokenizer, prompt), not _is_chat(prompt))


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValidationError(
            "This needs a tokenizer: pass tokenizer=…, or give prompts and completions as token ids."
        )
    return tokenizer


def encode_pair(
    tokenizer: Any, prompt: Prompt, completion: str | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion.

    Both are encoded together and split where the prompt's tokens end. Where a token would span the join,
    they are encoded apart, which is logged once per tokenizer. Spaces that end the prompt go to the completion.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text, token ids or chat messages.
        completion: text or token ids.

    Returns:
        (prompt ids, completion ids), neither empty.

    Raises:
        ValidationError: the completion is empty, or the prompt is and there is no BOS to predict from.
    """
    if not isinstance(completion, str):
        ids, answer = encode_prompt(tokenizer, prompt), _ids(completion)
    elif not isinstance(prompt, str) and isinstance(prompt, Sequence) and not _is_chat(prompt):
        ids, answer = _ids(prompt), _continuation(_needed(tokenizer), completion)
    else:
        text, special = prompt_text(_needed(tokenizer), prompt), not _is_chat(prompt)
        ids, answer = _encode_texts(tokenizer, text, completion, special)
    if not answer:
        raise ValidationError(f"The completion {completion!r} has no tokens; give at least one.")
    if not ids:
        raise ValidationError(
            "The prompt has no tokens and the tokenizer adds no BOS, so nothing comes before the completion; "
            "give a prompt."
        )
    return ids, answer


def _encode_texts(tokenizer: Any, prompt: str, completion: str, special: bool) -> tuple[list[int], list[int]]:
    if not completion:
        return _encode(tokenizer, prompt, special), []
    bare = prompt.rstrip(" ")
    completion, prompt = prompt[len(bare) :] + completion, bare
    ids = _encode(tokenizer, prompt, special)
    whole = _encode(tokenizer, prompt + completion, special)
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return ids, whole[len(ids) :]
    name = getattr(tokenizer, "name_or_path", "")
    if name not in _warned_joins:
        _warned_joins.add(name)
        # Texts may be private, and a server's log is read by others.
        _log.warning(
            "A token spans the join of a prompt and its completion (such pairs are encoded separately); the texts are "
            "logged at level DEBUG."
        )
        _log.debug("It spans the join of %r and %r.", prompt[-20:], completion[:20])
    return ids, _continuation(tokenizer, completion)


def _continuation(tokenizer: Any, completion: str) -> list[int]:
    return _raw_ids(tokenizer, completion, False)
