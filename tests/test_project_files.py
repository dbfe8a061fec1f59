"""The files that tell people about the project agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import mechanex

ROOT = Path(__file__).resolve().parents[1]


def test_changelog_and_citation_know_this_version_and_its_day() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    day = re.search(
        rf"^## \[{re.escape(mechanex.__version__)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE
    )
    assert day, f"CHANGELOG.md has no heading with the day of {mechanex.__version__}"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'version: "{mechanex.__version__}"' in citation
    assert f'date-released: "{day[1]}"' in citation


def test_the_readme_leads_to_how_one_contributes_reports_and_what_changed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        assert f"]({name})" in readme and (ROOT / name).exists()
