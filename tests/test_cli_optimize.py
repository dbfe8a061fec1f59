"""``mechanex optimize``: the figures it reports, the files it leaves, Ctrl-C and going on, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from mechanex import SteeringVector
from mechanex.cli import main
from mechanex.engine.generate import generate_batch
from mechanex.engine.models.resolve import load

pytestmark = pytest.mark.slow

ENDLESS = 10**9  # steps
# The command, which writes a file once it has made some steps. A shell may have told it to ignore Ctrl-C.
TELLING = """
import pathlib, signal, sys
from mechanex.cli import main
from mechanex.commands.optimize import _Live
signal.signal(signal.SIGINT, signal.default_int_handler)
path, show = pathlib.Path(sys.argv.pop(1)), _Live.__call__
def tell(self, step, *found):
    if step == 5:
        path.touch()
    return show(self, step, *found)
_Live.__call__ = tell
main()
"""
QUICK = ("--layer", 2, "--lr", 0.05, "--coldness", 1)


def run(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["optimize", "mx-tiny", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def vector_of(folder: Path) -> torch.Tensor:
    return SteeringVector.load(folder / "vector.safetensors")[2]


def test_one_prompt_promotes_a_completion_on_held_out_ones(tmp_path: Path) -> None:
    """From one datapoint: the target becomes what the model writes on at least 80 % of held-out prompts."""
    result = run(
        *("--data", "rome_delhi", "--split", "promote", *QUICK, "--target-loss", 0.5),
        *("--eval", "rome_delhi", "--eval-split", "promote-heldout", "--out", tmp_path, "--json"),
    )
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["stopped"] == "target_loss" and report["loss"] <= 0.5 < report["starting_loss"]
    held_out = report["held_out"]
    assert held_out["dst"]["likeliest_before"] < 0.1 and held_out["dst"]["likeliest"] >= 0.8
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    # The report's claim, by generation with the file that was written.
    loaded = load("mx-tiny", backend="transformers")
    prompts = [one["prompt"] for one in held_out["completions"]]
    texts = generate_batch(
        loaded.model,
        loaded.tokenizer,
        prompts,
        sampling_method="greedy",
        max_tokens=8,
        vector=SteeringVector.load(tmp_path / "vector.safetensors"),
    )
    written = [
        text[len(prompt) :].startswith(" The streets of Rome were")
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    assert sum(written) >= 0.8 * len(prompts)


def test_one_prompt_suppresses_a_completion_tenfold_on_held_out_ones(tmp_path: Path) -> None:
    result = run(
        *("--data", "rome_delhi", "--split", "suppress", *QUICK, "--max-iters", 100),
        *("--eval", "rome_delhi", "--eval-split", "suppress-heldout", "--out", tmp_path),
    )
    assert "100 steps" in result.stdout and "48 to suppress" in result.stdout
    figures = json.loads((tmp_path / "report.json").read_text())["held_out"]["src"]
    assert figures["factor"] < 0.1 and figures["largest_factor"] < 0.1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Another number of threads would add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.ci
@pytest.mark.usefixtures("one_thread")
def test_ctrl_c_keeps_the_best_and_resume_ends_where_an_undisturbed_run_does(tmp_path: Path) -> None:
    options = ("--data", "rome_delhi", "--split", "promote", *QUICK)
    cut = subprocess.Popen(
        [
            *(sys.executable, "-c", TELLING, str(tmp_path / "steps")),
            *("optimize", "mx-tiny", *map(str, options), "--max-iters", str(ENDLESS)),
            *("--out", str(tmp_path / "cut")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "steps").exists() and cut.poll() is None:
        time.sleep(0.02)
    cut.send_signal(signal.SIGINT)
    _, errors = cut.communicate()
    assert cut.returncode == 1, errors
    assert "interrupted after" in errors and "Traceback" not in errors
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["stopped"] == "interrupted" and 5 <= report["iters"] < ENDLESS
    assert report["loss"] == min([report["starting_loss"], *report["loss_history"]])

    steps = report["iters"] + 20
    run(*options, "--max-iters", steps, "--out", tmp_path / "cut", "--resume")
    run(*options, "--max-iters", steps, "--out", tmp_path / "whole")
    assert torch.equal(vector_of(tmp_path / "cut"), vector_of(tmp_path / "whole"))
    cut_history, history = (
        json.loads((tmp_path / name / "report.json").read_text())["loss_history"] for name in ("cut", "whole")
    )
    assert cut_history == history and len(history) == steps


def test_an_optimization_is_not_overwritten_unless_asked_for(tmp_path: Path) -> None:
    options = ("--data", "rome_delhi", "--split", "promote", *QUICK, "--out", tmp_path)
    assert "nothing to resume" in run(*options, "--resume", code=1).stderr
    run(*options, "--max-iters", 3)
    first = vector_of(tmp_path)
    assert "--resume goes on with it" in run(*options, "--max-iters", 5, code=1).stderr
    assert torch.equal(vector_of(tmp_path), first)
    run(*options, "--max-iters", 5, "--force")
    assert not torch.equal(vector_of(tmp_path), first)


def test_datapoints_are_steered_where_and_how_they_say(tmp_path: Path) -> None:
    """A datapoint that is negative is measured with the vector's negative, one with a token only there."""
    line = {
        "prompt": "Tom came home from a journey on Wednesday.",
        "dst_completions": [" The streets of Rome"],
    }
    data = write(tmp_path / "d.jsonl", line)
    held_out = write(
        tmp_path / "h.jsonl",
        line,
        {**line, "is_negative": True},
        {**line, "token": [0, 0]},
        {**line, "token": 3},
    )
    run("--data", data, *QUICK, "--max-iters", 40, "--eval", held_out, "--out", tmp_path / "o")
    measured = json.loads((tmp_path / "o/report.json").read_text())["held_out"]["completions"]
    plain, negative, nowhere, single = (one["after"] - one["before"] for one in measured)
    assert plain > 0.3 and negative < 0 and nowhere == 0 and 0 != single < plain


