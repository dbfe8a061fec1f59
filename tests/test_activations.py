"""Activations of texts: as the model has them alone, in memory and in files; projections on a vector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, build

from mechanex import Mechanex, MechanexError, NotFoundError, SteeringVector, ValidationError
from mechanex.engine import activation_files
from mechanex.engine.activation_files import StoredRows
from mechanex.engine.activations import Activations
from mechanex.engine.activations import activations as module_activations
from mechanex.engine.logit_lens import logit_lens
from mechanex.engine.models import adapter_for

TEXTS = ["Clara walked into the bakery.", "The", "Anna went to the market on Friday.", "Clara walked home."]


@pytest.fixture(scope="module")
def client() -> Iterator[Mechanex]:
    made = Mechanex()
    made.load("mx-tiny", backend="transformers")
    made.set_execution_mode("local")
    yield made


def streams(client: Mechanex, text: Any) -> list[numpy.ndarray[Any, Any]]:
    """The stream entering each layer, of a text that runs alone."""
    from mechanex.engine.text import encode_prompt

    ids = torch.tensor([encode_prompt(client.tokenizer, text)])
    model: Any = client.local_model
    with torch.no_grad():
        return [x[0].numpy() for x in model(ids, output_hidden_states=True).hidden_states]


def close(a: Any, b: Any) -> bool:
    return numpy.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_every_token_is_what_it_is_alone(client: Mechanex) -> None:
    texts = [*TEXTS, [5], [7, 8, 9]]
    found = client.model.activations(texts, layers=[0, 3], tokens="all")
    for i, text in enumerate(texts):
        alone = streams(client, text)
        assert found.lengths[i] == len(alone[0])
        assert all(close(found.by_text(layer)[i], alone[layer]) for layer in (0, 3))


def test_the_last_token_is_the_usual_one_and_all_layers_are(client: Mechanex) -> None:
    found = client.model.activations(TEXTS)
    n = len(found) - 1
    assert list(found) == list(range(n + 1)) and found[3].shape == (len(TEXTS), 128)
    assert close(found[3], [streams(client, text)[3][-1] for text in TEXTS])
    assert found[3].dtype == numpy.float32


@pytest.mark.parametrize("tokens", [0, -2, slice(1, 3), slice(-2, None)])
def test_places_and_slices_count_in_each_text(client: Mechanex, tokens: Any) -> None:
    texts = [TEXTS[0], TEXTS[2]]
    found = client.model.activations(texts, layers=[-1], tokens=tokens)
    (layer,) = found
    alone = [numpy.atleast_2d(streams(client, text)[layer][tokens]) for text in texts]
    assert close(found[layer], numpy.concatenate(alone))


def test_files_hold_what_memory_would(client: Mechanex, tmp_path: Path) -> None:
    written = client.model.activations(TEXTS, layers=[2, 4], tokens="all", out=tmp_path / "acts")
    assert isinstance(written[2][:], numpy.memmap)
    opened = Activations.load(tmp_path / "acts")
    assert list(opened) == [2, 4] and opened.lengths == written.lengths
    assert numpy.array_equal(opened[4], client.model.activations(TEXTS, layers=[4], tokens="all")[4])
    client.model.activations(TEXTS[:1], layers=[4], out=tmp_path / "acts")
    again = Activations.load(tmp_path / "acts")  # nothing of the texts before is beside them
    assert list(again) == [4] and again.lengths == [1]
    with pytest.raises(NotFoundError, match="holds no activations"):
        Activations.load(tmp_path)


def test_rows_in_several_files_are_read_as_one_array(tmp_path: Path) -> None:
    whole = numpy.arange(30, dtype=numpy.float32).reshape(10, 3)
    rows = StoredRows([whole[:4], whole[4:5], whole[5:]])
    assert rows.shape == (10, 3) and len(rows) == 10 and rows.dtype == numpy.float32
    keys: list[Any] = [0, -1, 4, slice(None), slice(2, 7), slice(-3, None), slice(8, 1, -2), slice(7, 3)]
    keys += [
        [3, 9, -10],
        numpy.arange(10) % 2 == 0,
        (slice(1, 6), 2),
        (5, 1),
        numpy.array([[1, 2], [8, 9]]),
        [],
        ...,
        (..., 1),
        None,
        ([0, 1], [2, 0]),
        ([[0, 1], [1, 0]], 1),
        (3, slice(1, None)),
    ]
    for key in keys:
        assert numpy.array_equal(rows[key], whole[key]), key
    assert numpy.array_equal(list(rows), whole) and numpy.array_equal(numpy.asarray(rows), whole)
    with pytest.raises(ValueError, match="is a copy"):
        rows.__array__(copy=False)
    assert numpy.array_equal(2 * rows - 1, 2 * whole - 1) and numpy.mean(rows) == whole.mean()
    for wrong in (10, -11, 1.5, numpy.ones(4, bool)):
        with pytest.raises(IndexError):
            rows[wrong]
    with pytest.raises(TypeError, match="read only"):
        rows += 1


def test_a_call_that_was_stopped_goes_on_after_what_is_there(
    client: Mechanex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_files, "SHARD_TOKENS", 4)
    texts = TEXTS * 3
    wanted = client.model.activations(texts, layers=[2, 4])
    client.model.activations(texts, layers=[2, 4], out=tmp_path)
    shards = sorted(tmp_path.glob("activations-*"))
    kept = {path: path.stat().st_mtime_ns for path in shards}
    assert len(shards) > 4
    for path in shards[2:4]:
        path.unlink()
    (tmp_path / ".activations-00003-of-00009.safetensors.ab12.tmp").touch()
    with pytest.raises(ValidationError, match=r"unfinished: 2 of \d+ shards are missing.*again"):
        Activations.load(tmp_path)
    found = client.model.activations(texts, layers=[2, 4], out=tmp_path)
    changed = [path for path in shards if path.stat().st_mtime_ns != kept[path]]
    assert changed == shards[2:4] and not list(tmp_path.glob("*.tmp"))
    assert close(found[4], wanted[4]) and found.lengths == wanted.lengths
    assert [len(rows) for rows in found.by_text(2)] == [1] * 12
    vector = SteeringVector({1: torch.ones(128)})
    shards[0].unlink()
    with vector.apply(client.local_model):  # type: ignore[arg-type]
        steered = client.model.activations(texts, layers=[2, 4], out=tmp_path)  # nothing without it is left
    assert not close(steered[4], wanted[4]) and all(path.stat().st_mtime_ns > kept[path] for path in shards)


def test_steering_that_the_probe_would_not_see_begins_the_work_anew(
    client: Mechanex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps norms, or edits no token of the text that is looked at: shards of both kinds must not lie together."""
    monkeypatch.setattr(activation_files, "SHARD_TOKENS", 4)
    vector = SteeringVector({1: torch.ones(128)})
    wanted = client.model.activations(TEXTS, layers=[2], out=tmp_path)
    for steering, options in (
        (vector.keeping_norm(), {"strength": 20}),
        (vector, {"tokens": slice(10_000, None)}),
    ):
        sorted(tmp_path.glob("activations-*"))[-1].unlink()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("activations-*")}
        with steering.apply(client.local_model, **options):  # type: ignore[arg-type]
            found = client.model.activations(TEXTS, layers=[2], out=tmp_path)
        assert before and all(path.stat().st_mtime_ns > then for path, then in before.items())
        if "strength" in options:
            assert not close(found[2][:1], wanted[2][:1])
        wanted = client.model.activations(TEXTS, layers=[2])


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff" * 8,
        b"[]",
        b"{}",
        b'{"layer_2": [1]}',
        b'{"layer_2": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}}',
    ],
)
def test_damaged_shards_are_named(client: Mechanex, tmp_path: Path, damage: bytes) -> None:
    client.model.activations(TEXTS, layers=[2], out=tmp_path)
    (path,) = tmp_path.glob("activations-*")
    length = b"" if damage.startswith(b"\xff") else len(damage).to_bytes(8, "little")
    path.write_bytes(length + damage + bytes(16))
    with pytest.raises(MechanexError, match=r"activations-00001-of-00001\.safetensors can't be read"):
        Activations.load(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"bounds": []}, {"lengths": ["a"]}, {"lengths": []}, {"layers": []}, {"width": "3"}]
)
def test_a_damaged_index_is_named(client: Mechanex, tmp_path: Path, wrong: dict[str, Any]) -> None:
    client.model.activations(TEXTS, layers=[2], out=tmp_path)
    index = tmp_path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | wrong))
    with pytest.raises(ValidationError, match=r"index\.json is no index"):
        Activations.load(tmp_path)


