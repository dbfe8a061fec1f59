"""The group that holds every command, and how each ends: 0, or one line on stderr with 2 (wrong usage) or 1."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn

import click

from ..errors import MechanexError
from ..launched import global_rank

__all__ = ["Group"]


class Group(click.Group):
    """Ends every failure with one line on stderr and exit code 1, where click itself knows wrong usage only.

    Ctrl-C, a full disk and a pipe that is closed early are failures like any other. ``MECHANEX_TRACEBACK=1`` shows
    where an error comes from.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """As ``click.Command.main``; with ``standalone_mode=False`` errors reach the caller as they are."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        for stream in (sys.stdout, sys.stderr):
            # Text that the terminal's encoding lacks is no reason to fail.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        rank = global_rank()
        try:
            return self._silently(*args, **options) if rank else super().main(*args, **options)
        except Exception as error:
            if _interrupted(error):
                click.echo("\nAborted!", err=True)
                sys.exit(1)
            if os.environ.get("MECHANEX_TRACEBACK") == "1":
                raise
            click.echo(f"Error{f' in process {rank}' if rank else ''}: {_told(error)}", err=True)
            sys.exit(error.exit_code if isinstance(error, click.ClickException) else 1)

    def _silently(self, *args: Any, **options: Any) -> NoReturn:
        """A process of several that isn't the first, which tells of the work; errors may be this one's alone."""
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            code = super().main(*args, **{**options, "standalone_mode": False})
        sys.exit(code if isinstance(code, int) else 0)


def _interrupted(error: Exception) -> bool:
    """Whether it is Ctrl-C under another name: libraries turn what ends an import into errors of their own.

    What the system refused while a command was tidying up is told instead.
    """
    inner: BaseException | None = None if isinstance(error, OSError) else error
    while inner is not None and not isinstance(inner, (KeyboardInterrupt, click.Abort)):
        inner = inner.__cause__ or inner.__context__
    return inner is not None


def _told(error: Exception) -> str:
    """What happened, on one line, without the control characters that a server may have put there."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif not isinstance(error, (MechanexError, OSError)):
        text = f"{type(error).__name__}: {text} (MECHANEX_TRACEBACK=1 shows where)"
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
