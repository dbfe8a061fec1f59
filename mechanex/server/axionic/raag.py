"""The Axionic API's answers from documents, and which chunks their tokens rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.raag.answer import answer_questions, check_questions
from ...engine.raag.documents import as_documents
from ...errors import ValidationError
from ..http.answers import json_answer
from ..http.routes import Route
from ..model.engine import Engine
from .bodies import RaagBody
from .guards import Worker
from .work import check_count, done

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter

__all__ = ["router"]

router = APIRouter(route_class=Route)


@router.post("/raag/generate")
async def raag_generate(body: RaagBody, request: Request, engine: Engine, who: Worker) -> Response:
    """Answers questions from documents, and says which chunks each token of an answer rests on."""
    docs, index = body.docs, body.pinecone_index_name
    check_count(len(body.qa_entries), engine.settings.max_examples, "questions")
    for text in (text for entry in check_questions(body.qa_entries) for text in entry if text is not None):
        engine.encoder.check_size(text)
    if index is not None and index not in engine.settings.pinecone_indexes:
        raise ValidationError(
            f"this server reads no Pinecone index named {index!r}: give docs, or start it with "
            f"--pinecone-index {index!r}."
        )
    if docs is not None:
        check_count(len(docs), engine.settings.max_examples, "documents")
        as_documents(docs)

    def work(adapter: ModelAdapter) -> dict[str, Any]:
        return answer_questions(adapter, engine.tokenizer, body.qa_entries, docs, index)

    found = await done(request, engine, who, work)
    return await json_answer(lambda: found)
