"""Chats as prompts: answered, or continued, wherever a prompt is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import build, tiny_tokenizer

from mechanex import Chat, Mechanex, ValidationError
from mechanex.cli import main
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.models.resolve import load
from mechanex.engine.optimize.datapoints import read_datapoints
from mechanex.engine.score import completion_logprobs, rank_completions
from mechanex.engine.text import encode_pair, encode_prompt, prompt_text

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if quiet %} ...{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Where is Anna?"}]
STARTED = [*QUESTION, {"role": "assistant", "content": "She is at the"}]
ASKED = "user: Where is Anna?<eos>\nassistant:"
OPEN = ASKED + " She is at the"
CLOSED = OPEN + "<eos>\nassistant:"
OPTIONS: dict[str, Any] = {"max_tokens": 6, "sampling_method": "greedy"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_last_message_is_answered_or_goes_on(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, QUESTION) == ids(tokenizer, ASKED)
    assert encode_prompt(tokenizer, STARTED) == ids(tokenizer, CLOSED)
    going_on = Chat(STARTED, continue_final_message=True)
    assert encode_prompt(tokenizer, going_on) == ids(tokenizer, OPEN)
    assert prompt_text(tokenizer, going_on) == OPEN
    bare = Chat(QUESTION, add_generation_prompt=False)
    assert encode_prompt(tokenizer, bare) == ids(tokenizer, "user: Where is Anna?<eos>\n")
    quiet = Chat(QUESTION, template_kwargs={"quiet": True})
    assert encode_prompt(tokenizer, quiet) == ids(tokenizer, ASKED + " ...")


def test_a_chat_that_is_to_go_on_keeps_its_tools() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }}, {% endfor %}" + TEMPLATE
    model, tools = build("llama"), [{"name": "weather"}]
    chat = Chat(STARTED, tools=tools, add_generation_prompt=False)
    found = generate(model, tokenizer, chat, continue_final_message=True, **OPTIONS)
    right = generate(model, tokenizer, Chat(STARTED, tools=tools, continue_final_message=True), **OPTIONS)
    assert found == right and found.startswith("weather, " + OPEN)
    with pytest.raises(ValidationError, match="ask for one of them"):
        begun = Chat(STARTED, add_generation_prompt=True)
        generate(model, tokenizer, begun, continue_final_message=True, **OPTIONS)


@pytest.mark.parametrize("content", ["o", "<eos>", "a man. ", " Anna"])
def test_a_short_or_odd_message_goes_on_where_it_ends(tokenizer: Any, content: str) -> None:
    chat = Chat([*QUESTION, {"role": "assistant", "content": content}], continue_final_message=True)
    assert prompt_text(tokenizer, chat) == ASKED + " " + content


def test_generate_batch_and_stream_continue_it(tokenizer: Any) -> None:
    model = build("llama")
    right = generate(model, tokenizer, ids(tokenizer, OPEN), **OPTIONS)
    going_on = {"continue_final_message": True, **OPTIONS}
    assert generate(model, tokenizer, STARTED, **going_on) == right
    assert generate_batch(model, tokenizer, [STARTED, QUESTION], **going_on)[0] == right
    assert "".join(stream(model, tokenizer, STARTED, **going_on)) == right
    assert generate(model, tokenizer, STARTED, **OPTIONS).startswith(CLOSED)
    client = Mechanex().set_local_model(model, tokenizer)
    assert client.generation.generate(STARTED, 6, "greedy", continue_final_message=True) == right


def test_scores_and_vectors_continue_it(tokenizer: Any) -> None:
    model, going_on = build("llama"), Chat(STARTED, continue_final_message=True)
    before, answers = ids(tokenizer, OPEN), [" park", " station"]
    assert encode_pair(tokenizer, going_on, " park") == (before, ids(tokenizer, " park"))
    scored = completion_logprobs(model, going_on, answers, tokenizer)
    right = completion_logprobs(model, before, answers, tokenizer)
    assert torch.equal(scored.sums, right.sums)
    several = completion_logprobs(model, [going_on, going_on], answers, tokenizer)
    assert torch.allclose(several.sums, right.sums)
    assert rank_completions(model, going_on, answers, tokenizer)[0].index == int(right.sums.argmax())
    vectors = [
        caa_vectors(model, [prompt], [" park"], [" station"], [1], tokenizer)[1]
        for prompt in (going_on, before)
    ]
    assert torch.equal(*vectors)


def test_lines_of_data_continue_it(tokenizer: Any, tmp_path: Path) -> None:
    chat = {"prompt": STARTED, "continue_final_message": True}
    pairs, points = tmp_path / "pairs.jsonl", tmp_path / "points.jsonl"
    pairs.write_text(json.dumps({**chat, "positive": " park", "negative": " moon"}))
    points.write_text(json.dumps({**chat, "dst_completions": [" park"]}))
    assert prompt_text(tokenizer, read_pairs(pairs).prompts[0]) == OPEN
    assert prompt_text(tokenizer, read_datapoints(points)[0].prompt) == OPEN
    pairs.write_text(json.dumps({**chat, "prompt": "Anna", "positive": " park", "negative": " moon"}))
    with pytest.raises(ValidationError, match=r"line 1: .*goes with a chat"):
        read_pairs(pairs)


@pytest.mark.parametrize("prompt", ["The", [5, 6]])
def test_a_prompt_that_is_no_chat_is_an_error(tokenizer: Any, prompt: Any) -> None:
    with pytest.raises(ValidationError, match="goes with a chat"):
        generate(build("llama"), tokenizer, prompt, continue_final_message=True, **OPTIONS)
    client = Mechanex().set_local_model(build("llama"), tokenizer)
    with pytest.raises(ValidationError, match="goes with a chat"):
        client.generation.generate(prompt, continue_final_message=True)


def test_what_can_not_be_rendered_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValidationError, match="ask for one of them"):
        Chat(STARTED, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValidationError, match="no messages"):
        Chat([])
    with pytest.raises(ValidationError, match="list of dicts"):
        Chat(["user"])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="can't be called chat_template, tokenize"):
        encode_prompt(tokenizer, Chat(QUESTION, template_kwargs={"tokenize": True, "chat_template": ""}))
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(ValidationError, match="refuses these messages: no systems here"):
        encode_prompt(strict, QUESTION)


def test_the_command_line_continues_it(tmp_path: Path) -> None:
    loaded = load("mx-tiny")
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(STARTED), encoding="utf-8")
    found = CliRunner().invoke(
        main,
        [
            "score",
            "mx-tiny",
            "--chat",
            str(chat),
            "--continue-final-message",
            "--json",
            "--completion",
            " market",
        ],
    )
    assert found.exit_code == 0, found.output
    right = completion_logprobs(
        loaded.model, Chat(STARTED, continue_final_message=True), [" market"], loaded.tokenizer
    )
    shown = json.loads(found.stdout)["completions"][0]["logprob"]
    assert shown == pytest.approx(float(right.sums[0]), abs=1e-3)
    for wrong, said in (
        (["--prompt", "Anna", "--continue-final-message"], "goes with --chat"),
        ([], "Give a --prompt or a --chat"),
        (["--prompt", "Anna", "--chat", str(chat)], "one prompt"),
    ):
        failed = CliRunner().invoke(main, ["score", "mx-tiny", "--completion", " a", *wrong])
        assert failed.exit_code == 2 and said in failed.output


def test_the_command_line_steers_a_chat(tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(STARTED), encoding="utf-8")
    command = ["steer", "mx-tiny", "--data", "calm_angry", "--split", "train", "--max-tokens", "5", "--json"]
    command += ["--sampling-method", "greedy", "--chat", str(chat), "--continue-final-message"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)["results"]
    loaded = load("mx-tiny")
    going_on = Chat(STARTED, continue_final_message=True)
    whole = generate(loaded.model, loaded.tokenizer, going_on, max_tokens=5, sampling_method="greedy")
    assert row["unsteered"] == whole[len(prompt_text(loaded.tokenizer, going_on)) :].strip()
    chat.write_text("[3]")
    assert "no list of messages" in CliRunner().invoke(main, command).output
