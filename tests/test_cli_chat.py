"""``mechanex chat``: answers that stream and are steered, commands, Ctrl-C, at a real terminal and through a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from terminal import Terminal, terminal

from mechanex import SteeringVector, ValidationError
from mechanex.cli import main
from mechanex.commands.chat import Conversation
from mechanex.engine.dose_record import DoseRecord
from mechanex.engine.doses.calibrate import with_record
from mechanex.engine.generate import generate
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.text import prompt_text

OPTIONS: dict[str, Any] = {"max_tokens": 12, "sampling_method": "greedy", "seed": 0}
LINE = "Anna went to the market on Friday."
VECTOR = SteeringVector({3: torch.randn(128, generator=torch.Generator().manual_seed(0))})


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


def written(loaded: LoadedModel, **steering: Any) -> str:
    prompt = [{"role": "user", "content": LINE}]
    text = generate(loaded.model, loaded.tokenizer, prompt, **OPTIONS, **steering)
    return text[len(prompt_text(loaded.tokenizer, prompt)) :]


def test_answers_come_in_pieces_and_are_those_of_generate(loaded: LoadedModel) -> None:
    pieces: list[str] = []
    talk = Conversation(loaded, OPTIONS)
    answer = talk.answer(LINE, pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer == written(loaded)


def test_strength_vector_and_budget_hold_from_the_next_answer_on(loaded: LoadedModel, tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.safetensors")
    talk = Conversation(loaded, OPTIONS)
    assert "v.safetensors" in talk.command(f"/vector {tmp_path / 'v.safetensors'}")
    assert talk.command("/strength 2.5") == "strength 2.5"
    assert "".join(talk.pieces(LINE)) == written(loaded, vector=VECTOR, strength=2.5) != written(loaded)
    assert "".join(talk.pieces(LINE, plain=True)) == written(loaded)
    assert talk.command("/budget 0.1") == "budget 0.1 nats"
    assert "".join(talk.pieces(LINE)) == written(loaded, vector=VECTOR, strength=2.5, guard=0.1)
    talk.command("/strength 0")
    assert "".join(talk.pieces(LINE)) == written(loaded)


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is_of_it(loaded: LoadedModel) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    talk = Conversation(loaded, {**OPTIONS, "max_tokens": 100})
    answer = talk.answer(LINE, show)
    assert len(pieces) == 2 and talk.messages[-1] == {"role": "assistant", "content": answer}
    assert talk.answer(LINE, pieces.append)


def test_a_conversation_goes_on(loaded: LoadedModel) -> None:
    talk = Conversation(loaded, OPTIONS, system="Anna is calm.")
    first = talk.answer(LINE, lambda piece: None)
    second = talk.answer("Tom came home.", lambda piece: None)
    whole = [
        {"role": "system", "content": "Anna is calm."},
        {"role": "user", "content": LINE},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Tom came home."},
    ]
    text = generate(loaded.model, loaded.tokenizer, whole, **{**OPTIONS, "seed": 1})
    assert text.endswith(second) and talk.messages == [*whole, {"role": "assistant", "content": second}]
    talk.reset()
    assert talk.messages == whole[:1]


def test_what_was_said_is_saved_with_how_it_was_steered(loaded: LoadedModel, tmp_path: Path) -> None:
    talk = Conversation(loaded, OPTIONS, VECTOR, "v", 1.5, 2.0)
    answer = talk.answer(LINE, lambda piece: None)
    talk.command(f"/save {tmp_path / 'chat.json'}")
    told = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert told["messages"][1]["content"] == answer and told["vector"] == "v"
    assert (told["model"], told["strength"], told["guard"], told["seed"]) == ("mx-tiny", 1.5, 2.0, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/strength", "takes a number"),
        ("/strength nan", "takes a number"),
        ("/budget -1", "0 or more"),
        ("/vector", "id or a file"),
        ("/vector nowhere.safetensors", "no vector file"),
        ("/save", "the file to write"),
        ("/faster", "/help lists"),
    ],
)
def test_commands_say_what_is_wrong_and_change_nothing(loaded: LoadedModel, line: str, says: str) -> None:
    talk = Conversation(loaded, OPTIONS, VECTOR, "v", 1.5)
    with pytest.raises(Exception, match=says):
        talk.command(line)
    assert (talk.vector, talk.strength, talk.guard) == (VECTOR, 1.5, None)


def test_commands_tell_what_they_lack_and_a_vectors_dose(loaded: LoadedModel, tmp_path: Path) -> None:
    talk = Conversation(loaded, OPTIONS)
    hint = "; nothing steers yet: /vector NAME does"
    assert talk.command("/strength 2") == f"strength 2{hint}"
    assert talk.command("/compare") == f"comparing on{hint}"
    with_record(VECTOR, DoseRecord(1.0, 0.704, ((0.704, 1.0),), 9)).save(tmp_path / "v.safetensors")
    told = talk.command(f"/vector {tmp_path / 'v.safetensors'}")
    assert told.endswith("v.safetensors; its calibrated dose is at strength 0.704")
    assert talk.command("/strength 0.704") == "strength 0.704"


def test_without_a_template_each_line_is_continued_by_itself(loaded: LoadedModel) -> None:
    tokenizer = load("mx-tiny", backend="transformers").tokenizer
    tokenizer.chat_template = None
    plain = LoadedModel(loaded.model, tokenizer, "plain", "transformers")
    talk = Conversation(plain, OPTIONS)
    for _ in range(2):
        assert LINE + talk.answer(LINE, lambda piece: None) == generate(
            loaded.model, tokenizer, LINE, **OPTIONS
        )
    with pytest.raises(ValidationError, match="no chat template"):
        Conversation(plain, OPTIONS, system="Be kind.")


def test_a_pipe_is_answered_line_by_line(loaded: LoadedModel, tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.safetensors")
    arguments = ["chat", "mx-tiny", "--vector", str(tmp_path / "v.safetensors"), "--strength", "2.5"]
    arguments += ["--sampling-method", "greedy", "--max-tokens", "12"]
    lines = f"{LINE}\n/reset\n/strength 0\n{LINE}\n/compare\n{LINE}\n/nothing\n"
    plain = written(loaded)
    result = CliRunner().invoke(main, arguments, input=lines)
    assert result.exit_code == 0, result.output
    assert written(loaded, vector=VECTOR, strength=2.5) in result.output and plain in result.output
    assert "steered" in result.output and "plain" in result.output and "/help lists" in result.output


@pytest.fixture(scope="module")
def shell() -> Iterator[Terminal]:
    pytest.importorskip("pexpect")
    with terminal() as made:
        yield made


def test_at_a_terminal_ctrl_c_leaves_the_chat_open(shell: Terminal, tmp_path: Path) -> None:
    shell.start("chat", "mx-tiny", "--max-tokens", "8", MECHANEX_HOME=str(tmp_path))
    shell.expect("> ")
    shell.type(LINE)
    shell.expect("> ")
    shell.press_interrupt()
    shell.expect("ends)")
    shell.type("/strength 0.5")
    shell.expect("strength 0.5")
    shell.type("/quit")
    ran = shell.end()
    assert ran.code == 0
    assert LINE in (tmp_path / "chat_history").read_text(encoding="utf-8")
