"""The commands about sparse autoencoders and behaviors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli_tools import run

from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.models.resolve import load
from mechanex.engine.sae import registry
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.create import create
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.store import BehaviorStore

PAIRS = read_pairs(data_path("calm_angry"), split="train")


@pytest.fixture(scope="module")
def behavior() -> Behavior:
    loaded = load("mx-tiny", backend="transformers")
    examples = PAIRS.prompts[:16], PAIRS.negative_answers[:16], PAIRS.positive_answers[:16]
    sae = registry.default_sae("mx-tiny")
    return create(loaded.model, "anger", *examples, sae=sae, source="mx-tiny", tokenizer=loaded.tokenizer)


@pytest.fixture
def anger(behavior: Behavior, mechanex_home: Path) -> Behavior:
    BehaviorStore().put(behavior)
    return behavior


def told(*arguments: object) -> Any:
    return json.loads(run("sae", *arguments, "--json").stdout)


def test_what_is_known_is_listed(anger: Behavior) -> None:
    found = told("list")
    assert "mx-tiny" in [one["name"] for one in found["autoencoders"]]
    assert [one["behavior_name"] for one in found["behaviors"]] == ["anger"]
    shown = run("sae", "list").stdout
    assert "mx-tiny" in shown and "anger" in shown and anger.correction.way in shown


def test_behaviors_and_autoencoders_are_shown(anger: Behavior) -> None:
    assert told("show", "anger") == json.loads(json.dumps(anger.as_dict()))
    one = told("show", "mx-tiny")
    assert (one["architecture"], one["features"], one["point"]) == ("topk", 1024, "resid.4")
    assert "topk" in run("sae", "show", "mx-tiny").stdout
    assert "there is no folder" in run("sae", "show", "nothing", code=1).stderr


def test_features_are_explained(anger: Behavior) -> None:
    options = ("--data", data_path("calm_angry"), "--features", 2, "--contexts", 2)
    found = told("explain", "mx-tiny", "anger", *options)
    assert len(found) == 2 and all(len(one["contexts"]) == 2 for one in found)
    assert "feature " in run("sae", "explain", "mx-tiny", "anger", *options).stdout


def test_answers_are_traced(anger: Behavior) -> None:
    prompt = 'Julia wrote a letter to Sara on Monday. "This makes me furious!"'
    options = ("--prompt", prompt, "--max-tokens", 20, "--sampling-method", "greedy")
    (found,) = told("trace", "mx-tiny", *options, "--action", "report")
    assert found["detected"] == ["anger"] and found["text"].startswith(prompt)
    assert any(token["detected"] for token in found["trace"])
    assert "detected: anger" in run("sae", "trace", "mx-tiny", *options).stdout
    missing = run("sae", "trace", "mx-tiny", *options, "--behavior", "other", code=1)
    assert "no behavior is called 'other'" in missing.stderr


def test_without_behaviors_a_trace_says_so() -> None:
    assert "there are no behaviors" in run("sae", "trace", "mx-tiny", "--prompt", "A", code=1).stderr


def test_a_trained_autoencoder_is_written_and_known(tmp_path: Path) -> None:
    plain = tmp_path / "texts.txt"
    plain.write_text(
        "\n\n".join(str(p) + a for p, a in zip(PAIRS.prompts, PAIRS.positive_answers, strict=True))
    )
    out = tmp_path / "mine"
    options = (
        "--features",
        64,
        "--k",
        8,
        "--steps",
        5,
        "--batch",
        128,
        "--buffer",
        256,
        "--point",
        "resid.3",
    )
    data = ("--data", plain, "--data", data_path("kind_rude"))
    report = told("train", "mx-tiny", *data, "--out", out, *options)
    assert report["steps"] == 5 and {"variance_explained", "loss_recovered", "l0"} <= set(report)
    assert registry.find("mx-tiny").name == "mine"
    assert registry.default_sae("mx-tiny").point == HookPoint("resid", 3)
    assert "variance_explained" in run("sae", "train", "mx-tiny", *data, "--out", out, *options).stdout


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.txt", "holds no text"),
        ("\udcff", "b.txt", "is not UTF-8 text"),
        ('{"other": 1}', "c.jsonl", "line 1: it has neither 'text' nor 'prompt' with an answer"),
    ],
)
def test_data_that_can_not_be_used_says_why(content: str, name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    done = run("sae", "train", "mx-tiny", "--data", path, "--out", tmp_path / "out", code=1)
    assert message in done.stderr
