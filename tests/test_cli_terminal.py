"""Every command at a real terminal: what it shows, Ctrl-C, pipes that are closed early, prompts, NO_COLOR."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from faulty_proxy import FaultyProxy, Stall
from server_process import ServerProcess, serving
from terminal import Ran, Terminal, terminal

from mechanex import Mechanex, SteeringVector
from mechanex.bundled import dataset_path
from mechanex.cli import main
from mechanex.engine.datasets import read_pairs

pytest.importorskip("pexpect")

PASSWORD = "a long password"
PROMPT = "Anna went to the market on Friday."
QUICK = ["--data", "rome_delhi", "--split", "promote", "--layer", "2", "--max-iters", "3", "--force"]

# Arguments with which each command runs to its end, and what it shows then. serve, delete-api-key and the two that
# ask for a password have tests of their own.
COMMANDS: dict[str, tuple[list[str], str]] = {
    "create-api-key": (["--name", "second"], "shown this once"),
    "demo": (["--out", "{tmp}/demo"], "completions of the tone"),
    "doctor": ([], "server answers: yes"),
    "list-api-keys": ([], "last used"),
    "list-sessions": ([], "expires at"),
    "models": ([], "bundled"),
    "optimize": (["mx-tiny", *QUICK, "--out", "{tmp}/optimized"], "stopped by max_iters"),
    "score": (
        ["mx-tiny", "--prompt", PROMPT, "--completion", " She smiled.", "--vector", "{id}"],
        "perplexity",
    ),
    "steer": (["mx-tiny", "--vector", "{file}", "--prompt", PROMPT, "--max-tokens", "3"], "unsteered"),
    "vectors condition": (
        ["{id}", "{tmp}/c.safetensors", "--model", "mx-tiny", "--prompts", "{paris}", "--others", "{rome}"],
        "Written to",
    ),
    "vectors delete": (["{id}"], "Deleted"),
    "vectors export": (["{id}", "{tmp}/exported.gguf"], "Written to"),
    "vectors import": (["{file}"], ""),
    "vectors list": ([], "caa"),
    "vectors show": (["{id}"], "metadata"),
    "whoami": ([], "{email}"),
}
ASKING = {"login", "signup"}
# Autoencoders, and what looks into a model or an answer, have files of tests of their own.
ELSEWHERE = {
    "activations",
    "attribute",
    "chat",
    "orthogonalize",
    "cite",
    "measure",
    "sweep",
    "change-password",
    "delete-account",
    "delete-api-key",
    "end-session",
    "logout",
    "model graph",
    "model paths",
    "serve",
    *(f"sae {name}" for name in ("explain", "list", "show", "trace", "train")),
}
WITHOUT_DATA = {
    *ASKING,
    "chat",
    "orthogonalize",
    "change-password",
    "delete-account",
    "delete-api-key",
    "end-session",
    "serve",
    "logout",
    "vectors delete",
    "vectors export",
}


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(home=tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    home = tmp_path_factory.mktemp("home")
    with terminal(MECHANEX_HOME=str(home), MECHANEX_CONFIG=str(home / "none.json")) as running:
        yield running


@pytest.fixture(scope="module")
def account(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The credentials of somebody who has signed up, to be copied."""
    path = tmp_path_factory.mktemp("account") / "config.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHANEX_CONFIG", str(path))
        client = Mechanex(server.url)
        client.signup("anna@example.com", PASSWORD)
        client.create_api_key(persist=True)
    return path


@pytest.fixture
def vector() -> SteeringVector:
    return SteeringVector({3: torch.ones(128)}, model="mx-tiny", method="caa", metadata={"note": "ones"})


@pytest.fixture
def given(vector: SteeringVector, tmp_path: Path, mechanex_home: Path) -> dict[str, str]:
    """What stands for the names in the arguments: a vector in the test's folder, and one that is stored."""
    vector.save(tmp_path / "vector.safetensors")
    pairs = read_pairs(dataset_path("paris_rome"), split="train")
    for name, answers in (("paris", pairs.positive_answers), ("rome", pairs.negative_answers)):
        texts = (f"{prompt}{answer}\n" for prompt, answer in zip(pairs.prompts, answers, strict=True))
        (tmp_path / f"{name}.txt").write_text("".join(texts), encoding="utf-8")
    return {
        "paris": str(tmp_path / "paris.txt"),
        "rome": str(tmp_path / "rome.txt"),
        "tmp": str(tmp_path),
        "file": str(tmp_path / "vector.safetensors"),
        "id": Mechanex().vectors.put(vector),
        "email": "anna@example.com",
    }


