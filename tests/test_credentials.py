"""Stored credentials: private, whole at every moment, one server's never sent to another, nothing wiped."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy, Status

from mechanex import APIError, Mechanex, MechanexError, ValidationError
from mechanex.remote import config_file
from mechanex.remote.address import PUBLIC_BACKEND
from mechanex.remote.identity import Credentials

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and locks are those of POSIX")

HERE, THERE = "https://here.example", "https://there.example"


@pytest.fixture
def config(mechanex_home: Path) -> Path:
    """The test's file of credentials (conftest sets MECHANEX_CONFIG to it); it isn't there yet."""
    return Path(os.environ["MECHANEX_CONFIG"])


def stored(config: Path) -> Any:
    return json.loads(config.read_text())


def write(config: Path, content: Any, mode: int = 0o600) -> None:
    config.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.write_text(content if isinstance(content, str) else json.dumps(content))
    config.chmod(mode)


def sent(client: Mechanex) -> Credentials:
    return client.transport.credentials.current(client.transport.address.origin)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder, as in a container that runs under a number nobody has named."""
    import pwd

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "MECHANEX_CONFIG", "MECHANEX_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


# Where they come from


def test_an_argument_goes_before_the_environment_and_that_before_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not sent(Mechanex()) and not Mechanex().is_remote and not config.exists()
    write(config, {"api_key": "file-key", "access_token": "file-access", "refresh_token": "file-refresh"})
    assert sent(Mechanex()) == Credentials("file-key", "file-access", "file-refresh")
    monkeypatch.setenv("MECHANEX_API_KEY", " environment-key\n")
    assert sent(Mechanex()) == Credentials("environment-key")
    assert sent(Mechanex(api_key="argument-key")) == Credentials("argument-key")
    assert sent(Mechanex(api_key="argument-key").set_key("set-key")) == Credentials("set-key")
    monkeypatch.setenv("MECHANEX_API_KEY", "")
    assert sent(Mechanex()).api_key == "file-key"


def test_the_file_is_in_the_users_home_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHANEX_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    client = Mechanex().set_key("a-key", persist=True)
    assert client.transport.credentials.file.path == tmp_path / "me" / ".mechanex" / "config.json"
    assert stored(tmp_path / "me" / ".mechanex" / "config.json")["api_key"] == "a-key"
    assert (tmp_path / "me" / ".mechanex").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MECHANEX_CONFIG", "~/other.json")
    assert Mechanex().transport.credentials.file.path == tmp_path / "me" / "other.json"


