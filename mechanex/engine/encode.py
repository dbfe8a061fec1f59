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
    """Token ids, with the tokenizer's own special tokens but never a second BOS, and no EOS that it appended."""
    ids = encode_bare(tokenizer, text, special=True)
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
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
