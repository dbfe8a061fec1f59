"""Citations: for each sentence of an answer the sentences of its sources that it rests on, ranked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from .answer import MAX_TOKENS, read_answer
from .documents import as_documents, sentences

__all__ = ["cite"]


def cite(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    prompt: str,
    answer: str | None,
    sources: Sequence[Any],
    *,
    question: str | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """What ``raag.cite`` returns.

    Args:
        model: a Hugging Face or TransformerLens model.
        tokenizer: its tokenizer, a fast one.
        prompt: the text between the sources and the answer.
        answer: the answer; None to have it written.
        sources: texts, or mappings with ``text`` and perhaps ``id``.
        question: what sources are ranked by where not all fit; by default the prompt.
        max_tokens: most tokens of an answer that is written.
        seed: of the shuffled sources.

    Raises:
        ValidationError: a prompt, an answer or a source without text, or sources that don't fit.
    """
    for name, text in (("prompt", prompt), ("answer", "x" if answer is None else answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValidationError(f"{name} is a text with at least one word; got {text!r:.80}.")
    if isinstance(sources, str):
        raise ValidationError("sources is a list of texts; got one text: put it in a list.")
    docs = as_documents(list(sources))
    data = read_answer(
        adapter_for(model),
        tokenizer,
        prompt.strip(),
        prompt if question is None else question,
        answer,
        docs,
        max_tokens=max_tokens,
        chunk_tokens=None,
        seed=seed,
    )
    return {
        "answer": data["answer"],
        "sentences": [_cited(data, start, end) for start, end in sentences(data["answer"])],
        "retrieval": data["retrieval"],
    }


def _cited(data: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """One sentence of the answer with the chunks that cost it something, dearest first."""
    bundle, scores = data["bundle"], data["scores"]
    tokens = _tokens(bundle["answer_tokens"][0], start, end)
    validated = data["validated"]["validated_edges"]
    n_prompt = len(bundle["prompt_tokens"][0])
    rows = scores["removed"] if scores["blocked"] is None else scores["blocked"]
    citations = []
    for span, row, removed in zip(bundle["chunk_spans"], rows, scores["removed"], strict=True):
        score = math.fsum(row[i] for i in tokens)
        if score <= 0:
            continue
        edges = [edge for i in tokens for edge in validated.get(str(n_prompt + i), [])]
        citations.append(
            {
                "source": span["doc_id"],
                "text": span["text"],
                "score": score,
                "removed": None if None in removed else math.fsum(removed[i] for i in tokens),
                "validated": any(edge["chunk_global_id"] == span["chunk_global_id"] for edge in edges),
            }
        )
    citations.sort(key=lambda one: -one["score"])
    return {"text": data["answer"][start:end].strip(), "start": start, "end": end, "citations": citations}


def _tokens(texts: Sequence[str], start: int, end: int) -> list[int]:
    """The answer's tokens that begin in a range of its characters; the space before the answer isn't counted."""
    place = len("".join(texts).lstrip()) - len("".join(texts))
    found = []
    for i, text in enumerate(texts):
        middle = place + len(text) - len(text.lstrip())
        if start <= middle < end or (middle < start and place + len(text) > start):
            found.append(i)
        place += len(text)
    return found
