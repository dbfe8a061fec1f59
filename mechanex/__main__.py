"""``python -m mechanex``: say what is installed, which backends run here and why the others don't.

With arguments it is the command line: ``python -m mechanex serve mx-tiny``.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from mechanex.doctor import examine


def main() -> int:
    """Print the report, or run the command that the arguments name; the exit status."""
    if sys.argv[1:]:
        from mechanex.cli import main as command_line

        command_line(prog_name="python -m mechanex")
    with suppress(BrokenPipeError):  # a pipe that is closed early has read enough
        sys.stdout.write(f"{examine()}\n")
        sys.stdout.flush()
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
