"""Rows that follow a grammar: each its own, whatever rows are beside it, however steps overlap."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import mechanex.engine.decode.grammar as module
from mechanex import MechanexError, ValidationError
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.grammar import Grammars, GrammarState
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.sampling import Sampling, end_tokens

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "far": {"type": "boolean"}},
    "required": ["city", "far"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def local() -> Any:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def grammars(local: Any) -> Grammars:
    ends = end_tokens(local.model, local.tokenizer)
    return Grammars(local.tokenizer, local.model.config.vocab_size, ends)


def _written(
    local: Any, requests: list[TextRequest], overlapped: bool, ended: dict[int, MechanexError] | None = None
) -> list[Row]:
    ends = end_tokens(local.model, local.tokenizer)
    rows = [Row(one, local.tokenizer, ends) for one in requests]
    decoder = Decoder(adapter_for(local.model), 0, form="rolling", overlapped=overlapped)
    with torch.no_grad():
        reading = decoder.read(rows)
        while not decoder.advance(reading):
            pass
        outcomes = list(decoder.join(reading))
        while decoder.rows:
            outcomes += decoder.step()
    decoder.close()
    for row, news in outcomes:
        if isinstance(news, MechanexError):
            assert ended is not None, news
            ended[rows.index(row)] = news
    return rows


def test_rows_follow_their_grammars_beside_others_that_have_none(local: Any, grammars: Grammars) -> None:
    ids = local.tokenizer("Anna went to the market.").input_ids
    drawn = Sampling("top-p", top_p=1.0, temperature=1.5)
    calm = (Steer(3, Edit.add(3 * torch.randn(128, generator=torch.Generator().manual_seed(1)))),)
    asked = [
        TextRequest(ids, 40, drawn, seed=1, grammar=grammars.compiled("json", SCHEMA), logprobs=1),
        TextRequest(ids, 12),
        TextRequest(ids, 40, drawn, seed=2, grammar=grammars.compiled("regex", "[0-9]{4}"), steering=calm),
        TextRequest(ids, 40, drawn, seed=3, grammar=grammars.compiled("json", SCHEMA)),
        TextRequest(ids, 12, drawn, seed=4),
    ]
    together = _written(local, asked, overlapped=False)
    for first in (0, 3):
        assert set(json.loads(together[first].text)) == {"city", "far"}
    assert together[2].text.isdigit() and len(together[2].text) == 4
    results = [row.result for row in together]
    assert all(results[i] is not None and results[i].finish_reason == "stop" for i in (0, 2, 3))  # type: ignore[union-attr]
    assert [row.chosen for row in _written(local, asked, overlapped=True)] == [row.chosen for row in together]
    alone = [_written(local, [one], overlapped=False)[0].chosen for one in asked]
    assert alone == [row.chosen for row in together]


def test_a_grammar_that_can_not_be_followed_ends_its_own_rows_alone(local: Any, grammars: Grammars) -> None:
    """This one passes every check when it is compiled, and has too many states a few tokens later."""
    ids = local.tokenizer("Anna met the neighbour").input_ids
    drawn = Sampling("top-p", top_p=1.0, temperature=1.0)
    wild = grammars.compiled("regex", "([a-z]{0,40}[a-f ]{0,40}){0,60}x")
    calm = (
        TextRequest(ids, 30),
        TextRequest(ids, 30, drawn, seed=2, grammar=grammars.compiled("regex", "[0-9]{30}")),
    )
    asked = [calm[0], TextRequest(ids, 120, drawn, seed=0, grammar=wild), calm[1]]
    ended: dict[int, MechanexError] = {}
    together = _written(local, asked, False, ended)
    assert list(ended) == [1] and "grammar" in ended[1].message
    alone = [_written(local, [one], False)[0].chosen for one in calm]
    assert [together[0].chosen, together[2].chosen] == alone


def test_a_grammar_that_holds_up_the_batch_ends_all_of_its_rows_at_once(
    local: Any, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = local.tokenizer("Anna met the neighbour").input_ids
    slow, quick = grammars.compiled("json", SCHEMA), grammars.compiled("regex", "[0-9]{4}")
    looked: list[Any] = []
    allowed = GrammarState.allowed

    def counted(self: GrammarState) -> Any:
        if self.grammar is slow:
            looked.append(self)
            monkeypatch.setattr(module, "_MASK_SECONDS", -1.0)
        else:
            monkeypatch.setattr(module, "_MASK_SECONDS", 100.0)
        return allowed(self)

    monkeypatch.setattr(GrammarState, "allowed", counted)
    asked = [
        TextRequest(ids, 9, grammar=slow),
        TextRequest(ids, 9, grammar=quick),
        TextRequest(ids, 9, grammar=slow),
    ]
    ended: dict[int, MechanexError] = {}
    rows = _written(local, asked, False, ended)
    assert set(ended) == {0, 2} and "too long" in ended[2].message and len(looked) == 1
    assert rows[1].text.isdigit()


def test_what_is_no_grammar_is_refused_with_the_reason(grammars: Grammars) -> None:
    for kind, given in (
        ("regex", "(a"),
        ("json", {"type": "nope"}),
        ("grammar", "start: nothing"),
        ("regex", "a" * 10**6),
        ("json", {"$ref": "#"}),
        ("grammar", "start: start"),
    ):
        with pytest.raises(ValidationError) as refused:
            grammars.compiled(kind, given)  # type: ignore[arg-type]
        assert "<state>" not in str(refused.value)


def test_choices_are_taken_literally(local: Any, grammars: Grammars) -> None:
    ids = local.tokenizer("Anna").input_ids
    texts = ['say "no"', "a|b", "(.*)", "Zoë\n"]
    for text in texts:
        (row,) = _written(local, [TextRequest(ids, 40, grammar=grammars.compiled("choice", [text]))], False)
        assert row.text == text


def test_a_model_without_an_end_is_refused(local: Any) -> None:
    with pytest.raises(ValidationError, match="end token"):
        Grammars(local.tokenizer, local.model.config.vocab_size, [])
