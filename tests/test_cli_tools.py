"""The commands about models, stored vectors, scores and the installation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from families import D_MODEL, FAMILIES, tiny_tokenizer
from faulty_proxy import Close, FaultyProxy, Status

import mechanex
from mechanex import Mechanex, SteeringVector
from mechanex.cli import main


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert not result.stdout and "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    FAMILIES["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vector() -> SteeringVector:
    return SteeringVector({1: torch.ones(D_MODEL)}, model="tiny", method="caa", metadata={"note": "[bold]x"})


# Models


def test_bundled_models_are_listed_without_a_server() -> None:
    assert "mx-tiny" in run("models").stdout
    assert {"name": "mx-tiny", "where": "bundled"} in json.loads(run("models", "--json").stdout)


def test_the_servers_models_are_listed_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy() as server:
        monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
        server.faults = [
            Status(200, '{"models": [{"name": "large"}]}'),
            Status(200, '["other"]'),
            Status(401),
        ]
        assert {"name": "large", "where": server.url} in json.loads(run("models", "--json").stdout)
        assert "other" in run("models").stdout
        assert "[401]" in run("models", code=1).stderr
        run("models", "--local")
        assert len(server.requests) == 3


# Vectors


def test_vectors_from_import_to_export(vector: SteeringVector, tmp_path: Path) -> None:
    assert (
        "no vectors" in run("vectors", "list").stdout
        and json.loads(run("vectors", "list", "--json").stdout) == []
    )
    vector.save(tmp_path / "one.gguf")
    first = run("vectors", "import", tmp_path / "one.gguf").stdout.strip()
    vector.save(tmp_path / "two.safetensors")
    second = json.loads(run("vectors", "import", tmp_path / "two.safetensors", "--json").stdout)["id"]
    os.utime(mechanex.home.vectors_folder() / f"{first}.safetensors", (1, 1))

    listed = json.loads(run("vectors", "list", "--json").stdout)
    assert [one["id"] for one in listed] == [second, first]
    assert listed[0]["layers"] == [1] and listed[0]["width"] == D_MODEL and listed[0]["model"] == "tiny"
    assert "1970" in listed[1]["stored"]
    assert "caa" in run("vectors", "list").stdout

    shown = json.loads(run("vectors", "show", second, "--json").stdout)
    assert shown["method"] == "caa" and shown["norms"] == [pytest.approx(D_MODEL**0.5, abs=1e-5)]
    assert "[bold]x" in run("vectors", "show", second).stdout
    assert "caa" in run("vectors", "show", tmp_path / "two.safetensors").stdout

    out = tmp_path / "out.json"
    run("vectors", "export", second, out)
    assert SteeringVector.load(out).allclose(vector)
    assert "--force" in run("vectors", "export", second, out, code=2).stderr
    run("vectors", "export", tmp_path / "two.safetensors", out, "--force")
    assert Mechanex().steering.get_vectors(second)[1].equal(vector[1])

    # All that are named, or none.
    (line,) = run("vectors", "delete", first, "unknown", second, code=1).stderr.splitlines()
    assert "unknown" in line and len(json.loads(run("vectors", "list", "--json").stdout)) == 2
    assert run("vectors", "delete", first, second, first).stdout.count("Deleted") == 2
    assert json.loads(run("vectors", "list", "--json").stdout) == []
    assert "VECTOR" in run("vectors", "delete", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "unknown"], "unknown"),
        (["show", "../x"], "../x"),
        (["show", "nowhere.json"], "nowhere.json"),
        (["export", "unknown", "{tmp}/a.json"], "unknown"),
        (["delete", "../x"], "../x"),
        (["export", "{tmp}/v.json", "{tmp}/a.pt"], "'.pt'"),
        (["import", "{tmp}/bad.json"], "bad.json"),
    ],
)
def test_what_goes_wrong_with_vectors_is_one_line(
    vector: SteeringVector, tmp_path: Path, arguments: list[str], says: str
) -> None:
    vector.save(tmp_path / "v.json")
    (tmp_path / "bad.json").write_text("[")
    result = run("vectors", *(argument.format(tmp=tmp_path) for argument in arguments), code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and says in line


def test_a_damaged_file_does_not_hide_the_others(vector: SteeringVector) -> None:
    vector_id = Mechanex().vectors.put(vector)
    (mechanex.home.vectors_folder() / "damaged.safetensors").write_bytes(b"no vector")
    assert [one["id"] for one in json.loads(run("vectors", "list", "--json").stdout)] == [vector_id]


def test_a_folder_that_cannot_be_written_is_an_error(
    vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector.save(tmp_path / "v.json")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHANEX_HOME", str(tmp_path / "file"))
    assert "MECHANEX_HOME" in run("vectors", "import", tmp_path / "v.json", code=1).stderr


# Scores


def test_scores_are_those_of_the_library(model: str, vector: SteeringVector, tmp_path: Path) -> None:
    from mechanex.engine.score import completion_logprobs

    vector.save(tmp_path / "v.json")
    base = ("score", model, "--prompt", "The man", "--completion", " said", "--completion", " was happy")
    client = Mechanex().load(model, backend="transformers")
    texts = [" said", " was happy"]
    for options, edits in ((), None), (("--vector", tmp_path / "v.json", "--strength", 2), 2 * vector):
        report = json.loads(run(*base, *options, "--json").stdout)
        expected = completion_logprobs(client.local_model, "The man", texts, client.tokenizer, edits=edits)
        assert [row["logprob"] for row in report["completions"]] == pytest.approx(expected.sums.tolist())
        for row in report["completions"]:
            assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["tokens"]))
    assert "was happy" in run(*base).stdout and "perplexity" in run(*base).stdout
    stored = Mechanex().vectors.put(vector)
    by_id = json.loads(run(*base, "--vector", stored, "--strength", 2, "--json").stdout)
    assert by_id["completions"] == report["completions"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--prompt", "a"], 2, "--completion"),
        (["--completion", "a"], 2, "--prompt"),
        (["--prompt", "a", "--completion", ""], 1, "no tokens"),
        (["--prompt", "a", "--completion", "b", "--vector", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_be_scored_is_said(model: str, arguments: list[str], code: int, says: str) -> None:
    assert says in run("score", model, *arguments, code=code).stderr


# The doctor


def test_the_doctor_reports_installation_credentials_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("doctor").stdout
    assert mechanex.__version__ in out and "backend" in out and "credentials: none" in out
    assert "not asked: there are no credentials" in out
    with FaultyProxy() as server:
        monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
        Mechanex().set_key("a-secret-key", persist=True).set_token("secret-access", persist=True)
        account = json.loads(run("doctor", "--json").stdout)["account"]
        assert account["server answers"] == "yes" and account["credentials"] == "api_key, access_token"
        server.faults = [Close()] * 4
        assert "server answers: no: " in run("doctor").stdout
        assert "--offline" in run("doctor", "--offline").stdout and len(server.requests) == 5
        monkeypatch.setenv("MECHANEX_API_KEY", "environment-secret")
        out = run("doctor").stdout
        assert "api_key (from MECHANEX_API_KEY)" in out and "secret" not in out
        monkeypatch.delenv("MECHANEX_API_KEY")
        Mechanex().logout()
        Mechanex().set_token("ended-access", "ended-refresh", persist=True)
        server.faults = [Status(401), Status(401)]
        out = run("doctor").stdout
        assert "credentials: access_token, refresh_token: the session has ended, run mechanex login" in out
    monkeypatch.setenv("MECHANEX_BASE_URL", "https://user:secret@host")
    out = run("doctor").stdout
    assert "unusable" in out and "secret" not in out


@pytest.mark.parametrize("command", [["models"], ["vectors"], ["vectors", "list"], ["score"], ["doctor"]])
def test_help_comes_at_once(command: list[str]) -> None:
    code = (
        "import sys; from mechanex.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print([m for m in ('torch', 'requests', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage" in done.stdout and done.stdout.endswith("[]\n")
