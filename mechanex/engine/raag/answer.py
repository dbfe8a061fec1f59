"""Questions answered from documents, with what each token of an answer rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..generate import Generating
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import encode_pair
from ..whole import as_whole
from .attribute import SHUFFLES, Attribution, ChunkEdge, attribute
from .documents import CHUNK_TOKENS, ChunkedPrompt, as_documents, lay_out, question_text, split_documents
from .knockouts import AnsweredPrompt
from .retrieve import fitting, from_pinecone

__all__ = ["MAX_TOKENS", "answer_questions", "check_questions", "read_answer"]

MAX_TOKENS = 64
# A model that goes on writes the next question.
_STOPS = ("\n", "Question:")


def check_questions(entries: Sequence[Any]) -> list[tuple[str, str | None]]:
    """(question, answer or None) of each entry.

    Args:
        entries: texts, or mappings with ``question`` and perhaps ``answer``.

    Raises:
        ValidationError: none, or one without a question.
    """
    if not entries:
        raise ValidationError("qa_entries is a list of questions, at least one.")
    found = []
    for i, entry in enumerate(entries):
        question, answer = (
            (entry.get("question"), entry.get("answer")) if isinstance(entry, Mapping) else (entry, None)
        )
        if not isinstance(question, str) or not question.strip():
            raise ValidationError(
                f"qa_entries[{i}] has no question: an entry is an object with a text under 'question'; "
                f"got {entry!r:.80}."
            )
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise ValidationError(
                f"qa_entries[{i}] has an answer without tokens: give a text, or leave 'answer' out to have one "
                f"written; got {answer!r:.80}."
            )
        found.append((question, answer))
    return found


def answer_questions(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    qa_entries: Sequence[Any],
    docs: Sequence[Any] | None = None,
    pinecone_index_name: str | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    chunk_tokens: int | None = CHUNK_TOKENS,
    n_removed: int | None = None,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> dict[str, Any]:
    """Answers each question from the documents, in the wire's shape.

    Args:
        model: a Hugging Face or TransformerLens model.
        tokenizer: its tokenizer, a fast one; None where the model carries it.
        qa_entries: ``{"question": …}``, with ``"answer"`` where it is given rather than written.
        docs: ``{"text": …}``, with ``"id"`` where it has one; or
        pinecone_index_name: the Pinecone index that is searched.
        max_tokens: most tokens of an answer that is written (greedily).
        chunk_tokens: most tokens of a chunk of whole sentences; None for a chunk for each sentence.
        n_removed: how many of the best candidates are removed too; None for eight.
        seed: of the shuffled chunks.
        shuffles: how many shuffled readings an edge is held against.

    Raises:
        ValidationError: a question, an answer or a document without text, or documents that don't fit and can't be
            chosen from.
        NotFoundError: there is no such index.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    questions = check_questions(qa_entries)
    if (docs is None) == (pinecone_index_name is None):
        got = "neither" if docs is None else "both"
        raise ValidationError(f"the documents come from docs or from pinecone_index_name; got {got}.")
    given = None if docs is None else as_documents(docs)
    by_question: dict[str, Any] = {}
    for i, (question, answer) in enumerate(questions):
        found = given if given is not None else from_pinecone(str(pinecone_index_name), question)
        by_question[str(i)] = read_answer(
            adapter,
            tokenizer,
            question_text(question),
            question,
            answer,
            found,
            max_tokens=max_tokens,
            chunk_tokens=chunk_tokens,
            n_removed=n_removed,
            seed=seed,
            shuffles=shuffles,
        )
    return {
        "answers": [one["answer"] for one in by_question.values()],
        "data_by_question": by_question,
        **{
            name: [one["bundle"][name][0] for one in by_question.values()]
            for name in ("prompt_tokens", "answer_tokens")
        },
    }


