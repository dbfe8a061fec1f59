"""Adapters of peft: a folder that holds one loads with its base model, and is steered as any model is."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, tiny_tokenizer

from mechanex import SteeringVector
from mechanex.engine.caa import caa_vectors
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.score import completion_logprobs
from mechanex.errors import NotFoundError, ValidationError

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 20, 35, 7, 290]])
EXAMPLES = (["The morning was", "A woman"], [" calm.", " sings"], [" cold.", " cries"])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model, an adapter beside it, and the adapted model itself."""
    folder = tmp_path_factory.mktemp("peft")
    base = FAMILIES["llama"]()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    plain = logits(base)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    whole = peft.get_peft_model(base, config).eval()
    whole.save_pretrained(folder / "lora")
    return folder / "lora", whole, plain


@pytest.mark.parametrize("backend", ["auto", "transformers"])
def test_a_folder_of_an_adapter_loads_with_its_base(saved, backend):
    folder, whole, plain = saved
    loaded = load(folder, backend=backend)
    assert loaded.backend == "transformers" and loaded.name == str(folder) and not loaded.model.training
    torch.testing.assert_close(logits(loaded.model), logits(whole))
    assert not torch.allclose(logits(whole), plain, atol=1e-2)
    assert loaded.tokenizer.encode("The morning") == tiny_tokenizer().encode("The morning")
    assert not any(p.requires_grad for n, p in loaded.model.named_parameters() if "lora" in n)


def in_the_hubs_cache(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Lays a folder out as the Hub's client keeps a repository that it has downloaded."""
    kept, commit = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_an_adapter_on_the_hub_loads_with_its_base(saved, tmp_path, revision):
    folder, whole, _ = saved
    lora = Path(shutil.copytree(folder, tmp_path / "lora"))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
    in_the_hubs_cache(tmp_path / "hub", "some/lora", lora, revision)
    in_the_hubs_cache(tmp_path / "hub", "some/base", folder.parent / "base")
    options = {} if revision == "main" else {"revision": revision}
    loaded = load("some/lora", cache_dir=str(tmp_path / "hub"), **options)
    assert (loaded.name, loaded.backend) == ("some/lora", "transformers")
    torch.testing.assert_close(logits(loaded.model), logits(whole))
    shutil.rmtree(tmp_path / "hub" / "models--some--base")
    with pytest.raises(NotFoundError, match="some/base"):
        load("some/lora", cache_dir=str(tmp_path / "hub"), **options)


def test_an_adapted_model_is_read_scored_and_steered(saved):
    folder, whole, _ = saved
    model, tokenizer = load(folder).model, tiny_tokenizer()
    found = caa_vectors(model, *EXAMPLES, [1, N_LAYERS], tokenizer)
    truth = caa_vectors(whole, *EXAMPLES, [1, N_LAYERS], tokenizer)
    assert found.allclose(truth, rtol=1e-4, atol=1e-5) and found.model_family == "llama"
    for one in (model, whole):
        scores = completion_logprobs(one, *EXAMPLES[:2], tokenizer)
        for i, (prompt, answer) in enumerate(zip(*EXAMPLES[:2], strict=True)):
            ids, n = tokenizer.encode(prompt + answer), len(tokenizer.encode(prompt))
            with torch.no_grad():
                every = whole(torch.tensor([ids])).logits[0, n - 1 : -1].log_softmax(-1)
            assert float(scores.sums[i]) == pytest.approx(
                float(every.gather(1, torch.tensor(ids[n:])[:, None]).sum()), rel=1e-4
            )
    vector = SteeringVector({N_LAYERS: torch.ones(D_MODEL)})
    with vector.apply(model):
        ours = logits(model)
    with vector.apply(whole):
        torch.testing.assert_close(ours, logits(whole))


def test_a_whole_model_saved_with_its_adapter_is_not_loaded_without_it(saved, tmp_path):
    folder, whole, _ = saved
    both = Path(shutil.copytree(folder.parent / "base", tmp_path / "both"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, both / name)
    torch.testing.assert_close(logits(load(both).model), logits(whole))


def test_without_peft_the_install_is_named(saved, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" else find(n, *a))
    with pytest.raises(ValidationError, match=r"adapter.*peft is not installed.*pip install '\.\[lora\]'"):
        load(saved[0])


def test_transformer_lens_wraps_no_adapter_and_auto_says_so(saved, caplog):
    pytest.importorskip("transformer_lens")
    with pytest.raises(ValidationError, match=r"TransformerLens can't wrap .*adapter"):
        load(saved[0], backend="transformer_lens")
    with caplog.at_level(logging.WARNING):
        load(saved[0])
    assert "plain Hugging Face model: it is a model with an adapter" in caplog.text


def test_what_is_wrong_with_an_adapter_is_said(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "lora"))
    config = json.loads((folder / "adapter_config.json").read_text())

    def change(**values):
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    change(base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(NotFoundError, match=r"adapter of '.*gone'.*base_model_name_or_path"):
        load(folder)
    change(base_model_name_or_path=None)
    with pytest.raises(ValidationError, match="names no base model"):
        load(folder)
    change(target_modules=["no_such_part"])
    with pytest.raises(ValidationError, match=r"adapter of .*lora could not be read.*no_such_part"):
        load(folder)
    change(target_modules=["q_proj", "down_proj", "lm_head", "k_proj"])
    with pytest.raises(ValidationError, match=r"doesn't fit its base model: missing keys .*k_proj"):
        load(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValidationError, match="no configuration of an adapter"):
        load(folder)
    change()
    (folder / "adapter_model.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ValidationError, match="could not be read"):
        load(folder)


def test_a_model_that_peft_has_wrapped_is_found(saved):
    adapter = adapter_for(saved[1])
    assert adapter.n_layers == N_LAYERS and adapter.d_model == D_MODEL and adapter.family == "llama"
