"""docs/cli.md is what its script writes, and leaves out no command, option or environment variable."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import pytest

from mechanex.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import write_cli_docs  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
COMMANDS = dict(write_cli_docs.commands())
# Of the build, not of a running command.
BUILD = {"MECHANEX_CUDA", "MECHANEX_CUDA_ARCHITECTURES", "MECHANEX_PURE"}


def test_the_page_is_what_the_script_writes() -> None:
    written = write_cli_docs.page(write_cli_docs.TEMPLATE.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == written, "run: python scripts/write_cli_docs.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_with_every_option(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    _, _, section = page.partition(f"### `mechanex {name}`\n")
    section = re.split(r"^##", section, flags=re.MULTILINE)[0]
    command = COMMANDS[name]
    assert command.help and f"mechanex {name}" in section
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"
            assert f"| `{option.opts[0]}" in section
        else:
            assert str(option.name).upper() in section
    assert f"(#mechanex-{name.replace(' ', '-')})" in page


def test_a_command_without_a_place_and_a_place_without_a_command_are_errors() -> None:
    template = write_cli_docs.TEMPLATE.read_text(encoding="utf-8")
    for wrong, named in ((template.replace("{{steer}}", ""), "steer"), (template + "{{fly}}\n", "fly")):
        with pytest.raises(ValueError, match=named):
            write_cli_docs.page(wrong)


def test_every_environment_variable_is_in_the_table() -> None:
    """The table names what the package reads, and nothing that it doesn't."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mechanex").rglob("*.py"))
    read = set(re.findall(r"\bMECHANEX_[A-Z_]*[A-Z]\b", sources)) - BUILD
    table = PAGE.read_text(encoding="utf-8").partition("## Environment")[2].partition("\n## ")[0]
    assert set(re.findall(r"\bMECHANEX_[A-Z_]*[A-Z]\b", table)) == read


@pytest.mark.parametrize("option", ["max_batch", "max_waiting"])
def test_defaults_that_the_server_chooses_are_told_as_they_are(option: str) -> None:
    (found,) = (p for p in COMMANDS["serve"].params if p.name == option)
    assert isinstance(found, click.Option) and found.show_default == str(getattr(ServerSettings, option))
