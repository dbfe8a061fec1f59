"""The Axionic API's answers from documents, and which chunks their tokens rest on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.raag.answer import answer_questions, check_questions
from ...engine.raag.documents import as_documents
from ...errors import MechanexError, ValidationError
from ..http.answers import json_answer
from ..http.routes import Route
from ..model.engine import Engine, ServingEngine
from .bodies import RaagBody
from .guards import Worker
from .work import check_count, done

__all__ = ["router"]

router = APIRouter(route_class=Route)


@router.post("/raag/generate")
async def raag_generate(body: RaagBody, request: Request, engine: Engine, who: Worker) -> Response:
    """Answers questions from documents, and says which chunks each token of an answer rests on."""
    docs, index = body.docs, body.pinecone_index_name
    check_count(len(body.qa_entries), engine.settings.max_examples, "questions")
    questions = check_questions(body.qa_entries)
    for text in (text for entry in questions for text in entry if text is not None):
        engine.encoder.check_size(text)
    if index is not None and index not in engine.settings.pinecone_indexes:
        raise ValidationError(
            f"this server reads no Pinecone index named {index!r}: give docs, or start it with "
            f"--pinecone-index {index!r}."
        )
    if docs is not None:
        check_count(len(docs), engine.settings.max_examples, "documents")
    if index is not None and engine.is_split:
        # Each process would ask for itself, and might be told something else.
        raise MechanexError(
            "this server's model is split over processes (--tp), and reads no index: give docs.", 501
        )
    documents = [] if docs is None else [text for _, text in as_documents(docs)]
    known = await run_sync(_known_tokens, engine, [question for question, _ in questions], documents)

    work = partial(
        answer_questions,
        tokenizer=engine.tokenizer,
        qa_entries=body.qa_entries,
        docs=docs,
        pinecone_index_name=index,
    )
    found = await done(request, engine, who, work, known)
    # What was found in an index, and the answers, are known by now.
    read = sum(len(tokens) for name in ("prompt_tokens", "answer_tokens") for tokens in found[name])
    engine.scheduler.spend_tokens(max(read - known, 0))
    return await json_answer(lambda: found)


def _known_tokens(engine: ServingEngine, questions: Sequence[str], documents: Sequence[str]) -> int:
    """Tokens of the prompts, each question's with the documents, as far as they fit."""
    room = float("inf") if engine.context is None else engine.context
    n_documents = 0
    for text in documents:
        if n_documents < room:
            n_documents += engine.encoder.n_tokens(text)
    return sum(int(min(engine.encoder.n_tokens(question) + n_documents, room)) for question in questions)
