"""The client: loading, unloading, the default client's doors in any import order, and its errors."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from bridges import bridges_fit
from families import FAMILIES, tiny_tokenizer

import mechanex
from mechanex import AuthenticationError, Mechanex, MechanexError, NotFoundError, ValidationError

pytestmark = pytest.mark.slow


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    """A folder with a tiny random model and its tokenizer."""
    folder = tmp_path / "tiny-llama"
    FAMILIES["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# Loading


def test_load_generates_and_unloads_in_one_chain(saved_model: str) -> None:
    client = Mechanex()
    assert client.load(saved_model, backend="transformers") is client
    assert client.model_name == saved_model and client.local_model is not None
    assert client.generation.generate("The", max_tokens=3).startswith("The")
    assert client.unload() is client and client.local_model is None and client.model_name is None
    assert client.load_model(saved_model, backend="transformers").unload_model() is client


def test_auto_is_transformer_lens_where_it_is_installed_and_fits(saved_model: str) -> None:
    client = Mechanex().load(saved_model)
    wanted = "TransformerBridge" if bridges_fit() else "LlamaForCausalLM"
    assert type(client.local_model).__name__ == wanted


@pytest.mark.usefixtures("fitting_bridges")
def test_both_backends_write_and_steer_alike(saved_model: str) -> None:
    texts = []
    for backend in ("transformers", "transformer_lens"):
        client = Mechanex().load(saved_model, backend=backend)
        vector_id = client.steering.generate_vectors(
            ["The man"], [" was happy"], [" was angry"], method="caa"
        )
        for strength, vector in ((0, None), (4, vector_id)):
            texts.append(
                client.generation.generate(
                    "The man said", 12, "greedy", steering_strength=strength, steering_vector=vector
                )
            )
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_unloading_gives_the_memory_back(saved_model: str) -> None:
    client = Mechanex().load(saved_model, backend="transformers")
    client.generation.generate("The", max_tokens=2)
    vector_id = client.steering.generate_vectors(["a"], [" b"], [" c"], method="caa")
    alive = weakref.ref(client.local_model)
    client.unload()
    assert alive() is None
    assert client.steering.get_vectors(vector_id)
    client.unload()


def test_loading_another_model_lets_the_first_go_and_a_failed_one_does_not(saved_model: str) -> None:
    client = Mechanex().load(saved_model, backend="transformers")
    first = weakref.ref(client.local_model)
    with pytest.raises(NotFoundError, match="no-such-model"):
        client.load("no-such-model")
    assert client.local_model is first() is not None
    client.load(saved_model, backend="transformers")
    gc.collect()
    assert first() is None


def test_unknown_backends_and_models_are_errors(saved_model: str) -> None:
    with pytest.raises(ValidationError, match="'vllm'"):
        Mechanex().load(saved_model, backend="vllm")
    with pytest.raises(NotFoundError, match="no-such-model"):
        Mechanex().load("no-such-model")


def test_set_local_model_takes_models_and_says_what_is_none(
    saved_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = FAMILIES["gpt2"]()
    client = Mechanex()
    assert client.set_local_model(model) is client
    assert "tokenizer" in caplog.text
    with pytest.raises(ValidationError, match="tokenizer"):
        client.generation.generate("The")
    assert client.set_local_model(model, tiny_tokenizer()).generation.generate("The", 2).startswith("The")
    import torch

    for bad in ("gpt2", None, torch.nn.Linear(2, 2)):
        with pytest.raises(ValidationError):
            client.set_local_model(bad)
    assert client.local_model is model


@pytest.mark.usefixtures("fitting_bridges")
def test_set_local_model_takes_a_transformer_lens_model_without_a_tokenizer(saved_model: str) -> None:
    bridge = Mechanex().load(saved_model, backend="transformer_lens").local_model
    client = Mechanex().set_local_model(bridge)
    assert client.generation.generate("The", 3).startswith("The")


# Local and remote


def test_without_a_model_the_error_names_both_ways_out() -> None:
    with pytest.raises(MechanexError, match=r"load\('mx-tiny'\).*set_local_model.*login.*MECHANEX_API_KEY"):
        Mechanex().generation.generate("The")
    with pytest.raises(MechanexError, match=r"load\('mx-tiny'\).*set_local_model") as raised:
        Mechanex().set_execution_mode("local").generation.generate("The")
    assert "login" not in str(raised.value)


def test_remote_mode_without_credentials_names_the_ways_out(saved_model: str) -> None:
    client = Mechanex().load(saved_model, backend="transformers").set_execution_mode("remote")
    with pytest.raises(AuthenticationError, match=r"generation\.generate.*login.*MECHANEX_BASE_URL.*'local'"):
        client.generation.generate("The")
    assert client.set_execution_mode("local").generation.generate("The", 1)
    assert client.set_execution_mode("auto").generation.generate("The", 1)
    with pytest.raises(ValidationError, match="'cloud'"):
        client.set_execution_mode("cloud")
    assert client.execution_mode == "auto"


def test_clients_share_nothing_but_the_stored_vectors(saved_model: str) -> None:
    one, two = Mechanex().load(saved_model, backend="transformers"), Mechanex()
    assert two.local_model is None
    vector_id = one.steering.generate_vectors(["a"], [" b"], [" c"], method="caa")
    assert two.steering.get_vectors(vector_id).keys() == one.steering.get_vectors(vector_id).keys()


# The package's surface


@pytest.mark.ci
@pytest.mark.parametrize(
    "first_lines",
    [
        "import mechanex; steering = mechanex.steering",
        "import mechanex.steering; steering = mechanex.steering",
        "from mechanex import steering; import mechanex",
        "import mechanex.client; from mechanex import steering",
        "from mechanex.steering import SteeringModule; from mechanex import steering; import mechanex",
        "import mechanex; mechanex.generation; from mechanex import steering",
        "from mechanex import *; import mechanex",
        "import mechanex.engine.vectors; from mechanex import steering",
    ],
)
def test_a_module_is_the_default_clients_door_in_any_import_order(first_lines: str) -> None:
    checks = """
