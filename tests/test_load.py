"""Loading a model by name or path: what it means, what wraps it, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import traceback
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
import transformers
from bridges import bridges_fit
from families import D_MODEL, FAMILIES, N_VOCAB, tiny_tokenizer

from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for, bundled, lens, sources
from mechanex.engine.models.aliases import SHORT, hub_name
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.errors import AuthenticationError, MechanexError, NotFoundError, ValidationError

needs_lens = pytest.mark.skipif(
    not lens.installed(), reason="transformer-lens (the lens extra) is not installed"
)
BACKENDS = ["transformers", pytest.param("transformer_lens", marks=needs_lens)]
IDS = torch.tensor([[1, 20, 35, 7, 290]])


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    FAMILIES["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def no_lens(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "transformer_lens" else find(n, *a)
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return adapter_for(model).hf_model(IDS).logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_loads_ready_to_steer(saved, backend):
    if backend != "transformers" and not bridges_fit():
        with pytest.raises(ValidationError, match=r"than the model with a cache.*backend='transformers'"):
            load(str(saved), backend=backend, device="cpu")
        return
    loaded = load(str(saved), backend=backend, device="cpu")
    assert isinstance(loaded, LoadedModel)
    assert (loaded.backend, loaded.name) == (backend, str(saved))
    assert type(loaded.model).__name__ == {"transformers": "LlamaForCausalLM"}.get(
        backend, "TransformerBridge"
    )
    assert not any(module.training for module in loaded.model.modules())
    torch.testing.assert_close(
        logits(loaded.model), FAMILIES["llama"]()(IDS).logits.detach(), rtol=1e-4, atol=1e-4
    )
    adapter = adapter_for(loaded.model)
    assert adapter.tokenizer is loaded.tokenizer and adapter.model_id == str(saved)
    with SteeringPlan([Intervention(2, Edit.add(torch.ones(D_MODEL)))]).apply(loaded.model):
        assert not torch.allclose(logits(loaded.model), logits(load(saved, device="cpu").model), atol=1e-2)


@pytest.mark.usefixtures("fitting_bridges")
def test_both_backends_give_the_same_token_ids(tmp_path):
    """TransformerLens by itself would add a BOS for a tokenizer that has one but doesn't use it."""
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    plain, bridge = (load(tmp_path, backend=b, device="cpu") for b in ("transformers", "transformer_lens"))
    expected = tokenizer("The train leaves.")["input_ids"]
    assert plain.tokenizer("The train leaves.")["input_ids"] == expected
    assert bridge.tokenizer("The train leaves.")["input_ids"] == expected
    assert bridge.model.tokenizer("The train leaves.")["input_ids"] == expected
    assert bridge.model.to_tokens("The train leaves.")[0].tolist() == [
        1,
        *expected,
    ]  # its own rule, on request


@needs_lens
def test_auto_takes_the_bridge_if_it_computes_the_same_and_says_so(saved, caplog):
    level = logging.getLogger("transformers").level
    with caplog.at_level(logging.INFO, "mechanex"):
        loaded = load(saved, device="cpu")
    if bridges_fit():
        assert loaded.backend == "transformer_lens"
        assert "TransformerBridge" in caplog.text and "backend='transformers'" in caplog.text
    else:
        assert loaded.backend == "transformers" and "than the model with a cache" in caplog.text
    assert logging.getLogger("transformers").level == level


def test_auto_is_plain_without_the_extra_and_says_so(saved, caplog, no_lens):
    with caplog.at_level(logging.INFO, "mechanex"):
        loaded = load(saved, device="cpu")
    assert loaded.backend == "transformers"
    assert "plain Hugging Face model" in caplog.text and ".[lens]" in caplog.text


def test_asking_for_transformer_lens_without_the_extra_names_the_install(saved, no_lens):
    with pytest.raises(ValidationError, match=r"pip install '\.\[lens\]'"):
        load(saved, backend="transformer_lens")


@needs_lens
@pytest.mark.parametrize("cached", [False, True])
def test_a_bridge_that_computes_something_else_is_not_taken(saved, caplog, monkeypatch, cached):
    """The plain model is compared before it is wrapped; here each bridge is a little off."""
    seen = lens.watched

    def off(model):
        found = seen(model)
        return found | {lens.WITH if cached else lens.WITHOUT: found[lens.WITHOUT] + torch.randn(N_VOCAB)}

    wrap = lens.wrap

    def wrap_and_be_off(*given):
        monkeypatch.setattr(lens, "watched", off)
        return wrap(*given)

    monkeypatch.setattr(lens, "wrap", wrap_and_be_off)
    loaded = load(saved, device="cpu")
    how = lens.WITH if cached else lens.WITHOUT
    assert loaded.backend == "transformers" and f"than the model {how}" in caplog.text
    torch.testing.assert_close(logits(loaded.model), FAMILIES["llama"]()(IDS).logits.detach())


