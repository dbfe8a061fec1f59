"""Vector files: every format gives back what it was given, and no file, however hostile, does worse than an error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mechanex import NotFoundError, SteeringVector, ValidationError

SUFFIXES = (".safetensors", ".json", ".gguf")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def vectors(draw: st.DrawFn) -> SteeringVector:
    width = draw(st.integers(1, 9))
    layers = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True))
    numbers = st.lists(finite, min_size=width, max_size=width)
    keys = st.text("abcxyz_.-é", min_size=1, max_size=8).filter(lambda key: key not in ("site", "seed"))
    return SteeringVector(
        {layer: torch.tensor(draw(numbers)) for layer in layers},
        model=draw(st.none() | any_text.filter(bool)),
        method=draw(st.sampled_from([None, "caa"])),
        seed=draw(st.none() | st.integers(0, 2**63)),
        metadata=draw(st.dictionaries(keys, any_text, max_size=3)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


def described(vector: SteeringVector) -> tuple[Any, ...]:
    return (
        vector.model,
        vector.model_family,
        vector.method,
        vector.seed,
        vector.site,
        vector.metadata,
        vector.library_version,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(vector=vectors())
@example(vector=SteeringVector({1: torch.zeros(1)}, metadata={"empty": ""}))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_format_gives_the_numbers_back_to_the_bit(
    folder: Path, suffix: str, vector: SteeringVector
) -> None:
    path = folder / f"round{suffix}"
    vector.save(path)
    found = SteeringVector.load(path)
    assert found == vector
    assert all(torch.equal(found[layer].signbit(), vector[layer].signbit()) for layer in vector)
    if suffix != ".json":
        assert described(found) == described(vector)


def test_safetensors_keeps_float64_and_layer_0(tmp_path: Path) -> None:
    a = SteeringVector({0: torch.tensor([1 / 3], dtype=torch.float64)})
    a.save(tmp_path / "a.safetensors")
    found = SteeringVector.load(tmp_path / "a.safetensors")
    assert found == a and found.dtype == torch.float64


def test_a_path_may_be_a_text_and_its_folder_is_made(tmp_path: Path) -> None:
    a = SteeringVector({3: torch.ones(2)})
    a.save(str(tmp_path / "new" / "folder" / "a.SAFETENSORS"))
    assert SteeringVector.load(str(tmp_path / "new" / "folder" / "a.SAFETENSORS")) == a


# Others' files


def test_gguf_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    SteeringVector({4: torch.tensor([1.0, 2.0]), 9: torch.tensor([3.0, 4.0])}, model="llama").save(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: (tensor.tensor_type.name, tensor.data.tolist()) for tensor in reader.tensors}
    assert found == {"direction.3": ("F32", [1.0, 2.0]), "direction.8": ("F32", [3.0, 4.0])}


def write_gguf(
    path: Path, tensors: dict[str, np.ndarray[Any, Any]], architecture: str = "controlvector"
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_other_tools_without_our_fields_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.7": np.array([1, 2], np.float16)})
    found = SteeringVector.load(path)
    assert found == SteeringVector({8: torch.tensor([1.0, 2.0])}) and found.model is None


def test_layer_0_has_no_name_in_gguf_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"layer 0.*\.safetensors"):
        SteeringVector({0: torch.ones(2), 3: torch.ones(2)}).save(tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_layer_1_in_gguf_warns_that_llama_cpp_refuses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SteeringVector({1: torch.ones(2)}).save(tmp_path / "v.gguf")
    assert "llama.cpp" in caplog.text


def test_numbers_too_large_for_gguf_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="float32"):
        SteeringVector({2: torch.tensor([1e300], dtype=torch.float64)}).save(tmp_path / "v.gguf")


def test_plain_json_and_plain_safetensors_of_others_are_read(tmp_path: Path) -> None:
    expected = SteeringVector({3: torch.tensor([1.0, -2.5]), 12: torch.tensor([0.0, 4.0])})
    (tmp_path / "v.json").write_text('{"12": [0, 4], "3": [1, -2.5]}')
    assert SteeringVector.load(tmp_path / "v.json") == expected
    save_file({str(layer): tensor.half() for layer, tensor in expected.items()}, tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors") == expected


# Bad files


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}


def gguf_file(n_tensors: int, n_fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + rest


two = struct.pack("<2f", 1, 2)
HOSTILE: dict[str, bytes] = {
    "empty.safetensors": b"",
    "short.safetensors": b"\x01\x02",
    "huge header.safetensors": struct.pack("<Q", 2**63) + b"{}",
    "header past the end.safetensors": struct.pack("<Q", 500) + b"{}",
    "not JSON.safetensors": struct.pack("<Q", 4) + b"}}}}",
    "deep header.safetensors": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "no layers.safetensors": safetensors_file({}),
    "pickle.safetensors": pickle.dumps({"0": [1.0]}),
    "data missing.safetensors": safetensors_file({"layer.1": tensor_entry()}),
    "offsets overlap.safetensors": safetensors_file({"1": tensor_entry(), "2": tensor_entry()}, two),
    "wrong key.safetensors": safetensors_file({"model.embed": tensor_entry()}, two),
    "negative layer.safetensors": safetensors_file({"layer.-1": tensor_entry()}, two),
    "huge layer.safetensors": safetensors_file({"layer.99999999999999": tensor_entry()}, two),
    "same layer twice.safetensors": safetensors_file(
        {"1": tensor_entry(), "layer.1": tensor_entry() | {"data_offsets": [8, 16]}}, two * 2
    ),
    "integers.safetensors": safetensors_file({"layer.1": tensor_entry("I32")}, two),
    "a matrix.safetensors": safetensors_file({"layer.1": tensor_entry(shape=(2, 1))}, two),
    "no width.safetensors": safetensors_file({"layer.1": tensor_entry(shape=(0,), end=0)}),
    "NaN.safetensors": safetensors_file({"layer.1": tensor_entry()}, struct.pack("<2f", math.nan, 1)),
    "widths.safetensors": safetensors_file(
        {"1": tensor_entry(), "2": tensor_entry(shape=(1,)) | {"data_offsets": [8, 12]}}, two + two[:4]
    ),
    "later version.safetensors": safetensors_file(
        {"1": tensor_entry(), "__metadata__": {"format_version": "3"}}, two
    ),
    "no checksum.safetensors": safetensors_file(
        {"layer.1": tensor_entry(), "__metadata__": {"format_version": "2", "width": "2", "layers": "1"}}, two
    ),
    "other width.safetensors": safetensors_file(
        {"layer.1": tensor_entry(), "__metadata__": {"format_version": "1", "width": "3"}}, two
    ),
    "other layers.safetensors": safetensors_file(
        {"layer.1": tensor_entry(), "__metadata__": {"format_version": "1", "layers": "1,2"}}, two
    ),
    "names of two kinds.safetensors": safetensors_file(
        {"layer_1": tensor_entry(), "layer.2": tensor_entry() | {"data_offsets": [8, 16]}}, two * 2
    ),
    "other site.safetensors": safetensors_file({"1": tensor_entry(), "__metadata__": {"site": "mlp"}}, two),
    "empty.json": b"",
    "no layers.json": b"{}",
    "deep.json": b"[" * 10**7,
    "not UTF-8.json": b"\xff\xfe{}",
    "a list.json": b"[1, 2]",
    "a number.json": b"7",
    "truncated.json": b'{"1": [1.0, 2.',
    "negative layer.json": b'{"-1": [1]}',
    "padded layer.json": b'{" 1": [1]}',
    "layer twice.json": b'{"1": [1], "1": [2]}',
    "a name.json": b'{"model_type": "llama"}',
    "nested.json": b'{"1": [[1, 2]]}',
    "text.json": b'{"1": ["1"]}',
    "booleans.json": b'{"1": [true]}',
    "null.json": b'{"1": null}',
    "no width.json": b'{"1": []}',
    "widths.json": b'{"1": [1], "2": [1, 2]}',
    "NaN.json": b'{"1": [NaN]}',
    "infinite.json": b'{"1": [1e999]}',
    "past float32.json": b'{"1": [1e300]}',
    "long number.json": b'{"1": [1' + b"0" * 10**5 + b"]}",
    "empty.gguf": b"",
    "magic only.gguf": b"GGUF",
    "other magic.gguf": b"GGML" + bytes(64),
    "version.gguf": b"GGUF" + struct.pack("<IQQ", 77, 0, 0),
    "no layers.gguf": gguf_file(0, 0, bytes(64)),
    "2**60 fields.gguf": gguf_file(0, 2**60),
    "2**60 tensors.gguf": gguf_file(2**60, 0),
    "2**60 tensors and zeros.gguf": gguf_file(2**60, 0, bytes(10**5)),
    "2**60 numbers.gguf": gguf_file(0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**60) + bytes(100)),
    "many numbers.gguf": gguf_file(0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 10**5) + bytes(10**5)),
    "long text.gguf": gguf_file(0, 1, struct.pack("<Q1sIQ", 1, b"a", 8, 2**62) + b"abc"),
    "nested arrays.gguf": gguf_file(0, 1, struct.pack("<Q1s", 1, b"a") + struct.pack("<IQ", 9, 1) * 10**4),
    "unknown type.gguf": gguf_file(0, 1, struct.pack("<Q1sI", 1, b"a", 99) + bytes(64)),
    "tensor past the end.gguf": gguf_file(
        1, 0, struct.pack("<Q11sIQIQ", 11, b"direction.1", 1, 2**40, 0, 0) + bytes(64)
    ),
    "tensor of many sizes.gguf": gguf_file(
        1, 0, struct.pack("<Q11sI", 11, b"direction.1", 2**31) + bytes(64)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_hostile_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValidationError) as caught:
        SteeringVector.load(path)
    assert name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("tensors", "architecture", "says"),
    [
        ({"direction.1": np.ones(2, np.float32)}, "llama", "controlvector"),
        ({"token_embd.weight": np.ones(2, np.float32)}, "controlvector", "token_embd"),
        ({"direction.-1": np.ones(2, np.float32)}, "controlvector", "direction.-1"),
        ({"direction.1": np.ones(2, np.int32)}, "controlvector", "I32"),
        ({"direction.1": np.ones((2, 2), np.float32)}, "controlvector", "shape"),
        ({"direction.1": np.array([np.nan], np.float32)}, "controlvector", "NaN"),
        (
            {"direction.1": np.ones(2, np.float32), "direction.2": np.ones(3, np.float32)},
            "controlvector",
            "widths",
        ),
    ],
)
def test_gguf_files_that_are_no_control_vectors_say_why(
    tmp_path: Path, tensors: dict[str, Any], architecture: str, says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        SteeringVector.load(write_gguf(tmp_path / "v.gguf", tensors, architecture))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_an_error_not_another_vector(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    whole = SteeringVector({3: torch.arange(1.0, 9.0), 5: -torch.arange(1.0, 9.0)}, model="m")
    whole.save(path)
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with contextlib.suppress(ValidationError):
            assert SteeringVector.load(path) == whole  # padding at the end may go


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_changed_byte_never_does_worse_than_an_error(
    folder: Path, suffix: str, position: int, byte: int
) -> None:
    path = folder / f"changed{suffix}"
    SteeringVector({3: torch.arange(1.0, 9.0)}, model="m", seed=1).save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        found = SteeringVector.load(path)
    except ValidationError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_unpickled(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValidationError):
        SteeringVector.load(path)
    torch.save({"layer.1": _Bomb()}, path)
    with pytest.raises(ValidationError):
        SteeringVector.load(path)
    assert not (tmp_path / "exploded").exists()


# Paths


def test_unknown_suffixes_list_the_known_ones(tmp_path: Path) -> None:
    for name in ("v.pt", "v", "v.npz"):
        for act in (SteeringVector({1: torch.ones(2)}).save, SteeringVector.load):
            with pytest.raises(ValidationError, match=r"\.safetensors, \.json, \.gguf"):
                act(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.json"):
        SteeringVector.load(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValidationError, match="regular file"):
        SteeringVector.load(tmp_path / "folder.json")


def test_a_model_sized_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValidationError, match="bytes"):
        SteeringVector.load(path)


def test_a_failed_save_leaves_the_earlier_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.safetensors"
    first = SteeringVector({1: torch.ones(2)})
    first.save(path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        SteeringVector({1: torch.zeros(2)}).save(path)
    assert [child.name for child in tmp_path.iterdir()] == ["v.safetensors"]
    assert SteeringVector.load(path) == first
