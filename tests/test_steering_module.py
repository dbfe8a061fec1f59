"""``mechanex.steering``: vectors from examples and from JSONL, stored, saved, loaded, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import N_LAYERS, build, tiny_tokenizer
from torch import Tensor

from mechanex import Mechanex, MechanexError, NotFoundError, SteeringVector, ValidationError
from mechanex.engine.datasets import read_pairs

PROMPTS = ["The old man said", "She looked at the river and"]
POSITIVE = [" good", " was happy that you came"]
NEGATIVE = [" nothing at all", " was angry"]
EXAMPLES = (PROMPTS, POSITIVE, NEGATIVE)


@pytest.fixture
def client() -> Mechanex:
    return Mechanex().set_local_model(build("llama"), tiny_tokenizer())


def stored(home: Path) -> list[Path]:
    return sorted((home / "vectors").glob("*")) if (home / "vectors").exists() else []


def mean_of_answer(prompt: str, answer: str, layer: int) -> Tensor:
    tokenizer = tiny_tokenizer()
    n_prompt = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden: Tensor = build("llama")(ids, output_hidden_states=True).hidden_states[layer]
    return hidden[0, n_prompt:].mean(0)


def test_caa_is_the_mean_difference_of_answer_tokens_entering_the_layer(client: Mechanex) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, layer_idxs=[1, -1], method="caa")
    found = client.steering.get_vectors(vector_id)
    assert sorted(found) == [1, N_LAYERS - 1]
    for layer, vector in found.items():
        differences = [
            mean_of_answer(p, a, layer) - mean_of_answer(p, b, layer)
            for p, a, b in zip(*EXAMPLES, strict=True)
        ]
        torch.testing.assert_close(vector, torch.stack(differences).mean(0), rtol=1e-4, atol=1e-5)


def test_whoever_sits_at_a_terminal_is_told_where_the_vector_is(
    client: Mechanex, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mechanex_home: Path
) -> None:
    client.steering.generate_vectors(*EXAMPLES, method="caa")
    assert "stored" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    vector_id = client.steering.generate_vectors(*EXAMPLES, method="caa")
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        vector_id in line
        and str(next(path for path in stored(mechanex_home) if path.stem == vector_id)) in line
    )


def test_without_layers_it_is_the_one_at_two_thirds(client: Mechanex) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, method="caa")
    assert list(client.steering.get_vectors(vector_id)) == [int(2 * N_LAYERS / 3)]


def test_another_process_finds_the_vectors_by_id(client: Mechanex) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, [2], "caa")
    code = f"import mechanex; print(mechanex.steering.get_vectors({vector_id!r})[2].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == client.steering.get_vectors(vector_id)[2].tolist()


def test_stored_vectors_say_where_they_come_from(client: Mechanex, mechanex_home: Path) -> None:
    client.steering.generate_vectors(*EXAMPLES, method="caa")
    (path,) = stored(mechanex_home)
    vector = SteeringVector.load(path)
    assert vector.method == "caa" and vector.model == client.model_name and vector.library_version


def test_an_unwritable_home_keeps_the_vectors_for_the_session(
    client: Mechanex, mechanex_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mechanex_home.write_text("")
    assert client.steering.get_vectors(client.steering.generate_vectors(*EXAMPLES, method="caa"))
    assert "this session only" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "no-such"}, "'few-shot', 'caa', 'pca', 'probe'; got 'no-such'"),
        ({"method": "caa", "seed": 1}, "seed is for method='few-shot'"),
        ({"method": "caa", "prompts": PROMPTS[:1]}, "1, 2 and 2"),
        ({"method": "caa", "positive_answers": []}, "2, 0 and 2"),
        ({"method": "caa", "negative_answers": [*NEGATIVE, "x"]}, "2, 2 and 3"),
        ({"method": "caa", "prompts": [], "positive_answers": [], "negative_answers": []}, "empty"),
        ({"method": "caa", "negative_answers": [" x", ""]}, "no tokens"),
        ({"method": "caa", "layer_idxs": [N_LAYERS + 1]}, f"Layer {N_LAYERS + 1} "),
        ({"method": "caa", "layer_idxs": [-N_LAYERS - 1]}, "Layer"),
        ({"method": "caa", "layer_idxs": []}, "no layers"),
        ({"method": "caa", "negative_answers": POSITIVE}, "zero"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_stored(
    client: Mechanex, mechanex_home: Path, arguments: dict[str, Any], says: str
) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "positive_answers": POSITIVE, "negative_answers": NEGATIVE}
    with pytest.raises(ValidationError, match=says):
        client.steering.generate_vectors(**(given | arguments))
    assert stored(mechanex_home) == []


# JSONL


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_jsonl_file_gives_what_its_lists_give(client: Mechanex, tmp_path: Path) -> None:
    rows = list(zip(*EXAMPLES, strict=True))
    long_names = [{"prompt": p, "positive_answer": a, "negative_answer": b} for p, a, b in rows]
    short_names = [{"prompt": p, "positive": a, "negative": b, "note": "ignored"} for p, a, b in rows]
    expected = client.steering.get_vectors(client.steering.generate_vectors(*EXAMPLES, method="caa"))
    for lines in (long_names, short_names, [long_names[0], "", short_names[1], "  "]):
        path = write(tmp_path / "data.jsonl", *lines)
        found = client.steering.get_vectors(client.steering.generate_from_jsonl(str(path), method="caa"))
        assert found.keys() == expected.keys()
        for layer, vector in found.items():
            torch.testing.assert_close(vector, expected[layer])


def test_a_split_chooses_lines(tmp_path: Path) -> None:
    lines = [{"prompt": s, "positive": "a", "negative": "b", "split": s} for s in ("train", "heldout")]
    path = write(tmp_path / "data.jsonl", *lines)
    assert read_pairs(path, split="train").prompts == ["train"] and len(read_pairs(path)) == 2
    with pytest.raises(ValidationError, match=r"'test'.*heldout, train"):
        read_pairs(path, split="test")


def test_other_editors_files_are_read(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "é\u2028x", "positive": "a", "negative": "b"}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n" + line.encode())
    assert read_pairs(tmp_path / "data.jsonl").prompts == ["é\u2028x"] * 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ("7", "int"),
        ("null", "NoneType"),
        ("[" * 100_000, "nested too deeply"),
        ({"positive": "a", "negative": "b"}, "no 'prompt'"),
        ({"prompt": 7, "positive": "a", "negative": "b"}, "'prompt' is a int"),
        ({"prompt": "p", "negative": "b"}, "no 'positive_answer' or 'positive'"),
        ({"prompt": "p", "positive": "a"}, "no 'negative_answer' or 'negative'"),
        ({"prompt": "p", "positive": "", "negative": "b"}, "'positive' is \"\""),
        ({"prompt": "p", "positive": ["a"], "negative": "b"}, "'positive' is"),
        ({"prompt": "p", "positive": "a", "positive_answer": "a", "negative": "b"}, "both"),
    ],
)
def test_a_bad_line_is_named_by_number_and_fault(
    client: Mechanex, tmp_path: Path, mechanex_home: Path, line: Any, says: str
) -> None:
    good = {"prompt": "p", "positive": "a", "negative": "b"}
    path = write(tmp_path / "data.jsonl", good, "", line, good)
    with pytest.raises(ValidationError, match=f"data.jsonl.*line 3: .*{says}"):
        client.steering.generate_from_jsonl(str(path), method="caa")
    assert stored(mechanex_home) == []


def test_of_many_bad_lines_the_first_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *["{"] * 9)
    with pytest.raises(ValidationError, match=r"line 1: .*line 5: .*and 4 more"):
        read_pairs(path)


def test_files_that_are_no_dataset(client: Mechanex, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.jsonl"):
        client.steering.generate_from_jsonl(str(tmp_path / "none.jsonl"), method="caa")
    with pytest.raises(ValidationError, match="no examples"):
        client.steering.generate_from_jsonl(str(write(tmp_path / "empty.jsonl", "")), method="caa")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValidationError, match=r"line 1: it is not UTF-8"):
        read_pairs(tmp_path / "latin.jsonl")
    with pytest.raises(ValidationError, match="'nothing'"):
        client.steering.generate_from_jsonl(str(tmp_path / "none.jsonl"), method="nothing")


# Files and ids


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".gguf"])
def test_vectors_saved_by_id_dict_or_object_load_the_same(
    client: Mechanex, tmp_path: Path, suffix: str
) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, [2, 3], "caa")
    vectors = client.steering.get_vectors(vector_id)
    for source in (vector_id, vectors, SteeringVector(vectors)):
        path = str(tmp_path / f"v{suffix}")
        client.steering.save_vectors(source, path)
        loaded = client.steering.load_vectors(path)
        assert type(loaded) is dict and loaded.keys() == vectors.keys()
        assert all(torch.equal(loaded[layer], vectors[layer]) for layer in vectors)
        os.remove(path)


def test_what_cannot_be_saved_or_found_is_an_error(client: Mechanex, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no-such"):
        client.steering.get_vectors("no-such")
    with pytest.raises(NotFoundError, match="no-such"):
        client.steering.save_vectors("no-such", str(tmp_path / "v.json"))
    with pytest.raises(ValidationError, match="NaN"):
        client.steering.save_vectors({1: torch.tensor([float("nan")])}, str(tmp_path / "v.json"))
    with pytest.raises(ValidationError, match="from 0 up"):
        client.steering.save_vectors({-1: torch.ones(2)}, str(tmp_path / "v.json"))
    with pytest.raises(ValidationError, match=r"\.pt"):
        client.steering.save_vectors({1: torch.ones(2)}, str(tmp_path / "v.pt"))
    assert list(tmp_path.iterdir()) == []


def test_deleted_vectors_are_gone_for_good(client: Mechanex) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, method="caa")
    client.steering.delete_vectors(vector_id)
    for one in (client, Mechanex()):
        with pytest.raises(NotFoundError, match=vector_id):
            one.steering.get_vectors(vector_id)
        with pytest.raises(NotFoundError, match=vector_id):
            one.steering.delete_vectors(vector_id)


def test_vectors_whose_file_cant_be_deleted_stay(client: Mechanex, mechanex_home: Path) -> None:
    (mechanex_home / "vectors" / "stuck.safetensors").mkdir(parents=True)  # what unlink refuses, for root too
    with pytest.raises(MechanexError, match=r"stuck\.safetensors can't be deleted"):
        client.steering.delete_vectors("stuck")
    assert client.has_vector("stuck")


def test_files_and_ids_need_no_model_but_computing_does(tmp_path: Path) -> None:
    client = Mechanex()
    client.steering.save_vectors({1: torch.ones(2)}, str(tmp_path / "v.json"))
    assert client.steering.load_vectors(str(tmp_path / "v.json"))[1].tolist() == [1, 1]
    with pytest.raises(MechanexError, match="needs a model"):
        client.steering.generate_vectors(*EXAMPLES, method="caa")


def test_a_computed_vector_steers_and_its_opposite_does_otherwise(client: Mechanex) -> None:
    vector_id = client.steering.generate_vectors(*EXAMPLES, method="caa")
    texts = [
        client.generation.generate(PROMPTS[0], 15, "greedy", steering_strength=s, steering_vector=vector_id)
        for s in (-4, 4)
    ]
    assert len({*texts, client.generation.generate(PROMPTS[0], 15, "greedy")}) == 3
