"""The playground as people see it: a real server, and Chromium without a window, as wide as a desk's and a phone's."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from server_calls import call
from server_process import ServerProcess, serving

from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.vectors import SteeringVector

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, expect
else:
    reason = "playwright is not installed: pip install playwright"
    expect = pytest.importorskip("playwright.sync_api", reason=reason).expect
    expect.set_options(timeout=60_000)

pytestmark = pytest.mark.ci

WIDE, NARROW = (1280, 900), (390, 844)
KEY = "a-key-of-the-operator"
PROMPT = "How was your day?"
PICTURES = os.environ.get("MECHANEX_PAGE_PICTURES", "")
"""A folder for the pictures of the docs; "" for none."""

Opened = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next(
            (found for name in names if (found := shutil.which(name))), tools.chromium.executable_path
        )
        if not Path(program).exists():
            pytest.skip(
                "no Chromium here: apt-get install chromium, or python -m playwright install chromium"
            )
        sandbox = [] if hasattr(os, "getuid") and os.getuid() else ["--no-sandbox"]
        running = tools.chromium.launch(executable_path=program, args=sandbox)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a vector of its own, and a behavior that can be watched."""
    with serving("--behaviors", "calm_angry", home=tmp_path_factory.mktemp("home")) as running:
        pairs = read_pairs(data_path("kind_rude"))
        parts = pairs.prompts, pairs.positive_answers, pairs.negative_answers
        names = "prompts", "positive_answers", "negative_answers"
        body: dict[str, Any] = {name: list(part)[:24] for name, part in zip(names, parts, strict=True)}
        status, _, answer = call(running, "POST", "/behaviors/create", {**body, "behavior_name": "kindness"})
        assert status == 200 and json.loads(answer)["detector"], answer
        yield running


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Opens an address in a browser of its own, which has no console errors in the end."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def open_(address: str, size: tuple[int, int] = WIDE, *, refused: bool = False, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)

        def heard(kind: str, text: str) -> None:
            # A browser notes every answer of 400 and above, wanted or not.
            if kind in ("error", "warning") and not (refused and "status of 401" in text):
                problems.append(text)

        page.on("console", lambda message: heard(message.type, message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(address.split("#")[0]) else problems.append(r.url)
        )
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


def ready(page: Page) -> None:
    expect(page.locator("#model")).to_have_text("mx-tiny")


def write(page: Page, prompt: str = PROMPT) -> str:
    """Has both answers written, and gives the steered one."""
    page.get_by_role("textbox", name="Prompt", exact=True).first.fill(prompt)
    return again(page, lambda: page.get_by_role("button", name="Write", exact=True).click())


def again(page: Page, cause: Callable[[], Any]) -> str:
    """The steered answer once what ``cause`` sets off is whole."""
    page.evaluate("document.querySelector('#status').textContent = ''")
    cause()
    expect(page.locator("#status")).to_have_text(re.compile("^Written"))
    return page.locator("#steered").inner_text()


def add(page: Page, name: str) -> None:
    page.locator("#add").select_option(name)
    page.get_by_role("button", name="Add", exact=True).click()


def heats(page: Page, column: str) -> list[str]:
    return [
        str(one) for one in page.locator(f"#{column} .token").evaluate_all("all => all.map(t => t.className)")
    ]


def fill_examples(page: Page) -> None:
    examples = [
        ("The man said", "he was happy and calm", "he was angry and sad"),
        ("The woman felt", "glad about the day", "furious about the day"),
    ]
    for row, (prompt, towards, away) in zip(page.locator("#examples > li").all(), examples, strict=True):
        row.get_by_label("Prompt", exact=True).fill(prompt)
        row.get_by_label("Towards").fill(towards)
        row.get_by_label("Away from").fill(away)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["desk", "phone"])
def test_a_vector_is_made_a_slider_moved_and_a_link_followed(
    server: ServerProcess, opened: Opened, size: tuple[int, int], tmp_path: Path
) -> None:
    page = opened(server.url, size)
    ready(page)
    page.evaluate(
        """() => { window.lengths = []; const box = document.querySelector('#steered');
        new MutationObserver(() => window.lengths.push(box.textContent.length)).observe(box, {childList: true}); }"""
    )
    page.get_by_label("Tokens", exact=True).fill("200")
    write(page)
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 3, "the answer came at once, not streamed"
    assert not any("h1" in heat or "h7" in heat for heat in heats(page, "steered")), "nothing steers yet"

    fill_examples(page)
    page.get_by_label("Layers", exact=True).fill("2, 4")
    page.get_by_label("Name", exact=True).fill(f"mood {size[0]}")
    steered = again(page, lambda: page.get_by_role("button", name="Make it").click())
    vector = page.get_by_role("group", name=f"mood {size[0]}")
    assert any(re.search(r"h[1-7]", heat) for heat in heats(page, "steered"))
    plain, before = page.locator("#plain").inner_text(), heats(page, "steered")

    slider = vector.get_by_role("slider", name="Strength")
    slider.focus()
    moved = again(page, lambda: slider.press("End"))
    assert moved != steered and heats(page, "steered") != before
    assert page.locator("#plain").inner_text() == plain
    vector.get_by_text("By layer").click()
    alone = again(page, lambda: vector.get_by_role("slider", name="Layer 2").press("Home"))
    assert alone != moved
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    with page.expect_download() as download:
        vector.get_by_role("button", name="Download").click()
    path = tmp_path / "mood.safetensors"
    download.value.save_as(path)
    assert SteeringVector.load(path).layers == (2, 4)

    other = opened(page.url, size)
    ready(other)
    assert other.locator("#prompt").input_value() == PROMPT
    assert other.locator("#max_tokens").input_value() == "200"
    group = other.get_by_role("group", name=f"mood {size[0]}")
    assert group.get_by_role("slider", name="Strength").input_value() == "4"
    assert group.get_by_role("slider", name="Layer 2").input_value() == "0"
    assert again(other, lambda: other.locator("#prompt").press("Control+Enter")) == alone
    assert heats(other, "steered") == heats(page, "steered")