@pytest.fixture
def variables(server: ServerProcess, account: Path, tmp_path: Path, mechanex_home: Path) -> dict[str, str]:
    """The environment of somebody who is logged in."""
    shutil.copy(account, tmp_path / "config.json")
    return {
        "MECHANEX_BASE_URL": server.url,
        "MECHANEX_CONFIG": str(tmp_path / "config.json"),
        "MECHANEX_HOME": str(mechanex_home),
    }


def arguments_of(name: str, given: dict[str, str]) -> list[str]:
    return [*name.split(), *(argument.format(**given) for argument in COMMANDS[name][0])]


def assert_no_traceback(ran: Ran) -> None:
    for sign in ("Traceback", "Exception ignored", "BrokenPipe", "KeyboardInterrupt"):
        assert sign not in ran.text, ran.text


def test_these_are_all_commands() -> None:
    assert {name for name, _ in commands()} == COMMANDS.keys() | ASKING | ELSEWHERE


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_its_result(
    screen: Terminal, name: str, given: dict[str, str], variables: dict[str, str]
) -> None:
    ran = screen.run(*arguments_of(name, given), **variables)
    assert ran.code == 0, ran.text
    assert COMMANDS[name][1].format(**given) in ran.text
    assert_no_traceback(ran)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - WITHOUT_DATA))
def test_json_is_all_that_comes_to_stdout(
    screen: Terminal, name: str, given: dict[str, str], variables: dict[str, str], tmp_path: Path
) -> None:
    """Notes on stderr stand before it, since a terminal shows both."""
    ran = screen.run(*arguments_of(name, given), "--json", **variables)
    assert ran.code == 0, ran.text
    start = min(place for sign in "{[" if (place := ran.text.find(f"{sign}\n")) >= 0)
    assert json.loads(ran.text[start:])


@pytest.mark.ci
@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_that_is_closed_early_ends_a_command_without_a_word(
    screen: Terminal, name: str, given: dict[str, str], variables: dict[str, str]
) -> None:
    ran = screen.run(*arguments_of(name, given), closed=True, **variables)
    assert ran.code == 1, ran.text
    assert_no_traceback(ran)
    assert "Error" not in ran.text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["vectors", "--help"], ["steer", "--help"]])
def test_so_does_help(screen: Terminal, arguments: list[str]) -> None:
    ran = screen.run(*arguments, closed=True)
    assert ran == Ran("", 1)


@pytest.mark.parametrize("arguments", ["--help", "models --local", "models --local --json"])
def test_nor_does_a_process_of_its_own_complain(arguments: str) -> None:
    command = f"'{sys.executable}' -m mechanex.cli {arguments} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for arguments in (["--help"], ["models", "--local"], ["models", "--local", "--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "mechanex.cli", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 1 and done.stderr == "Error: No space left on device\n"


# Ctrl-C


@pytest.mark.parametrize("name", ["create-api-key", "doctor", "list-api-keys", "models", "whoami"])
def test_ctrl_c_while_a_server_is_silent(screen: Terminal, name: str) -> None:
    with FaultyProxy() as silent:
        silent.faults = [Stall(600)]
        screen.start(name, MECHANEX_BASE_URL=silent.url, MECHANEX_API_KEY="a-key")
        _wait_until(lambda: bool(silent.requests))
        _assert_aborted(screen)


