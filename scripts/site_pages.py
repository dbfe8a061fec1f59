"""Pages of the documentation's site that are no files under docs/: the README, notebooks, each module's reference.

MkDocs calls it while it builds (`hooks` of mkdocs.yml). Links between the repository's texts lead to their pages; those
to files that the site doesn't have lead to the repository where ``MECHANEX_REPOSITORY`` says where it is, and are plain
text otherwise: a site that is read offline has no dead ends.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from links import replaced  # noqa: E402
from notebook_pages import notebook_page  # noqa: E402

TEXTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/persona/README.md": "examples/persona.md",
}
"""What lies elsewhere in the repository, and its place in the site."""

MODULES = {
    "mechanex": ["mechanex.client"],
    "steering": ["mechanex.steering"],
    "generation": ["mechanex.generation"],
    "vectors": ["mechanex.engine.vectors"],
    "plans": ["mechanex.engine.hooks", "mechanex.engine.intervention"],
    "optimization": ["mechanex.utils.steering_opt"],
    "doses": ["mechanex.utils.doses"],
    "scores": ["mechanex.engine.score"],
    "model": ["mechanex.model"],
    "attribution": ["mechanex.attribution"],
    "raag": ["mechanex.raag"],
    "sae": ["mechanex.sae"],
    "serving": ["mechanex.serving"],
    "ops": ["mechanex.ops.steer", "mechanex.ops.logprob"],
    "errors": ["mechanex.errors"],
}
"""The pages under api/, and the modules whose docstrings they show."""


_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>[~.]*([^<]*)</code>")


def _pages() -> Iterator[tuple[str, str, str | bytes]]:
    """Path in the repository ("" where there is none), path in the site, and content of each page and picture."""
    for path, place in TEXTS.items():
        yield path, place, (ROOT / path).read_text(encoding="utf-8")
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        text, pictures = notebook_page(notebook)
        yield f"examples/{notebook.name}", f"examples/{notebook.stem}.md", text
        for name, picture in pictures.items():
            yield "", f"examples/{name}", picture
    for name, modules in MODULES.items():
        yield (
            "",
            f"api/{name}.md",
            "\n\n".join([f"# {name}", *(f"::: {module}" for module in modules)]) + "\n",
        )


_sources: dict[str, str] = {}
"""Place in the site of every text, to its path in the repository."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; know where each text of the site comes from."""
    _sources.clear()
    _sources.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    for path, place, content in _pages():
        files.append(File.generated(config, place, content=content))
        if path:
            _sources[place] = path
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's own pages."""
    here = page.file.src_uri
    if here not in _sources:
        return markdown
    places = {path: place for place, path in _sources.items()}
    repository = os.environ.get("MECHANEX_REPOSITORY", "").rstrip("/")

    def placed(path: str, picture: bool) -> str | None:
        found = places.get(path) or places.get(f"{path}/README.md")
        if found is not None:
            return posixpath.relpath(found, posixpath.dirname(here) or ".")
        if not (ROOT / path).exists():
            return path  # MkDocs names it among the links that lead nowhere
        if not repository:
            return None
        kind = "raw" if picture else "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/HEAD/{path}"

    return replaced(markdown, posixpath.dirname(_sources[here]), placed)


def on_page_content(html: str, **_: Any) -> str:
    """Names that docstrings mark by Sphinx's roles are shown as code."""
    return _ROLE.sub(r"<code>\1</code>", html)
