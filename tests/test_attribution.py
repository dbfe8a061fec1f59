"""Attribution: planted components come first, gradients agree with exact patching, and models stay as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from attribution_models import ASK, COPY_HEAD, COPY_LAYER, LinearModel, copying_model
from families import FAMILIES, N_HEADS, build, n_hooks, tiny_tokenizer
from torch import Tensor, nn

import mechanex
from mechanex.engine.attribution.edge_scores import attribution_edges
from mechanex.engine.attribution.edges import Edge
from mechanex.engine.attribution.scores import NodeScores, attribution_scores
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.errors import ValidationError

PLANTED = 1
CLEAN, CORRUPTED = [10, 3, 11, 12, ASK], [10, 5, 11, 12, ASK]
COPIER = f"model.layers.{COPY_LAYER}.self_attn"
METHODS: list[dict[str, Any]] = [{}, {"steps": 5}, {"method": "exact"}]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [torch.tensor(side).argsort().argsort().double() for side in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def agreement(one: NodeScores, other: NodeScores) -> float:
    return spearman(list(one.scores.values()), [other.scores[path] for path in one.scores])


# What is known to be so


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_planted_head_and_position_come_first(options: dict[str, Any]) -> None:
    found = attribution_scores(copying_model(), CLEAN, CORRUPTED, **options)
    assert found.runs.clean_metric > 1 and found.runs.corrupted_metric < -1
    assert found.to_dict()["metric"]["answers"] == [3, 5]
    ranked = sorted(found.scores, key=lambda path: -found.scores[path])
    assert set(ranked[:2]) == {"model.embed_tokens", COPIER}
    heads = {(path, n): float(s) for path, scores in found.heads.items() for n, s in enumerate(scores)}
    assert max(heads, key=lambda one: heads[one]) == (COPIER, COPY_HEAD)
    assert int(found.positions["model.embed_tokens"].argmax()) == PLANTED
    assert int(found.positions[COPIER].argmax()) == len(CLEAN) - 1
    assert int(found.head_positions[COPIER][COPY_HEAD].argmax()) == len(CLEAN) - 1


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_planted_edges_come_first_and_are_the_circuit(options: dict[str, Any]) -> None:
    found = attribution_edges(copying_model(), CLEAN, CORRUPTED, **options)
    ranked = sorted(found.scores, key=lambda edge: -found.scores[edge])
    planted = {Edge("model.embed_tokens", COPIER), Edge(COPIER, "logits")}
    assert set(ranked[:2]) == planted
    for how in ("greedy", "threshold"):
        circuit = found.circuit(2, how=how)  # type: ignore[arg-type]
        assert set(circuit.edges) == planted and circuit.n_all == len(found.scores)
        assert circuit.faithfulness > 0.8


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_twentieth_of_the_edges_keeps_what_the_model_does(options: dict[str, Any]) -> None:
    """Exact patching says that there is such a circuit, and gradients find one too."""
    found = attribution_edges(copying_model(n_layers=8), CLEAN, CORRUPTED, **options)
    for how in ("greedy", "threshold"):
        circuit = found.circuit(share=0.05, how=how)  # type: ignore[arg-type]
        assert len(circuit.edges) <= 8 and circuit.n_all == 153
        assert circuit.faithfulness >= 0.8


def difference(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 7]


def test_a_linear_model_is_attributed_exactly() -> None:
    model = LinearModel()
    exact = attribution_scores(model, [1, 2, 3, 4], [1, 5, 3, 9], method="exact", metric=difference)
    assert set(exact.roles.values()) == {"embedding", "attention", "mlp"}
    for steps in (1, 3):
        found = attribution_scores(model, [1, 2, 3, 4], [1, 5, 3, 9], steps=steps, metric=difference)
        assert agreement(found, exact) == pytest.approx(1)
        for mine, theirs in (
            (found.positions, exact.positions),
            (found.heads, exact.heads),
            (found.head_positions, exact.head_positions),
        ):
            assert mine.keys() == theirs.keys() and mine
            for path in mine:
                torch.testing.assert_close(mine[path], theirs[path], atol=1e-4, rtol=1e-4)


def test_a_linear_models_edges_are_exact_and_add_up() -> None:
    given: dict[str, Any] = {"metric": difference}
    exact = attribution_edges(LinearModel(), [1, 2, 3, 4], [1, 5, 3, 9], method="exact", **given)
    found = attribution_edges(LinearModel(), [1, 2, 3, 4], [1, 5, 3, 9], **given)
    for edge, score in exact.scores.items():
        assert found.scores[edge] == pytest.approx(score, abs=1e-4)
    into = sum(score for edge, score in found.scores.items() if edge.target == "logits")
    assert into == pytest.approx(found.runs.clean_metric - found.runs.corrupted_metric, abs=1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "bloom", "opt", "falcon", "mamba"]
)
def test_exact_patching_of_everything_is_the_clean_run(family: str) -> None:
    """And of the last layer's output alone, at any family's modules; the patched runs are the model's own."""
    model, adapter = build(family), adapter_for(build(family))
    layers = [name for name, module in model.named_modules() if module is adapter.layers[-1]]
    embedding = next(name for name, module in model.named_modules() if module is adapter.embedding)
    clean, corrupted = [5, 90, 17, 44, 8], [5, 31, 17, 200, 8]
    found = attribution_scores(
        model, clean, corrupted, [embedding, *layers], method="exact", metric=difference, positions=False
    )
    with torch.no_grad():
        both = difference(model(input_ids=torch.tensor([clean, corrupted])).logits[:, -1])
    whole = float(both[0] - both[1])
    assert found.scores == {path: pytest.approx(whole, abs=1e-3) for path in (embedding, *layers)}
    assert found.positions == {} and found.heads == {}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mamba",)])