def test_files_of_others_are_left_alone(client: Mechanex, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"name": "site"}')
    with pytest.raises(ValidationError, match="another program's"):
        client.model.activations(TEXTS, layers=[2], out=tmp_path)
    assert (tmp_path / "index.json").read_text() == '{"name": "site"}'
    (tmp_path / "index.json").unlink()
    (tmp_path / "activations-notes.safetensors").touch()
    client.model.activations(TEXTS, layers=[2], out=tmp_path)
    assert (tmp_path / "activations-notes.safetensors").exists()


def test_steering_that_is_applied_is_seen(client: Mechanex) -> None:
    vector = SteeringVector({3: torch.ones(128)})
    plain = client.model.activations(TEXTS, layers=[3])
    with vector.apply(client.local_model):  # type: ignore[arg-type]
        steered = client.model.activations(TEXTS, layers=[3])
    assert close(steered[3], plain[3] + 1)


def test_projections_are_in_the_units_of_the_stream(client: Mechanex) -> None:
    vector = SteeringVector({3: 5 * torch.eye(128)[7], 5: torch.ones(128)})
    found = client.model.activations(TEXTS, layers=[3, 4], tokens="all")
    projected = vector.project(found)
    assert list(projected) == [3] and close(projected[3], found[3][:, 7])
    with pytest.raises(ValidationError, match="no layer in common"):
        vector.project({4: found[4]})


