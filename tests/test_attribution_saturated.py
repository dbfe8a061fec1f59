"""Where gradients mislead: saturated attention is run again, and effects that cancel are seen by dropping layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_models import LinearModel
from families import FAMILIES, build
from torch import Tensor, nn

from mechanex.engine.attribution.scores import attribution_scores
from mechanex.engine.models.resolve import load
from mechanex.errors import ValidationError

CLEAN, CORRUPTED = [5, 90, 17, 44, 8], [5, 31, 17, 200, 8]


def difference(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 7]


def saturated(family: str) -> tuple[nn.Module, list[str]]:
    """A model whose last attention picks one token each time, and the paths of what its queries and keys come from."""
    model = FAMILIES[family]()
    names = [name for name, _ in model.named_modules()]
    named = ("q_proj", "k_proj", "query_key_value")
    paths = [name for name in names if name.endswith(named) and ".3." in name]
    assert paths
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.removesuffix(".weight") in paths:
                weight.mul_(12)
    return model, paths


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt"])
def test_queries_and_keys_count_through_a_saturated_softmax(family: str) -> None:
    model, paths = saturated(family)
    given: dict[str, Any] = {"metric": difference}
    exact = attribution_scores(model, CLEAN, CORRUPTED, paths, method="exact", **given)
    plain = attribution_scores(model, CLEAN, CORRUPTED, paths, **given)
    again = attribution_scores(model, CLEAN, CORRUPTED, paths, recompute_attention=True, **given)

    def wrong(found: Any) -> float:
        return sum(float((found.positions[path] - exact.positions[path]).abs().sum()) for path in paths)

    assert wrong(again) < 0.5 * wrong(plain)
    assert set(again.heads) == set(paths) and not set(paths) & set(plain.heads)
    for path in paths:
        assert float(again.heads[path].sum()) == pytest.approx(again.scores[path], rel=1e-4, abs=1e-5)
        total = again.head_positions[path].sum(0)
        torch.testing.assert_close(total, again.positions[path], rtol=1e-4, atol=1e-5)


def test_what_lies_outside_attention_is_scored_as_ever() -> None:
    paths = [
        "model.layers.1.mlp",
        "model.layers.1.self_attn",
        "model.layers.1.self_attn.o_proj",
        "model.norm",
    ]
    plain = attribution_scores(build("llama"), CLEAN, CORRUPTED, paths)
    inside = "model.layers.1.self_attn.q_proj"
    again = attribution_scores(build("llama"), CLEAN, CORRUPTED, [*paths, inside], recompute_attention=True)
    assert {path: again.scores[path] for path in paths} == plain.scores
    assert all(torch.equal(again.positions[path], plain.positions[path]) for path in paths)


@pytest.mark.parametrize(
    ("family", "paths", "said"),
    [
        ("llama", None, r"such as 'model\.layers\.\d\.self_attn\.\w+'"),
        ("llama", ["model.norm", "model.layers.1.self_attn"], "none of the target modules is one"),
        ("mamba", None, "has none: leave it out"),
    ],
)
def test_where_no_attention_would_run_again_that_is_an_error(
    family: str, paths: list[str] | None, said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        attribution_scores(build(family), CLEAN, CORRUPTED, paths, recompute_attention=True)


def test_heads_are_left_out_where_nobody_asked_for_them() -> None:
    path = "model.layers.1.self_attn.q_proj"
    given: dict[str, Any] = {"metric": difference, "recompute_attention": True}
    with_heads = attribution_scores(build("llama"), CLEAN, CORRUPTED, [path], **given)
    without = attribution_scores(build("llama"), CLEAN, CORRUPTED, [path], heads=False, **given)
    assert path in with_heads.heads and not without.heads and not without.head_positions
    assert without.scores[path] == pytest.approx(with_heads.scores[path])


def test_a_patch_in_attention_is_exact_where_the_rest_is_linear() -> None:
    """Values act linearly: both ways agree, in the model and with several steps."""
    tiny = load("mx-tiny", backend="transformers")
    prompts = ("The gym was full of calm. She", "The gym was full of anger. She")
    path = "model.layers.3.self_attn.v_proj"
    for steps in (1, 3):
        given: dict[str, Any] = {"tokenizer": tiny.tokenizer, "steps": steps}
        one = attribution_scores(tiny.model, *prompts, [path], recompute_attention=True, **given)
        if steps == 1:
            other = attribution_scores(tiny.model, *prompts, [path], **given)
            assert one.scores[path] == pytest.approx(other.scores[path], rel=1e-3)
            torch.testing.assert_close(one.positions[path], other.positions[path], rtol=1e-3, atol=1e-4)
        assert one.scores[path]


class _Hidden(LinearModel):
    """What the first layer thinks is taken back by the second, and comes again from the third."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            first, second, third = (layer.thinks for layer in self.layers)
            for layer in self.layers:
                layer.mixes.out.weight.zero_()
                layer.thinks.weight.zero_()
            first.weight[6:, :6] = torch.eye(6)
            second.weight[6:, 6:] = -torch.eye(6)
            third.weight[:6, 6:] = 0


