"""The documentation as a site: it builds strictly, has all that it names, and loads nothing from elsewhere."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from links import replaced  # noqa: E402
from package_page import addresses, page  # noqa: E402

REPOSITORY = "https://git.example/owner/mechanex"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    environment = {k: v for k, v in os.environ.items() if k != "MECHANEX_REPOSITORY"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.ci
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)"
    )
    styles = re.compile(r"(?:url\(|@import\s*)[\"']?((?:https?:)?//[^\"')]+)")
    pages, sheets = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 40 and sheets
    foreign = [
        (path.name, found)
        for pattern, paths in ((loads, pages), (styles, [*sheets, *pages]))
        for path in paths
        for found in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    assert not foreign


@pytest.mark.ci
def test_every_text_has_a_page_and_links_stay_inside(site: Path) -> None:
    for text in (ROOT / "docs").glob("*.md"):
        assert (site / f"{text.stem}.html").exists()
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        assert (site / "examples" / f"{notebook.stem}.html").exists()
    for page_file in site.rglob("*.html"):
        if page_file.name == "404.html":  # shown at any depth, so its links begin at the root
            continue
        for target in re.findall(r"<a\b[^>]*\bhref=\"([^\"#?]+)", page_file.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page_file.parent / target).exists(), (
                    f"{page_file.relative_to(site)} leads to {target}"
                )


@pytest.mark.ci
def test_the_reference_shows_signatures_and_what_is_raised(site: Path) -> None:
    text = (site / "api" / "steering.html").read_text(encoding="utf-8")
    assert "mechanex.steering.SteeringModule.generate_vectors" in text and "few-shot" in text
    assert "Raises:" in text
    assert not [
        path.name for path in site.rglob("*.html") if re.search(r":(func|class|meth):", path.read_text())
    ]


@pytest.mark.ci
def test_search_works_in_a_browser_that_reaches_this_host_alone(site: Path) -> None:
    tools = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with serving(site) as address, tools.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        asked: list[str] = []
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{address}/index.html")
        tab.locator("label.md-header__button[for=__search]").or_(
            tab.locator("input.md-search__input")
        ).last.click()
        # Typed key by key: once its index is loaded, the search reads its field when a key comes up, not on input.
        tab.locator("input.md-search__input").press_sequentially("orthogonalize")
        tab.locator("a.md-search-result__link").first.wait_for(timeout=60_000)
        assert tab.locator("article img").evaluate_all("all => all.every(one => one.naturalWidth > 0)")
        browser.close()
    assert len(asked) > 3
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


class serving:
    """A folder over HTTP on this host, at the address that ``with`` gives."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(_Quiet, directory=str(folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_links_are_replaced_in_text_and_left_in_code() -> None:
    code = "`[a](x.md)`\n```\n[a](x.md)\n```\n"
    text = "[a](x.md#part) ![p](y.png) [`code`](../z) [out](https://host/x) [here](#part)\n" + code
    seen: list[tuple[str, bool]] = []

    def placed(path: str, picture: bool) -> str:
        seen.append((path, picture))
        return path.upper()

    new = replaced(text, "docs", placed)
    assert seen == [("docs/x.md", False), ("docs/y.png", True), ("z", False)]
    linked = "[a](DOCS/X.MD#part) ![p](DOCS/Y.PNG) [`code`](Z) [out](https://host/x) [here](#part)\n"
    assert new == linked + code
    assert replaced("a [b](c) ![d](e)", "", lambda *_: None) == "a b "


def relative(text: str) -> list[str]:
    """Targets of links and pictures that only work beside the repository's files."""
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]


def test_the_packages_page_has_links_and_a_picture_that_work_there() -> None:
    shown = page(REPOSITORY, "v1.2.3")
    assert f"]({REPOSITORY}/raw/v1.2.3/docs/demo.png)" in shown
    assert f"]({REPOSITORY}/blob/v1.2.3/docs/recipes.md)" in shown
    assert not relative(shown)
    for path in re.findall(rf"{re.escape(REPOSITORY)}/(?:blob|raw|tree)/v1\.2\.3/([^)#\s]+)", shown):
        assert (ROOT / path).exists()
    assert set(addresses(REPOSITORY, "v1.2.3")) == {"Source", "Documentation", "Changelog", "Issues"}


def test_where_the_repository_is_unknown_the_packages_page_has_no_dead_links() -> None:
    shown = page("", "v1.2.3")
    assert not relative(shown) and "docs/recipes.md" in shown
    assert addresses("", "v1.2.3") == {}
