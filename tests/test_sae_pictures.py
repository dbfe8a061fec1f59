"""Pictures of traces and of features: what they say, in colours and without them, whatever the text holds."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mechanex.bundled import data_path
from mechanex.cli import main
from mechanex.engine.datasets import read_pairs
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.activations import as_pairs
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.dashboard import Dashboard
from mechanex.engine.sae.feature_stats import dashboard
from mechanex.engine.sae.plots import text_lines
from mechanex.engine.sae.registry import default_sae
from mechanex.engine.sae.shading import Shade, color
from mechanex.engine.sae.traces import TracedToken, WatchedText, save_traces
from mechanex.errors import ValidationError

PAIRS = read_pairs(data_path("calm_angry"), split="train")
TEXTS = [str(p) + a for p, a in zip(PAIRS.prompts[:30], PAIRS.negative_answers[:30], strict=True)]
HOSTILE = '<script>alert("$x^2$")</script>\n\u202eabc\x1b[31m\ud800\t漢字'
PNG = b"\x89PNG\r\n\x1a\n"


def watched(text: str = HOSTILE) -> WatchedText:
    trace = (
        TracedToken(1, text, {'a"<b>': 0.4}, (), ()),
        TracedToken(2, " rage", {'a"<b>': 1.7}, ('a"<b>',), ('a"<b>',)),
        TracedToken(3, " calm", {'a"<b>': -0.2}, (), ('a"<b>',)),
        TracedToken(4, "</s>", {}, (), ()),
    )
    return WatchedText("whole", "length", ('a"<b>',), trace, prompt=text)


def luminance(hexadecimal: str) -> float:
    parts = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_readable_on_every_colour() -> None:
    found = [luminance(color(level / 20)) for level in range(-3, 30)]
    dark = luminance("#1a1a1a")
    assert all((light + 0.05) / (dark + 0.05) >= 4.5 for light in found)
    assert found == sorted(found, reverse=True) and color(float("nan")) == "#ffffff"


def test_a_trace_shows_itself_in_a_notebook_with_its_text_escaped() -> None:
    shown = watched()._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "\u202e" not in shown
    assert "\x1b" not in shown and "\ud800" not in shown
    assert not re.search(r'title="[^"]*<', shown)
    detected = re.search(
        r'<span style="background:(#\w+)" title="([^"]*)"><strong><u> rage</u></strong>', shown
    )
    assert detected is not None and detected[1] == color(1)
    assert html.unescape(detected[2]) == 'a"<b> 1.70; detected: a"<b>; corrected: a"<b>'
    assert "><u> calm</u></span>" in shown and "length; detected: a&quot;&lt;b&gt;" in shown
    # The legend says in words what colours say.
    assert "framed: detected; underlined: corrected" in shown


def test_pictures_are_written_without_a_display(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.environ.pop('DISPLAY', None)\n"
        "from mechanex.engine.sae.traces import TracedToken, WatchedText\n"
        "one = WatchedText('ab', 'stop', (), (TracedToken(1, 'b $_{', {'x': 1.0}, (), ()),), 'a')\n"
        "one._repr_html_(); assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        f"one.save({str(tmp_path / 'a' / 'a.png')!r}); one.save({str(tmp_path / 'b' / 'a.html')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # In folders that are made, too, of both kinds.
    assert (tmp_path / "a" / "a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "b" / "a.html").read_text().startswith("<!doctype html>")


def test_any_text_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_traces([watched(), watched("x" * 500), watched("")], path)
    assert path.read_bytes().startswith(PNG)
    save_traces([watched()], tmp_path / "a.HTML")
    for name in ("a.jpg", "a"):
        with pytest.raises(ValidationError, match=r"a picture is an .html or a .png file"):
            watched().save(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValidationError, match=r"pip install '\.\[plot\]'.*, or save as .html"):
        watched().save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_lines_hold_all_of_the_text_and_no_more_than_fits() -> None:
    tokens = [Shade("one two\nthree", 1.0), Shade("x" * 50), Shade(" 漢字" * 9, under=True)]
    lines = text_lines(tokens, 20)
    joined = "".join(one.text for line in lines for _, one in line)
    assert joined == "".join(t.text for t in tokens).replace("\n", "⏎")
    for line in lines:
        at, last = line[-1]
        assert at + sum(2 if char > "\u2fff" else 1 for char in last.text) <= 20
    assert all(one.under for line in lines for _, one in line if "漢" in one.text)


@pytest.fixture(scope="module")
def tiny() -> ModelAdapter:
    loaded = load("mx-tiny", backend="transformers")
    adapter = adapter_for(loaded.model)
    adapter.tokenizer = loaded.tokenizer
    return adapter


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return default_sae("mx-tiny")


@pytest.fixture(scope="module")
def loud(tiny: ModelAdapter, sae: SparseAutoencoder) -> Dashboard:
    return dashboard(tiny, sae, 253, TEXTS, contexts=4)


def test_a_dashboard_tells_what_the_autoencoder_says(
    tiny: ModelAdapter, sae: SparseAutoencoder, loud: Dashboard
) -> None:
    values, added, streams = [], [], []
    for first, rest in as_pairs(tiny.tokenizer, TEXTS, 512):
        with torch.no_grad():
            out: Any = tiny.hf_model(torch.tensor([[*first, *rest]]), output_hidden_states=True)
            norm_in: list[Any] = []
            handle = tiny.on_residual(tiny.n_layers, lambda h, into=norm_in: into.append(h))  # type: ignore[misc]
            tiny.hf_model(torch.tensor([[*first, *rest]]))
            handle.remove()
        x = out.hidden_states[4][0, 1:]
        said = sae.encode(x)[:, 253]
        whole = torch.zeros(len(x), sae.n_features)
        whole[:, 253] = said
        prepared = sae.prepare(x)
        change = sae.decode(whole, prepared) - sae.decode(torch.zeros_like(whole), prepared)
        values.append(said)
        added.append(change[said != 0])
        streams.append(norm_in[0][0, 1:][said != 0])
    every = torch.cat(values)
    assert loud.n_tokens == len(every) and loud.n_active == int((every != 0).sum()) == sum(loud.counts)
    assert loud.edges[0] == pytest.approx(float(every[every != 0].min()), rel=1e-3)
    strongest = sorted((float(one.max()) for one in values), reverse=True)[:4]
    assert [one.strongest for one in loud.passages] == pytest.approx(strongest, rel=1e-3)
    assert all(one.values[one.at] == max(one.values) for one in loud.passages)
    stream, change = torch.cat(streams).mean(0), torch.cat(added).mean(0)
    with torch.no_grad():
        logits = tiny.unembedding.logits(tiny.finish(torch.stack([stream, stream + change])))
    effect = logits[1] - logits[0]
    assert [one.change for one in loud.promoted] == pytest.approx(effect.topk(10).values.tolist(), abs=1e-3)
    lowered = (-effect).topk(10).values
    assert [one.change for one in loud.suppressed] == pytest.approx((-lowered).tolist(), abs=1e-3)


def test_a_dashboard_is_shown_and_written(loud: Dashboard, tmp_path: Path) -> None:
    shown = loud._repr_html_()
    assert shown.count("<strong>") == 4 and "<svg" in shown and "raised" in shown
    assert loud.title in html.unescape(shown) and json.dumps(loud.as_dict())
    for name in ("d.png", "d.html"):
        loud.save(tmp_path / name)
    assert (tmp_path / "d.png").read_bytes().startswith(PNG)


def test_a_silent_feature_has_an_empty_dashboard(
    tiny: ModelAdapter, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    said = dashboard(tiny, sae, 253, ["We met."])
    assert said.n_active == 0 and said.passages == said.promoted == said.suppressed == ()
    said.save(tmp_path / "d.png")
    assert "<svg" in said._repr_html_()
    with pytest.raises(ValidationError, match=r"features are numbered 0 to 1023; got 1024"):
        dashboard(tiny, sae, 1024, TEXTS)


def test_the_commands_write_pictures(tmp_path: Path, tiny: ModelAdapter) -> None:
    from mechanex.engine.sae.create import create
    from mechanex.engine.sae.store import BehaviorStore

    examples = PAIRS.prompts[:12], PAIRS.negative_answers[:12], PAIRS.positive_answers[:12]
    BehaviorStore().put(create(tiny, "anger", *examples, sae=default_sae("mx-tiny"), source="mx-tiny"))
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(TEXTS))

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(main, ["sae", *map(str, arguments)])

    page, drawn = tmp_path / "t.html", tmp_path / "t.png"
    done = run(
        "trace", "mx-tiny", "--prompt", TEXTS[0][:60], "--max-tokens", 5, "--html", page, "--png", drawn
    )
    assert done.exit_code == 0, done.output
    assert f"Written to {page}." in done.output.replace("\n", "")
    assert drawn.read_bytes().startswith(PNG) and "anger" in page.read_text()
    for name in ("mx-tiny", "anger"):
        done = run("show", name, "--feature", 253, "--data", data, "--png", drawn, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["feature"] == 253
    done = run("show", "mx-tiny", "--feature", 253, "--data", data)
    assert "feature 253 at resid.4" in done.output and "raises:" in done.output
    for wrong, said in (
        (("show", "mx-tiny", "--feature", 253), "give --data"),
        (("show", "mx-tiny", "--html", page), "go with --feature"),
        (("trace", "mx-tiny", "--prompt", "a", "--png", "a.html"), "ends in .png"),
    ):
        done = run(*wrong)
        assert done.exit_code == 2 and said in done.output