import types
assert isinstance(steering, types.ModuleType) and steering is mechanex.steering
assert isinstance(mechanex.steering.SteeringModule, type)
default = mechanex.client.default_client()
assert steering.get_vectors.__self__ is default.steering
assert mechanex.generation.generate.__self__ is default.generation
assert mechanex.load.__self__ is mechanex.unload.__self__ is default
assert isinstance(default, mechanex.Mechanex)
"""
    python(f"{first_lines}\n{checks}")


def test_the_default_client_works_through_the_package(saved_model: str) -> None:
    out = python(f"""
import mechanex
assert mechanex.load({saved_model!r}, backend="transformers") is mechanex.client.default_client()
vector_id = mechanex.steering.generate_vectors(["The man"], [" was happy"], [" was angry"], method="caa")
print(mechanex.generation.generate("The", 3, steering_strength=2, steering_vector=vector_id))
mechanex.unload()
try:
    mechanex.generation.generate("The")
except mechanex.MechanexError:
    pass
""")
    assert out.startswith("The")


@pytest.mark.parametrize("name", ["nothing", "log_in", "_hidden", "__wrapped__"])
def test_unknown_names_are_attribute_errors(name: str) -> None:
    for module in (mechanex, mechanex.steering, mechanex.generation):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
        assert not hasattr(module, name)


def test_the_documented_names_are_there_and_listed() -> None:
    for name in mechanex.__all__:
        assert getattr(mechanex, name) is not None
        assert name in dir(mechanex)
    assert mechanex.__version__.count(".") == 2
    from mechanex import errors

    for name in errors.__all__:
        assert getattr(mechanex, name) is getattr(errors, name)


def test_documented_signatures_come_first_and_more_is_keyword_only() -> None:
    import inspect

    from mechanex.generation import GenerationModule
    from mechanex.steering import SteeringModule

    empty = inspect.Parameter.empty
    documented: dict[Any, dict[str, Any]] = {
        GenerationModule.generate: {
            "prompt": empty,
            "max_tokens": 128,
            "sampling_method": "top-k",
            "top_k": 50,
            "top_p": 0.9,
            "steering_strength": 0,
            "steering_vector": None,
        },
        SteeringModule.generate_vectors: {
            "prompts": empty,
            "positive_answers": empty,
            "negative_answers": empty,
            "layer_idxs": None,
            "method": "few-shot",
        },
        SteeringModule.generate_from_jsonl: {"dataset_path": empty, "layer_idxs": None, "method": "few-shot"},
        SteeringModule.get_vectors: {"vector_id": empty},
        SteeringModule.save_vectors: {"vectors_or_id": empty, "path": empty},
        SteeringModule.load_vectors: {"path": empty},
        Mechanex.load_model: {"model_name": empty, "backend": "auto"},
        Mechanex.set_local_model: {"model": empty, "tokenizer": None},
    }
    for function, expected in documented.items():
        parameters = list(inspect.signature(function).parameters.values())[1:]
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert {p.name: p.default for p in positional} == expected
        assert [p.name for p in positional] == list(expected)
