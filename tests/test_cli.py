"""The command line: what it prints, on which stream, with which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from families import D_MODEL, FAMILIES, tiny_tokenizer

import mechanex
from mechanex import SteeringVector
from mechanex.cli import main

PROMPT = "The old man said"
PAIRS = [
    {"prompt": "The man", "positive": " was happy", "negative": " was angry", "split": "train"},
    {"prompt": "She said", "positive": " good", "negative": " nothing", "split": "heldout"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    FAMILIES["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return str(path)


def run(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mechanex.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_version_and_help() -> None:
    assert mechanex.__version__ in run("--version").output
    listed = run("--help").output
    assert "steer" in listed and "demo" in listed
    for option in ("--data", "--layer", "--strength", "--prompt", "--vector", "--save", "--seed", "--json"):
        assert option in run("steer", "-h").output


def test_steer_prints_both_texts_side_by_side(model: str, data: str) -> None:
    out = run(
        "steer", model, "--data", data, "--layer", 1, "--strength", 3, "--prompt", PROMPT, "--max-tokens", 5
    ).stdout
    for part in ("unsteered", "steered", "layer 1", "strength 3", "caa from 2 pairs"):
        assert part in out


def test_json_holds_what_generate_writes(model: str, data: str, tmp_path: Path) -> None:
    saved = tmp_path / "v.safetensors"
    command = (
        "steer",
        model,
        "--data",
        data,
        "--layer",
        2,
        "--strength",
        -3,
        "--prompt",
        PROMPT,
        "--prompt",
        "I",
    )
    out = run(*command, "--max-tokens", 8, "--seed", 5, "--save", saved, "--json").stdout
    report = json.loads(out)
    client = mechanex.Mechanex().load(model, backend="transformers")
    vector = client.steering.generate_from_jsonl(data, [2], "caa")
    for i, (prompt, row) in enumerate(zip((PROMPT, "I"), report["results"], strict=True)):
        assert row["prompt"] == prompt
        for key, steering in (
            ("unsteered", {}),
            ("steered", {"steering_strength": -3, "steering_vector": vector}),
        ):
            text = client.generation.generate(prompt, 8, seed=5 + i, **steering)
            assert row[key] == text[len(prompt) :].strip()
    assert report["layers"] == [2] and report["strength"] == -3 and report["seed"] == 5
    assert SteeringVector.load(saved).allclose(SteeringVector(client.steering.get_vectors(vector)), atol=1e-5)
    again = json.loads(
        run("steer", model, "--vector", saved, "--strength", -3, "--prompt", PROMPT, "--prompt", "I",
            "--max-tokens", 8, "--seed", 5, "--json").stdout
    )  # fmt: skip
    assert again["results"] == report["results"]


def test_split_and_bundled_data_sets(model: str, data: str) -> None:
    out = run("steer", model, "--data", data, "--split", "train", "--prompt", "I", "--max-tokens", 1).stdout
    assert "caa from 1 pairs" in out
    out = run(
        "steer", model, "--data", "calm_angry", "--split", "heldout", "--prompt", "I", "--max-tokens", 1
    ).stdout
    assert re.search(r"caa from \d\d+ pairs", out)


def test_data_may_come_through_a_pipe(model: str, data: str, tmp_path: Path) -> None:
    """As shells give it: --data <(…) or /dev/stdin."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        written = threads.submit(pipe.write_bytes, Path(data).read_bytes())
        out = run("steer", model, "--data", pipe, "--prompt", "I", "--max-tokens", 1).stdout
        assert "caa from 2 pairs" in out and written.result()


