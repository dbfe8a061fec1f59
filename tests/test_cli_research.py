"""The commands that look into a model or change it for good, every method of ``steer``, and short ids of vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner

from mechanex import SteeringVector
from mechanex.cli import main
from mechanex.engine.activations import Activations, activations
from mechanex.engine.models.resolve import load
from mechanex.engine.orthogonalize import ablate_everywhere
from mechanex.engine.vector_store import VectorStore

VECTOR = SteeringVector({3: torch.randn(128, generator=torch.Generator().manual_seed(0))}, method="by hand")


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_activations_are_written_as_they_are_read_here(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Anna went home.\n\nTom came.\n", encoding="utf-8")
    out = run("activations", "mx-tiny", tmp_path / "texts.txt", tmp_path / "a", "--layer", 3, "--json")
    assert json.loads(out) == {
        "out": str(tmp_path / "a"),
        "layers": [3],
        "texts": 2,
        "tokens": 2,
        "empty_lines": [2],
    }
    loaded = load("mx-tiny", backend="transformers")
    found = activations(loaded.model, ["Anna went home.", "Tom came."], [3], loaded.tokenizer)
    assert numpy.array_equal(Activations.load(tmp_path / "a")[3], found[3])


def test_activations_have_a_row_for_each_line_that_holds_text(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\ufeffAnna\fwent\u2028home.\r\nTom came.\n", encoding="utf-8")
    out = run("activations", "mx-tiny", texts, tmp_path / "a", "--layer", 3)
    assert "2 tokens of 2 texts" in out and "Empty" not in out
    loaded = load("mx-tiny", backend="transformers")
    found = activations(loaded.model, ["Anna\fwent\u2028home.", "Tom came."], [3], loaded.tokenizer)
    assert numpy.array_equal(Activations.load(tmp_path / "a")[3], found[3])
    texts.write_text("\nAnna\n\n", encoding="utf-8")
    assert "Empty lines have no rows: 1." in run("activations", "mx-tiny", texts, tmp_path / "a")
    texts.write_bytes(b"Anna\xe9\n")
    assert "texts.txt is not UTF-8 text" in run("activations", "mx-tiny", texts, tmp_path / "a", code=1)
    texts.write_text("\n", encoding="utf-8")
    assert "holds no text" in run("activations", "mx-tiny", texts, tmp_path / "a", code=2)


def test_an_orthogonal_model_does_without_steering_what_the_ablation_does(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.safetensors")
    run("orthogonalize", "mx-tiny", tmp_path / "v.safetensors", tmp_path / "model")
    ids = torch.tensor([[5, 9, 17]])
    plain, written = (load(name, backend="transformers") for name in ("mx-tiny", tmp_path / "model"))
    with ablate_everywhere(plain.model, VECTOR), torch.no_grad():
        ablated = plain.model(ids).logits
    with torch.no_grad():
        # What ships in half precision is written in the precision that it runs in.
        assert torch.allclose(written.model(ids).logits, ablated, atol=5e-2)
        assert not torch.allclose(plain.model(ids).logits, ablated, atol=5e-2)
    assert "not empty" in run(
        "orthogonalize", "mx-tiny", tmp_path / "v.safetensors", tmp_path / "model", code=2
    )


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_steer_takes_every_method(method: str, tmp_path: Path) -> None:
    save = tmp_path / "v.safetensors"
    data = ["--data", "calm_angry", "--split", "heldout", "--layer", 3, "--method", method, "--save", save]
    run("steer", "mx-tiny", *data, "--prompt", "Anna went", "--max-tokens", 3)
    vector = SteeringVector.load(save)
    assert vector.method == method and vector.metadata["data_name"] == "calm_angry.jsonl"


def test_the_first_letters_of_an_id_are_enough_and_it_stays_on_a_line() -> None:
    store = VectorStore()
    one, other = store.put(VECTOR), store.put(VECTOR)
    result = CliRunner().invoke(main, ["vectors", "list"], env={"COLUMNS": "60"})
    assert one in result.output and other in result.output
    assert "by hand" in run("vectors", "show", one[:10])
    run("vectors", "delete", one[:10])
    assert one not in VectorStore() and other in VectorStore()
    assert "no steering vector" in run("vectors", "show", one[:10], code=1)


def test_letters_that_begin_several_ids_are_refused(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    for name in ("abcd1", "abcd2"):
        VECTOR.save(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 stored vectors begin with 'abcd'"):
        store.completed("abcd")
    assert store.completed("abcd1") == "abcd1" and store.completed("abc") == "abc"
