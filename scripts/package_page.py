"""What a package's page shows: the README with links that work there, and addresses; called by the build.

``MECHANEX_REPOSITORY``, such as https://github.com/OWNER/mechanex, says where the repository is. Without it the page
has no links to files and no pictures, since a page elsewhere can't reach them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from links import replaced  # noqa: E402


def page(repository: str, tag: str) -> str:
    """The README for a place that has no files of the repository, in Markdown."""

    def placed(path: str, picture: bool) -> str | None:
        if not repository:
            return None
        kind = "raw" if picture else "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/{tag}/{path}"

    return replaced((ROOT / "README.md").read_text(encoding="utf-8"), "", placed)


def addresses(repository: str, tag: str) -> dict[str, str]:
    """The project's addresses by their names; none where the repository's isn't known."""
    if not repository:
        return {}
    return {
        "Source": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``readme`` and ``urls``, as the build asks for them."""
    repository = os.environ.get("MECHANEX_REPOSITORY", "").rstrip("/")
    tag = f"v{project['version']}"
    return {
        "readme": {"content-type": "text/markdown", "text": page(repository, tag)},
        "urls": addresses(repository, tag),
    }


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    """A wheel built from a source archive may be told another repository than the archive was."""
    return {"readme": True, "urls": True}
