"""Lines that install the library work from a clone or a wheel: a package index has another `mechanex`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mechanex.extras import install_line

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).resolve().parents[1]
FILES = [
    *(ROOT / "mechanex").rglob("*.py"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "scripts").glob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
    *ROOT.glob("*.md"),
]


def test_no_text_installs_the_other_package() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.group()}"
        for path in FILES
        for line in re.finditer(
            r"\binstall (?:-\S+ )*['\"]?mechanex(?:\[|['\"\s=<>~]|$)", path.read_text(encoding="utf-8")
        )
    ]
    assert not found, "\n".join(found)


def test_every_extra_that_a_text_names_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    named = {
        extra
        for path in FILES
        for group in re.findall(
            r"install '\.\[([\w,]+)\]'|install_line\([\"'](\w+)", path.read_text(encoding="utf-8")
        )
        for extra in ",".join(filter(None, group)).split(",")
    }
    assert named and named <= extras, sorted(named - extras)


def test_a_missing_extra_is_told_with_both_ways() -> None:
    told = install_line("serve")
    assert "pip install '.[serve]'" in told and "wheel>[serve]'" in told