@pytest.mark.parametrize(
    ("arguments", "at"),
    [
        (["steer", "mx-tiny", "--prompt", PROMPT, "--data", "{tmp}/data.jsonl"], "{tmp}/data.jsonl"),
        (
            ["score", "mx-tiny", "--prompt", "a", "--completion", "b", "--vector", "{tmp}/v.json"],
            "{tmp}/v.json",
        ),
        (["optimize", "mx-tiny", "--data", "{tmp}/data.jsonl", "--out", "{tmp}/new"], "{tmp}/data.jsonl"),
        (["vectors", "show", "{tmp}/v.json"], "{tmp}/v.json"),
        (["vectors", "export", "{tmp}/v.json", "{tmp}/new"], "{tmp}/v.json"),
        (["vectors", "import", "{tmp}/v.json"], "{tmp}/v.json"),
        (["vectors", "list"], "{home}/vectors"),
        (["demo", "--out", "{tmp}/new"], "{tmp}/new"),
        (["serve", "mx-tiny", "--port", "0", "--behaviors", "{tmp}/data.jsonl"], "{tmp}/data.jsonl"),
        (["logout"], "{tmp}/config.json.lock"),
    ],
    ids=lambda one: " ".join(one[:2]) if isinstance(one, list) else "",
)
def test_ctrl_c_while_a_file_is_opened(
    screen: Terminal,
    arguments: list[str],
    at: str,
    vector: SteeringVector,
    variables: dict[str, str],
    tmp_path: Path,
    mechanex_home: Path,
) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    vector.save(tmp_path / "v.json")
    (mechanex_home / "vectors").mkdir(parents=True)
    names = {"tmp": tmp_path, "home": mechanex_home}
    if arguments == ["logout"]:  # of nowhere: other tests go on with this session
        variables["MECHANEX_BASE_URL"] = "http://127.0.0.1:9"
    given = [argument.format(**names) for argument in arguments]
    screen.start(*given, pause=at.format(**names), **variables)
    _assert_aborted(screen)
    assert not (tmp_path / "new").exists() and not any((mechanex_home / "vectors").iterdir())
    assert (tmp_path / "config.json").exists()


def test_ctrl_c_in_the_middle_of_work(screen: Terminal, tmp_path: Path) -> None:
    screen.start("demo", "--out", str(tmp_path))
    screen.expect("steering:")
    _assert_aborted(screen)
    assert not list(tmp_path.glob("steering*"))


def test_ctrl_c_keeps_the_best_vector_so_far(screen: Terminal, tmp_path: Path) -> None:
    options = [option if option != "3" else "100000" for option in QUICK]
    screen.start("optimize", "mx-tiny", *options, "--out", str(tmp_path), NO_COLOR="1")
    screen.expect("step 1")
    ran = screen.interrupt()
    assert ran.code == 1 and "interrupted after" in ran.text and "--resume" in ran.text
    assert_no_traceback(ran)
    assert SteeringVector.load(tmp_path / "vector.safetensors").layers == (2,)
    assert not ran.has_color


def test_ctrl_c_ends_a_server_well(screen: Terminal, mechanex_home: Path) -> None:
    screen.start("serve", "mx-tiny", "--host", "127.0.0.1", "--port", "0", MECHANEX_HOME=str(mechanex_home))
    screen.expect("Serving mx-tiny at http://127.0.0.1:")
    screen.expect("startup complete")
    ran = screen.interrupt()
    assert ran.code == 0, ran.text
    assert_no_traceback(ran)


# Prompts


@pytest.mark.parametrize("name", sorted(ASKING))
def test_the_password_is_not_shown(
    screen: Terminal, server: ServerProcess, account: Path, name: str, tmp_path: Path
) -> None:
    email = "anna@example.com" if name == "login" else "new@example.com"
    config = tmp_path / "config.json"
    screen.start(name, MECHANEX_BASE_URL=server.url, MECHANEX_CONFIG=str(config))
    screen.expect("Email: ")
    assert screen.echoes
    screen.type(email)
    screen.expect("Password: ")
    _wait_until(lambda: not screen.echoes)
    screen.type(PASSWORD)
    ran = screen.end()
    assert ran.code == 0 and PASSWORD not in ran.raw and f"ogged in as {email}" in ran.text
    assert screen.echoes and json.loads(config.read_text())["access_token"] not in ran.raw


@pytest.mark.parametrize("name", sorted(ASKING))
def test_ctrl_c_at_a_prompt(screen: Terminal, name: str) -> None:
    screen.start(name)
    screen.expect("Email: ")
    _assert_aborted(screen, 0.5)
    screen.start(name, "--email", "a@example.com")
    screen.expect("Password: ")
    _wait_until(lambda: not screen.echoes)
    _assert_aborted(screen, 0.5)
    assert screen.echoes