@needs_lens
def test_auto_falls_back_to_a_sound_plain_model_when_wrapping_fails(saved, caplog, monkeypatch):
    def ruin(model, *_):
        model.lm_head = torch.nn.Identity()
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(lens, "wrap", ruin)
    loaded = load(saved, device="cpu")
    assert loaded.backend == "transformers" and "no such architecture" in caplog.text
    torch.testing.assert_close(logits(loaded.model), FAMILIES["llama"]()(IDS).logits.detach())
    with pytest.raises(ValidationError, match="backend='transformers'"):
        load(saved, backend="transformer_lens", device="cpu")


def test_models_with_images_stay_plain_where_the_bridge_would_install_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "torchvision" in (lens.unsuitable(transformers.Gemma3Config()) or "")
    assert lens.unsuitable(transformers.LlamaConfig()) is None


# Names


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("gpt2-small", "gpt2"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("Pythia-160M", "EleutherAI/pythia-160m"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("gpt2", "gpt2"),
        ("someone/pythia-70m", "someone/pythia-70m"),
        ("unheard-of", "unheard-of"),
    ],
)
def test_short_names_mean_hub_names(short, full):
    assert hub_name(short) == full


@needs_lens
def test_short_names_mean_what_they_mean_to_transformer_lens():
    for short, full in SHORT.items():
        assert lens.official_name(short) in (full, None)
    assert (
        hub_name("stanford-gpt2-small-a", ask_transformer_lens=True) == "stanford-crfm/alias-gpt2-small-x21"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_names_load_in_both_backends(saved, tmp_path, backend, request):
    """From the Hub's cache, without a network."""
    if backend == "transformer_lens":
        request.getfixturevalue("fitting_bridges")
    repository = tmp_path / "models--EleutherAI--pythia-70m-deduped"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = load("pythia-70m-deduped", backend=backend, device="cpu", cache_dir=tmp_path)
    assert loaded.name == adapter_for(loaded.model).model_id == "EleutherAI/pythia-70m-deduped"
    torch.testing.assert_close(
        logits(loaded.model), FAMILIES["llama"]()(IDS).logits.detach(), rtol=1e-4, atol=1e-4
    )


def test_a_bundled_name_loads_from_the_package(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "model_names", lambda: ["mx-tiny"])
    monkeypatch.setattr(bundled, "model_path", lambda name: saved)
    monkeypatch.chdir(tmp_path)
    loaded = load("mx-tiny", device="cpu")
    assert loaded.name == adapter_for(loaded.model).model_id == "mx-tiny"


def test_mx_tiny_comes_with_the_package():
    loaded = load("mx-tiny", backend="transformers", device="cpu")
    prompt = loaded.tokenizer("The weather in Paris", return_tensors="pt")
    out = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert len(loaded.tokenizer.decode(out[0], skip_special_tokens=True)) > len("The weather in Paris")
    assert loaded.model.dtype == torch.float32, "float16 files are computed in float32 on a CPU"


# What can go wrong


def told(error: MechanexError, *parts: str) -> None:
    text = str(error)
    for part in parts:
        assert part in text, f"{part!r} is missing in: {text}"


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["nobody/nothing", "nosuchmodel", "gpt2-small"])
def test_an_unknown_name_offline_fails_at_once_and_says_everything(name, backend, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        load(name, backend=backend)
    told(
        caught.value,
        repr(name),
        str(tmp_path / name),
        "bundled",
        "cache",
        "could not be reached",
        "save_pretrained",
    )
    assert len(traceback.format_exception(caught.value)) < 15, "no chain of somebody else's errors"
    if name == "gpt2-small":
        told(caught.value, "short for 'gpt2'")


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "a/b/c", Path("gpt2"), "~/nothing-here"])
def test_a_path_to_nothing_names_the_path(path):
    with pytest.raises(NotFoundError, match="no model folder at /"):
        load(path)


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValidationError, match="named by a string or a path"):
        load(name)


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        ("GatedRepoError", AuthenticationError, "hf auth login"),
        ("RepositoryNotFoundError", NotFoundError, "no such model"),
        ("LocalEntryNotFoundError", NotFoundError, "could not be reached"),
    ],
)
def test_the_hubs_answers_are_told_apart(cause, kind, words):
    cls = getattr(huggingface_hub.errors, cause)
    error = OSError("first line\nand many more")
    error.__cause__ = cls.__new__(cls)
    told(sources.explain(error, sources.Source("a/b", "a/b", "hub", "a/b"), "configuration"), words)
    assert isinstance(
        sources.explain(error, sources.Source("a/b", "a/b", "hub", "a/b"), "configuration"), kind
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [(transformers.T5Config(), "an encoder-decoder model"), (transformers.BertConfig(), "an encoder")],
)
@pytest.mark.parametrize("backend", ["auto", "transformers"])
def test_models_that_are_not_decoders_are_refused_before_their_weights(config, words, backend, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValidationError) as caught:
        load(tmp_path, backend=backend)
    told(caught.value, words, config.model_type, "decoder-only")


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValidationError, match="nonsense"):
        load(tmp_path)


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "own_config.py").write_text(f"open({str(ran)!r}, 'w')")
    auto_map = {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ValidationError, match="trust_remote_code=True"):
        load(tmp_path)
    assert not ran.exists()


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ValidationError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ValidationError, match=r"gguf_file='weights\.gguf'"):
        load(tmp_path / "weights.gguf")


