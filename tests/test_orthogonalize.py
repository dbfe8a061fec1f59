"""A direction that is taken out: by steering everywhere, or in the weights, which do the same and can be put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, n_hooks

from mechanex import Mechanex, SteeringVector, ValidationError
from mechanex.engine.orthogonalize import ablate_everywhere, orthogonalize
from mechanex.engine.reset import reset

IDS = torch.tensor([[5, 9, 17, 3, 40, 11]])


def direction(width: int, layer: int = 2) -> SteeringVector:
    return SteeringVector({layer: torch.randn(width, generator=torch.Generator().manual_seed(1))})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.clone()


def weights(model: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "opt", "phi"])
def test_weights_do_what_the_ablation_does_and_come_back(family: str) -> None:
    model = FAMILIES[family]()
    vector = direction(48)
    plain, before, hooks = logits(model), weights(model), n_hooks(model)
    with ablate_everywhere(model, vector):
        ablated = logits(model)
    assert n_hooks(model) == hooks and torch.equal(logits(model), plain)
    handle = orthogonalize(model, vector)
    try:
        moved = (ablated - plain).abs().max()
        assert moved > 1e-3 and (logits(model) - ablated).abs().max() < 1e-2 * moved
        v = vector[2] / vector[2].norm()
        for states in model(IDS, output_hidden_states=True).hidden_states[:-1]:
            assert (states @ v).abs().max() < 1e-4
    finally:
        handle.remove()
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_the_stream_has_nothing_of_the_direction_at_any_site() -> None:
    client = Mechanex()
    client.load("mx-tiny", backend="transformers")
    vector = direction(128)
    with client.steering.ablate_everywhere(vector):
        found = client.model.activations(["Anna went to the market."], tokens="all")
        text = client.generation.generate("Anna went", 8, "greedy")
    everywhere = SteeringVector({layer: vector[2] for layer in found})
    assert all(abs(projected).max() < 1e-4 for projected in everywhere.project(found).values())
    with client.steering.orthogonalize(vector):
        assert client.generation.generate("Anna went", 8, "greedy") == text


# A norm follows what attention and MLPs write; experts' weights aren't matrices; a norm follows the embeddings.
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mixtral", "gpt_oss", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_whose_weights_cannot_do_it_is_left_as_it_was(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype)
    before = weights(model)
    with pytest.raises(ValidationError, match="use ablate_everywhere"):
        orthogonalize(model, direction(48))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "cohere"])
def test_narrow_weights_do_it_too(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype)
    vector = direction(48)
    with orthogonalize(model, vector):
        states = model(IDS, output_hidden_states=True).hidden_states[1:-1]
        v = (vector[2] / vector[2].norm()).to(dtype).float()
        assert all(((s.float() @ v).norm() / s.float().norm()) < 0.01 for s in states)


def test_a_model_that_reads_images_says_that_its_head_is_its_own() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 120, "hidden_size": 48, "intermediate_size": 64}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "tie_word_embeddings": True}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_index=119)
    ).eval()
    with orthogonalize(model, direction(48)):
        assert not model.config.tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings
    assert model.config.tie_word_embeddings and model.config.get_text_config().tie_word_embeddings


def test_one_direction_is_taken_out() -> None:
    several = SteeringVector({1: torch.ones(48), 2: torch.ones(48)})
    with pytest.raises(ValidationError, match=r"restricted\(\[1\]\)"):
        ablate_everywhere(build("llama"), several)
    with pytest.raises(ValidationError, match="128 wide"):
        ablate_everywhere(build("llama"), direction(128))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [0, 1])
def test_directions_come_back_in_any_order(family: str, first: int) -> None:
    model = FAMILIES[family]()
    before = weights(model)
    vectors = [
        SteeringVector({1: torch.randn(48, generator=torch.Generator().manual_seed(i))}) for i in (3, 4)
    ]
    handles = [orthogonalize(model, one) for one in vectors]
    handles[first].remove()
    left = vectors[1 - first][1] / vectors[1 - first][1].norm()
    for states in model(IDS, output_hidden_states=True).hidden_states[:-1]:
        assert (states @ left).abs().max() < 1e-4
    handles[1 - first].remove()
    now = weights(model)
    assert len(now) == len(before) and all(map(torch.equal, now, before))


def test_reset_puts_weights_back_whoever_holds_the_handles() -> None:
    model = FAMILIES["llama"]()
    before = weights(model)
    lost = [orthogonalize(model, SteeringVector({1: torch.eye(48)[i]})) for i in (3, 4)]
    ablate_everywhere(model, direction(48))
    reset(model)
    assert all(map(torch.equal, weights(model), before)) and n_hooks(model) == 0
    with torch.no_grad():
        next(model.parameters()).add_(1)
    after = weights(model)
    for handle in lost:
        handle.remove()
    assert all(map(torch.equal, weights(model), after))
