"""A PostgreSQL server of the tests' own, where the machine has the programs: in a new folder, on a free port."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_process import free_port

__all__ = ["Postgres", "find_programs", "postgres"]

_DEBIANS = Path("/usr/lib/postgresql")


@dataclass
class Postgres:
    """A server that listens on loopback; it can be stopped and started again in the middle of a test."""

    programs: Path
    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = None
    _made: int = 0

    def new_database(self) -> str:
        """Makes an empty database and gives its URL, as a user writes it."""
        self._made += 1
        name = f"test_{os.getpid()}_{self._made}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", name)
        return f"postgresql://tester:secret@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        # No flush to the disk: the tests kill servers of ours, never this one.
        options = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off")
        self._process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder, "-p", str(self.port), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **_as_user(),
        )
        until = time.monotonic() + 300
        ready = [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester"]
        while subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode != 0:
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError("PostgreSQL does not start")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it at once, connections and all."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(300)
            self._process = None

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, **_as_user()
        )


def find_programs() -> Path | None:
    """The folder with ``initdb`` and ``postgres``, or None."""
    debians = sorted(_DEBIANS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), reverse=True)
    found = shutil.which("initdb")
    candidates = [Path(os.path.realpath(found)).parent] if found else []
    for folder in [*candidates, *(path.parent for path in debians)]:
        if (folder / "postgres").exists() and (os.getuid() != 0 or _as_user()):
            return folder
    return None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server."""
    programs = find_programs()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="mechanex-postgres-") as folder:
        Path(folder).chmod(0o755)  # for the user below
        data = Path(folder) / "data"
        data.mkdir()
        if user := _as_user():
            shutil.chown(data, user["user"])
        server = Postgres(programs, data, free_port())
        server._run("initdb", "-D", str(data), "-U", "tester", "--auth=trust", "--encoding=UTF8", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _as_user() -> dict[str, Any]:
    """PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    import pwd

    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    found = names.get("postgres") or names.get("nobody")
    return {"user": found.pw_name, "group": found.pw_gid, "extra_groups": (), "cwd": "/"} if found else {}
