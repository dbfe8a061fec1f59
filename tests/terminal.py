"""A real terminal to run ``mechanex`` in: a small shell that has imported what the commands need.

It forks for every command, which then has the terminal as its own, its keys and its Ctrl-C; a command takes what it
does and not the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Ran", "Terminal", "terminal"]

_SHELL = """
import json, os, signal, sys, time
from tqdm.std import TqdmDefaultWriteLock
from mechanex.cli import main
from mechanex.commands import account, doctor, models, optimize, score, serve, steer, vectors
from mechanex.demo import measure
from mechanex.demo import run as demo
from mechanex.server import serve

# A lock that forked processes share: one that is interrupted while it has it would hold up the next.
TqdmDefaultWriteLock.mp_lock = None
# Much of transformers is imported when a model first runs.
arguments = ["score", "mx-tiny", "--prompt", "a", "--completion", " b", "--completion", " c"]
main(arguments, standalone_mode=False)
demo.TONES, demo.N_LAYERS, demo.N_TRAIN_PROMPTS, measure.MAX_TOKENS = demo.TONES[:1], 1, 2, 2


def pause_at(path):
    def hook(event, found):
        if path in map(str, found):
            print("<paused>", file=sys.stderr, flush=True)
            time.sleep(600)

    return hook


def end(arguments):
    # As the interpreter ends, less the second or two in which it takes torch apart.
    try:
        main(arguments, prog_name="mechanex")
    except SystemExit as error:
        code = error.code or 0
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError:
            print("Exception ignored", file=sys.stderr)
            code = 120
    os._exit(code)


signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    print("<ready>", flush=True)
    given = json.loads(sys.stdin.readline())
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(given["environment"])
        if given["closed"]:
            reads, writes = os.pipe()
            os.close(reads)
            os.dup2(writes, 1)
        if given["pause"]:
            sys.addaudithook(pause_at(given["pause"]))
        print("<begin>", end="", file=sys.stderr, flush=True)
        end(given["arguments"])
    print(f"<exit {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}>", flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """What a command left.

    Attributes:
        raw: all that came to the terminal, escape sequences included.
        code: its exit code; that of a signal is negative.
    """

    raw: str
    code: int

    @property
    def text(self) -> str:
        """What can be read, with plain line ends."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r\n", "\n")

    @property
    def has_color(self) -> bool:
        """Whether a color was chosen; bold, dim and the like are none."""
        chosen = ";".join(re.findall(r"\x1b\[([0-9;]*)m", self.raw)).split(";")
        return any(code.isdigit() and int(code) in {*range(30, 49), *range(90, 108)} for code in chosen)


class Terminal:
    """The terminal, with at most one command running."""

    def __init__(self, child: Any) -> None:
        self._child = child

    def run(self, *arguments: str, closed: bool = False, **environment: str) -> Ran:
        """Runs a command to its end; ``closed``: its stdout is a pipe that nobody reads."""
        self.start(*arguments, closed=closed, **environment)
        return self.end()

    def start(self, *arguments: str, closed: bool = False, pause: str = "", **environment: str) -> None:
        """Starts a command; ``pause``: waits until it is about to open this file or folder, where it stays."""
        given = {"arguments": arguments, "environment": environment, "closed": closed, "pause": pause}
        self._child.sendline(json.dumps(given))
        self._child.expect_exact("<paused>" if pause else "<begin>")

    def expect(self, text: str) -> None:
        """Waits until the command has shown this."""
        self._child.expect_exact(text)

    def type(self, line: str) -> None:
        """Types a line."""
        self._child.sendline(line)

    def press_interrupt(self) -> None:
        """Presses Ctrl-C once, for a command that goes on."""
        self._child.sendintr()

    def interrupt(self, patience: float = 20.0) -> Ran:
        """Presses Ctrl-C until the command ends: again after so many seconds in which nothing came of it.

        Python misses a Ctrl-C that comes between a prompt and the call that reads the line.
        """
        import pexpect

        for _ in range(20):
            self._child.sendintr()
            if not self._child.expect([r"<exit (-?\d+)>", pexpect.TIMEOUT], timeout=patience):
                return self._ended()
            if self._child.before.replace("^C", "").strip():  # it is ending
                return self.end()
        raise AssertionError("Ctrl-C does not end it")

    def end(self) -> Ran:
        """Waits for the command's end; what it showed since the last text that was expected, and its exit code."""
        self._child.expect(r"<exit (-?\d+)>")
        return self._ended()

    def _ended(self) -> Ran:
        raw, code = self._child.before, int(self._child.match[1])
        self._child.expect_exact("<ready>")
        return Ran(raw, code)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(self._child.getecho())


@contextmanager
def terminal(**environment: str) -> Iterator[Terminal]:
    """A terminal of 24 lines and 200 columns, in which commands have these variables beside ours."""
    import pexpect

    variables = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        variables.pop(name, None)
    child = pexpect.spawn(
        sys.executable, ["-c", _SHELL], encoding="utf-8", timeout=300, dimensions=(24, 200), env=variables
    )
    child.delaybeforesend = None
    try:
        child.expect_exact("<ready>")
        yield Terminal(child)
    finally:
        # pexpect asks the child to end and waits for a moment, which one that computes doesn't notice in time.
        if child.isalive():
            child.kill(signal.SIGKILL)
            child.wait()
        child.close()
