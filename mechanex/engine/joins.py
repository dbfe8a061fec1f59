"""Tokens of a text that continues another one, without the space that some tokenizers put before every text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .encode import encode_bare, encode_text

__all__ = ["continue_ids", "split_texts"]

# What a text is encoded behind, to see its tokens inside a text; where one merges with the text's begin, the next is
# taken. The second is too rare to merge with anything, but unknown to some tokenizers, which join unknown characters.
_BEFORE = (".", "\u241e", "\n", "a")
# Tokenizers that mark what goes on with a word split at those above: one of these stays a token of its own.
_WITHIN = "0123456789qxzjvwkybcdefghilmnoprstu"

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def split_texts(
    tokenizer: Any, prompt: str, completion: str, encode: Callable[[str], list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the completion that continues it; whitespace that ends the prompt changes sides.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text. Where nothing but whitespace would leave it without tokens, the whitespace stays.
        completion: text.
        encode: from a text to token ids; by default with the tokenizer's special tokens.

    Returns:
        (prompt ids, completion ids); either is empty where the text gives no tokens.
    """
    encode = encode or (lambda text: encode_text(tokenizer, text))
    if not completion:
        return encode(prompt), []
    bare = prompt.rstrip()
    ids = encode(bare)
    if not ids:
        bare, ids = prompt, encode(prompt)
    completion = prompt[len(bare) :] + completion
    whole = encode(bare + completion)
    return ids, _rest(ids, whole) or _joined(tokenizer, ids, completion, whole)


def continue_ids(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Token ids of a text that continues token ids.

    Args:
        tokenizer: a transformers tokenizer.
        ids: what comes before, taken as it is.
        text: the continuation, without special tokens but those that are written in it.
    """
    ids = list(ids)
    begin = encode_text(tokenizer, "")
    begins = bool(begin) and ids[: len(begin)] == begin
    written = _decode(tokenizer, ids[len(begin) :] if begins else ids)
    encode = encode_text if begins else encode_bare
    # Ids that aren't their own text's say nothing about how that text goes on.
    whole = encode(tokenizer, written + text) if encode(tokenizer, written) == ids else []
    return _rest(ids, whole) or _joined(tokenizer, ids, text, whole)


def _rest(ids: list[int], whole: list[int]) -> list[int]:
    """What follows the ids in the tokens of the whole text; nothing where it doesn't begin with them."""
    return whole[len(ids) :] if whole[: len(ids)] == ids else []


def _joined(tokenizer: Any, ids: list[int], text: str, whole: list[int]) -> list[int]:
    """Tokens of the text where the whole text's don't begin with the ids: those that read as its continuation."""
    _warn(tokenizer, ids, text)
    wanted = {_decode(tokenizer, ids) + text, _decode(tokenizer, whole)}
    candidates = []
    for found in _candidates(tokenizer, text):
        if _decode(tokenizer, ids + found) in wanted:
            return found
        candidates.append(found)
    # A tokenizer that loses characters can't be checked by reading; inside a text it adds no space at least.
    return candidates[1] if len(candidates) > 1 else candidates[0]


def _candidates(tokenizer: Any, text: str) -> Iterator[list[int]]:
    yield encode_bare(tokenizer, text)
    for before in (*_BEFORE, *(_WITHIN if text[:1].isalnum() else "")):
        if found := _rest(encode_bare(tokenizer, before), encode_bare(tokenizer, before + text)):
            yield found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _warn(tokenizer: Any, ids: list[int], text: str) -> None:
    name = getattr(tokenizer, "name_or_path", "")
    if name not in _warned:
        _warned.add(name)
        # Texts may be private, and a server's log is read by others.
        _log.warning(
            "A token spans the join of a prompt and its completion (such completions are encoded as they continue the "
            "prompt's own tokens); the texts are logged at level DEBUG."
        )
        _log.debug("It spans the join of %r and %r.", _decode(tokenizer, ids[-20:]), text[:20])
