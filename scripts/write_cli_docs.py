"""Writes docs/cli.md: the page scripts/cli_page.md, with each command's help and options where it asks for them.

python scripts/write_cli_docs.py
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from mechanex.cli import main

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "scripts" / "cli_page.md"
PAGE = ROOT / "docs" / "cli.md"

_WIDTH = 150
_PLACE = re.compile(r"^\{\{(.+)\}\}$", re.MULTILINE)
# What is code in the text of a help page.
_CODE = re.compile(r"(?<![\w`-])(--[a-z][a-z-]*|MECHANEX_[A-Z_]+|\.(?:safetensors|jsonl?|gguf)\b)")


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that runs something, as "vectors list" and the like, by name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def page(template: str) -> str:
    """The page that a template asks for: ``{{commands}}`` is the table of all, ``{{name}}`` one command's section.

    Raises:
        ValueError: a place for a command that there isn't, or a command without a place.
    """
    found = dict(commands())
    places = _PLACE.findall(template)
    if wrong := sorted(set(places) ^ {"commands", *found}):
        raise ValueError(f"{TEMPLATE.name} and the commands don't agree on: {', '.join(wrong)}")
    return _PLACE.sub(
        lambda place: _index(found) if place[1] == "commands" else _section(place[1], found), template
    )


def _index(found: dict[str, click.Command]) -> str:
    rows = [
        f"| [`mechanex {name}`](#mechanex-{name.replace(' ', '-')}) | {_prose(_help(command)[0])} |"
        for name, command in found.items()
    ]
    return "\n".join(["| command | |", "|---|---|", *rows])


def _section(name: str, found: dict[str, click.Command]) -> str:
    command = found[name]
    operands = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    usage = ["mechanex", name, *(["[OPTIONS]"] if options else []), *(str(p.name).upper() for p in operands)]
    parts = [f"### `mechanex {name}`", f"```text\n{' '.join(usage)}\n```"]
    for paragraph in _help(command):
        if paragraph.startswith("\b\n"):
            example = textwrap.dedent(paragraph.removeprefix("\b\n"))
            parts.append(f"```console\n{example}\n```")
        else:
            parts.append(
                textwrap.fill(_prose(paragraph), _WIDTH, break_long_words=False, break_on_hyphens=False)
            )
    if options:
        rows = [f"| `{_name(option)}` | {_meaning(option)} | {_default(option)} |" for option in options]
        parts.append("\n".join(["| option | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _help(command: click.Command) -> list[str]:
    return re.split(r"\n\n+", inspect.cleandoc(command.help or ""))


def _prose(text: str) -> str:
    return _CODE.sub(r"`\1`", " ".join(text.split())).replace("|", "\\|")


def _name(option: click.Option) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} " + "\\|".join(map(str, option.type.choices))
    kind = option.type
    text = option.metavar or kind.name.removesuffix(" range").upper()
    if isinstance(kind, click.IntRange):
        text += f" ({kind.min} to {kind.max})" if kind.max is not None else f" ({kind.min} or more)"
    return f"{names} {text}"


def _meaning(option: click.Option) -> str:
    text = _prose(option.help or "").removesuffix(".")
    return f"{text}; `{option.envvar}`" if option.envvar else text


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    if option.prompt:
        return "asked for"
    if isinstance(option.show_default, str):
        return _prose(option.show_default)
    return f"`{option.default}`" if option.show_default else ""


if __name__ == "__main__":
    PAGE.write_text(page(TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} is written\n")