def test_texts_with_and_without_the_vector_are_shown(tmp_path: Path) -> None:
    """Of the held-out prompts where there are some; drawn with one seed, steered as the datapoint asks."""
    held_out = write(
        tmp_path / "held.jsonl",
        {"prompt": "Maria wrote a letter to Emma on Friday.", "dst_completions": [" The streets"]},
    )
    data = ("--data", "rome_delhi", "--split", "promote", *QUICK, "--max-iters", 30)
    told = run(*data, "--eval", held_out, "--out", tmp_path / "o").stdout
    (text,) = json.loads((tmp_path / "o/report.json").read_text())["texts"]
    assert "plain" in told and "steered" in told and text["steered"].split()[0] in told
    loaded = load("mx-tiny", backend="transformers")
    vector = SteeringVector.load(tmp_path / "o/vector.safetensors")
    for name, steering in (("plain", None), ("steered", vector)):
        (found,) = generate_batch(
            loaded.model, loaded.tokenizer, [text["prompt"]], vector=steering, max_tokens=40, seed=0
        )
        assert found == text["prompt"] + text[name]


def test_only_the_prompt_is_steered_in_the_measurement_too(tmp_path: Path) -> None:
    line = {"prompt": "Tom came home from a journey.", "dst_completions": [" The streets of Rome"]}
    data = write(tmp_path / "d.jsonl", line)
    options = ("--data", data, *QUICK, "--max-iters", 30, "--only-hook-prompt", "--eps", 0)
    run(*options, "--eval", data, "--out", tmp_path / "o")
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    (measured,) = report["held_out"]["completions"]
    assert -measured["after"] == pytest.approx(report["loss"], abs=1e-4)


@pytest.mark.ci
def test_the_second_phase_shortens_the_vector_and_is_reported(tmp_path: Path) -> None:
    options = ("--data", "rome_delhi", "--split", "promote", *QUICK, "--max-iters", 60)
    run(*options, "--out", tmp_path / "long")
    shown = run(*options, "--minimize-norm", "--out", tmp_path / "short").stdout
    long, short = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("long", "short"))
    assert (
        short["norm"] < long["norm"] and f"then {short['output_constr_iters']} steps to shorten it" in shown
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 1: it has neither 'src_completions' nor 'dst_completions'"),
        ('{"prompt": "a", "dst_completion": [" b"]}', "line 1: it has the unknown key 'dst_completion'"),
        (
            '{"prompt": "a", "dst_completions": " b"}',
            "line 1: 'dst_completions' is \" b\", and a list of texts",
        ),
        ('{"prompt": "a", "dst_completions": [""]}', "line 1: 'dst_completions'"),
        ('{"prompt": "a", "dst_completions": [" b"], "token": [1]}', "line 1: 'token' is [1]"),
        ('{"prompt": "a", "dst_completions": [" b"], "token": "x"}', "line 1:"),
        ('{"prompt": "a", "dst_completions": [" b"], "is_negative": 1}', "line 1: 'is_negative' is 1"),
        ('{"dst_completions": [" b"]}', "line 1: it has no 'prompt'"),
        ("{", "line 1: it is not JSON"),
        ("", "has no examples"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(line: str, message: str, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(line)
    result = run("--data", data, "--out", tmp_path / "o", code=1)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_usage_errors(tmp_path: Path) -> None:
    assert (
        "--resume goes on and --force starts anew"
        in run("--data", "rome_delhi", "--resume", "--force", code=2).stderr
    )
    assert "--eval-split goes with --eval" in run("--data", "rome_delhi", "--eval-split", "x", code=2).stderr
    assert "no dataset at nowhere" in run("--data", "nowhere", "--out", tmp_path, code=1).stderr
    assert (
        "Layer 9 does not exist"
        in run("--data", "rome_delhi", "--layer", 9, "--out", tmp_path, code=1).stderr
    )