def test_heads_add_up_to_their_attention(family: str) -> None:
    """What each head is worth by its gradient is a share of the attention's worth, wherever nothing stands between."""
    adapter = adapter_for(build(family))
    found = attribution_scores(adapter, [5, 90, 17, 44, 8], [5, 31, 17, 200, 8], metric=difference)
    assert len(found.heads) == 4
    for path, heads in found.heads.items():
        assert heads.shape == (N_HEADS,) and found.head_positions[path].shape == (N_HEADS, 5)
        torch.testing.assert_close(found.head_positions[path].sum(1), heads)
        if "layernorm" not in path:
            assert float(heads.sum()) == pytest.approx(found.scores[path], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "granite", "bloom"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted(family: str) -> None:
    found = attribution_edges(build(family), [5, 90, 17, 44, 8], [5, 31, 17, 200, 8], metric=difference)
    n = len(found.scores)
    assert found.circuit(n).faithfulness == pytest.approx(1, abs=1e-3)
    assert found.circuit(0).faithfulness == pytest.approx(0, abs=1e-3)
    parallel = family == "gpt_neox"
    assert n == sum(range(1, 10)) - (4 if parallel else 0)


PROMPTS = [
    ("Anna went home. She was calm. She", "Anna went home. She was angry. She"),
    ("The gym was full of calm. She", "The gym was full of anger. She"),
    ("A dog has four legs. Elephants are", "A dog has six legs. Elephants are"),
    ("Cheese is made of milk. Grass is", "Cheese is made of sand. Grass is"),
]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: prompts[0])
def test_integrated_gradients_rank_a_trained_models_parts_as_exact_patching_does(
    tiny: LoadedModel, prompts: tuple[str, str]
) -> None:
    exact = attribution_scores(
        tiny.model, *prompts, tokenizer=tiny.tokenizer, method="exact", positions=False
    )
    found = attribution_scores(tiny.model, *prompts, tokenizer=tiny.tokenizer, steps=5)
    assert agreement(found, exact) >= 0.8


def test_a_curve_rises_from_the_corrupted_to_the_clean_run(tiny: LoadedModel) -> None:
    found = attribution_edges(tiny.model, *PROMPTS[0], tokenizer=tiny.tokenizer, steps=5)
    curve = found.curve(shares=(0.1, 0.5, 1.0))
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-3)
    assert curve.faithfulness[0] < curve.faithfulness[1] and curve.area > 0.5 and 0 < curve.distance < 0.5


# What is asked for


def test_any_module_is_scored_and_unknown_ones_are_refused() -> None:
    model = build("llama")
    paths = ["model.layers.1.self_attn.q_proj", "model.layers.2", "model.norm"]
    found = attribution_scores(model, [5, 90, 17], [5, 31, 17], paths)
    assert list(found.scores) == paths and all(len(found.positions[path]) == 3 for path in paths)
    with pytest.raises(ValidationError, match=r"Paths like it: model\.layers\.1\.self_attn"):
        attribution_scores(model, [5, 90], [5, 31], ["model.layers.1.self_attention"])
    with pytest.raises(ValidationError, match="is empty"):
        attribution_scores(model, [5, 90], [5, 31], [])
    with pytest.raises(ValidationError, match="a module path is a text"):
        attribution_scores(model, [5, 90], [5, 31], [["model.norm"]])  # type: ignore[list-item]


