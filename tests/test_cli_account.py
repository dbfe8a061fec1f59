"""The account commands against a real server: what they print and keep, in a pipe and in a script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from faulty_proxy import FaultyProxy, Received, Status
from server_process import ServerProcess, serving

from mechanex import Mechanex
from mechanex.cli import main

PASSWORD = "a long password"
COMMAND = [sys.executable, "-c", "from mechanex.cli import main; main()"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(home=tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(autouse=True)
def _base_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "server" in request.fixturenames:
        monkeypatch.setenv("MECHANEX_BASE_URL", request.getfixturevalue("server").url)


@pytest.fixture
def email(request: pytest.FixtureRequest) -> str:
    """An address of the test's own."""
    return f"{zlib.crc32(request.node.nodeid.encode())}@example.com"


@pytest.fixture
def config(mechanex_home: Path) -> Path:
    return Path(os.environ["MECHANEX_CONFIG"])


def run(*arguments: str, code: int = 0, given: str | None = None, obj: Any = None) -> Result:
    result = CliRunner().invoke(main, list(arguments), input=given, obj=obj)
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert "Traceback" not in result.output
    return result


def as_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        timeout=300,
    )


def test_from_sign_up_to_log_out(server: ServerProcess, email: str, config: Path) -> None:
    out = run("signup", "--email", email, "--password", PASSWORD)
    assert f"Signed up and logged in as {email}" in out.stdout and str(config) in out.stdout
    stored = json.loads(config.read_text())
    assert {"api_key", "access_token", "refresh_token", "base_url"} <= stored.keys()
    assert not any(stored[name] in out.output for name in ("api_key", "access_token", "refresh_token"))

    assert email in run("whoami").stdout
    assert json.loads(run("whoami", "--json").stdout)["email"] == email

    keys = json.loads(run("list-api-keys", "--json").stdout)
    assert [key["name"] for key in keys] == ["Default Key"]
    assert (
        "Default Key" in run("list-api-keys").stdout and stored["api_key"] not in run("list-api-keys").stdout
    )

    made = run("create-api-key", "--name", "second")
    key = made.stdout.strip()
    assert Mechanex(api_key=key).whoami()["email"] == email and "once" in made.stderr
    assert json.loads(config.read_text())["api_key"] == stored["api_key"]
    saved = json.loads(run("create-api-key", "--save", "--json").stdout)
    assert json.loads(config.read_text())["api_key"] == saved["key"]
    listed = json.loads(run("list-api-keys", "--json").stdout)
    assert len(listed) == 3
    assert "is deleted" in run("delete-api-key", listed[2]["id"]).stdout
    assert json.loads(run("list-api-keys", "--json").stdout) == listed[:2]
    (line,) = run("delete-api-key", listed[2]["id"], code=1).stderr.splitlines()
    assert "no API key of this account" in line

    assert str(config) in run("logout").stdout and not config.exists()
    assert "no stored credentials" in run("logout").stdout

    assert f"Logged in as {email}" in run("login", "--email", email, "--password", PASSWORD).stdout
    assert email in run("whoami").stdout


