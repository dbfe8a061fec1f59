"""The notebooks of examples/: they run, and what they show is what a run gave."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[test]'")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from notebook_pages import notebook_page  # noqa: E402
from run_notebooks import executed  # noqa: E402

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
REAL = [
    path
    for path in NOTEBOOKS
    if "smollm2" in path.read_text(encoding="utf-8").split("mechanex.load(")[1][:20]
]
"""Those that load SmolLM2-135M-Instruct."""


def cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def named(path: Path) -> str:
    return path.stem


def test_there_are_five() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    assert [path.stem for path in REAL] == ["03_persona"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_outputs_are_those_of_one_whole_run(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    found = cells(path)
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell.outputs]
    assert outputs
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text and "/tmp/" not in text


def test_pictures_are_small() -> None:
    pictures = [
        base64.b64decode(output.data["image/png"])
        for path in NOTEBOOKS
        for cell in cells(path)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures and sum(map(len, pictures)) < 200_000


def test_a_page_has_code_outputs_and_pictures(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    picture = base64.b64encode(b"a picture").decode()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell(
            "print(1)",
            outputs=[
                nbformat.v4.new_output("stream", text="\x1b[31m1\x1b[0m\n"),
                nbformat.v4.new_output("display_data", {"image/png": picture, "text/plain": "<Image>"}),
            ],
        ),
    ]
    nbformat.write(notebook, tmp_path / "one.ipynb")
    text, pictures = notebook_page(tmp_path / "one.ipynb")
    assert text.startswith("# Title\n\n```python\nprint(1)\n```\n\n````text\n1\n````\n")
    assert "](one-1.png)" in text and pictures == {"one-1.png": b"a picture"}


@pytest.mark.ci
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path not in REAL], ids=named)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    executed(path, tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("path", REAL, ids=named)
def test_a_notebook_of_a_real_model_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHANEX_HOME", os.environ["MECHANEX_REAL_HOME"])
    notebook = executed(path, tmp_path)
    said = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for line in output.get("text", "").splitlines()
        if line.startswith("  steered: ")
    ]
    assert len(said) == 4 and sum("matey" in line or " ye " in line.lower() for line in said) >= 3
