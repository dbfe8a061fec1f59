"""Which documents are read: the best by BM25 where not all fit, or what a Pinecone index finds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import MechanexError, NotFoundError, ValidationError
from ...extras import install_line
from .documents import Chunk, ChunkedPrompt

__all__ = ["fitting", "from_pinecone"]

_TOP = 10
_NAMESPACE = "__default__"  # Pinecone's name for the one that every index has


def fitting(
    chunks: Sequence[Chunk],
    question: str,
    room: int | None,
    lay_out: Callable[[Sequence[Chunk]], ChunkedPrompt],
) -> tuple[ChunkedPrompt, dict[str, Any]]:
    """The prompt with all chunks, or with as many of the best by BM25 as fit.

    Args:
        chunks: in order.
        question: what they are ranked by.
        room: most tokens of the prompt; None for no limit.
        lay_out: from chunks to a prompt.

    Returns:
        The prompt, and ``{"method": "all" or "bm25", "left_out": [chunk ids]}``.

    Raises:
        ValidationError: not even the best chunk fits, or bm25s isn't installed.
    """
    whole = lay_out(chunks)
    if room is None or len(whole.ids) <= room:
        return whole, {"method": "all", "left_out": []}
    ranked = _ranked(chunks, question, len(whole.ids), room)
    sizes = {chunk.id: end - first for chunk, (first, end) in zip(whole.chunks, whole.spans, strict=True)}
    left = room - (len(whole.ids) - sum(sizes.values()))
    kept = set()
    for chunk in ranked:
        if sizes[chunk.id] > left:
            break
        kept.add(chunk.id)
        left -= sizes[chunk.id]
    while kept:
        found = lay_out([chunk for chunk in chunks if chunk.id in kept])
        if len(found.ids) <= room:
            break
        # Tokens at the joins may be others than in the whole.
        kept.remove(next(chunk.id for chunk in reversed(ranked) if chunk.id in kept))
    else:
        raise ValidationError(
            f"not even the best chunk of {sizes[ranked[0].id]} tokens fits before the question: the model's context "
            f"leaves {max(room, 0)} tokens for the prompt. Ask for a shorter answer or smaller chunks (chunk_tokens)."
        )
    return found, {"method": "bm25", "left_out": [chunk.id for chunk in chunks if chunk.id not in kept]}


def _ranked(chunks: Sequence[Chunk], question: str, size: int, room: int) -> list[Chunk]:
    try:
        import bm25s
    except ImportError:
        raise ValidationError(
            f"the documents and the question have {size} tokens and the model has room for {room}: give fewer "
            f"documents, or let BM25 choose among them: {install_line('raag')}."
        ) from None
    texts = [*(chunk.text for chunk in chunks), question]
    words = bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
    scores = [0.0] * len(chunks)
    if words[-1] and any(words[:-1]):
        index = bm25s.BM25()
        index.index(words[:-1], show_progress=False)
        scores = index.get_scores(words[-1]).tolist()
    order = sorted(range(len(chunks)), key=lambda i: -scores[i])
    return [chunks[i] for i in order]


def from_pinecone(index_name: str, question: str) -> list[tuple[Any, str]]:
    """(id, text) of what a Pinecone index that embeds texts itself finds for a question.

    Args:
        index_name: an index of the account whose key ``PINECONE_API_KEY`` holds; its records have a field ``text``.
        question: what is searched for.

    Raises:
        ValidationError: the client isn't installed, or there is no key.
        NotFoundError: no such index, or it finds nothing with text.
        MechanexError: whatever Pinecone says.
    """
    try:
        import pinecone
    except ImportError:
        raise ValidationError(
            f"the Pinecone index {index_name!r} needs Pinecone's client, which is not installed: "
            "pip install pinecone, or give docs."
        ) from None
    key = os.environ.get("PINECONE_API_KEY")
    if not key:
        raise ValidationError(
            f"the Pinecone index {index_name!r} needs a key: set PINECONE_API_KEY, or give docs."
        )
    try:
        client = pinecone.Pinecone(api_key=key)
        there = client.has_index(index_name)
        found = (
            client.Index(index_name).search(
                namespace=_NAMESPACE, query={"inputs": {"text": question}, "top_k": _TOP}
            )
            if there
            else None
        )
    except Exception as error:  # its client has many kinds, which change
        raise MechanexError(f"Pinecone did not answer for the index {index_name!r}: {error}") from error
    if found is None:
        raise NotFoundError(
            f"there is no Pinecone index {index_name!r} for this key: check its name, or give docs."
        )
    hits = _of(_of(found, "result"), "hits") or []
    read = [(_of(hit, "_id") or _of(hit, "id"), (_of(hit, "fields") or {}).get("text")) for hit in hits]
    docs = [(name, text) for name, text in read if isinstance(text, str) and text.strip()]
    if not docs:
        raise NotFoundError(
            f"the Pinecone index {index_name!r} found nothing with a field 'text' for the question: check its records."
        )
    return docs


def _of(value: Any, name: str) -> Any:
    """A part of an answer, which is an object or a mapping as the client's version has it."""
    if value is None:
        return None
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
