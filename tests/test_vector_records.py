"""Vectors first: computed without being stored, with a record of where they come from; names and short texts."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import mechanex
from mechanex import Mechanex, SteeringVector, ValidationError
from mechanex.home import vectors_folder

LISTS = (
    ["Clara walked into the bakery.", "Anna went to the market."],
    [" She smiled softly.", " She spoke calmly."],
    [" She shouted furiously.", " She slammed the door."],
)


@pytest.fixture(scope="module")
def client() -> Iterator[Mechanex]:
    made = Mechanex()
    made.load("mx-tiny", backend="transformers")
    made.set_execution_mode("local")
    yield made


def test_a_vector_is_computed_without_being_stored(client: Mechanex) -> None:
    before = set(vectors_folder().glob("*"))
    vector = client.steering.vector(*LISTS, [3, 4], "caa")
    assert set(vectors_folder().glob("*")) == before
    stored = client.steering.generate_vectors(*LISTS, [3, 4], "caa")
    assert client.steering.get(stored) == vector and vector.layers == (3, 4)


def test_a_vector_knows_its_examples_its_day_and_its_fit(client: Mechanex, tmp_path: Path) -> None:
    vector = client.steering.vector(*LISTS, [3], "caa")
    assert vector.method == "caa" and vector.model and vector.metadata["data_count"] == "2"
    expected = hashlib.sha256(json.dumps(LISTS, ensure_ascii=False).encode()).hexdigest()
    assert vector.metadata["data_sha256"] == expected
    assert abs(datetime.fromisoformat(vector.metadata["date"]) - datetime.now(timezone.utc)).days == 0
    assert 0 < json.loads(vector.metadata["fit"])["3"]["of_stream"] < 2
    vector.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").metadata == vector.metadata


def test_a_vector_of_a_file_names_it_and_its_split(client: Mechanex) -> None:
    data = mechanex.bundled.data_path("calm_angry")
    vector = client.steering.get(client.steering.generate_from_jsonl(data, [3], "pca", split="heldout"))
    assert vector.metadata["data_name"] == "calm_angry.jsonl"
    assert vector.metadata["data_split"] == "heldout"
    assert 0.5 <= json.loads(vector.metadata["fit"])["3"]["pairs_apart"] <= 1


def test_few_shot_says_how_its_optimization_went(client: Mechanex) -> None:
    vector = client.steering.vector(*LISTS, [3])
    told = json.loads(vector.metadata["fit"])["3"]
    assert told["loss"] < told["starting_loss"] and told["iters"] > 0 and vector.seed == 0


def test_caa_reads_the_last_token_where_asked(client: Mechanex) -> None:
    last = client.steering.vector(*LISTS, [3], "caa", tokens="last")
    texts = [[p + a for p, a in zip(LISTS[0], side, strict=True)] for side in LISTS[1:]]
    assert last.allclose(client.steering.difference(*texts, [3]), rtol=1e-4, atol=1e-5)
    assert last != client.steering.vector(*LISTS, [3], "caa")
    with pytest.raises(ValidationError, match="tokens is 'all', or 'last' with method='caa'"):
        client.steering.vector(*LISTS, [3], "pca", tokens="last")


def test_prompts_need_not_be_pairs(client: Mechanex) -> None:
    positive, negative = ["She smiled softly.", "Calm rain.", "A quiet lake."], ["He shouted furiously."]
    vector = client.steering.difference(positive, negative, [4])
    one = client.steering.difference(positive[:1], negative, [4])
    assert vector.layers == (4,) and vector.method == "difference" and vector != one
    with pytest.raises(ValidationError, match="do not differ"):
        client.steering.difference(positive[:1], positive[:1])
    with pytest.raises(ValidationError, match="There are no prompts: negative is"):
        client.steering.difference(positive, [])


def test_a_layer_that_a_vector_lacks_says_which_it_has() -> None:
    vector = SteeringVector({3: torch.ones(4), 5: torch.ones(4)})
    with pytest.raises(KeyError, match=r"^the vector has no layer -1: it has 3, 5"):
        vector[-1]
    with pytest.raises(ValidationError):
        vector[4]
    assert vector.get(4) is None and 4 not in vector


@pytest.mark.parametrize("module", ["generation", "steering", "sae", "attribution", "model", "raag"])
def test_tab_lists_public_names_that_work(module: str) -> None:
    found = importlib.import_module(f"mechanex.{module}")
    names = dir(found)
    assert not [name for name in names if name.startswith("_") or name in ("annotations", "Any", "os")]
    assert all(getattr(found, name) is not None for name in names) and len(names) >= 2


def test_texts_of_objects_are_short(client: Mechanex) -> None:
    vector = SteeringVector({n: torch.ones(4096) for n in range(32)}, method="caa")
    handle = SteeringVector({3: torch.ones(128)}).apply(client.local_model)  # type: ignore[arg-type]
    shown = [repr(one) for one in (client, vector, handle, client._loaded)]
    handle.remove()
    assert all(len(text) < 200 and "\n" not in text and " object at " not in text for text in shown)
    assert "mx-tiny" in shown[0] and "32 layers" in shown[1] and repr(handle) == "Handles(removed)"


def test_notebooks_show_the_norms_as_bars() -> None:
    html = SteeringVector({3: torch.ones(4), 4: 2 * torch.ones(4)}, model="<b>")._repr_html_()
    assert html.count("<rect") == 2 and "layer 4: 4" in html and "<b>" not in html
