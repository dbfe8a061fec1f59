"""Every code block of the README and of the documentation runs as printed.

Blocks marked `py` instead of `python` need the network or a GPU, and are only shown.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import fork

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.ci
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    found = blocks(page, "python")
    if page.name == "README.md":
        assert len(found) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for body in found:
        exec(compile(body, str(page), "exec"), namespace)


@pytest.mark.ci
def test_the_quick_start_prints_what_stands_below_it(tmp_path, monkeypatch, capsys):
    """Its texts are cut with "…"."""
    (code, shown), *_ = re.findall(
        r"```python\n(.*?)```\s*```text\n(.*?)```", PAGES[0].read_text("utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for line in shown.splitlines():
        assert line.removesuffix(" …") in printed


def commands(page: Path) -> list[list[str]]:
    lines = [line for body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.ci
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda p: p.name)
def test_shell_blocks_run(page, tmp_path):
    """`make` targets are checked to exist (running them from inside `make test` would not end); the rest is run."""
    log = tmp_path / "output.txt"
    for words in commands(page):
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "mechanex":
            done = fork(words[1:], os.environ, log, folder=tmp_path)
            assert done.wait(300) == 0, f"{page.name}: {shlex.join(words)}\n{log.read_text()}"
        elif words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}: {shlex.join(words)}\n{done.stderr}"
        else:
            assert words[:2] == ["pip", "install"], (
                f"{page.name}: {shlex.join(words)} is not run by this test"
            )


def test_every_shell_block_is_looked_at():
    assert {"README.md", "cli.md", "optimization.md"} <= {page.name for page in PAGES if commands(page)}
    assert len(commands(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
