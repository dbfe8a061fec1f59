"""Where the library keeps a user's files: ``MECHANEX_HOME``, or the platform's data folder; and how it writes them."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_path", "mechanex_home", "vectors_folder"]


def mechanex_home() -> Path:
    """The folder for everything kept between sessions; read from the environment at each call, not created.

    Returns:
        ``$MECHANEX_HOME`` when it is set and not empty, else ``mechanex`` in the platform's user data folder.
    """
    chosen = os.environ.get("MECHANEX_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return _user_data() / "mechanex"


def vectors_folder() -> Path:
    """The folder of stored steering vectors, ``<home>/vectors``; not created."""
    return mechanex_home() / "vectors"


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``target``; on success it is flushed and takes the target's name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _user_data() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