def test_prompts_are_seen_where_stdout_is_redirected(screen: Terminal) -> None:
    screen.start("login", closed=True)
    screen.expect("Email: ")
    _assert_aborted(screen, 0.5)


# Colors


def test_no_color_is_respected(screen: Terminal, given: dict[str, str], tmp_path: Path) -> None:
    arguments = arguments_of("optimize", given)
    assert screen.run(*arguments).has_color
    assert screen.run(*arguments, NO_COLOR="").has_color
    assert not screen.run(*arguments, NO_COLOR="1").has_color
    plain = screen.run(*arguments, TERM="dumb")
    assert not plain.has_color


# Usage, through click.testing


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_help_and_wrong_usage(name: str) -> None:
    shown = CliRunner().invoke(main, [*name.split(), "--help"])
    assert shown.exit_code == 0 and not shown.stderr and f"main {name}" in shown.stdout
    wrong = CliRunner().invoke(main, [*name.split(), "--nonsense"])
    assert wrong.exit_code == 2 and not wrong.stdout
    assert wrong.stderr.startswith("Usage: ") and "--nonsense" in wrong.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_json_is_an_option_wherever_data_is_printed(name: str, command: click.Command) -> None:
    has_json = any("--json" in option.opts for option in command.params)
    assert has_json == (name not in WITHOUT_DATA)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_their_script(shell: str) -> None:
    variables = {**os.environ, "_MECHANEX_COMPLETE": f"{shell}_source"}
    done = subprocess.run(_NAMED, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "_MECHANEX_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ste"], ["plain,steer"]),
        (["vectors", "ex"], ["plain,export"]),
        (["steer", "--str"], ["plain,--strength"]),
        (["steer", "mx"], ["file,mx", "plain,mx-tiny"]),
        (["steer", "mx-tiny", "--data", "calm"], ["file,calm", "plain,calm_angry"]),
        (["serve", "mx-tiny", "--log-level", "w"], ["plain,warning"]),
    ],
)
def test_bash_completes(words: list[str], found: list[str]) -> None:
    variables = {
        **os.environ,
        "_MECHANEX_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["mechanex", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(_NAMED, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == found


_NAMED = [sys.executable, "-c", "from mechanex.cli import main; main(prog_name='mechanex')"]


# Errors that nobody foresaw


@pytest.mark.parametrize(
    "disguise", [ImportError("are its requirements defined correctly?"), OSError("full")]
)
def test_ctrl_c_that_a_library_turns_into_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, disguise: Exception
) -> None:
    """transformers does it to what ends an import; what the system refuses on the way out is told."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            try:
                raise RuntimeError from error
            except RuntimeError:
                raise disguise  # noqa: B904

    monkeypatch.setattr("mechanex.commands.models.run_models", lambda *arguments: interrupted())
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 1 and not result.stdout
    told = "Error: full" if isinstance(disguise, OSError) else "Aborted!"
    assert result.stderr.strip() == told


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of\nmemory \x1b[31m")

    monkeypatch.setattr("mechanex.commands.models.run_models", broken)
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 1 and not result.stdout
    assert (
        result.stderr == "Error: RuntimeError: out of memory \ufffd[31m (MECHANEX_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("MECHANEX_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(main, ["models"]).exception, RuntimeError)
    with pytest.raises(RuntimeError):
        main(["models"], standalone_mode=False)


def test_text_that_is_not_utf8_is_said(screen: Terminal, given: dict[str, str]) -> None:
    for arguments in (
        ["score", "mx-tiny", "--prompt", "a\udcff", "--completion", "b"],
        ["score", "mx-tiny", "--prompt", "a", "--completion", "\udcff"],
        ["steer", "mx-tiny", "--prompt", "a\udcff", "--vector", given["file"]],
    ):
        ran = screen.run(*arguments)
        assert ran.code == 1 and ran.text.startswith("Error: A text holds half of a surrogate pair")
        assert len(ran.text.splitlines()) == 1


def _assert_aborted(screen: Terminal, patience: float = 20.0) -> None:
    ran = screen.interrupt(patience)
    assert ran.code == 1, ran.text
    assert ran.text.split()[-1] == "Aborted!"
    assert_no_traceback(ran)


def _wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to that")
        time.sleep(0.01)