def test_projections_take_other_shapes_and_keep_double_precision() -> None:
    vector = SteeringVector({3: 5 * torch.eye(4)[2]})
    rows = torch.randn(2, 3, 4, dtype=torch.float64)
    for given in (rows, rows.numpy()):
        found = vector.project({3: given})[3]
        assert found.dtype == numpy.float64 and numpy.array_equal(found, rows[..., 2].numpy())
    assert vector.project({3: rows[0, 0]})[3].tolist() == [float(rows[0, 0, 2])]
    assert vector.project({3: [[1, 2, 3, 4], [5, 6, 7, 8]]})[3].tolist() == [3, 7]
    assert vector.project({3: rows.bfloat16()})[3].dtype == numpy.float32


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({3: [[1.0, 2.0, 3.0, 4.0], [1.0]]}, "no numbers"),
        ({3: [["a", "b", "c", "d"]]}, "no numbers"),
        ({3: 1.0}, "no numbers"),
        ({3: numpy.zeros((2, 5))}, "4 wide"),
        (numpy.zeros((2, 4)), r"name the layer, as in project\(\{3"),
    ],
)
def test_what_has_no_projection_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SteeringVector({3: torch.ones(4)}).project(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"texts": []}, "at least one"),
        ({"texts": "a text"}, "list of texts"),
        ({"texts": TEXTS, "tokens": "first"}, "'last', 'all'"),
        ({"texts": TEXTS, "tokens": 5}, "text 1 has"),
        ({"texts": TEXTS, "tokens": -3}, "text 1 has"),
        ({"texts": TEXTS, "tokens": True}, "int, a slice"),
        ({"texts": TEXTS, "tokens": None}, "'last', 'all'"),
        ({"texts": TEXTS, "tokens": [0, 1]}, "int, a slice"),
        ({"texts": TEXTS, "tokens": slice(0.5)}, "made of ints"),
        ({"texts": TEXTS, "layers": [99]}, "99"),
        ({"texts": None}, "texts is a list of texts"),
        ({"texts": TEXTS, "layers": []}, "There are no layers"),
        ({"texts": TEXTS, "layers": 3}, "got 3: put it in a list"),
        ({"texts": TEXTS, "out": __file__}, "out is a folder"),
        ({"texts": TEXTS, "out": Path(__file__) / "a"}, "out is a folder"),
    ],
)
def test_what_has_no_activations_is_refused(client: Mechanex, given: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        client.model.activations(**given)


@pytest.mark.parametrize(("layers", "says"), [([], "There are no layers"), (3, "layers is a list of layers")])
def test_no_list_of_layers_is_refused_by_what_reads_activations(
    client: Mechanex, layers: Any, says: str
) -> None:
    for read in (
        lambda: client.model.logit_lens(TEXTS, layers),
        lambda: client.steering.difference(TEXTS[:1], TEXTS[1:], layers),
    ):
        with pytest.raises(ValidationError, match=says):
            read()


def test_texts_may_come_one_by_one(client: Mechanex) -> None:
    found = client.model.activations((text for text in TEXTS), layers=numpy.array([3]))  # type: ignore[arg-type]
    assert numpy.array_equal(found[3], client.model.activations(TEXTS, layers=[3])[3])
    made = client.steering.difference(iter(TEXTS[:2]), iter(TEXTS[2:]), [3])  # type: ignore[arg-type]
    assert torch.equal(made[3], client.steering.difference(TEXTS[:2], TEXTS[2:], [3])[3])
    with pytest.raises(ValidationError, match="negative is a list of prompts"):
        client.steering.difference(TEXTS, "a text")


def test_where_a_pack_puts_its_tokens_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import mechanex.engine.activations as module

    seen: list[Any] = []
    real = module._targets
    monkeypatch.setattr(module, "_targets", lambda pack, rows: seen.append(pack) or real(pack, rows))
    module.activations(build("llama"), [[5, 6, 7], [8, 9]])
    assert len(seen) == len(set(map(id, seen)))


def test_a_text_past_the_context_is_read_on_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"](max_position_embeddings=16)
    text = list(range(5, 25))
    found = module_activations(model, [text], [2], tokens="all")
    module_activations(model, [text], [2])
    told = [one.getMessage() for one in caplog.records if "past the context" in one.getMessage()]
    assert len(told) == 1 and "20 tokens" in told[0] and "16" in told[0]
    with torch.no_grad():
        alone = model(torch.tensor([text]), output_hidden_states=True).hidden_states[2][0]
    assert close(found[2], alone)
    with pytest.raises(ValidationError, match="has 16 positions"):
        module_activations(FAMILIES["gpt2"](n_positions=16), [text])


def test_the_logit_lens_ends_in_what_the_model_says(client: Mechanex) -> None:
    found = client.model.logit_lens(TEXTS[:2], top=3)
    ids = client.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    model: Any = client.local_model
    with torch.no_grad():
        logits = model(ids).logits[0, -1].log_softmax(-1)
    last = found[max(found)]
    assert last[0][0][0] == client.tokenizer.decode([int(logits.argmax())])
    assert abs(last[0][0][1] - float(logits.max().exp())) < 1e-4
    assert all(len(layer) == 2 and len(layer[0]) == 3 for layer in found.values())
    assert list(found) == list(range(len(found)))


def test_the_logit_lens_needs_a_tokenizer(client: Mechanex, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_for(client.local_model)
    monkeypatch.setattr(adapter, "tokenizer", None)
    with pytest.raises(ValidationError, match="pass tokenizer="):
        logit_lens(adapter, [[5, 6]])
