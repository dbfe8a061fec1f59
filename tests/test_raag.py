"""``mechanex.raag`` as users call it: on a model here, on a server, and from the command line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from server_process import ServerProcess, serving

import mechanex
from mechanex import Mechanex
from mechanex.cli import main
from mechanex.errors import MechanexError, ValidationError

DOCS = [{"text": "Mia has a green bag. Lucy has a black hat."}, {"id": "x", "text": "Tom has a red lamp."}]
ASKED = [
    {"question": "Who has the bag?"},
    {"question": "Which color is the lamp?", "answer": "The lamp is red."},
]


@pytest.fixture(scope="module")
def local() -> Mechanex:
    return Mechanex().set_execution_mode("local").load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving("--pinecone-index", "ours", home=tmp_path_factory.mktemp("home")) as running:
        yield running


def close(one: Any, other: Any) -> bool:
    """Equal, but for rounding of numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return math.isclose(one, other, abs_tol=1e-4) if isinstance(one, float) else bool(one == other)


def test_a_server_gives_the_answer_that_the_model_gives_here(local: Mechanex, server: ServerProcess) -> None:
    remote = Mechanex(base_url=server.url).set_execution_mode("remote")
    here = local.raag.generate(ASKED, docs=DOCS)
    assert close(json.loads(json.dumps(here)), remote.raag.generate(ASKED, docs=DOCS))
    assert here["answers"] == ["Mia has the bag.", "The lamp is red."]


def test_a_server_says_what_is_wrong(server: ServerProcess) -> None:
    remote = Mechanex(base_url=server.url).set_execution_mode("remote")
    with pytest.raises(ValidationError, match="has no question"):
        remote.raag.generate([{"q": 1}], docs=DOCS)
    with pytest.raises(ValidationError, match="document 0 has no text"):
        remote.raag.generate(ASKED, docs=[{}])
    with pytest.raises(ValidationError, match=r"the request has 257 questions, and .* takes 256 at most"):
        remote.raag.generate([{"question": "Who?"}] * 257, docs=DOCS)
    with pytest.raises(MechanexError, match=r"pip install pinecone|PINECONE_API_KEY"):
        remote.raag.generate(ASKED, pinecone_index_name="ours")
    with pytest.raises(ValidationError, match="reads no Pinecone index named 'theirs'"):
        remote.raag.generate(ASKED, pinecone_index_name="theirs")


def test_cite_names_the_sentence_first_that_the_answer_rests_on(local: Mechanex) -> None:
    found = local.raag.cite("Question: Who has the bag? Answer:", None, [doc["text"] for doc in DOCS])
    assert found["answer"] == "Mia has the bag."
    (sentence,) = found["sentences"]
    assert sentence["text"] == found["answer"]
    first = sentence["citations"][0]
    assert first["text"] == "Mia has a green bag." and first["source"] == 0 and first["score"] > 1
    scores = [one["score"] for one in sentence["citations"]]
    assert scores == sorted(scores, reverse=True)


def test_cite_goes_by_sentence_of_the_answer(local: Mechanex) -> None:
    answer = "Mia has the bag. Tom has the lamp."
    found = local.raag.cite("Question: Who has what? Answer:", answer, DOCS)
    assert [one["text"] for one in found["sentences"]] == ["Mia has the bag.", "Tom has the lamp."]
    for one in found["sentences"]:
        assert answer[one["start"] : one["end"]].strip() == one["text"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "Mia.", ["a"]), "prompt is a text"),
        (("Who?", " ", ["a"]), "answer is a text"),
        (("Who?", "Mia.", "a text"), "put it in a list"),
        (("Who?", "Mia.", []), "no documents"),
    ],
)
def test_cite_refuses_what_has_no_text(local: Mechanex, arguments: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        local.raag.cite(*arguments)


def test_the_figure_and_the_page_show_every_edge(local: Mechanex) -> None:
    from matplotlib.figure import Figure

    result = local.raag.generate(
        [{"question": "Who has the $bag <b>?"}], docs=[{"text": "Mia <i> has $a bag$."}]
    )
    data = result["data_by_question"]["0"]
    n_edges = sum(map(len, data["candidate"]["candidate_edges"].values()))
    figure = mechanex.raag.draw_edges(result, candidates=True)
    assert isinstance(figure, Figure) and n_edges > 0
    figure.canvas.draw()
    assert sum(len(line.get_xdata()) == 2 for line in figure.axes[0].lines) == n_edges
    page = mechanex.raag.html_page(result, candidates=True)
    assert "<b>" not in page and "Mia &lt;i&gt; has" in page
    assert page.count('class="token rests"') == len(data["candidate"]["candidate_edges"])
    with pytest.raises(ValidationError, match="no question 3"):
        mechanex.raag.html_page(result, 3)


def test_the_figure_needs_matplotlib(local: Mechanex, monkeypatch: pytest.MonkeyPatch) -> None:
    result = local.raag.generate(ASKED[:1], docs=DOCS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValidationError, match=r"pip install '\.\[plot\]'"):
        mechanex.raag.draw_edges(result)


def test_the_command_cites_files(tmp_path: Path) -> None:
    for name, text in (("a.txt", DOCS[0]["text"]), ("b.txt", DOCS[1]["text"])):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    told = CliRunner().invoke(main, ["cite", *files, "--question", "Who has the bag?", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["answer"] == "Mia has the bag."
    assert found["sentences"][0]["citations"][0]["source"] == files[0]
    shown = CliRunner().invoke(main, ["cite", *files, "--question", "Who has the bag?"])
    assert shown.exit_code == 0 and "Mia has a green bag." in shown.stdout
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    wrong = CliRunner().invoke(main, ["cite", str(tmp_path / "c.bin"), "--question", "Who?"])
    assert wrong.exit_code == 1 and "UTF-8" in wrong.output