def test_making_and_importing_reads_and_writes_nothing(config: Path) -> None:
    config.parent.mkdir()
    os.mkfifo(config)  # whoever opens it to read would wait
    code = (
        "import mechanex; mechanex.Mechanex(); mechanex.steering; mechanex.login; mechanex.set_key('a-key')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert os.listdir(config.parent) == ["config.json"]


def test_credentials_that_appear_later_are_found(config: Path) -> None:
    client = Mechanex()
    assert not client.is_remote
    write(config, {"api_key": "late-key"})
    assert client.is_remote


@pytest.mark.parametrize("bad", ["", "  ", "a b", "a\nb", "é", "x" * 9000, None, 5, b"key"])
def test_what_cannot_be_a_key_is_refused_without_showing_it(bad: Any, config: Path) -> None:
    for call in (
        lambda: Mechanex().set_key(bad, persist=True),
        lambda: Mechanex().set_token(bad, persist=True),
        lambda: Mechanex().set_token("fine", bad if bad is not None else 7, persist=True),
    ):
        with pytest.raises(ValidationError, match="no key or token") as raised:
            call()
        if isinstance(bad, str) and len(bad.strip()) > 2:
            assert bad not in str(raised.value)
    assert not config.exists()


# The file


def test_it_is_private_from_its_first_moment(config: Path) -> None:
    before = os.umask(0)
    try:
        Mechanex().set_key("a-key", persist=True)
    finally:
        os.umask(before)
    assert config.stat().st_mode & 0o777 == 0o600
    assert config.parent.stat().st_mode & 0o777 == 0o700
    for other in config.parent.iterdir():
        assert other.stat().st_mode & 0o077 == 0


def test_a_wider_mode_is_tightened_with_a_warning(
    config: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(config, {"api_key": "a-key"}, mode=0o644)
    config.parent.chmod(0o755)  # a folder that the user named may be anybody's
    assert sent(Mechanex()).api_key == "a-key"
    assert config.stat().st_mode & 0o777 == 0o600 and "644" in caplog.text
    assert config.parent.stat().st_mode & 0o777 == 0o755
    monkeypatch.delenv("MECHANEX_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".mechanex" / "config.json"
    write(default, {"api_key": "a-key"})
    default.parent.chmod(0o755)
    assert sent(Mechanex()).api_key == "a-key"
    assert default.parent.stat().st_mode & 0o777 == 0o700
    caplog.clear()
    assert sent(Mechanex()).api_key == "a-key" and not caplog.text


@pytest.mark.parametrize(
    "content",
    ["{", "", "[1]", '"text"', '{"api_key": "a-key"} and more', "[" * 5000, "\x00" * 20, " " * (2 << 20)],
    ids=["cut", "empty", "list", "text", "tail", "deep", "zeros", "huge"],
)
def test_a_corrupt_file_is_reported_and_kept_aside_never_wiped(
    config: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(config, content)
    client = Mechanex()
    assert not client.is_remote
    assert str(config) in caplog.text and "a-key" not in caplog.text
    assert config.read_text() == content
    client.set_key("new-key", persist=True)
    assert stored(config)["api_key"] == "new-key"
    (aside,) = config.parent.glob("config.json.corrupt-*")
    assert aside.read_text() == content and str(aside) in caplog.text
    write(config, content)
    client.set_key("newer-key", persist=True)
    assert len(list(config.parent.glob("config.json.corrupt-*"))) == 2


def test_bytes_that_are_no_text_and_a_folder_in_its_place(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.parent.mkdir()
    config.write_bytes(b"\xff\xfe{}")
    assert not Mechanex().is_remote and "UTF-8" in caplog.text
    config.unlink()
    config.mkdir()
    assert not Mechanex().is_remote
    caplog.clear()
    os.chmod(config.parent, 0o700)
    with pytest.raises(MechanexError, match=r"not a regular file.*MECHANEX_CONFIG"):
        Mechanex().set_key("a-key", persist=True)
    assert config.is_dir()


def test_values_that_are_no_credentials_are_ignored_with_a_warning(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(config, {"api_key": ["secret-1"], "access_token": "two words", "refresh_token": None})
    assert not Mechanex().is_remote
    assert "api_key" in caplog.text and "access_token" in caplog.text and "two words" not in caplog.text


def test_fields_of_others_stay(config: Path) -> None:
    write(config, {"api_key": "old-key", "theme": "dark", "nested": {"a": [1]}})
    Mechanex().set_token("new-access", persist=True)
    assert stored(config)["theme"] == "dark" and stored(config)["nested"] == {"a": [1]}
    Mechanex().logout()
    assert stored(config) == {"theme": "dark", "nested": {"a": [1]}}


def test_a_link_stays_a_link(config: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "config.json"
    write(real, {"api_key": "old-key"})
    config.parent.mkdir()
    config.symlink_to(real)
    Mechanex().set_key("new-key", persist=True)
    assert config.is_symlink() and stored(real)["api_key"] == "new-key"


def test_a_link_leaves_the_modes_of_other_folders_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MECHANEX_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    real = tmp_path / "dotfiles" / "config.json"
    write(real, {"api_key": "a-key"}, mode=0o644)
    real.parent.chmod(0o755)
    default = tmp_path / ".mechanex"
    default.mkdir()
    default.chmod(0o755)
    (default / "config.json").symlink_to(real)
    assert sent(Mechanex()).api_key == "a-key"
    modes = [path.stat().st_mode & 0o777 for path in (real, real.parent, default)]
    assert modes == [0o600, 0o755, 0o700]
    (default / "config.json").unlink()
    default.rmdir()
    default.symlink_to(real.parent)
    assert sent(Mechanex()).api_key == "a-key" and real.parent.stat().st_mode & 0o777 == 0o755


def test_one_bad_file_is_one_warning_until_it_changes(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(config, "{")
    client = Mechanex()
    for _ in range(3):
        assert not client.is_remote
        with pytest.raises(MechanexError):
            client.whoami()
    assert len(warnings(caplog)) == 1 and str(config) in caplog.text
    write(config, {"api_key": "two words"})
    assert not client.is_remote and not client.is_remote
    assert len(warnings(caplog)) == 2 and "api_key" in warnings(caplog)[1]
    write(config, "[]")
    assert not client.is_remote and len(warnings(caplog)) == 3


def test_a_user_without_a_home_folder_is_told_what_to_set(
    homeless: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from mechanex.cli import main

    says = r"no home folder.*HOME.*MECHANEX_HOME.*MECHANEX_CONFIG"
    client = Mechanex()
    assert not client.is_remote and client.set_key("a-key").is_remote
    with pytest.raises(MechanexError, match=says):
        client.set_key("b-key", persist=True)
    with pytest.raises(MechanexError, match=says):
        client.steering.get_vectors("an-id")
    doctor = CliRunner().invoke(main, ["doctor", "--offline"])
    assert doctor.exit_code == 0 and "MECHANEX_CONFIG" in doctor.stdout
    listed = CliRunner().invoke(main, ["vectors", "list"])
    assert listed.exit_code == 1 and listed.stderr.startswith("Error: there is no home folder")
    monkeypatch.setenv("MECHANEX_CONFIG", str(tmp_path / "c.json"))
    assert client.set_key("b-key", persist=True) and sent(Mechanex()).api_key == "b-key"


def test_what_fails_while_the_file_is_held_is_told_alone(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHANEX_CONFIG", str(tmp_path / "file" / "config.json"))
    with pytest.raises(KeyError) as raised, config_file.ConfigFile().locked():
        raise KeyError
    assert raised.value.__context__ is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_file_that_cannot_be_written_is_an_error_and_stays(config: Path) -> None:
    write(config, {"api_key": "old-key"})
    config.parent.chmod(0o500)
    try:
        with pytest.raises(MechanexError, match="MECHANEX_CONFIG"):
            Mechanex().set_key("new-key", persist=True)
    finally:
        config.parent.chmod(0o700)
    assert stored(config)["api_key"] == "old-key"


def test_a_place_that_cannot_be_is_an_error_for_writing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHANEX_CONFIG", str(tmp_path / "file" / "config.json"))
    client = Mechanex()
    assert not client.is_remote
    with pytest.raises(MechanexError, match="MECHANEX_CONFIG"):
        client.set_key("a-key", persist=True)
    assert not client.is_remote  # what could not be kept is not half used
    assert client.set_key("a-key").is_remote


def test_many_writers_leave_a_whole_file(config: Path) -> None:
    code = (
        "import sys, mechanex\n"
        "for i in range(20): mechanex.Mechanex().set_key(sys.argv[1] + str(i) * 50, persist=True)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b", "c")]
    readings = 0
    while any(process.poll() is None for process in running):
        if config.exists():
            assert stored(config)["api_key"][0] in "abc"
            readings += 1
    assert readings and all(process.returncode == 0 for process in running)
    assert {path.name for path in config.parent.iterdir()} == {"config.json", "config.json.lock"}


def test_a_writer_that_is_killed_leaves_the_old_file(config: Path) -> None:
    write(config, {"api_key": "old-key"})
    code = (
        "import os, mechanex, mechanex.home as home\n"
        "def die(descriptor): os._exit(9)\n"
        "os.fsync = die\n"
        "mechanex.Mechanex().set_key('new-key', persist=True)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert stored(config) == {"api_key": "old-key"}
    assert (
        Mechanex().set_key("newer-key", persist=True).is_remote and stored(config)["api_key"] == "newer-key"
    )


@contextmanager
def held_by_another_process(config: Path) -> Iterator[None]:
    config.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    code = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'a')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, f"{config}.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.communicate(timeout=120)


def test_a_call_waits_for_a_process_that_hangs_no_longer_than_its_timeout(config: Path) -> None:
    with FaultyProxy(answer=lambda request: Status(401)) as server:
        client = Mechanex(server.url, timeout=0.5).set_token("an-access", "a-refresh", persist=True)
        held = pytest.raises(APIError, match=r"json\.lock is held by another process")
        with held_by_another_process(config), held:
            client.transport.get("/models")
        assert server.paths() == ["/models"] and stored(config)["refresh_token"] == "a-refresh"


def test_a_log_in_goes_on_beside_a_process_that_hangs(
    server: FaultyProxy, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(config_file, "_PATIENCE", 0.1)
    with held_by_another_process(config):
        client = Mechanex(server.url)
        client.login("ada@b.c", "password")
        assert "held by another process" in caplog.text
        assert (
            sent(client) == sent(Mechanex(server.url)) == Credentials(None, "access-of-ada", "refresh-of-ada")
        )
        assert client.logout() and not config.exists()


# Whose they are


def test_only_what_is_to_persist_is_written(config: Path) -> None:
    client = Mechanex().set_key("a-key").set_token("an-access", "a-refresh")
    assert not config.exists() and not Mechanex().is_remote
    client.set_key("b-key", persist=True)
    assert stored(config) == {"api_key": "b-key", "base_url": PUBLIC_BACKEND}
    assert sent(client) == Credentials("b-key", "an-access", "a-refresh")


def test_a_key_and_a_token_that_are_set_by_hand_go_together(config: Path) -> None:
    for client in (
        Mechanex().set_key("a-key", persist=True).set_token("an-access", persist=True),
        Mechanex().set_token("an-access", persist=True).set_key("a-key", persist=True),
        Mechanex(),
    ):
        assert sent(client) == Credentials("a-key", "an-access")


def test_credentials_go_to_the_server_that_they_are_for(config: Path) -> None:
    Mechanex(HERE).set_key("here-key", persist=True)
    assert sent(Mechanex(HERE)).api_key == "here-key"
    assert not Mechanex(THERE).is_remote and not Mechanex().is_remote
    Mechanex(THERE + "/deeper").set_token("there-access", persist=True)
    assert sent(Mechanex(THERE)) == Credentials(access_token="there-access")
    assert sent(Mechanex(HERE)) == Credentials("here-key")
    Mechanex(HERE).set_token("here-access", persist=True)
    assert sent(Mechanex(THERE)) == Credentials(access_token="there-access")
    assert stored(config)["base_url"] == HERE and not Mechanex("https://here.example:8443").is_remote


@pytest.mark.parametrize(
    "base_url",
    ["HTTPS://Here.Example", f"{HERE}/", f"{HERE}:443/deeper/", f" {HERE} "],
    ids=["upper case", "slash", "port and path", "spaces"],
)
def test_a_server_is_known_by_any_form_of_its_url(config: Path, base_url: str) -> None:
    write(config, {"api_key": "here-key", "base_url": base_url})
    assert sent(Mechanex(HERE)).api_key == "here-key" and not Mechanex(THERE).is_remote
    Mechanex(THERE).set_key("there-key", persist=True)
    assert stored(config)["others"] == {HERE: {"api_key": "here-key"}}
    write(config, {"base_url": THERE, "others": {base_url: {"api_key": "here-key"}}})
    assert sent(Mechanex(HERE)).api_key == "here-key"
    Mechanex(HERE).set_token("here-access", persist=True)
    assert stored(config)["base_url"] == HERE and "others" not in stored(config)
    assert sent(Mechanex(HERE)) == Credentials("here-key", "here-access")


@pytest.mark.parametrize("base_url", ["here.example", "", 5, "https://user:secret@here.example"])
def test_a_base_url_that_cannot_be_read_is_told_once_and_keeps_its_credentials(
    config: Path, caplog: pytest.LogCaptureFixture, base_url: Any
) -> None:
    write(config, {"access_token": "an-access", "base_url": base_url})
    client = Mechanex(HERE)
    assert not client.is_remote and not client.is_remote and not Mechanex().is_remote
    (told,) = warnings(caplog)
    assert str(config) in told and "base_url" in told and "secret" not in told
    client.set_key("here-key", persist=True)
    assert {"access_token": "an-access"} in stored(config)["others"].values()
    assert sent(Mechanex(HERE)) == Credentials("here-key")


def test_a_file_that_names_no_server_serves_any_and_then_the_public_one(config: Path) -> None:
    write(config, {"api_key": "plain-key"})
    assert sent(Mechanex(HERE)).api_key == sent(Mechanex()).api_key == "plain-key"
    Mechanex(HERE).set_token("here-access", persist=True)
    assert sent(Mechanex()).api_key == "plain-key"
    assert sent(Mechanex(HERE)) == Credentials(access_token="here-access")


def test_a_file_that_names_no_server_is_never_sent_over_plain_http(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(config, {"api_key": "plain-key"})
    monkeypatch.setenv("MECHANEX_ALLOW_HTTP", "1")
    client = Mechanex("http://192.0.2.1:8000", allow_http=True)
    assert not client.is_remote and not sent(client)
    assert len(caplog.records) == 1 and "set_key" in caplog.text and "plain-key" not in caplog.text
    assert sent(Mechanex("http://127.0.0.1:8000")).api_key == "plain-key"
    client.set_key("lan-key", persist=True)
    assert sent(Mechanex("http://192.0.2.1:8000")).api_key == "lan-key"
    assert sent(Mechanex()).api_key == "plain-key"


def test_the_server_that_renews_the_tokens_of_a_file_is_the_one_it_is_for(config: Path) -> None:
    def answer(request: Any) -> Any:
        if request.path == "/auth/refresh":
            return Status(200, '{"session": {"access_token": "access-2", "refresh_token": "refresh-2"}}')
        return None if "access-2" in request.headers["authorization"] else Status(401)

    write(config, {"api_key": "plain-key", "access_token": "access-1", "refresh_token": "refresh-1"})
    with FaultyProxy(answer=answer) as server:
        assert Mechanex(server.url).transport.get("/models")["ok"]
        renewed = {"api_key": "plain-key", "access_token": "access-2", "refresh_token": "refresh-2"}
        assert stored(config) == {**renewed, "base_url": server.url}
        assert not Mechanex().is_remote


@pytest.fixture
def server() -> Any:
    def answer(request: Any) -> Any:
        if request.path in ("/auth/login", "/auth/signup"):
            name = request.json()["email"].partition("@")[0]
            session = {"access_token": f"access-of-{name}", "refresh_token": f"refresh-of-{name}"}
            user = None if name == "unconfirmed" else session
            return Status(200, json.dumps({"session": user, "user": {"email": request.json()["email"]}}))
        if request.path == "/auth/api-keys":
            return Status(200, '{"api_key": "made-key", "id": "1"}')
        return None

    with FaultyProxy(answer=answer) as running:
        yield running


def test_login_keeps_tokens_and_shows_none(server: FaultyProxy, config: Path) -> None:
    client = Mechanex(server.url)
    answer = client.login(" ada@b.c ", "pass word")
    assert answer["session"] == {"access_token": "***", "refresh_token": "***"}
    assert server.requests[0].json() == {"email": "ada@b.c", "password": "pass word"}
    assert sent(client) == sent(Mechanex(server.url)) == Credentials(None, "access-of-ada", "refresh-of-ada")
    assert "pass word" not in config.read_text()
    other = Mechanex(server.url)
    other.login("bob@b.c", "pass word", persist=False)
    assert sent(other).access_token == "access-of-bob" != sent(Mechanex(server.url)).access_token


def test_signing_up_logs_in_where_the_server_does_at_once(server: FaultyProxy, config: Path) -> None:
    client = Mechanex(server.url, "server-key")
    assert client.signup("unconfirmed@b.c", "password")["session"] is None
    assert server.requests[-1].headers["x-api-key"] == "server-key"
    assert sent(client) == Credentials("server-key") and not config.exists()
    assert client.signup("ada@b.c", "password")["user"] == {"email": "ada@b.c"}
    assert sent(client) == Credentials(None, "access-of-ada", "refresh-of-ada")


def test_a_login_does_not_mix_two_accounts(
    server: FaultyProxy, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Mechanex(server.url).set_key("somebodys-key", persist=True)
    client = Mechanex(server.url)
    client.login("ada@b.c", "password")
    assert sent(client).api_key is None and sent(Mechanex(server.url)).api_key is None
    assert stored(config)["previous_api_key"] == "somebodys-key"
    assert "previous_api_key" in caplog.text and "somebodys-key" not in caplog.text
    assert client.create_api_key("mine", persist=True) == {
        "api_key": "made-key",
        "key": "made-key",
        "id": "1",
    }
    both = Credentials("made-key", "access-of-ada", "refresh-of-ada")
    assert sent(client) == sent(Mechanex(server.url)) == both
    Mechanex(server.url).login("ADA@b.c", "password")
    assert sent(Mechanex(server.url)).api_key == "made-key"
    Mechanex(server.url).login("bob@b.c", "password")
    assert sent(Mechanex(server.url)) == Credentials(None, "access-of-bob", "refresh-of-bob")


def test_a_new_key_is_only_told_unless_it_is_to_be_used(server: FaultyProxy, config: Path) -> None:
    client = Mechanex(server.url, "old-key")
    assert client.create_api_key()["key"] == "made-key"
    assert server.requests[0].json() == {"name": "Default Key"}
    assert sent(client).api_key == "old-key" and not config.exists()


def test_a_new_key_reaches_its_owner_when_it_cannot_be_stored(
    server: FaultyProxy, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.parent.write_text("in the way")
    assert Mechanex(server.url, "old-key").create_api_key(persist=True)["key"] == "made-key"
    assert "not stored" in caplog.text and "made-key" not in caplog.text


@pytest.mark.parametrize(("email", "password"), [("", "p"), ("a@b.c", ""), (" ", "p"), (None, "p"), ("a", 5)])
def test_empty_logins_are_not_sent(server: FaultyProxy, email: Any, password: Any) -> None:
    for call in (Mechanex(server.url).login, Mechanex(server.url).signup):
        with pytest.raises(ValidationError):
            call(email, password)
    assert not server.requests


def test_logout_forgets_here_and_in_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mechanex().logout() is False and not config.exists()
    Mechanex(HERE).set_key("here-key", persist=True)
    client = Mechanex(THERE).set_key("there-key", persist=True)
    assert client.logout() is True
    assert not config.exists() and not client.is_remote and not Mechanex(HERE).is_remote
    monkeypatch.setenv("MECHANEX_API_KEY", "environment-key")
    assert not client.is_remote and Mechanex(THERE).is_remote
    assert client.set_key("again-key").is_remote


@pytest.mark.parametrize("content", ['{"access_token": "secret-access"', None], ids=["cut", "folder"])
def test_logout_says_when_it_cannot_tell_what_the_file_holds(config: Path, content: str | None) -> None:
    from click.testing import CliRunner

    from mechanex.cli import main

    if content is None:
        config.mkdir(parents=True)
    else:
        write(config, content)
    client = Mechanex().set_key("a-key")
    with pytest.raises(MechanexError, match=rf"{config}.*stays.*Repair or delete") as raised:
        client.logout()
    assert not client.is_remote and config.exists()
    inner: Any = raised.value
    while inner is not None:
        assert "secret-access" not in repr(vars(inner)) + str(inner) + repr(getattr(inner, "doc", ""))
        inner = inner.__context__
    done = CliRunner().invoke(main, ["logout"])
    assert done.exit_code == 1 and str(config) in done.stderr and not done.stdout
    assert [path.name for path in config.parent.iterdir() if "corrupt" in path.name] == []


def test_nothing_is_logged_about_what_is_in_order(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Mechanex().set_key("a-key", persist=True).set_token("an-access", "a-refresh", persist=True)
    assert sent(Mechanex()).access_token == "an-access"
    assert not [record for record in caplog.records if "aside" not in record.message]