def test_a_stored_vector_goes_by_its_id(model: str) -> None:
    stored = mechanex.Mechanex().vectors.put(SteeringVector({1: torch.ones(D_MODEL)}))
    out = run("steer", model, "--vector", stored, "--prompt", "I", "--max-tokens", 1, "--json").stdout
    report = json.loads(out)
    assert report["vector"] == stored and report["layers"] == [1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "x"], "--data"),
        (["--prompt", "x", "--data", "a", "--vector", "b.json"], "--vector"),
        (["--prompt", "x", "--vector", "b.json", "--layer", "1"], "--layer"),
        (["--data", "calm_angry"], "--prompt"),
        (["--prompt", "x", "--data", "a", "--layer", "two"], "two"),
        (["--prompt", "x", "--data", "a", "--strength", "strong"], "strong"),
        (["--prompt", "x", "--data", "a", "--method", "no-shot"], "no-shot"),
        (["--prompt", "x", "--data", "a", "--max-tokens", "0"], "max-tokens"),
        (["--prompt", "x", "--data", "a", "--nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], says: str) -> None:
    result = run("steer", "mx-tiny", *arguments, code=2)
    assert says in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}-nowhere", "--data", "{data}"], "nowhere"),
        (["{model}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["{model}", "--data", "{data}", "--split", "none"], "'none'"),
        (["{model}", "--data", "{bad}"], "line 1"),
        (["{model}", "--vector", "nowhere.json"], "nowhere.json"),
        (["{model}", "--vector", "{bad}"], "suffix"),
        (["{model}", "--vector", "{wide}"], f"7 wide.*{D_MODEL}"),
        (["{model}", "--data", "{data}", "--layer", "99"], "Layer 99"),
        (["{model}", "--data", "{data}", "--strength", "nan"], "finite"),
        (["{model}", "--data", "{data}", "--sampling-method", "beam"], "beam"),
        (["{model}", "--data", "{data}", "--temperature", "0"], "temperature"),
        (["{model}", "--data", "{data}", "--save", "vector.pt"], "suffix"),
        (["{model}", "--data", "{data}", "--save", "{data}/v.json"], "pairs.jsonl"),
        (["{model}", "--data", "{data}", "--device", "toaster"], "toaster"),
        (["{model}", "--data", "{data}", "--dtype", "int3"], "int3"),
    ],
)
def test_what_goes_wrong_is_one_line_on_stderr_and_exit_code_1(
    model: str, data: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    SteeringVector({1: torch.ones(7)}).save(tmp_path / "wide.json")
    names = {"model": model, "data": data, "bad": tmp_path / "bad.jsonl", "wide": tmp_path / "wide.json"}
    given = [argument.format(**names) for argument in arguments]
    result = run("steer", *given, "--prompt", "x", "--max-tokens", 1, code=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1 and re.search(says, errors[0]) and not result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.ci
def test_pipes_and_no_color_get_plain_text(model: str, data: str) -> None:
    arguments = ("steer", model, "--data", data, "--prompt", PROMPT, "--max-tokens", "3")
    done = as_process(*arguments, NO_COLOR="1", COLUMNS="60", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 60


def test_model_text_cannot_steer_the_terminal() -> None:
    from rich.console import Console

    from mechanex.commands.console import model_text

    screen = Console(force_terminal=True, width=60, record=True, file=io.StringIO())
    screen.print(model_text("a\x1b[31mred\x07 [bold]not bold[/bold] \u202ereversed"))
    assert "\x1b" not in screen.export_text(styles=False)
    assert "[bold]not bold[/bold]" in str(model_text("[bold]not bold[/bold]"))
    assert "\u202e" not in str(model_text("\u202e"))


def test_the_entry_point_runs_the_command() -> None:
    done = as_process("steer", "mx-tiny")
    assert done.returncode == 2 and "Usage" in done.stderr


# The demo


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """The demo at a few tokens and one layer, on a random model, which it can't steer but must survive."""
    from mechanex.demo import measure, run

    monkeypatch.setattr(run, "MODEL", model)
    monkeypatch.setattr(run, "N_LAYERS", 1)
    monkeypatch.setattr(run, "TONES", run.TONES[:1])
    monkeypatch.setattr(measure, "MAX_TOKENS", 4)


def test_demo_leaves_figures_and_a_picture(small_demo: None, tmp_path: Path) -> None:
    out = run("demo", "--out", tmp_path / "new" / "out").stdout
    assert "angry" in out and "perplexity" in out
    report = json.loads((tmp_path / "new" / "out" / "steering.json").read_text())
    assert [one["strength"] for one in report["measurements"]] == [-1, -0.5, 0, 0.5, 1]
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "new" / "out" / "steering.png").read_bytes().startswith(b"\x89PNG")


def test_demo_tells_of_every_step(small_demo: None, tmp_path: Path) -> None:
    from mechanex.demo import run, tones

    steps: list[int] = []
    run.run_demo(tmp_path, progress=lambda: steps.append(1))
    # What the command itself loads first comes to two more; this is of one tone at one layer.
    assert len(steps) + 2 == tones.STEPS - 2 * (2 + 2 * 3 + 5) - 2 * 2


def test_demo_shows_completions_that_were_turned_and_can_be_read() -> None:
    from mechanex.demo.measure import Measurement
    from mechanex.demo.report import _telling

    words = mechanex.bundled.tone_words()["angry"]
    salad, sentence = " ".join(words[:8]), f"She was {words[0]} with the waiter."

    def at(strength: float, *texts: str, perplexities: tuple[float, ...] = (2.0, 2.0, 2.0)) -> Measurement:
        return Measurement("angry", strength, 0.5, 1.0, 2.0, texts, perplexities)

    plain = at(0, "She sat down.", "She sat down.", f"She was {words[1]}.")
    dosed = at(1, salad, sentence, sentence, perplexities=(90.0, 3.0, 2.0))
    assert _telling(plain, dosed) == 1


def test_demo_without_matplotlib_says_how_to_get_the_plot(
    small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = run("demo", "--out", tmp_path).stdout
    assert "pip install '.[plot]'" in out and not (tmp_path / "steering.png").exists()


def test_demo_into_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run("demo", "--out", tmp_path / "file", code=2)


def test_a_text_is_of_the_tone_that_has_most_words_in_it() -> None:
    from mechanex.demo.measure import tone_of

    words = mechanex.bundled.tone_words()
    assert (
        tone_of(f"He was {words['angry'][0]}, {words['angry'][1].upper()} and {words['calm'][0]}.") == "angry"
    )
    assert tone_of(f"{words['angry'][0]} {words['calm'][0]}") == "neutral"
    assert tone_of("") == tone_of("The door was a door.") == "neutral"


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif("mx-tiny" not in mechanex.bundled.model_names(), reason="mx-tiny is not in this tree")
@pytest.mark.parametrize("n_tones", [1, pytest.param(3, marks=pytest.mark.long)])
def test_the_demo_shows_that_steering_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tones: int
) -> None:
    from mechanex.demo import run as demo

    monkeypatch.setattr(demo, "TONES", demo.TONES[:n_tones])
    run("demo", "--out", tmp_path)
    report = json.loads((tmp_path / "steering.json").read_text())
    assert len(report["steering"]) == n_tones
    for steering in report["steering"]:
        by_strength = {
            one["strength"]: one for one in report["measurements"] if one["tone"] == steering["tone"]
        }
        plain, most = by_strength[0.0], by_strength[1.0]
        assert most["share"] > 0.9 or most["share"] - plain["share"] >= 0.5
        assert by_strength[-1.0]["share"] <= plain["share"] < most["share"]
        assert most["perplexity"] <= 2 * plain["perplexity"]


@pytest.mark.ci
def test_text_that_the_terminal_lacks_does_not_stop_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from mechanex.cli import main; main()",
        "steer",
        "mx-tiny",
        "--prompt",
        "Café ☕",
    ]
    options = ["--data", "calm_angry", "--layer", "3", "--max-tokens", "2"]
    done = subprocess.run(
        command + options, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()


def test_an_unknown_suffix_is_told_before_anything_is_computed() -> None:
    done = CliRunner().invoke(
        main, ["steer", "no-such-model", "--data", "calm_angry", "--prompt", "x", "--save", "a.txt"]
    )
    assert done.exit_code == 1 and "'.txt'" in done.output


def test_the_module_with_arguments_is_the_command_line(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", ["mechanex", "models", "--local", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mechanex", run_name="__main__")
    assert ended.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)[0]["name"] == "mx-tiny"
