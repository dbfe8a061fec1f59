"""Answers from documents with mx-tiny: what they rest on, and what is refused."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy
import pytest
import torch
from families import build

from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.raag.answer import answer_questions
from mechanex.engine.raag.attribute import attribute
from mechanex.engine.raag.documents import _cut
from mechanex.engine.raag.knockouts import AnsweredPrompt
from mechanex.errors import NotFoundError, ValidationError

PEOPLE = [
    "Mia",
    "Lucy",
    "Tom",
    "Peter",
    "Emma",
    "Julia",
    "Maria",
    "Clara",
    "Hugo",
    "Leo",
    "Nora",
    "Felix",
    "Sara",
]
OBJECTS = ["bag", "hat", "lamp", "ball", "box", "cup", "coat", "chair", "book", "key", "pen"]
COLORS = ["green", "black", "red", "blue", "white", "brown", "yellow"]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


def planted(seed: int, *, absent: bool = False) -> tuple[list[dict[str, str]], dict[str, str], int]:
    """Three facts, a question with its true answer, and which fact holds it; ``absent``: none does."""
    rng = random.Random(seed)
    people, things = rng.sample(PEOPLE, 4), rng.sample(OBJECTS, 4)
    colors = rng.sample(COLORS, 4)
    who = 3 if absent else rng.randrange(3)
    docs = [{"text": f"{people[i]} has a {colors[i]} {things[i]}."} for i in range(3)]
    question, answer = rng.choice(
        [
            (f"Who has the {things[who]}?", f"{people[who]} has the {things[who]}."),
            (f"What does {people[who]} have?", f"{people[who]} has a {colors[who]} {things[who]}."),
            (f"Which color is the {things[who]}?", f"The {things[who]} is {colors[who]}."),
        ]
    )
    return docs, {"question": question, "answer": answer}, who


def answered(
    tiny: LoadedModel, entry: dict[str, str], docs: list[dict[str, str]], **more: Any
) -> dict[str, Any]:
    found: dict[str, Any] = answer_questions(tiny.model, tiny.tokenizer, [entry], docs, **more)
    return dict(found["data_by_question"]["0"])


def test_the_chunk_that_holds_the_answer_ranks_first(tiny: LoadedModel) -> None:
    """Of questions that the model answers right, since others it answers from somewhere else."""
    right = first = 0
    for seed in range(60):
        docs, entry, who = planted(seed)
        if right == 10:
            break
        prompt = f"{' '.join(d['text'] for d in docs)} Question: {entry['question']} Answer:"
        ids = tiny.tokenizer(prompt, return_tensors="pt").input_ids
        out = tiny.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        if tiny.tokenizer.decode(out, skip_special_tokens=True).strip() != entry["answer"]:
            continue
        right += 1
        drops = torch.tensor(answered(tiny, entry, docs, shuffles=0, n_removed=0)["scores"]["blocked"])
        first += int(drops.amax(1).argmax()) == who
    assert right == 10 and first >= 0.9 * right


@pytest.mark.ci
def test_documents_without_the_answer_give_no_validated_edge(tiny: LoadedModel) -> None:
    silent = 0
    for seed in range(10):
        docs, entry, _ = planted(1000 + seed, absent=True)
        silent += not answered(tiny, entry, docs)["validated"]["validated_edges"]
    assert silent >= 9


@pytest.mark.ci
def test_some_planted_facts_are_validated_at_a_layer(tiny: LoadedModel) -> None:
    """Token indices count over prompt then answer."""
    seen = 0
    for seed in range(12):
        docs, entry, who = planted(seed)
        data = answered(tiny, entry, docs)
        n_prompt = len(data["bundle"]["prompt_tokens"][0])
        n_all = n_prompt + len(data["bundle"]["answer_tokens"][0])
        for token, edges in data["validated"]["validated_edges"].items():
            assert n_prompt <= int(token) < n_all
            for edge in edges:
                seen += edge["chunk_global_id"] == who
                assert edge["weight"] > data["validated"]["threshold"] == max(data["validated"]["null"])
                assert 0 <= edge["best_layer"] < 6
    assert seen >= 2


def test_only_chunks_that_were_removed_too_are_validated(tiny: LoadedModel) -> None:
    docs, entry, _ = planted(0)
    one = answered(tiny, entry, docs, shuffles=0, n_removed=1)
    assert len({e["chunk_global_id"] for e in edges_in(one, "validated")}) == 1
    none = answered(tiny, entry, docs, shuffles=0, n_removed=0)
    assert edges_in(none, "candidate") and not edges_in(none, "validated")


def edges_in(data: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = data[kind][f"{kind}_edges"]
    return [edge for edges in found.values() for edge in edges]


def test_the_answer_has_the_wires_shape_and_repeats(tiny: LoadedModel) -> None:
    docs = [
        {"text": "Mia has a green bag. Lucy has a black hat."},
        {"id": "x", "text": "Tom has a red lamp."},
    ]
    asked = [
        {"question": "Who has the bag?"},
        {"question": "Which color is the lamp?", "answer": "The lamp is red."},
    ]
    found = answer_questions(tiny.model, tiny.tokenizer, asked, docs, chunk_tokens=8)
    assert found["answers"] == ["Mia has the bag.", "The lamp is red."]
    assert found["answer_tokens"][0] == [" Mia", " has", " the", " bag", "."]
    bundle = found["data_by_question"]["1"]["bundle"]
    assert [one["chunk_global_id"] for one in bundle["chunk_spans"]] == [0, 1, 2]
    assert [one["doc_id"] for one in bundle["chunk_spans"]] == [0, 0, "x"]
    for one in bundle["chunk_spans"]:
        tokens = bundle["prompt_tokens"][0][one["tok_start_in_prompt"] : one["tok_end_in_prompt"]]
        assert "".join(tokens).strip() == one["text"]
    assert found == answer_questions(tiny.model, tiny.tokenizer, asked, docs, chunk_tokens=8)


def test_an_answer_that_was_written_and_the_same_one_given_rest_on_the_same(tiny: LoadedModel) -> None:
    docs = [{"text": "Mia has a green bag."}, {"text": "Tom has a red lamp."}]
    written = answered(tiny, {"question": "Who has the bag?"}, docs)
    given = answered(tiny, {"question": "Who has the bag?", "answer": written["answer"]}, docs)
    assert given == written


def test_long_sentences_are_cut_between_tokens(tiny: LoadedModel) -> None:
    text = "Mia has a green bag and Lucy has a black hat and Tom has a red lamp and Leo has a blue box."
    data = answered(tiny, {"question": "Who?", "answer": "Mia."}, [{"text": text}], chunk_tokens=5)
    spans = data["bundle"]["chunk_spans"]
    assert " ".join(one["text"] for one in spans) == text
    assert all(one["tok_end_in_prompt"] - one["tok_start_in_prompt"] <= 5 for one in spans)


def test_a_long_document_is_cut_in_a_time_that_grows_with_its_length() -> None:
    looked_at = 0

    class Place(int):
        def __lt__(self, other: int) -> bool:
            nonlocal looked_at
            looked_at += 1
            return int(self) < int(other)

    counts = []
    for n in (200, 800):
        looked_at = 0
        words = [(6 * i, 6 * i + 5) for i in range(n)]
        found = _cut("Anna. " * n, [(Place(a), Place(b)) for a, b in words], 10)
        assert found == [(60 * i, 60 * i + 60) for i in range(n // 10)]
        counts.append(looked_at)
    assert counts[1] < 8 * counts[0]  # four times and a little: what is sorted is found by halves


def test_documents_that_do_not_fit_are_chosen_from_and_this_is_told(tiny: LoadedModel) -> None:
    docs = [{"text": f"Lucy has a black hat. Tom has a red lamp. {i} is a number."} for i in range(40)]
    docs.insert(30, {"text": "Mia has a green bag."})
    data = answered(tiny, {"question": "Who has the bag?", "answer": "Mia has the bag."}, docs, n_removed=1)
    assert data["retrieval"]["method"] == "bm25"
    kept = [one["chunk_global_id"] for one in data["bundle"]["chunk_spans"]]
    assert 30 in kept and sorted(kept + data["retrieval"]["left_out"]) == list(range(41))
    assert len(data["bundle"]["prompt_tokens"][0]) <= 512


def test_without_bm25_the_error_says_what_to_do(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    docs = [{"text": "Lucy has a black hat. Tom has a red lamp."}] * 60
    with pytest.raises(ValidationError, match=r"tokens and the model has room for .*'\.\[raag\]'"):
        answered(tiny, {"question": "Who?", "answer": "Mia."}, docs)


@pytest.mark.parametrize(
    ("entries", "docs", "more", "says"),
    [
        ([], [{"text": "a"}], {}, "at least one"),
        ([{"q": 1}], [{"text": "a"}], {}, r"qa_entries\[0\] has no question"),
        ([{"question": "Who?", "answer": "  "}], [{"text": "a"}], {}, "answer without tokens"),
        ([{"question": "Who?"}], [], {}, "no documents"),
        ([{"question": "Who?"}], [{"text": " "}], {}, "document 0 has no text"),
        ([{"question": "Who?"}], [{"text": "a b"}], {"chunk_tokens": 0}, "chunk_tokens is"),
        ([{"question": "Who? " * 300}], [{"text": "a b"}], {}, "not even the best chunk"),
        ([{"question": "Who?"}], [{"text": "a b"}], {"max_tokens": None}, "max_tokens is"),
        ([{"question": "Who?"}], [{"text": "a b"}], {"shuffles": None}, "shuffles is"),
        ([{"question": "Who?"}], [{"text": "a b"}], {"n_removed": 1.5}, "n_removed is"),
        ([{"question": "Who?"}], [{"text": "a b"}], {"seed": "today"}, "seed is"),
    ],
)
def test_bad_input_is_refused(tiny: LoadedModel, entries: Any, docs: Any, more: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        answer_questions(tiny.model, tiny.tokenizer, entries, docs, **more)


def test_numbers_may_be_of_any_whole_type(tiny: LoadedModel) -> None:
    docs, entry, _ = planted(0)
    n = numpy.int64
    given = {"chunk_tokens": n(8), "n_removed": n(1), "seed": n(1), "shuffles": n(1)}
    plain = {name: int(value) for name, value in given.items()}
    assert answered(tiny, entry, docs, **given) == answered(tiny, entry, docs, **plain)


def test_an_index_without_client_or_key_is_refused(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PINECONE_API_KEY", raising=False)
    with pytest.raises((ValidationError, NotFoundError), match=r"pip install pinecone|PINECONE_API_KEY"):
        answer_questions(tiny.model, tiny.tokenizer, [{"question": "Who?"}], None, "an-index")


def test_a_model_that_cannot_be_blocked_is_measured_by_removal() -> None:
    from mechanex.engine.models import adapter_for

    ids = torch.randint(3, 380, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    reading = AnsweredPrompt(tuple(ids[:16]), tuple(ids[16:20]), tuple(ids[20:]))
    found = attribute(adapter_for(build("bloom")), reading, [(1, 8), (8, 16)], shuffles=2)
    assert found.blocked is None and bool(found.removed.isfinite().all()) and len(found.null) == 2
    assert all(edge.best_layer is None for edge in found.candidates)
