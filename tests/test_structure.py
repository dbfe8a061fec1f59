"""What a model is made of, whatever its family names its modules: components, heads, who reads whom, and paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, N_HEADS, N_LAYERS, build, n_hooks
from torch import nn

import mechanex
from mechanex.engine.models import adapter_for
from mechanex.engine.structure.components import Component
from mechanex.engine.structure.graph import model_graph, model_paths, structure_of
from mechanex.errors import ValidationError

PARALLEL = ("gpt_neox", "gptj", "falcon", "phi", "cohere", "cohere2")


def components_of(family: str) -> list[Component]:
    return structure_of(adapter_for(build(family))).components


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_sum_of_what_the_components_write(family: str) -> None:
    """With no name known beforehand: what leaves the last layer is the embedding and every write."""
    model, components = build(family), components_of(family)
    adapter = adapter_for(model)
    written: dict[str, torch.Tensor] = {}
    ids = torch.tensor([[5, 90, 17, 44, 8, 61]])

    def note(component: Component) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            written[component.path] = component.scale * value.reshape(1, 6, -1).clone()

        return hook

    streams: dict[int, torch.Tensor] = {}
    handles = [component.module.register_forward_hook(note(component)) for component in components[1:]]
    handles += [
        adapter.on_residual(layer, lambda hidden, layer=layer: streams.update({layer: hidden.clone()}))
        for layer in (0, N_LAYERS)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(streams[0] + sum(written.values()), streams[N_LAYERS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_each_layer_has_attention_with_heads_and_an_mlp(family: str) -> None:
    components = components_of(family)
    assert components[0].role == "embedding"
    for layer in range(N_LAYERS):
        attention, mlp = (component for component in components if component.layer == layer)
        assert (attention.role, mlp.role) == ("attention", "mlp")
        assert attention.heads is not None and attention.heads.n_heads == N_HEADS
        assert mlp.heads is None and all(mlp.reads(component) for component in components[: 2 * layer + 1])
        assert mlp.reads(attention) is (family not in PARALLEL) and not attention.reads(mlp)


def test_a_layer_without_attention_is_a_mixer_alone() -> None:
    components = components_of("mamba")
    assert [component.role for component in components] == ["embedding", *["mixer"] * N_LAYERS]


def test_a_multiplied_write_has_its_factor() -> None:
    assert {component.scale for component in components_of("granite")[1:]} == {0.5}


def test_writes_of_zeros_have_the_roles_of_their_like() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    roles = [component.role for component in structure_of(adapter_for(model)).components]
    assert roles == ["embedding", *["attention", "mlp"] * N_LAYERS]


class _Rescaled(nn.Module):
    """A layer whose stream isn't handed on as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        return 0.5 * self.layer(hidden, **options)


def test_a_layer_that_is_no_plain_sum_is_a_component_as_a_whole() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1] = _Rescaled(model.model.layers[1])
    components = structure_of(adapter_for(model)).components
    assert [component.role for component in components if component.layer == 1] == ["block"]
    assert [component.role for component in components if component.layer == 2] == ["attention", "mlp"]


def test_the_graph_tells_shapes_parameters_children_and_the_stream() -> None:
    model = build("gpt_neox")
    nodes = {node["path"]: node for node in model_graph(adapter_for(model))}
    assert list(nodes) == [name for name, _ in model.named_modules() if name]
    layer = nodes["gpt_neox.layers.1"]
    assert layer["children"] == [
        f"gpt_neox.layers.1.{n}" for n, _ in model.gpt_neox.layers[1].named_children()
    ]
    assert layer["parameters"] == sum(p.numel() for p in model.gpt_neox.layers[1].parameters())
    assert layer["role"] is None and layer["layer"] == 1
    attention, mlp = nodes["gpt_neox.layers.1.attention"], nodes["gpt_neox.layers.1.mlp"]
    assert attention["output_shape"] == ["batch", "tokens", 48] and attention["heads"] == N_HEADS
    assert attention["parallel"] and mlp["parallel"] and attention["reads"] == mlp["reads"]
    assert attention["reads"] == ["gpt_neox.embed_in", "gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"]
    assert nodes["lm_head"]["role"] == "unembedding" and len(nodes["lm_head"]["reads"]) == 1 + 2 * N_LAYERS
    assert nodes["gpt_neox.layers.1.mlp.dense_h_to_4h"]["output_shape"] == ["batch", "tokens", 96]


def test_paths_are_modules_that_give_numbers_for_each_token() -> None:
    paths = model_paths(adapter_for(build("mixtral")))
    assert "model.layers.0.self_attn.q_proj" in paths and "model.layers.0" in paths
    assert "model.rotary_emb" not in paths and "lm_head" not in paths and "model" not in paths


def test_looking_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["llama"]()
    model.train()
    before = n_hooks(model), [type(m) for m in model.modules()]
    structure_of(adapter_for(model))
    assert (n_hooks(model), [type(m) for m in model.modules()]) == before
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_unknown_path_names_paths_like_it() -> None:
    structure = structure_of(adapter_for(build("llama")))
    with pytest.raises(ValidationError, match=r"no module.*model\.layers\.1\.self_attn"):
        structure.check(["model.layers.1.self_atn"])
    with pytest.raises(ValidationError, match="token by token"):
        structure.check(["model.rotary_emb"])
    with pytest.raises(ValidationError, match="text"):
        structure.check([3])  # type: ignore[list-item]


def test_a_client_tells_the_graph_of_its_model() -> None:
    client = mechanex.Mechanex().load("mx-tiny", backend="transformers")
    paths = client.model.get_paths()
    nodes = client.model.get_graph()
    assert {node["path"] for node in nodes if node["role"] in ("attention", "mlp", "embedding")} <= set(paths)
    assert paths == [p for p in (node["path"] for node in nodes) if p in set(paths)]
