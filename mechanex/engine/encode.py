"""From a text to token ids: the tokenizer's special tokens once, and none at its end that nobody wrote."""

from __future__ import annotations

from typing import Any

from ..errors import ValidationError

__all__ = ["check_characters", "encode_bare", "encode_text"]


def check_characters(text: str) -> None:
    """Refuses half of a surrogate pair, which no tokenizer takes: a ValidationError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationError(
            f"A text holds half of a surrogate pair at character {error.start}, which is no character: check how it "
            "was decoded."
        ) from None


def encode_bare(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids as the tokenizer gives them, by default without the special tokens that it adds."""
    check_characters(text)
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with the tokenizer's own special tokens but never a second BOS, and no end that it appended."""
    ids = encode_bare(tokenizer, text, special=True)
    bos = getattr(tokenizer, "bos_token_id", None)
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        del ids[0]
    # The kind of BERT ends a text with a separator.
    for name in ("eos_token", "sep_token"):
        mark, end = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
        # With one token for both ends, a single one is the BOS of an empty text and stays.
        if end is not None and (len(ids) > 1 or end != bos) and _is_appended(ids, end, text, mark):
            del ids[-1]
    return ids


def _is_appended(ids: list[int], end: int, text: str, mark: str | None) -> bool:
    """Whether the ids end with one token ``end`` more than the text has of its ``mark``."""
    written = 0
    while mark and text.endswith(mark):
        text, written = text[: -len(mark)], written + 1
    return ids[-1 - written :] == [end] * (written + 1)
