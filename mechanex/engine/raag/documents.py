"""Documents cut into chunks by the tokenizer's offsets, and laid out before a question."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ValidationError
from ..encode import encode_text
from ..pauses import pause
from .knockouts import Span

__all__ = [
    "CHUNK_TOKENS",
    "Chunk",
    "ChunkedPrompt",
    "as_documents",
    "lay_out",
    "question_text",
    "sentences",
    "split_documents",
]

CHUNK_TOKENS = 64
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+|\n+")  # noqa: RUF001
_TEXT_KEYS = ("text", "content")


@dataclass(frozen=True)
class Chunk:
    """A part of a document.

    Attributes:
        id: its number among all chunks of all documents.
        document: number of its document.
        document_id: the id that the document came with, or its number.
        start, end: characters of the document.
        text: those characters.
    """

    id: int
    document: int
    document_id: Any
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class ChunkedPrompt:
    """A prompt made of chunks and a question.

    Attributes:
        text: the prompt.
        ids: its token ids.
        chunks: what stands in it, in order.
        spans: the tokens of each chunk.
    """

    text: str
    ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    spans: tuple[Span, ...]


def as_documents(docs: Sequence[Any]) -> list[tuple[Any, str]]:
    """(id, text) of each document.

    Args:
        docs: texts, or mappings with ``text`` (or ``content``) and perhaps ``id``.

    Raises:
        ValidationError: no documents, or one without text.
    """
    if not docs:
        raise ValidationError("docs has no documents; give at least one with text.")
    found = []
    for i, doc in enumerate(docs):
        text: Any = doc
        if isinstance(doc, Mapping):
            text = next((doc[key] for key in _TEXT_KEYS if key in doc), None)
        if not isinstance(text, str) or not text.strip():
            raise ValidationError(
                f"document {i} has no text: a document is a text, or an object with a text under 'text'; "
                f"got {doc!r:.80}."
            )
        found.append((doc.get("id", i) if isinstance(doc, Mapping) else i, text))
    return found


def split_documents(tokenizer: Any, docs: Sequence[tuple[Any, str]], chunk_tokens: int | None) -> list[Chunk]:
    """Whole sentences up to ``chunk_tokens`` together; a longer one is cut between two tokens.

    Args:
        tokenizer: a fast transformers tokenizer.
        docs: from :func:`as_documents`.
        chunk_tokens: most tokens of a chunk; None for one sentence each, however long.
    """
    chunks: list[Chunk] = []
    for number, (document_id, text) in enumerate(docs):
        pause()
        _, offsets = _encode(tokenizer, text)
        for start, end in _cut(text, offsets, chunk_tokens):
            while start < end and text[start].isspace():
                start += 1
            while end > start and text[end - 1].isspace():
                end -= 1
            if start < end:
                chunks.append(Chunk(len(chunks), number, document_id, start, end, text[start:end]))
    return chunks


def sentences(text: str) -> list[Span]:
    """Character ranges of a text's sentences, without those of whitespace alone."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    found = zip([0, *ends], [*ends, len(text)], strict=True)
    return [(start, end) for start, end in found if text[start:end].strip()]


def question_text(question: str) -> str:
    """How a question stands behind the documents."""
    return f"Question: {question.strip()} Answer:"


def lay_out(
    tokenizer: Any, chunks: Sequence[Chunk], asked: str, docs: Sequence[tuple[Any, str]]
) -> ChunkedPrompt:
    """The chunks in order, then what is asked; neighbours of one document keep what stands between them.

    Args:
        tokenizer: a fast transformers tokenizer.
        chunks: at least one.
        asked: the text between the documents and the answer.
        docs: what the chunks are parts of.

    Raises:
        ValidationError: the tokenizer doesn't tell which characters its tokens are.
    """
    text, places = "", []
    before: Chunk | None = None
    for chunk in chunks:
        if before is not None:
            near = before.document == chunk.document and before.id + 1 == chunk.id
            text += docs[chunk.document][1][before.end : chunk.start] if near else " "
        places.append((len(text), len(text) + len(chunk.text)))
        text, before = text + chunk.text, chunk
    text += f" {asked}"
    ids, offsets = _encode(tokenizer, text)
    spans, first = [], 0
    for start, end in places:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(offsets) and max(offsets[last][0], start) < min(offsets[last][1], end):
            last += 1
        spans.append((first, last))
        first = last
    if any(first == last for first, last in spans) or spans[-1][1] >= len(ids):
        raise ValidationError(
            "a chunk has no token of its own in the prompt: make chunk_tokens larger, or leave out documents of "
            "single characters."
        )
    return ChunkedPrompt(text, tuple(ids), tuple(chunks), tuple(spans))


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Token ids as everywhere, and the characters of each; (0, 0) for special tokens."""
    ids = encode_text(tokenizer, text)
    try:
        found = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
        whole, offsets = list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]
    except (NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise ValidationError(
            f"chunks need a tokenizer that tells the characters of its tokens, and {type(tokenizer).__name__} "
            "doesn't: load the model with a fast tokenizer (use_fast=True)."
        ) from error
    skipped = next((i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids), 0)
    return ids, offsets[skipped : skipped + len(ids)]


def _cut(text: str, offsets: Sequence[Span], most: int | None) -> list[Span]:
    """Character ranges of the chunks of one document."""
    whole = sentences(text)
    if most is None:
        return whole
    found: list[Span] = []
    held = 0
    spans = sorted((first, last) for first, last in offsets if first < last)
    firsts, lasts = [first for first, _ in spans], [last for _, last in spans]
    for start, end in whole:
        tokens = spans[bisect_right(lasts, start) : bisect_left(firsts, end)]
        if found and held and held + len(tokens) <= most:
            found[-1] = (found[-1][0], end)
            held += len(tokens)
            continue
        pieces = [tokens[i : i + most] for i in range(0, len(tokens), most)]
        for i, piece in enumerate(pieces):
            first = start if i == 0 else piece[0][0]
            last = end if i + 1 == len(pieces) else pieces[i + 1][0][0]
            if first < last:
                found.append((first, last))
        held = len(pieces[-1]) if pieces else 0
    return found
