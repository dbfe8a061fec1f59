"""Vectors that users and other tools have, in the forms they have them in, and files that are not what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import BOS, D_MODEL, FAMILIES, N_LAYERS, build, tiny_tokenizer
from safetensors.torch import load_file, save_file

import mechanex
from mechanex import SteeringVector, ValidationError
from mechanex.cli import main
from mechanex.engine.beam import most_likely_completions
from mechanex.engine.caa import caa_vectors
from mechanex.engine.generate import generate
from mechanex.engine.hooks import Intervention, SteeringPlan, positions
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.sae.train_step import TrainingSettings
from mechanex.engine.score import completion_logprobs
from mechanex.engine.vector_store import VectorStore
from mechanex.utils.beam_search import sample_most_likely_completions_hf
from mechanex.utils.completions import get_completion_logprob_hf
from mechanex.utils.hooks import hf_hooks_contextmanager, make_steering_hook_hf
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    make_abl_mat,
    optimize_vector,
    optimize_vector_minibatch_hf,
)

IDS = torch.tensor([[BOS, 9, 30, 71, 12, 8, 45]])


def numbers(width: int = 4, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=width).astype(np.float32)


# What users have


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a.tolist(),
        lambda a: tuple(a),
        lambda a: a,
        lambda a: a[None],
        lambda a: [a.tolist()],
        lambda a: torch.from_numpy(a)[None],
        lambda a: torch.from_numpy(a)[None, None],
        lambda a: a.astype(np.float64),
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
    ],
    ids=["list", "tuple", "array", "[1, d] array", "[1, d] list", "[1, d]", "[1, 1, d]", "float64", "a view"],
)
def test_a_vector_may_be_a_list_an_array_or_have_an_axis_of_one(form: Any) -> None:
    a = numbers(D_MODEL)
    truth, given = torch.from_numpy(a), form(a)
    vector = SteeringVector({np.int64(2): given})
    assert vector.layers == (2,) and torch.equal(vector[2].float(), truth)
    assert vector.dtype == (torch.float64 if getattr(given, "dtype", None) == np.float64 else torch.float32)
    assert torch.equal(Edit.add(given).bias.float(), truth)
    torch.testing.assert_close(make_abl_mat(given).float(), make_abl_mat(truth))
    resolved = VectorStore().resolve({np.int32(-1): given}, build("llama"))
    assert resolved.layers == (N_LAYERS - 1,) and torch.equal(resolved[N_LAYERS - 1].float(), truth)
    start, _ = optimize_vector(
        build("llama"),
        [TrainingDatapoint("The morning was", dst_completions=[" calm."])],
        np.int64(2),
        tokenizer=tiny_tokenizer(),
        starting_vec=given,
        max_iters=0,
        return_info=True,
    )
    torch.testing.assert_close(start.float(), truth)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
def test_vectors_in_eight_bits_count_as_the_numbers_that_they_hold(dtype: torch.dtype) -> None:
    given = torch.from_numpy(numbers(D_MODEL)).to(dtype)
    truth = given.float()
    vector = SteeringVector({2: given})
    assert vector.dtype == torch.float32 and torch.equal(vector[2], truth)
    assert vector == SteeringVector({2: truth})
    rows = given[None]
    for edit, same in (
        (Edit.add(given), Edit.add(truth)),
        (Edit.ablate(given), Edit.ablate(truth)),
        (Edit.affine(given, rows, rows), Edit.affine(truth, truth[None], truth[None])),
        (Edit.dense(given, given.expand(D_MODEL, -1)), Edit.dense(truth, truth.expand(D_MODEL, -1))),
        (Edit.add(given).gated("step", given), Edit.add(truth).gated("step", truth)),
    ):
        hidden = torch.from_numpy(numbers(2 * D_MODEL, 1)).view(2, D_MODEL)
        torch.testing.assert_close(edit.apply(hidden), same.apply(hidden))
    with pytest.raises(ValidationError, match="NaN or infinite"):
        SteeringVector({2: torch.full((4,), float("nan")).to(dtype)})


def test_a_vector_that_torch_does_not_read_is_refused() -> None:
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(ValidationError, match=r"layer 2 is torch.float4_e2m1fn_x2, .* convert it yourself"):
        SteeringVector({2: packed})


@pytest.mark.parametrize(
    ("text", "logged"), [("None", False), ("", False), ("null", False), ("4.5", True), ("9" * 5000, True)]
)
def test_a_file_whose_seed_is_no_number_has_none(
    text: str, logged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"layer.2": torch.from_numpy(numbers())}, path, metadata={"seed": text, "author": "x"})
    vector = SteeringVector.load(path, site="input")
    assert vector.seed is None and vector.metadata == {"author": "x"}
    assert ("no whole number" in caplog.text) == logged and len(caplog.text) < 400
    again = tmp_path / "again.safetensors"
    vector.save(again)
    assert SteeringVector.load(again).seed is None


def test_whole_numbers_are_numbers_in_lists_and_arrays() -> None:
    assert SteeringVector({0: [1, 0, -2]}) == SteeringVector({0: np.array([1, 0, -2])})
    assert SteeringVector({0: [1, 0, -2]}) == SteeringVector({0: torch.tensor([1.0, 0.0, -2.0])})


@pytest.mark.parametrize(
    "given", ["abc", None, 3, [], [[1.0], [2.0]], [[1.0, 2.0], [3.0]], [True, False], ["1"], np.array(["a"]), {1: 2}]
)  # fmt: skip
def test_what_is_no_vector_is_named(given: Any) -> None:
    with pytest.raises(ValidationError, match="layer 2 must be"):
        SteeringVector({2: given})


def test_numpy_integers_are_seeds_and_layers(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    plain, numpy = (
        generate(model, tokenizer, "The morning", seed=kind(7), max_tokens=4, sampling_method="top-k")
        for kind in (int, np.int64)
    )
    assert plain == numpy
    vector = SteeringVector({np.uint8(3): [1.0, 2.0]}, seed=np.int32(5))
    vector.save(tmp_path / "v.safetensors")
    assert vector.seed == 5 and SteeringVector.load(tmp_path / "v.safetensors").seed == 5
    examples = (["The morning was"], [" calm."], [" cold."])
    assert caa_vectors(model, *examples, np.array([1, N_LAYERS]), tokenizer).layers == (1, N_LAYERS)
    for bad in (1.5, True, "3"):
        with pytest.raises(ValidationError, match="seed"):
            SteeringVector({0: [1.0]}, seed=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.float16])
def test_numbers_of_any_type_are_numbers_everywhere(kind: Any) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    half, text = kind(0.5), ("The morning was", " calm.")

    def found(number: Any) -> list[Any]:
        options = {
            "top_p": number,
            "temperature": number,
            "sampling_method": "top-p",
            "seed": 1,
            "max_tokens": 4,
        }
        return [
            generate(model, tokenizer, "The morning", **options),
            completion_logprobs(model, *text, tokenizer, coldness=number).sums.tolist(),
            most_likely_completions(
                model, "The", None, tokenizer, k=2, iters=1, coldness=number
            ).scores.tolist(),
            SteeringVector({0: [1.0, 2.0]}) * number,
            get_completion_logprob_hf(model, *text, tokenizer, eps=number).tolist(),
            TrainingSettings(lr=number, n_features=kind(64) if kind is torch.tensor else np.int32(64)),
            optimize_vector(
                model,
                [
                    TrainingDatapoint(
                        text[0], dst_completions=[text[1]], dst_completions_target_losses=[number]
                    )
                ],
                1,
                tokenizer=tokenizer,
                lr=number,
                coldness=number,
                max_iters=1,
                seed=1,
                return_info=False,
            )[0].tolist(),
        ]

    assert found(half) == found(0.5)
    for bad in (True, "0.5", kind(float("nan")), 10**400):
        with pytest.raises(ValidationError, match="finite number"):
            completion_logprobs(model, *text, tokenizer, coldness=bad)


def test_whole_numbers_of_numpy_are_whole_numbers_everywhere() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    ids, forms = tokenizer.encode("The morning was"), (int, np.int64, np.int32)

    def text(kind: type) -> str:
        options = {"max_tokens": kind(5), "top_k": kind(2), "seed": kind(3)}
        return generate(model, tokenizer, [kind(i) for i in ids], **options)

    def beams(kind: type) -> list[str]:
        return sample_most_likely_completions_hf(model, tokenizer, ids, k=kind(2), iters=kind(1))[0]

    def steered(kind: type) -> list[Any]:
        seen: list[Any] = []
        edit = Edit.add(torch.ones(D_MODEL))
        for tokens in (kind(-1), slice(kind(1), None, kind(2))):
            plan = SteeringPlan([Intervention(kind(1), edit, tokens=tokens, rows=[kind(0)])])
            hook = make_steering_hook_hf(torch.ones(D_MODEL), token=tokens)
            followed = positions(model, prompt_tokens=kind(len(ids)))
            with (
                plan.apply(model),
                hf_hooks_contextmanager(model, [(kind(2), hook)]),
                followed,
                torch.no_grad(),
            ):
                seen += model(torch.tensor([ids])).logits.flatten().tolist()
        return seen

    def optimized(kind: type) -> list[float]:
        data = TrainingDatapoint(ids, [" calm"], token=kind(-1))
        options = {"max_iters": kind(2), "affine_rank": kind(1), "seed": kind(1), "batch_tokens": kind(64)}
        return optimize_vector(model, [data], kind(1), tokenizer=tokenizer, **options)[0].tolist()

    def minibatches(kind: type) -> list[float]:
        found = optimize_vector_minibatch_hf(
            model,
            tokenizer,
            ["A", "The", "He"],
            kind(1),
            [" calm"],
            minibatch_size=kind(2),
            max_iters=kind(2),
            seed=1,
        )
        return found[0].tolist()

    for run in (text, beams, steered, optimized, minibatches):
        results = [run(form) for form in forms]
        assert results[0] == results[1] == results[2], run.__name__


# repeng and llama.cpp


def as_repeng_runs_it(
    model: Any, directions: dict[int, np.ndarray[Any, Any]], strength: float
) -> torch.Tensor:
    """Logits with each direction added to what its block gives: what repeng's wrapped blocks do, in a few lines."""
    handles = []
    for layer, direction in directions.items():
        added = strength * torch.from_numpy(direction)

        def after(module: Any, args: Any, out: Any, added: torch.Tensor = added) -> Any:
            return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

        handles.append(adapter_for(model).layers[layer].register_forward_hook(after))
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