def test_tokens_are_walked_along_with_the_keys(server: ServerProcess, opened: Opened) -> None:
    page = opened(server.url)
    ready(page)
    add(page, "calm_angry")
    write(page)
    answer = page.get_by_role("listbox", name="Steered answer, token by token")
    answer.focus()
    answer.press("ArrowRight")
    answer.press("ArrowRight")
    chosen = page.locator("#steered .token.at")
    assert chosen.get_attribute("id") == answer.get_attribute("aria-activedescendant") == "steered-2"
    assert "KL" in str(chosen.get_attribute("aria-label"))
    told = page.get_by_role("region", name="The likeliest tokens")
    assert told.locator("tbody tr").count() == 5 and "KL(steered‖plain)" in told.inner_text()
    page.locator("#plain .token").nth(1).hover()
    assert page.locator("#plain .token").nth(1).get_attribute("aria-selected") == "true"


def test_a_behavior_colours_what_shows_it(server: ServerProcess, opened: Opened) -> None:
    page = opened(server.url)
    ready(page)
    write(page)
    again(page, lambda: page.get_by_label("Colour by").select_option("behavior:kindness"))
    labels = page.locator("#steered .token").evaluate_all("all => all.map(t => t.getAttribute('aria-label'))")
    assert sum("kindness" in label for label in labels) > len(labels) / 2
    assert "kindness" in page.locator("#legend").inner_text()


def test_a_sweep_is_drawn_and_a_setting_of_it_used(server: ServerProcess, opened: Opened) -> None:
    page = opened(server.url)
    ready(page)
    write(page)
    fill_examples(page)
    page.get_by_role("button", name="Sweep", exact=True).click()
    picture = page.get_by_role("img", name="Sweep of the vector's strength")
    picture.wait_for()
    assert picture.locator("circle").count() == 18
    page.get_by_text("The numbers").click()
    again(page, lambda: page.get_by_role("button", name="Use strength 2, all layers").click())
    assert page.get_by_role("slider", name="Strength").input_value() == "2"


def test_history_brings_back_what_was_written(server: ServerProcess, opened: Opened) -> None:
    page = opened(server.url)
    ready(page)
    first = write(page)
    write(page, "What is the weather like?")
    page.locator("#history button").nth(1).click()
    expect(page.locator("#status")).to_have_text(re.compile("before"))
    assert page.locator("#prompt").input_value() == PROMPT
    assert page.locator("#steered").inner_text() == first
    page.reload()
    ready(page)
    assert page.locator("#history button").count() == 2


def test_what_goes_wrong_is_said(server: ServerProcess, opened: Opened) -> None:
    page = opened(server.url)
    ready(page)
    page.get_by_role("button", name="Write", exact=True).click()
    alert = page.get_by_role("alert")
    assert alert.inner_text() == "Write a prompt first."
    page.locator("#examples input").first.fill("only a prompt")
    page.get_by_role("button", name="Make it").click()
    assert "fill in all three fields" in alert.inner_text()


def test_a_server_with_a_key_asks_for_it(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("locked")
    with serving(home=home, environment={"MECHANEX_SERVER_KEY": KEY}) as server:
        page = opened(server.url, refused=True)
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.wait_for()
        dialog.get_by_label("Key", exact=True).fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-reason")).to_have_text(re.compile("not valid"))
        dialog.get_by_label("Key", exact=True).fill(KEY)
        dialog.get_by_role("button", name="Use this key").click()
        ready(page)
        assert write(page)
        assert KEY not in page.url
        page.reload()
        ready(page)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["desk", "phone"])
def test_everything_is_reached_and_named(
    server: ServerProcess, opened: Opened, size: tuple[int, int]
) -> None:
    page = opened(server.url, size)
    ready(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')].filter(one =>
        !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim())).map(one => one.outerHTML)"""
    )
    assert nameless == []
    wanted = {"prompt", "write", "add", "colour", "make-button", "sweep-button", "clear-history"}
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert wanted <= reached


def test_it_is_dark_where_the_system_is_and_where_one_wants_it(server: ServerProcess, opened: Opened) -> None:
    light, dark = (opened(server.url, color_scheme=scheme) for scheme in ("light", "dark"))
    ground = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(ground) != dark.evaluate(ground)
    button = light.get_by_role("button", name="Colours of the page: as the system")
    button.click()
    light.get_by_role("button", name="Colours of the page: light").click()
    assert light.evaluate(ground) == dark.evaluate(ground)
    for page in (light, dark):  # WCAG AA, of the text on its ground
        ratio = page.evaluate(
            """() => { const lum = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            const s = getComputedStyle(document.body), a = lum(s.color), b = lum(s.backgroundColor);
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }"""
        )
        assert ratio > 7


@pytest.mark.skipif(not PICTURES, reason="MECHANEX_PAGE_PICTURES names no folder")
def test_pictures_for_the_docs(server: ServerProcess, opened: Opened) -> None:
    for name, size, options in [
        ("playground.png", (1280, 1000), {}),
        ("playground-phone.png", (390, 844), {"color_scheme": "dark"}),
    ]:
        page = opened(server.url, size, **options)
        ready(page)
        add(page, "calm_angry")
        write(page)
        page.locator("#steered .token.h7").first.hover()
        if size[0] < 1000:
            page.locator(".answers").scroll_into_view_if_needed()
            page.evaluate("document.querySelector('.answers').scrollIntoView()")
        page.screenshot(path=Path(PICTURES) / name)
