"""examples/persona: its chats and judges, and what a vector makes SmolLM2-135M-Instruct say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mechanex.engine.optimize.datapoints import read_datapoints

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "persona"
PLAIN = "The moon is a celestial body that orbits the Earth, and it reflects the light of the sun."


@pytest.fixture
def personas(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import personas

    yield personas
    for name in ("personas", "persona", "choose"):
        sys.modules.pop(name, None)


def test_every_persona_has_four_chats_and_a_judge_that_knows_it(personas: Any) -> None:
    assert (
        personas.PERSONAS.keys() == personas.FROM_ONE_CHAT.keys() == {"pirate", "haiku", "legal", "toddler"}
    )
    for name, persona in personas.PERSONAS.items():
        assert len(read_datapoints(EXAMPLE / f"{name}.jsonl")) == 4
        assert not persona.shows(PLAIN)
        assert sum(map(persona.shows, persona.said)) >= len(persona.said) - 1, name


@pytest.mark.real
def test_a_pirate_from_one_chat(
    personas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import persona

    monkeypatch.setenv("MECHANEX_HOME", os.environ["MECHANEX_REAL_HOME"])
    monkeypatch.setattr(
        sys, "argv", ["persona.py", "--chats", "1", "--questions", "8", "--out", str(tmp_path)]
    )
    persona.main()
    figures = json.loads((tmp_path / "pirate.json").read_text(encoding="utf-8"))
    assert figures["shows"] >= 0.8 and figures["plain shows"] <= 0.125
    assert figures["shows after the opening"] >= 0.5
    assert figures["perplexity under the system prompt"] <= 2 * figures["prompted perplexity"]
    assert (tmp_path / "pirate.html").stat().st_size > 1000
    assert "50 steps" in capsys.readouterr().out


@pytest.mark.real
def test_openings_and_settings_are_tried(
    personas: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import choose

    monkeypatch.setenv("MECHANEX_HOME", os.environ["MECHANEX_REAL_HOME"])
    for name, few in (("QUESTIONS", 4), ("STRENGTHS", 2), ("AFTER", 2)):
        monkeypatch.setattr(choose, name, getattr(choose, name)[:few])
    arguments = ["--persona", "toddler", "--chats", "1", "--opening", "Mommy, daddy,", "--layers", "6,10"]
    monkeypatch.setattr(sys, "argv", ["choose.py", *arguments])
    choose.main()
    said = capsys.readouterr().out
    assert said.count("'Mommy, daddy,', layers 6,10, norm 12, noise 0.6") in (4, 5)
    assert "the best: " in said or "none is cheap enough" in said