def write_control_vector(path: Path, directions: dict[int, np.ndarray[Any, Any]], kind: Any = None) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        if kind is None:
            writer.add_tensor(f"direction.{layer}", direction)
        else:
            quantized = gguf.quantize(direction, kind)
            writer.add_tensor(f"direction.{layer}", quantized, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen2"])
def test_a_full_file_of_repeng_steers_as_repeng_does(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    directions = {
        layer: numbers(D_MODEL, layer) for layer in range(N_LAYERS - 1, 0, -1)
    }  # its default layers
    path = write_control_vector(tmp_path / "repeng.gguf", directions)
    vector = SteeringVector.load(path)
    assert vector.layers == (2, 3, N_LAYERS)
    truth = as_repeng_runs_it(model, directions, 1.5)
    with vector.apply(model, 1.5), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, truth, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(truth, as_repeng_runs_it(model, {}, 1.0), atol=1e-2)
    vector.save(tmp_path / "again.gguf")
    again = {t.name: t.data.tolist() for t in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert again == {f"direction.{layer}": direction.tolist() for layer, direction in directions.items()}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_quantized_directions_are_dequantized(kind: str, tmp_path: Path) -> None:
    a = numbers(64)
    path = write_control_vector(tmp_path / "q.gguf", {2: a}, gguf.GGMLQuantizationType[kind])
    found = SteeringVector.load(path)[3]
    least = {"Q8_0": 0.02, "Q4_0": 0.3, "BF16": 0.02}[kind]
    assert found.shape == (64,) and float((found - torch.from_numpy(a)).abs().max()) <= least


@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_directions_with_an_axis_of_one_are_vectors(kind: str | None, tmp_path: Path) -> None:
    a = numbers(64)
    chosen = None if kind is None else gguf.GGMLQuantizationType[kind]
    flat = SteeringVector.load(write_control_vector(tmp_path / "flat.gguf", {2: a}, chosen))
    row = SteeringVector.load(write_control_vector(tmp_path / "row.gguf", {2: a[None]}, chosen))
    assert row == flat


# Names that don't say which side of a block they mean


@pytest.mark.parametrize("pattern", ["layer_{}", "model.layers.{}", "transformer.h.{}", "v_layer_{}"])
def test_names_that_do_not_say_the_site_ask_for_it(pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    tensors = {layer: torch.from_numpy(numbers(seed=layer))[None] for layer in (0, 3)}
    save_file({pattern.format(layer): tensor for layer, tensor in tensors.items()}, path)
    with pytest.raises(
        ValidationError, match=r"v\.safetensors.*site='input'.*layer 0.*site='output'.*layer 1"
    ):
        SteeringVector.load(path)
    entering = SteeringVector.load(path, site="input")
    assert entering == SteeringVector(tensors)
    leaving = SteeringVector.load(path, site="output")
    assert leaving == SteeringVector({layer + 1: tensor for layer, tensor in tensors.items()})
    assert mechanex.steering.load_vectors(path, site="output").keys() == {1, 4}
    with pytest.raises(ValidationError, match=r"'input'.*'output'.*'resid_post'"):
        SteeringVector.load(path, site="resid_post")  # type: ignore[arg-type]
    leaving.save(tmp_path / "ours.safetensors")
    assert SteeringVector.load(tmp_path / "ours.safetensors") == leaving


def test_an_output_of_a_hugging_face_module_steers_where_it_was_read(tmp_path: Path) -> None:
    model, v = build("llama"), torch.from_numpy(numbers(D_MODEL))
    save_file({f"model.layers.{N_LAYERS - 1}": v}, tmp_path / "v.safetensors")
    vector = SteeringVector.load(tmp_path / "v.safetensors", site="output")
    with vector.apply(model), torch.no_grad():
        found = model(IDS).logits
    torch.testing.assert_close(
        found, as_repeng_runs_it(model, {N_LAYERS - 1: v.numpy()}, 1.0), rtol=1e-5, atol=1e-5
    )


def test_a_file_that_says_its_site_is_believed(tmp_path: Path) -> None:
    path, a = tmp_path / "v.safetensors", torch.ones(3)
    for named, metadata, layer in (
        ("layer_3", {"site": "output"}, 4),
        ("layer_3", {"site": "resid_pre"}, 3),
        ("3", {"site": "resid_post"}, 4),
        ("blocks.3.hook_resid_pre", None, 3),
        ("blocks.3.hook_resid_post", None, 4),
    ):
        save_file({named: a}, path, metadata=metadata)
        assert SteeringVector.load(path).layers == (layer,)
    SteeringVector({3: a}).save(path)
    assert SteeringVector.load(path, site="input").layers == (3,)
    SteeringVector({3: a}).save(tmp_path / "own.json")
    assert SteeringVector.load(tmp_path / "own.json", site="input").layers == (3,)
    for own in (path, tmp_path / "own.json"):
        with pytest.raises(ValidationError, match="says itself that its layers are inputs"):
            SteeringVector.load(own, site="output")
    write_control_vector(tmp_path / "v.gguf", {3: a.numpy()})
    with pytest.raises(ValidationError, match="says itself that its layers are outputs"):
        SteeringVector.load(tmp_path / "v.gguf", site="input")
    (tmp_path / "v.json").write_text('{"3": [1, 1, 1]}')
    assert SteeringVector.load(tmp_path / "v.json", site="output").layers == (4,)


def test_the_shell_takes_the_site(tmp_path: Path, mechanex_home: Path) -> None:
    path, run = tmp_path / "v.safetensors", CliRunner().invoke
    save_file({"layer_3": torch.ones(3)}, path)
    refused = run(main, ["vectors", "import", str(path)])
    assert refused.exit_code == 1 and "--site output" in " ".join(refused.output.split())
    stored = run(main, ["vectors", "import", str(path), "--site", "output", "--json"])
    assert VectorStore().get(json.loads(stored.output)["id"]).layers == (4,)
    shown = run(main, ["vectors", "show", str(path), "--site", "input", "--json"])
    assert json.loads(shown.output)["layers"] == [3]
    exported = run(main, ["vectors", "export", str(path), str(tmp_path / "o.gguf"), "--site", "output"])
    assert exported.exit_code == 0 and SteeringVector.load(tmp_path / "o.gguf").layers == (4,)


# Files that are not what they were


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".json"])
def test_a_flipped_bit_is_an_error_that_names_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"flipped{suffix}"
    whole = SteeringVector(
        {3: numbers(5), 5: numbers(5, 1)}, model="m", model_family="llama", seed=3, metadata={"a": "b"}
    )
    whole.save(path)
    data = path.read_bytes()
    says, quiet = ("m", "llama", 3, {"a": "b"}), 0
    if suffix == ".json":  # has nothing but numbers, in more digits than float32 tells apart
        says = (None, None, None, {})
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(changed)
        try:
            found = SteeringVector.load(path)
        except ValidationError as error:
            assert path.name in str(error)
            continue
        # GGUF has bytes that mean nothing here: the hint, the padding.
        assert found == whole
        assert (found.model, found.model_family, found.seed, found.metadata) == says
        quiet += 1
    assert quiet <= (0 if suffix == ".safetensors" else len(data) // 3)


def test_a_flipped_number_names_the_checksum_and_files_without_one_still_load(tmp_path: Path) -> None:
    path, vector = tmp_path / "v.safetensors", SteeringVector({3: numbers(5)}, model="m", seed=3)
    vector.save(path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValidationError, match=r"v\.safetensors.*checksum.*damaged"):
        SteeringVector.load(path)
    old = {"format_version": "1", "library_version": "0.1", "model": "m", "width": "5", "layers": "3"}
    save_file({"layer.3": vector[3]}, path, metadata=old | {"site": "resid_pre", "seed": "3"})
    found = SteeringVector.load(path)
    assert found == vector and (found.model, found.seed) == ("m", 3)


def test_tensors_swapped_between_layers_are_not_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    SteeringVector({3: numbers(5), 4: numbers(5, 1)}).save(path)
    tensors = load_file(path)
    metadata = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])[
        "__metadata__"
    ]
    save_file({"layer.3": tensors["layer.4"], "layer.4": tensors["layer.3"]}, path, metadata=metadata)
    with pytest.raises(ValidationError, match="checksum"):
        SteeringVector.load(path)
    save_file(tensors, path, metadata=metadata)
    assert SteeringVector.load(path).layers == (3, 4)


def test_a_vector_of_another_family_is_refused_and_of_another_checkpoint_is_not(tmp_path: Path) -> None:
    examples = (["The morning was"], [" calm."], [" cold."])
    vector = caa_vectors(build("llama"), *examples, [2], tiny_tokenizer())
    vector.model = "llama-one"
    assert vector.model_family == "llama"
    for suffix in (".safetensors", ".gguf"):
        vector.save(tmp_path / f"v{suffix}")
        found = (2 * SteeringVector.load(tmp_path / f"v{suffix}")).restricted([2])
        with pytest.raises(ValidationError, match=r"family 'llama' \(llama-one\).*'gpt2'.*dict\(vector\)"):
            found.plan(build("gpt2"))
        found.plan(FAMILIES["llama"]())
        SteeringVector(dict(found)).plan(build("gpt2"))
    vector.save(tmp_path / "v.json")
    SteeringVector.load(tmp_path / "v.json").plan(build("gpt2"))  # a format that doesn't say


def test_an_edit_may_be_made_of_an_array() -> None:
    model, v = build("llama"), numbers(D_MODEL)
    with SteeringPlan([Intervention(1, Edit.ablate(v))]).apply(model), torch.no_grad():
        found = model(IDS).logits
    with SteeringPlan([Intervention(1, Edit.ablate(torch.from_numpy(v)))]).apply(model), torch.no_grad():
        assert torch.equal(found, model(IDS).logits)