def read_answer(
    adapter: ModelAdapter,
    tokenizer: Any,
    asked: str,
    question: str,
    answer: str | None,
    docs: Sequence[tuple[Any, str]],
    *,
    max_tokens: int = MAX_TOKENS,
    chunk_tokens: int | None = CHUNK_TOKENS,
    n_removed: int | None = None,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> dict[str, Any]:
    """One question's answer and what it rests on, as ``data_by_question`` holds it.

    Args:
        adapter, tokenizer: the model.
        asked: the text between the documents and the answer.
        question: what documents are ranked by where not all fit.
        answer: as given; None to have it written.
        docs: (id, text) of each document.
        max_tokens, chunk_tokens, n_removed, seed, shuffles: as for :func:`answer_questions`.

    Raises:
        ValidationError: as there, and an answer without tokens.
    """
    max_tokens = _at_least("max_tokens", max_tokens, 1)
    chunk_tokens = None if chunk_tokens is None else _at_least("chunk_tokens", chunk_tokens, 1)
    n_removed = None if n_removed is None else _at_least("n_removed", n_removed, 0)
    seed, shuffles = _at_least("seed", seed, 0), _at_least("shuffles", shuffles, 0)
    if adapter.head is None or tokenizer is None:
        raise ValidationError(
            f"{adapter.model_id} can't answer: that takes a language head and a tokenizer; load the model by name."
        )
    written = max_tokens if answer is None else len(encode_pair(tokenizer, asked, f" {answer.strip()}")[1])
    room = None if adapter.context is None else adapter.context - written
    chunks = split_documents(tokenizer, docs, chunk_tokens)
    layout, retrieval = fitting(chunks, question, room, lambda some: lay_out(tokenizer, some, asked, docs))
    if answer is None:
        options = Options(max_tokens=max_tokens, sampling_method="greedy", stop=_STOPS)
        answer = Generating(adapter, tokenizer, [layout.text], options).texts()[0][len(layout.text) :]
        if not answer.strip():
            raise ValidationError(
                f"{adapter.model_id} wrote an answer without tokens to {question!r:.80}: give one under 'answer', "
                "or ask otherwise."
            )
    answer = answer.strip()
    # The prompt's tokens are the layout's: it ends without whitespace.
    prompt_ids, answer_ids = encode_pair(tokenizer, list(layout.ids), f" {answer}")
    behind = layout.spans[-1][1]
    reading = AnsweredPrompt(tuple(prompt_ids[:behind]), tuple(prompt_ids[behind:]), tuple(answer_ids))
    found = attribute(adapter, reading, layout.spans, n_removed=n_removed, seed=seed, shuffles=shuffles)
    return _shaped(tokenizer, question, answer, layout, reading, found, retrieval)


def _at_least(name: str, value: object, least: int) -> int:
    number = as_whole(value)
    if number is None or not least <= number < 2**63:
        raise ValidationError(f"{name} is a whole number, at least {least}; got {value!r}.")
    return number


def _shaped(
    tokenizer: Any,
    question: str,
    answer: str,
    layout: ChunkedPrompt,
    reading: AnsweredPrompt,
    found: Attribution,
    retrieval: dict[str, Any],
) -> dict[str, Any]:
    spans = [
        {
            "chunk_global_id": chunk.id,
            "tok_start_in_prompt": first,
            "tok_end_in_prompt": end,
            "doc_id": chunk.document_id,
            "text": chunk.text,
        }
        for chunk, (first, end) in zip(layout.chunks, layout.spans, strict=True)
    ]
    return {
        "question": question,
        "answer": answer,
        "bundle": {
            "chunk_spans": spans,
            "prompt_tokens": [_strings(tokenizer, reading.prompt)],
            "answer_tokens": [_strings(tokenizer, reading.answer)],
        },
        "candidate": {"candidate_edges": _edges(found.candidates, layout, len(reading.prompt))},
        "validated": {
            "validated_edges": _edges(found.validated, layout, len(reading.prompt)),
            "threshold": found.threshold,
            "null": found.null,
        },
        "scores": {
            "logprobs": found.logprobs.tolist(),
            "blocked": None if found.blocked is None else found.blocked.tolist(),
            "removed": [[_number(x) for x in row] for row in found.removed.tolist()],
        },
        "retrieval": retrieval,
    }


def _edges(
    edges: Sequence[ChunkEdge], layout: ChunkedPrompt, prompt_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for edge in sorted(edges, key=lambda e: (e.token, -e.weight)):
        found.setdefault(str(prompt_tokens + edge.token), []).append(
            {
                "chunk_global_id": layout.chunks[edge.chunk].id,
                "best_layer": edge.best_layer,
                "weight": edge.weight,
                "removed_weight": _number(edge.removed),
            }
        )
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
