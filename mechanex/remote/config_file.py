"""The file that keeps credentials: private, written as a whole, never wiped because it can't be read.

One server's are at its top level, those of others beside them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import APIError, MechanexError, ValidationError
from ..home import atomic_path, expanded
from .address import PUBLIC_BACKEND, origin_of
from .identity import NAMES

__all__ = ["ENTRY", "ConfigFile", "normal", "with_entry"]

_logger = logging.getLogger(__name__)

ENTRY = (*NAMES, "email", "previous_api_key")
"""What a server's entry may hold."""

_FOLDER = "~/.mechanex"
_MOST_BYTES = 1 << 20
# Longer than a process that runs holds the lock: it asks the server for new tokens meanwhile, for at most 30 s.
_PATIENCE = 35.0
_PAUSE = 0.02
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK}
if sys.platform == "win32":
    _HELD |= {errno.EACCES, errno.EDEADLK}


# What was warned about already: a call reads the file several times.
_warned: set[tuple[str, int, str]] = set()


class ConfigFile:
    """``MECHANEX_CONFIG``, or ``~/.mechanex/config.json``; looked up at each call."""

    @property
    def path(self) -> Path:
        """Where the file is, links followed; it need not exist.

        Raises:
            MechanexError: it is in the user's home folder, and there is none.
        """
        return Path(os.path.realpath(expanded(os.environ.get("MECHANEX_CONFIG") or f"{_FOLDER}/config.json")))

    def read(self) -> dict[str, Any]:
        """What the file holds; empty where there is none, or, with a warning, where it can't be read.

        A file or default folder that others can read is closed to them, with a warning.
        """
        try:
            return self.load()
        except MechanexError as error:
            hint = "; repair it, or log in again, which keeps this one aside"
            corrupt = isinstance(error.__cause__, ValueError)
            self.warn(f"{error}: going on without them{hint if corrupt else ''}")
        return {}

    def load(self) -> dict[str, Any]:
        """What the file holds; empty where there is none. Modes as in ``read``.

        Raises:
            MechanexError: it can't be read.
        """
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (OSError, MechanexError) as error:
            raise MechanexError(f"credentials can't be read ({error})") from error
        except ValueError as error:
            raise MechanexError(f"{self.path} holds no readable credentials ({error})") from error

    def warn(self, text: str) -> None:
        """Logs a warning about the file, once for each state of it."""
        try:
            path = self.path
            key = str(path), path.stat().st_mtime_ns, text
        except (OSError, MechanexError):
            key = "", 0, text
        if key not in _warned:
            _warned.add(key)
            _logger.warning("%s", text)

    def update(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Writes what ``change`` makes of the file's fields; without any, there is no file.

        A file that can't be read is kept aside under another name, and a warning says so.

        Raises:
            MechanexError: the file can't be written, and the old one is as it was; there is no home folder.
        """
        try:
            path = self.path
            try:
                found = self._read()
            except FileNotFoundError:
                found = {}
            except ValueError as error:
                found = {}
                aside = _keep_aside(path)
                _logger.warning("%s held no readable credentials (%s): kept as %s", path, error, aside)
            if changed := change(found):
                self._write(path, changed)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise MechanexError(
                f"credentials can't be written ({error}): set MECHANEX_CONFIG to a file that can, or keep the "
                "key in MECHANEX_API_KEY."
            ) from error

    @contextlib.contextmanager
    def locked(self, wanted: bool = True, deadline: float | None = None) -> Iterator[None]:
        """Holds other processes off for a read that a write follows; goes on where the folder can't be written.

        Args:
            wanted: False for no lock at all.
            deadline: on the monotonic clock, when to give up; None to go on without the lock, with a warning,
                once it is held for longer than by any process that runs.

        Raises:
            APIError: the deadline passed.
        """
        descriptor = self._lock_file() if wanted else None
        if descriptor is None:
            yield
            return
        try:
            patience = time.monotonic() + _PATIENCE
            if not _lock(descriptor, patience if deadline is None else deadline):
                held = f"{self.path}.lock is held by another process"
                if deadline is not None:
                    raise APIError(
                        f"the session's tokens can't be renewed in this call's time: {held}. Call again, with a "
                        "longer timeout, or end that process if it hangs."
                    )
                _logger.warning("%s, for more than %.0f s: going on without the lock", held, _PATIENCE)
            yield
        finally:
            os.close(descriptor)  # which lets go of the lock

    def _lock_file(self) -> int | None:
        """A descriptor of the file that is locked; None where there can be none."""
        try:
            path = self.path
            _make_folder(path.parent)
            return os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        except (OSError, MechanexError):
            return None

    def _read(self) -> dict[str, Any]:
        path = self.path
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is not a regular file")
        self._close_to_others(path, mode, 0o600)
        if not os.environ.get("MECHANEX_CONFIG"):
            # The folder that the library made; behind a link is one that the user has for other things too.
            folder = expanded(_FOLDER)
            if stat.S_ISDIR(mode := folder.lstat().st_mode):
                self._close_to_others(folder, mode, 0o700)
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError("it is larger than any credentials")
        # Neither message may quote the file, and the errors themselves hold it: none is chained.
        problem, found = "", None
        try:
            found = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start}"
        except json.JSONDecodeError as error:
            problem = f"not JSON at line {error.lineno}, column {error.colno}"
        except RecursionError:
            problem = "nested too deeply"
        if problem:
            raise ValueError(problem)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, and an object is expected")
        return found

    def _write(self, path: Path, fields: Mapping[str, Any]) -> None:
        _make_folder(path.parent)
        with atomic_path(path) as temporary:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(fields, file, indent=2)
                file.write("\n")

    def _close_to_others(self, path: Path, mode: int, wanted: int) -> None:
        if os.name != "posix" or not stat.S_IMODE(mode) & 0o077:
            return
        try:
            path.chmod(wanted)
        except OSError as error:
            self.warn(f"{path} can be read by others, and its mode can't be changed ({error})")
        else:
            _logger.warning("%s was open to others (mode %03o): now %03o", path, stat.S_IMODE(mode), wanted)


def _make_folder(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _keep_aside(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.corrupt-{stamp}")
    number = 1
    while aside.exists():
        aside = path.with_name(f"{path.name}.corrupt-{stamp}-{number}")
        number += 1
    path.rename(aside)
    return aside


def _lock(descriptor: int, deadline: float) -> bool:
    """Waits for the lock and says whether it came in time; where the file system has none, goes on without."""
    while True:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                time.sleep(min(_PAUSE, left))
                continue
        return True


def with_entry(found: dict[str, Any], origin: str, changes: Mapping[str, str | None]) -> dict[str, Any]:
    """The file's fields with this server's on top, changed; another server's move to ``others``."""
    belongs = _key(found.get("base_url") or PUBLIC_BACKEND)
    if belongs != origin:
        top = {name: found.pop(name) for name in ENTRY if name in found}
        others = found["others"] if isinstance(found.get("others"), dict) else {}
        others = {_key(name): entry for name, entry in others.items()}
        if top:
            others[belongs] = top
        entry = others.pop(origin, None)
        found = {**found, **(entry if isinstance(entry, dict) else {}), "others": others or None}
    found = {**found, **changes, "base_url": origin}
    return {name: value for name, value in found.items() if value is not None}


def normal(base_url: object) -> str | None:
    """The form that origins are compared in; None for what is no URL."""
    try:
        return origin_of(base_url) if isinstance(base_url, str) else None
    except ValidationError:
        return None


def _key(base_url: object) -> str:
    """What a server's entry is kept under; one that can't be read stays under its own name."""
    return normal(base_url) or str(base_url)
