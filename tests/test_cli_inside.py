"""The commands that look inside a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from families import build
from test_cli_tools import run

import mechanex.commands.attribute
import mechanex.commands.structure
from mechanex.engine.attribution.plots import plot_circuit, plot_scores
from mechanex.engine.models import adapter_for
from mechanex.engine.structure.graph import model_graph
from mechanex.engine.structure.plots import plot_graph
from mechanex.errors import ValidationError

PROMPTS = ("--clean", "The gym was full of calm. She", "--corrupted", "The gym was full of anger. She")


def test_the_graph_is_a_tree_and_a_drawing(tmp_path: Path) -> None:
    shown = run("model", "graph", "mx-tiny", "--depth", 4, "--out", tmp_path / "stream.svg").stdout
    assert (
        "self_attn" in shown
        and "4 heads" in shown
        and "1,433,600 parameters" in shown
        and "q_proj" not in shown
    )
    assert (tmp_path / "stream.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    graph = json.loads(run("model", "graph", "mx-tiny", "--json").stdout)["graph"]
    assert graph == json.loads(json.dumps(graph)) and graph[0]["path"] == "model"
    paths = run("model", "paths", "mx-tiny").stdout.split()
    assert json.loads(run("model", "paths", "mx-tiny", "--json").stdout)["paths"] == paths


def test_scores_are_shown_and_drawn(tmp_path: Path) -> None:
    options = ("--steps", 5, "--top", 3, "--plot", tmp_path / "scores.png")
    shown = run("attribute", "mx-tiny", *PROMPTS, *options).stdout
    assert "model.embed_tokens" in shown and "' anger'" in shown and "head 0" in shown
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("attribute", "mx-tiny", *PROMPTS, "--path", "model.layers.2", "--json").stdout)
    assert list(found["scores"]) == ["model.layers.2"] and found["model"] == "mx-tiny"
    answers = json.loads(
        run("attribute", "mx-tiny", *PROMPTS, "--answer", " smiled", " shouted", "--json").stdout
    )
    assert len(answers["metric"]["answers"]) == 2


def test_circuits_are_shown_and_drawn(tmp_path: Path) -> None:
    shown = run("attribute", "mx-tiny", *PROMPTS, "--circuit", 12, "--plot", tmp_path / "circuit.svg").stdout
    assert "Faithfulness of 12 of 91 edges" in shown and (tmp_path / "circuit.svg").exists()
    found = json.loads(run("attribute", "mx-tiny", *PROMPTS, "--edges", "--json").stdout)
    assert len(found["edges"]) == found["n_edges"] == 91


def test_what_does_not_go_together_is_said() -> None:
    assert "--path" in run("attribute", "mx-tiny", *PROMPTS, "--edges", "--path", "model", code=2).stderr
    assert (
        "are for modules" in run("attribute", "mx-tiny", *PROMPTS, "--edges", "--drop-layers", code=2).stderr
    )
    mended = ("--path", "model.layers.2.self_attn.k_proj", "--recompute-attention", "--drop-layers")
    assert json.loads(run("attribute", "mx-tiny", *PROMPTS, *mended, "--json").stdout)["heads"]
    longer = ("--clean", "Anna went home.", "--corrupted", "Anna")
    assert "align='tokens'" in run("attribute", "mx-tiny", *longer, code=1).stderr
    assert run("attribute", "mx-tiny", *longer, "--align", "--top", 1).stdout


COMMANDS = [
    ("model", "graph", "mx-tiny", "--out"),
    ("attribute", "mx-tiny", *PROMPTS, "--plot"),
    ("attribute", "mx-tiny", *PROMPTS, "--edges", "--plot"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: " ".join(one[:2]))
def test_a_figure_that_cannot_be_written_is_told_before_anything_runs(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mechanex.commands.attribute, mechanex.commands.structure):
        monkeypatch.setattr(module, "load", None)
    assert "ends with .png, .svg, .pdf" in run(*command, tmp_path / "a.gif", code=1).stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install '.[plot]'" in run(*command, tmp_path / "a.png", code=1).stderr


def test_drawings_need_something_to_draw(tmp_path: Path) -> None:
    nothing: Any = {"positions": {}, "edges": [], "roles": {}}
    for draw in (plot_scores, plot_circuit):
        with pytest.raises(ValidationError, match="to draw"):
            draw(nothing, tmp_path / "x.png")
    with pytest.raises(ValidationError, match="to draw"):
        plot_graph([], tmp_path / "x.png")
    with pytest.raises(ValidationError, match=r"ends with \.png"):
        plot_graph(model_graph(adapter_for(build("gpt_neox"))), tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())