def test_effects_that_cancel_are_seen_where_a_layer_is_dropped() -> None:
    model, path = _Hidden(), "layers.0.thinks"
    given: dict[str, Any] = {"metric": difference}
    plain = attribution_scores(model, [1, 2, 3, 4], [1, 5, 3, 9], **given)
    dropped = attribution_scores(model, [1, 2, 3, 4], [1, 5, 3, 9], drop_layers=True, **given)
    assert plain.scores[path] == pytest.approx(0, abs=1e-5)
    assert dropped.scores[path] > 0.01
    assert all(score >= 0 for score in dropped.scores.values())


@pytest.mark.parametrize("steps", [1, 2])
def test_dropped_layers_give_the_mean_of_gradients_taken_one_by_one(steps: int) -> None:
    model = build("llama")
    path = "model.layers.1.mlp"
    found = attribution_scores(
        model, CLEAN, CORRUPTED, [path], metric=difference, drop_layers=True, steps=steps
    )
    values: list[float] = []
    layers = model.model.layers
    for index in range(len(layers)):
        total = torch.zeros(())
        for step in range(steps):
            kept: dict[str, Tensor] = {}
            with torch.no_grad():
                embedded = [model.model.embed_tokens(torch.tensor([ids])) for ids in (CLEAN, CORRUPTED)]
            start = embedded[1] + step / steps * (embedded[0] - embedded[1])

            def keep(_: Any, __: Any, out: Tensor, kept: dict[str, Tensor] = kept) -> None:
                kept["mlp"] = out

            hooks = [layers[1].mlp.register_forward_hook(keep)]
            hooks += [
                module.register_forward_hook(_detached)
                for module in (layers[index].self_attn, layers[index].mlp)
            ]
            logits = model(inputs_embeds=start.requires_grad_(True)).logits[:, -1]
            (slope,) = torch.autograd.grad(difference(logits).sum(), [kept["mlp"]], allow_unused=True)
            for hook in hooks:
                hook.remove()
            if slope is not None:
                total = total + (slope * _delta(model)).sum() / steps
        values.append(abs(float(total)))
    assert found.scores[path] == pytest.approx(sum(values) / (len(layers) - 1), rel=1e-3)


def test_what_lies_outside_of_layers_is_the_mean_over_all_of_them() -> None:
    """Each dropped layer leaves a gradient at the final norm, all the same; a layer's own parts have one less."""
    paths = ["model.norm", "model.layers.3", "model.layers.3.mlp"]
    given: dict[str, Any] = {"metric": difference}
    plain = attribution_scores(build("llama"), CLEAN, CORRUPTED, paths, **given)
    dropped = attribution_scores(build("llama"), CLEAN, CORRUPTED, paths, drop_layers=True, **given)
    for path in paths:
        assert dropped.scores[path] == pytest.approx(abs(plain.scores[path]), rel=1e-4)
        torch.testing.assert_close(dropped.positions[path], plain.positions[path].abs(), rtol=1e-4, atol=1e-6)


def _detached(_: Any, __: Any, out: Any) -> Any:
    return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()


def _delta(model: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: kept.append(out.detach()))  # type: ignore[union-attr]
    with torch.no_grad():
        for ids in (CLEAN, CORRUPTED):
            model(torch.tensor([ids]))
    hook.remove()
    return kept[0] - kept[1]


@pytest.mark.parametrize("option", ["recompute_attention", "drop_layers"])
def test_exact_scores_need_no_mends(option: str) -> None:
    given: dict[str, Any] = {"method": "exact", "metric": difference, option: True}
    with pytest.raises(ValidationError, match="exact scores need neither"):
        attribution_scores(build("llama"), CLEAN, CORRUPTED, **given)
