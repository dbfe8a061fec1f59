"""Where the library keeps a user's files: ``MECHANEX_HOME``, or the platform's data folder; and how it writes them."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import MechanexError

__all__ = ["atomic_path", "behaviors_folder", "expanded", "mechanex_home", "vectors_folder"]


def mechanex_home() -> Path:
    """The folder for everything kept between sessions; read from the environment at each call, not created.

    Returns:
        ``$MECHANEX_HOME`` when it is set and not empty, else ``mechanex`` in the platform's user data folder.

    Raises:
        MechanexError: as in ``expanded``.
    """
    chosen = os.environ.get("MECHANEX_HOME")
    if chosen:
        return expanded(chosen)
    return _user_data() / "mechanex"


def vectors_folder() -> Path:
    """The folder of stored steering vectors, ``<home>/vectors``; not created."""
    return mechanex_home() / "vectors"


def behaviors_folder() -> Path:
    """The folder of behaviors, ``<home>/behaviors``; not created."""
    return mechanex_home() / "behaviors"


def expanded(path: str) -> Path:
    """The path, with a ``~`` in front as the user's home folder.

    Raises:
        MechanexError: the user has none, as in a container whose user id nobody has named.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        problem = f"there is no home folder for {path!r}"
    raise MechanexError(
        f"{problem}: set HOME, or MECHANEX_HOME to a folder for the library's files and MECHANEX_CONFIG to a file "
        "for credentials."
    )


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
        return Path(os.environ.get("LOCALAPPDATA") or expanded("~/AppData/Local"))
    if sys.platform == "darwin":
        return expanded("~/Library/Application Support")
    return Path(os.environ.get("XDG_DATA_HOME") or expanded("~/.local/share"))