def test_a_password_is_piped_or_in_the_environment(
    server: ServerProcess, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("signup", given=f"{email}\n{PASSWORD}\n")
    out = run("login", "--email", email, given=PASSWORD + "\n")
    assert PASSWORD not in out.output
    monkeypatch.setenv("MECHANEX_EMAIL", email)
    monkeypatch.setenv("MECHANEX_PASSWORD", PASSWORD)
    run("login")
    done = as_process("login")
    assert done.returncode == 0 and email in done.stdout and not done.stderr


def test_without_a_terminal_a_missing_password_is_wrong_usage() -> None:
    assert "--password" in run("login", "--email", "a@b.c", given="", code=2).stderr
    assert as_process("login", "--email", "a@b.c").returncode == 2
    for command in ("login", "signup"):
        done = as_process(command)
        assert done.returncode == 2 and "--email" in done.stderr and not done.stdout
    closed = f"'{sys.executable}' -m mechanex.cli login <&-"
    assert subprocess.run(closed, shell=True, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["login", "--email", "nobody@example.com", "--password", "x" * 12], r"[401]"),
        (["signup", "--email", "no address", "--password", "x" * 12], "email"),
        (["signup", "--email", "a@example.com", "--password", "short"], "assword"),
        (["login", "--email", " ", "--password", "x"], "email"),
        (["create-api-key", "--name", " "], "name"),
    ],
)
def test_what_the_server_refuses_is_one_line_on_stderr(
    server: ServerProcess, arguments: list[str], says: str, config: Path
) -> None:
    result = run(*arguments, code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and says in line and not result.stdout and not config.exists()


@pytest.mark.parametrize("command", ["whoami", "list-api-keys", "create-api-key"])
def test_without_credentials_the_error_says_how_to_get_them(command: str) -> None:
    result = run(command, code=1)
    assert "login" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["whoami", "extra"], ["login", "--nothing"], ["list-api-keys", "--json=1"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert "Error" in run(*arguments, code=2).stderr


def test_an_account_that_must_be_confirmed_first(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    with FaultyProxy() as server:
        monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
        for status in (400, 401, 403, 422):
            server.faults = [Status(200, '{"session": null, "user": {}}'), Status(status)]
            out = run("signup", "--email", "a@b.c", "--password", PASSWORD).stdout
            assert "Confirm the address" in out and "mechanex login" in out and not config.exists()
        server.faults = [Status(200, '{"session": null, "user": {}}'), Status(500)]
        result = run("signup", "--email", "a@b.c", "--password", PASSWORD, code=1)
        assert re.search(r"a@b.c is signed up, but.*\[500\].*run mechanex login", result.stderr)
        session = '{"session": {"access_token": "the-access", "refresh_token": "the-refresh"}}'
        server.faults = [Status(200, session), Status(500)]
        result = run("signup", "--email", "a@b.c", "--password", PASSWORD, code=1)
        assert "signed up and logged in, but has no API key" in result.stderr
        assert json.loads(config.read_text())["access_token"] == "the-access"
        assert not any(secret in result.output for secret in ("the-access", "the-refresh", PASSWORD))


def test_a_new_key_that_cannot_be_stored_is_shown_and_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    def answer(request: Received) -> Status | None:
        if request.path != "/auth/api-keys":
            return Status(200, '{"session": {"access_token": "the-access"}, "user": {}}')
        if config.is_file():
            config.unlink()
            config.mkdir()
        return Status(200, '{"key": "the-key"}')

    with FaultyProxy(answer=answer) as server:
        monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
        signed_up = run("signup", "--email", "a@b.c", "--password", PASSWORD, code=1)
        assert signed_up.stdout == "the-key\n"
        assert "a@b.c is signed up and logged in, but" in signed_up.stderr and "stored" in signed_up.stderr
        again = run("signup", "--email", "a@b.c", "--password", PASSWORD, code=1)
        assert "a@b.c is signed up, but" in again.stderr and "mechanex login" in again.stderr
        monkeypatch.setenv("MECHANEX_API_KEY", "an-old-key")
        made = run("create-api-key", "--save", code=1)
        assert made.stdout == "the-key\n" and "is not stored" in made.stderr.splitlines()[-1]
        assert not any("is stored" in result.stderr for result in (signed_up, again, made))
        for result in (signed_up, again, made):
            assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def test_what_a_server_writes_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = json.dumps("\x1b[2J\x07[bold]evil[/bold]\u202e")
    with FaultyProxy() as server:
        monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
        server.faults = [
            Status(200, f'{{"email": {evil}}}'),
            Status(200, f'[{{"name": {evil}, "last_used": 3, "more": {{}}}}]'),
            Status(200, f'{{"key": {evil}}}'),
            Status(418, f'{{"detail": {evil}}}'),
        ]
        shown = [run("whoami"), run("list-api-keys"), run("create-api-key"), run("whoami", code=1)]
        for result in shown:
            assert "evil" in result.output and "\x1b" not in result.output and "\u202e" not in result.output
        server.faults = [Status(200, "[]"), Status(200, '["odd"]')]
        assert "no API keys" in run("list-api-keys").stdout
        run("list-api-keys", code=1)


def test_json_is_read_everywhere_and_steers_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "Zoë 東京 😀 \x1b[2J \x7f \x9b31m \u202e \u2028 \ue000 \U000e0001 \ud800 a\nb"
    with FaultyProxy(answer=lambda request: Status(200, json.dumps({"email": text}))) as server:
        variables = {"MECHANEX_BASE_URL": server.url, "MECHANEX_API_KEY": "a-key", "PYTHONUTF8": "0"}
        for encoding in ("utf-8", "UTF8", "latin-1", "ascii", "cp1252:strict"):
            done = subprocess.run(
                [*COMMAND, "whoami", "--json"],
                capture_output=True,
                env=os.environ | variables | {"PYTHONIOENCODING": encoding},
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            printed = done.stdout.decode()
            assert json.loads(printed) == {"email": text}
            assert all(char.isprintable() or char == "\n" for char in printed)
            assert ("Zoë 東京 😀" in printed) == encoding.lower().startswith("utf")


def test_the_environments_key_is_pointed_out(
    server: ServerProcess, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("signup", "--email", email, "--password", PASSWORD)
    monkeypatch.setenv("MECHANEX_API_KEY", "from-the-environment")
    for arguments in (["login", "--email", email, "--password", PASSWORD], ["logout"]):
        result = run(*arguments)
        assert "MECHANEX_API_KEY" in result.stderr and "from-the-environment" not in result.output


def test_a_client_can_be_handed_in(server: ServerProcess, email: str) -> None:
    client = Mechanex()
    client.signup(email, PASSWORD, persist=False)
    assert email in run("whoami", obj=client).stdout


def test_output_to_a_pipe_is_plain(server: ServerProcess, email: str) -> None:
    run("signup", "--email", email, "--password", PASSWORD)
    done = as_process("list-api-keys", COLUMNS="60")
    assert done.returncode == 0 and "\x1b" not in done.stdout and not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_sessions_a_new_password_and_the_end(server: ServerProcess, email: str) -> None:
    run("signup", "--email", email, "--password", PASSWORD)
    (session,) = json.loads(run("list-sessions", "--json").stdout)
    changed = run("change-password", given=f"{PASSWORD}\nthe next password\n")
    assert "password is changed" in changed.stdout and "next password" not in changed.output
    run("end-session", session["id"], code=1)
    assert email in run("whoami").stdout
    assert "other" not in run("delete-account", "--password", "wrong password", "--yes", code=1).stdout
    assert "are deleted" in run("delete-account", "--password", "the next password", "--yes").stdout
    run("login", "--email", email, "--password", "the next password", code=1)
