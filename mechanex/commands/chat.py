"""``mechanex chat``: a conversation with a model that a vector steers, whose strength can be turned meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..engine.chat import has_chat_template
from ..engine.generate import stream
from ..engine.given import as_finite
from ..engine.models.resolve import LoadedModel, load
from ..engine.sampling import Options
from ..engine.seeds import row_seed
from ..engine.text import Prompt
from ..engine.vectors import SteeringVector
from ..errors import MechanexError, ValidationError
from ..home import atomic_path, mechanex_home
from .console import console, model_text
from .vectors import find_vector

__all__ = ["Conversation", "run_chat"]

_HELP = """\
/strength 1.5      multiplies the vector from now on; 0 for the plain model
/vector NAME       steers by a stored vector's id or a file; /vector off by none
/compare           shows steered and plain answers side by side, or stops to
/budget 2          most nats by which the vector may move a token; /budget off
/save FILE         writes the conversation, its vector and strength as JSON
/reset             forgets the conversation
/quit              ends, as Ctrl-D does; Ctrl-C stops an answer"""


class Conversation:
    """Messages to and from a model, and how its answers are steered.

    Args:
        loaded: the model. Without a chat template each line is continued by itself.
        options: keyword arguments of ``Options`` for every answer, ``seed`` among them.
        vector: steers answers; None for none.
        name: the vector's, as it was given.
        strength: multiplies it.
        guard: most nats by which it may move a token's distribution.
        system: what the conversation begins with.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: dict[str, Any],
        vector: SteeringVector | None = None,
        name: str | None = None,
        strength: float = 1.0,
        guard: float | None = None,
        system: str | None = None,
    ) -> None:
        self.loaded, self.options = loaded, options
        self.vector, self.name, self.strength, self.guard = vector, name, strength, guard
        self.compares = False
        self.chats = has_chat_template(loaded.tokenizer)
        if system is not None and not self.chats:
            raise ValidationError(f"{loaded.name} has no chat template, which a system prompt needs.")
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = list(self._system)

    def answer(self, text: str, show: Callable[[str], object]) -> str:
        """Answers a line, which goes on the conversation; Ctrl-C ends the answer, and what there is of it stays.

        Args:
            text: what the user says.
            show: is called with each piece of the answer.
        """
        parts: list[str] = []
        asked = [*self.messages, {"role": "user", "content": text}]
        with suppress(KeyboardInterrupt), closing(self.pieces(text)) as pieces:
            for piece in pieces:
                parts.append(piece)
                show(piece)
        self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
        return "".join(parts)

    def pieces(self, text: str, *, plain: bool = False) -> Generator[str, None, None]:
        """The answer to a line in pieces, which the conversation doesn't keep; ``plain``: without the vector."""
        prompt: Prompt = [*self.messages, {"role": "user", "content": text}] if self.chats else text
        steered = self.vector is not None and self.strength != 0 and not plain
        turn = sum(one["role"] == "user" for one in self.messages)
        given = {**self.options, "seed": row_seed(self.options["seed"], turn)}
        if steered:
            given |= {"vector": self.vector, "strength": self.strength, "guard": self.guard}
        found = stream(self.loaded.model, self.loaded.tokenizer, prompt, **given)
        next(found)  # the prompt
        yield from found

    def save(self, path: Path) -> None:
        """Writes what was said and how it was steered, as JSON."""
        told = {
            "model": self.loaded.name,
            "vector": self.name,
            "strength": self.strength,
            "guard": self.guard,
            "seed": self.options["seed"],
            "messages": self.messages,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(told, ensure_ascii=False, indent=2), encoding="utf-8")

    def command(self, line: str) -> str:
        """Does what a line such as ``/strength 1.5`` says, and tells it.

        Raises:
            MechanexError: an unknown command, or one whose argument is missing or no good.
        """
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name == "strength":
            self.strength = _number("/strength", argument)
            return f"strength {self.strength:g}"
        if name == "vector":
            if not argument:
                raise ValidationError("/vector takes a stored vector's id or a file, or off.")
            vector = None if argument == "off" else find_vector(argument)
            if vector is not None:
                vector.plan(self.loaded.model)
            self.vector, self.name = vector, None if vector is None else argument
            return f"vector {self.name or 'off'}"
        if name == "budget":
            self.guard = None if argument == "off" else _number("/budget", argument, least=0)
            return f"budget {'off' if self.guard is None else f'{self.guard:g} nats'}"
        if name == "compare":
            self.compares = not self.compares
            return f"comparing {'on' if self.compares else 'off'}"
        if name == "save":
            if not argument:
                raise ValidationError("/save takes the file to write.")
            self.save(Path(argument))
            return f"written to {argument}"
        if name == "reset":
            self.reset()
            return "the conversation begins anew"
        if name == "help":
            return _HELP
        raise ValidationError(f"there is no /{name}: /help lists what there is.")


def run_chat(
    *,
    model: str,
    vector: str | None,
    strength: float,
    guard: float | None,
    system: str | None,
    max_tokens: int,
    decoding: dict[str, Any],
    seed: int,
    device: str | None,
    dtype: str | None,
) -> None:
    """Reads lines and answers them until Ctrl-D, ``/quit`` or the end of a pipe.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the vector or the settings.
    """
    options = decoding | {"max_tokens": max_tokens, "seed": seed}
    Options(**options, guard=guard)  # checked before the model is loaded
    found = None if vector is None else find_vector(vector)
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    if found is not None:
        found.plan(loaded.model)
    talk = Conversation(loaded, options, found, vector, strength, guard, system)
    if not talk.chats:
        click.echo(f"{loaded.name} has no chat template: each line is continued by itself.")
    click.echo("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends.")
    with _LineHistory():
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /quit ends)")
                continue
            if line == "/quit":
                return
            if line:
                _reply(talk, line)


def _reply(talk: Conversation, line: str) -> None:
    try:
        if line.startswith("/"):
            click.echo(talk.command(line))
        elif talk.compares:
            plain: list[str] = []
            with suppress(KeyboardInterrupt), closing(talk.pieces(line, plain=True)) as pieces:
                plain.extend(pieces)
            steered = talk.answer(line, lambda piece: None)
            table = Table()
            for column in ("steered", "plain"):
                table.add_column(column, ratio=1, overflow="fold")
            table.add_row(model_text(steered.strip()), model_text("".join(plain).strip()))
            console().print(table)
        else:
            talk.answer(line, _show)
            click.echo()
    except MechanexError as error:
        click.echo(f"Error: {error}", err=True)
    except OSError as error:
        click.echo(f"Error: {error.filename}: {error.strerror}", err=True)


def _show(piece: str) -> None:
    click.echo(model_text(piece).plain, nl=False)
    sys.stdout.flush()


def _number(name: str, text: str, least: float | None = None) -> float:
    try:
        number = as_finite(float(text))
    except ValueError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of {least:g} or more"
        raise ValidationError(f"{name} takes a number{bound}; got {text!r}.")
    return number


class _LineHistory:
    """Earlier lines at the arrow keys, kept in a file of the user's own."""

    def __enter__(self) -> None:
        self._lines: Any = None
        if not sys.stdin.isatty():
            return
        with suppress(ImportError):  # Windows has no readline
            import readline

            self._lines = readline
            self._path = mechanex_home() / "chat_history"
            with suppress(OSError):
                readline.read_history_file(self._path)
            readline.set_history_length(1000)

    def __exit__(self, *exc: object) -> None:
        if self._lines is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.close(descriptor)
            self._lines.write_history_file(self._path)
