"""Where the library keeps a user's files: ``MECHANEX_HOME``, or the platform's user data folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["mechanex_home", "vectors_folder"]


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


def _user_data() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