def test_broken_weights_are_an_error_in_one_line(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValidationError, match=r"weights of .* could not be read") as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ValidationError, match=r"model\.safetensors"):
        load(folder, device="cpu")


def test_a_checkpoint_without_a_language_head_is_an_error_and_not_random(folder):
    FAMILIES["llama"]().model.save_pretrained(folder)
    with pytest.raises(ValidationError, match=r"lm_head\.weight.*random"):
        load(folder, device="cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_missing_tokenizer_is_an_error_unless_one_is_given(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    with pytest.raises(ValidationError, match=r"tokenizer\.save_pretrained"):
        load(tmp_path, device="cpu")
    tokenizer = tiny_tokenizer()
    assert load(tmp_path, device="cpu", tokenizer=tokenizer).tokenizer is tokenizer


def test_a_wrong_path_of_layers_is_an_error(saved):
    with pytest.raises(ValidationError, match=r"model\.nothing"):
        load(saved, device="cpu", layers="model.nothing")
    assert load(saved, device="cpu", layers="model.layers").backend == "transformers"


@needs_lens
def test_a_path_of_layers_is_not_ignored_by_the_bridge(saved):
    with pytest.raises(ValidationError, match="backend='transformers'"):
        load(saved, backend="transformer_lens", layers="model.layers")


# Options


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(saved, backend, asked, got, request):
    if backend == "transformer_lens":
        request.getfixturevalue("fitting_bridges")
    assert adapter_for(load(saved, backend=backend, device="cpu", dtype=asked).model).dtype == got


def test_float16_files_are_computed_in_float32_on_a_cpu_unless_asked_otherwise(tmp_path):
    FAMILIES["llama"]().half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = {"backend": "transformers", "device": "cpu"}
    assert load(tmp_path, **options).model.dtype == torch.float32
    assert load(tmp_path, dtype="auto", **options).model.dtype == torch.float16


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"backend": "jax"}, "auto, transformers, transformer_lens"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"dtype": torch.int8}, "floating"),
        ({"device": "nowhere"}, "Unknown device 'nowhere'"),
        ({"device": "cpu", "device_map": "cpu"}, "not both"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_options_are_named(saved, option, words):
    with pytest.raises(ValidationError, match=words):
        load(saved, **option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_named(saved):
    with pytest.raises(ValidationError, match="no cuda device"):
        load(saved, device="cuda")


def test_other_options_reach_transformers(saved, monkeypatch):
    given = {}
    real = transformers.AutoModelForCausalLM.from_pretrained
    quantized = object()

    def from_pretrained(location, **options):
        given.update(options)
        options.pop("quantization_config")
        return real(location, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    options = {
        "quantization_config": quantized,
        "attn_implementation": "eager",
        "max_position_embeddings": 99,
    }
    loaded = load(saved, backend="transformers", **options)
    assert given["quantization_config"] is quantized and given["trust_remote_code"] is False
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model.config.max_position_embeddings == 99


def test_a_device_without_memory_is_refused(folder):
    with pytest.raises(ValidationError, match="meta device"):
        load(folder, backend="transformers", device="meta")