class _LongTexts(nn.Module):
    """An MLP with an expert that only long texts come to."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.expert = mlp, nn.Linear(48, 48)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.mlp(hidden)
        return out + self.expert(hidden) if hidden.shape[1] > 4 else out


def test_a_module_that_a_prompt_does_not_come_to_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp = _LongTexts(model.model.layers[1].mlp)
    path = "model.layers.1.mlp.expert"
    assert attribution_scores(model, [5, 90, 17, 44, 8], [5, 31, 17, 44, 8], [path]).scores[path]
    for method in ("gradient", "exact"):
        with pytest.raises(ValidationError, match="expert took no part"):
            attribution_scores(model, [5, 90], [5, 31], [path], method=method)  # type: ignore[arg-type]


def test_answers_and_functions_are_metrics(tiny: LoadedModel) -> None:
    found = attribution_scores(
        tiny.model, *PROMPTS[0], tokenizer=tiny.tokenizer, metric=(" smiled", " shouted")
    ).to_dict()
    assert found["metric"]["name"] == "logprob_difference" and len(found["metric"]["answers"]) == 2
    ids = [tiny.tokenizer.encode(text, add_special_tokens=False)[0] for text in found["metric"]["answers"]]
    with torch.no_grad():
        tokens = tiny.tokenizer(list(PROMPTS[0]), return_tensors="pt")
        logprobs = tiny.model(input_ids=tokens["input_ids"]).logits[:, -1].float().log_softmax(-1)
    expected = (logprobs[:, ids[0]] - logprobs[:, ids[1]]).tolist()
    assert [found["metric"]["clean"], found["metric"]["corrupted"]] == pytest.approx(expected, abs=1e-3)
    whole = attribution_scores(
        tiny.model, *PROMPTS[0], tokenizer=tiny.tokenizer, metric=[numpy.int64(one) for one in ids]
    )
    assert whole.to_dict()["metric"] == found["metric"]
    same = attribution_scores(tiny.model, PROMPTS[0][0], PROMPTS[0][0], tokenizer=tiny.tokenizer).to_dict()
    assert same["metric"]["name"] == "logprob" and set(same["scores"].values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": ("a",)}, "two answers"),
        ({"metric": (4, 4)}, "same token"),
        ({"metric": (4, "")}, "at least one token"),
        ({"metric": (4, 100_000)}, "vocabulary"),
        ({"metric": lambda logits: logits}, "a number for each row"),
        ({"metric": lambda logits: logits.argmax(-1).float()}, "no gradient"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 3, "method": "exact"}, "exact scores have none"),
        ({"method": "guess"}, "one of gradient, exact"),
        ({"align": "words"}, "align is None or 'tokens'"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_wrong_options_say_what_to_give(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        attribution_scores(build("llama"), [5, 90], [5, 31], **options)


def test_prompts_of_other_lengths_are_refused_or_aligned() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    clean, corrupted = [1, 5, 90, 17, 44, 8], [1, 5, 31, 33, 90, 17, 60, 8]
    with pytest.raises(
        ValidationError, match=r"6 tokens and corrupted_prompt 8.*from token 2 on.*align='tokens'"
    ):
        attribution_scores(model, clean, corrupted, tokenizer=tokenizer)
    exact = attribution_scores(model, clean, corrupted, method="exact", align="tokens")
    found = attribution_scores(model, clean, corrupted, align="tokens")
    for scores in (exact, found):
        by_position = scores.positions["model.layers.0.mlp"]
        assert by_position.shape == (8,) and by_position[2] == by_position[3] == 0 and by_position[6] != 0
    assert attribution_edges(model, clean, corrupted, align="tokens").circuit(3).edges
    with pytest.raises(ValidationError, match="no tokens"):
        attribution_scores(model, [], corrupted)


def test_steering_that_is_applied_counts() -> None:
    model = build("llama")
    given: Any = ([5, 90, 17], [5, 31, 17])
    plain = (
        attribution_scores(model, *given, metric=difference),
        attribution_edges(model, *given, metric=difference),
    )
    edit = Edit.add(torch.ones(48))
    with SteeringPlan([Intervention(2, edit)]).apply(model):
        steered = [attribution_scores(model, *given, metric=difference)]
        edges = attribution_edges(model, *given, metric=difference)
    assert steered[0].runs.clean_metric != plain[0].runs.clean_metric
    assert edges.runs.clean_metric == pytest.approx(steered[0].runs.clean_metric)
    assert edges.runs.clean_metric != plain[1].runs.clean_metric


# What is left as it was


def _state(model: nn.Module) -> Any:
    flags = [p.requires_grad for p in model.parameters()]
    return n_hooks(model), [m.training for m in model.modules()], flags, [type(m) for m in model.modules()]


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = FAMILIES["llama"]()
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = _state(model)

    def fails(logits: Tensor) -> Tensor:
        if logits.shape[0] == 1 or logits.requires_grad:
            raise RuntimeError("no metric today")
        return logits[:, 0]

    for call in (attribution_scores, attribution_edges):
        call(model, [5, 90, 17], [5, 31, 17])  # type: ignore[operator]
        assert _state(model) == before and all(p.grad is None for p in model.parameters())
        with pytest.raises(RuntimeError, match="no metric today"):
            call(model, [5, 90, 17], [5, 31, 17], metric=fails)  # type: ignore[operator]
        assert _state(model) == before and all(p.grad is None for p in model.parameters())


def test_a_client_answers_from_its_model_with_what_json_has() -> None:
    client = mechanex.Mechanex().load("mx-tiny", backend="transformers")
    paths = client.model.get_paths()[-3:]
    found = client.attribution.compute_scores(*PROMPTS[0], paths, steps=2)
    assert list(found["scores"]) == paths and found["steps"] == 2 and found["method"] == "gradient"
    assert [len(found["positions"][path]) for path in paths] == [len(found["tokens"]["corrupted"])] * 3
    assert isinstance(found["scores"][paths[0]], float)
