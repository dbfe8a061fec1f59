"""What answers are held to: the same names, ranges and texts in Python, in commands, by a client and over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner, Result
from faulty_proxy import FaultyProxy, Status

from mechanex import APIError, Mechanex, SteeringVector, ValidationError
from mechanex.cli import main
from mechanex.engine.answering import RULES
from mechanex.engine.generate import generate_batch, stream
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.server.axionic.bodies import GenerateBody, SaeBody
from mechanex.server.openai.bodies import ChatBody, CompletionBody

PROMPT = (
    "The gym was full of calm. She took a slow breath and felt relaxed. The gym was full of tranquility. She felt "
    "relaxed, for the prize was soothing. She"
)  # whose greedy answer ends after eight tokens
N = 16
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
LIST = 'start: "[" /[a-z]{2}/ "]"'


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def local(model: LoadedModel) -> Mechanex:
    return Mechanex().set_local_model(model.model, model.tokenizer).set_execution_mode("local")


@pytest.fixture(scope="module")
def url(model: LoadedModel) -> Iterator[str]:
    client = Mechanex().set_local_model(model.model, model.tokenizer)
    with client.serve(host="127.0.0.1", port=0, block=False) as running:
        yield running.url


def written(client: Mechanex, prompt: Any = PROMPT, **given: Any) -> str:
    text = client.generation.generate(prompt, N, **({"sampling_method": "greedy", "seed": 5} | given))
    assert text.startswith(PROMPT)
    return text[len(PROMPT) :]


def tokens(model: LoadedModel, text: str) -> list[int]:
    found: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
    return found


Cases = list[tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def cases(model: LoadedModel, local: Mechanex) -> Cases:
    """Arguments that each change what the model writes greedily, and what it writes then."""
    plain = tokens(model, written(local))
    drawn = {"sampling_method": "combined", "top_k": 20, "min_p": 0.05, "top_p": 0.95, "temperature": 1.5}
    found: list[dict[str, Any]] = [
        {"min_tokens": N, "temperature": 1.0},
        {"ignore_eos": True},
        {"stop_token_ids": [plain[5]]},
        {"stop_token_ids": [plain[5]], "include_stop_str_in_output": True},
        {"ignore_eos": True, "skip_special_tokens": False},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0, "min_tokens": N},
        {"presence_penalty": 2.0, "min_tokens": N},
        {"logit_bias": {plain[0]: -100.0, plain[2]: -100}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"guided_regex": "[0-9]{3}"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": LIST},
        drawn,
        {"sampling_method": "typical", "typical_p": 0.3, "temperature": 1.5},
    ]
    texts = [written(local, **given) for given in found]
    assert written(local) not in texts
    return list(zip(found, texts, strict=True))


def command(given: dict[str, Any], folder: Path) -> list[str]:
    """The arguments as options of a command."""
    found: list[str] = []
    for name, value in ({"sampling_method": "greedy"} | given).items():
        option = "--" + name.replace("_", "-")
        if name == "skip_special_tokens":
            found += [] if value else ["--keep-special-tokens"]
        elif name in ("guided_json", "guided_grammar"):
            path = folder / name
            path.write_text(value if isinstance(value, str) else json.dumps(value))
            found += [option, str(path)]
        elif name == "response_format":
            found += [option, json.dumps(value)]
        elif name == "logit_bias":
            found += [part for token, bias in value.items() for part in (option, f"{token}={bias}")]
        elif isinstance(value, list):
            found += [part for one in value for part in (option.removesuffix("s"), str(one))]
        else:
            found += [option] if value is True else [option, str(value)]
    return found


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_clients_streams_and_http_get_what_python_gets(local: Mechanex, url: str, cases: Cases) -> None:
    remote = Mechanex(url, "any").set_execution_mode("remote")
    for given, wanted in cases:
        assert written(remote, **given) == wanted, given
        if set(given) <= {*RULES}:
            sent = {"prompt": PROMPT, "max_tokens": N, "temperature": 0} | given | _keys(given)
            answer = httpx.post(f"{url}/v1/completions", json=sent, timeout=60).json()
            assert answer["choices"][0]["text"] == wanted, (given, answer)
    for given, wanted in cases[3::4]:
        asked: dict[str, Any] = {"sampling_method": "greedy", "seed": 5} | given
        assert "".join(local.generation.generate(PROMPT, N, stream=True, **asked)) == PROMPT + wanted, given


def _keys(given: dict[str, Any]) -> dict[str, Any]:
    """JSON has texts as keys."""
    return (
        {"logit_bias": {str(k): v for k, v in given["logit_bias"].items()}} if "logit_bias" in given else {}
    )


def test_commands_write_what_python_gets(cases: Cases, tmp_path: Path) -> None:
    SteeringVector({3: torch.zeros(128)}).save(tmp_path / "v.safetensors")
    for given, wanted in (cases[3], cases[8], cases[10], cases[14]):
        steer = [
            "steer",
            "mx-tiny",
            "--vector",
            str(tmp_path / "v.safetensors"),
            "--prompt",
            PROMPT,
            "--json",
        ]
        done = run(*steer, "--max-tokens", str(N), "--seed", "5", *command(given, tmp_path))
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.output)["results"]
        assert row["steered"] == row["unsteered"] == wanted.strip(), given


def test_forms_hold_in_batches_under_guards_and_while_behaviors_are_watched(
    local: Mechanex, model: LoadedModel
) -> None:
    vector = SteeringVector({3: torch.randn(128, generator=torch.Generator().manual_seed(0))})
    texts = generate_batch(
        model.model,
        model.tokenizer,
        [PROMPT, "The"],
        max_tokens=N,
        guided_regex="[0-9]{4}",
        vector=vector,
        seed=1,
    )
    assert all(re.fullmatch("[0-9]{4}", t[len(p) :]) for t, p in zip(texts, [PROMPT, "The"], strict=True))
    guarded = written(local, steering_vector=4 * vector, guard=0.5, guided_choice=["yes", "no"])
    assert guarded in ("yes", "no")
    held = written(local, steering_vector=4 * vector, guard=0.5, logit_bias={i: -100 for i in range(3, 500)})
    assert not any(3 <= token < 500 for token in tokens(model, held)[1:])
    assert local.sae.generate(PROMPT, N, [], guided_choice=["yes"], seed=1) == PROMPT + "yes"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_tokens": -1}, "min_tokens"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"min_tokens": N + 1}, f"min_tokens is at most max_tokens: got {N + 1} and {N}"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [999_999]}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"guided_json": "no schema"}, "guided_json"),
    ({"guided_json": {"type": "nope"}}, "guided_json"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    (
        {"guided_regex": "a", "guided_choice": ["a"]},
        "An answer has one form: give guided_regex or guided_choice.",
    ),
    ({"guided_regex": "a", "min_tokens": 3}, "min_tokens holds off the end that guided_regex asks for"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos holds off the end that guided_regex asks for"),
]


def test_what_no_answer_can_be_held_to_is_refused_by_every_way_to_ask(local: Mechanex, url: str) -> None:
    remote = Mechanex(url, "any").set_execution_mode("remote")
    for given, says in WRONG:
        for client in (local, remote):
            with pytest.raises(ValidationError) as error:
                written(client, **given)
            assert says in str(error.value), (given, error.value)
        sent = {"prompt": PROMPT, "max_tokens": N} | given
        answer = httpx.post(f"{url}/v1/completions", json=sent, timeout=60)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], (given, answer.text)
        assert answer.json()["error"]["param"] in {*given, None}
        answer = httpx.post(f"{url}/generate", json=sent, timeout=60)
        assert answer.status_code in (400, 422) and says in answer.text, (given, answer.text)


def test_a_misspelt_argument_is_no_silent_one(local: Mechanex) -> None:
    remote = Mechanex("http://127.0.0.1:1", "any").set_execution_mode("remote")
    for client in (local, remote):
        with pytest.raises(TypeError, match="unexpected keyword argument 'repetition_penalti'"):
            client.generation.generate(PROMPT, repetition_penalti=2)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "option, says",
    [
        (["--logit-bias", "5"], "42=-100"),
        (["--logit-bias", "5=x"], "42=-100"),
        (["--response-format", "json"], "no JSON"),
        (["--response-format", "[1]"], "JSON object"),
        (["--presence-penalty", "3"], "presence_penalty is from -2 to 2"),
        (["--top-k", "0"], "top_k is a number of tokens, at least 1"),
        (["--min-tokens", "50"], "min_tokens is at most max_tokens"),
    ],
)
def test_commands_refuse_before_they_load_a_model(option: list[str], says: str, tmp_path: Path) -> None:
    SteeringVector({3: torch.zeros(128)}).save(tmp_path / "v.safetensors")
    done = run(
        "steer", "no/such-model", "--vector", str(tmp_path / "v.safetensors"), "--prompt", "a", *option
    )
    assert done.exit_code and says in done.output


def test_all_bodies_and_commands_know_all_names() -> None:
    for body in (GenerateBody, SaeBody, CompletionBody, ChatBody):
        assert {*RULES} <= {*body.model_fields}, body
    group: Any = main
    texts = [group.commands["steer"], group.commands["chat"], group.commands["sae"].commands["trace"]]
    for one in texts:
        assert {*RULES, "top_k", "top_p", "min_p", "typical_p"} <= {param.name for param in one.params}
        (method,) = (param for param in one.params if param.name == "sampling_method")
        assert "combined" in method.help


def test_a_server_that_knows_the_contract_alone_is_not_taken_to_have_obeyed() -> None:
    with FaultyProxy() as proxy:
        client = Mechanex(proxy.url, "any").set_execution_mode("remote")
        plain = json.dumps({"output": "a b"})
        proxy.faults = [Status(200, plain)] * 3
        assert client.generation.generate("a") == "a b"
        for given in ({"min_tokens": 5}, {"typical_p": 0.5}):
            with pytest.raises(
                APIError, match=f"no 'finish_reason', so that it doesn't know {next(iter(given))}"
            ):
                client.generation.generate("a", **given)


def test_streams_of_the_engine_take_them_too(model: LoadedModel) -> None:
    pieces = [*stream(model.model, model.tokenizer, PROMPT, max_tokens=N, guided_choice=["yes"])]
    assert "".join(pieces) == PROMPT + "yes"


def test_a_schema_reaches_the_grammar_as_it_was_sent(local: Mechanex, url: str) -> None:
    """A null is something that a schema says."""
    form = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"const": None}}}
    assert written(local, response_format=form) == "null"
    sent = {"prompt": PROMPT, "max_tokens": N, "response_format": form}
    answer = httpx.post(f"{url}/v1/completions", json=sent, timeout=60)
    assert answer.json()["choices"][0]["text"] == "null", answer.text


@pytest.mark.parametrize("option", ["--guided-json", "--guided-grammar"])
def test_a_file_that_is_no_text_is_refused_in_a_line(option: str, tmp_path: Path) -> None:
    SteeringVector({3: torch.zeros(128)}).save(tmp_path / "v.safetensors")
    (tmp_path / "form").write_bytes(b"\xff\xfe{}")
    steer = ["steer", "mx-tiny", "--vector", str(tmp_path / "v.safetensors"), "--prompt", PROMPT]
    done = run(*steer, option, str(tmp_path / "form"))
    assert done.exit_code and "is not UTF-8 text" in done.output and "Traceback" not in done.output


def test_json_that_is_nested_too_deep_is_refused_in_a_line(tmp_path: Path) -> None:
    SteeringVector({3: torch.zeros(128)}).save(tmp_path / "v.safetensors")
    (tmp_path / "form").write_text("[" * 200_000, encoding="utf-8")
    steer = ["steer", "mx-tiny", "--vector", str(tmp_path / "v.safetensors"), "--prompt", PROMPT]
    done = run(*steer, "--guided-json", str(tmp_path / "form"))
    assert done.exit_code == 2 and "it is no JSON" in done.output
