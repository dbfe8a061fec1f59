"""``generate_vectors`` by every method: what each computes, and that it steers the bundled model."""

from __future__ import annotations

import json
from functools import cache

import numpy
import pytest
import torch
from families import FAMILIES, N_LAYERS, build, tiny_tokenizer

from mechanex import Mechanex, ValidationError
from mechanex.bundled import data_path, tone_words
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.directions import answer_means, pca_vectors, probe_vectors
from mechanex.engine.few_shot import few_shot_vectors
from mechanex.engine.models import adapter_for
from mechanex.engine.optimize.passes import Passes
from mechanex.engine.score import completion_logprobs
from mechanex.engine.text import encode_pair
from mechanex.engine.vectors import SteeringVector
from mechanex.utils.steering_opt import TrainingDatapoint, optimize_vector, sample_most_likely_completions_hf

pytestmark = pytest.mark.slow

TOKENIZER = tiny_tokenizer()
PROMPTS = ["The morning was", "She said that the", "A woman", "In the winter the snow covers the roofs and"]
POSITIVE = [" calm.", " bread was warm.", " opened", " sings"]
NEGATIVE = [" cold and the street was quiet.", " train", " knew every child", " cries"]
EXAMPLES = (PROMPTS, POSITIVE, NEGATIVE)


def activations(layer: int, model=None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Means over answer tokens, one text at a time."""
    sides = []
    for side in (POSITIVE, NEGATIVE):
        means = []
        for prompt, answer in zip(PROMPTS, side, strict=True):
            ids, tokens = encode_pair(TOKENIZER, prompt, answer)
            with torch.no_grad():
                out = (model or build("llama"))(torch.tensor([ids + tokens]), output_hidden_states=True)
            means.append(out.hidden_states[layer][0, len(ids) :].mean(0))
        sides.append(torch.stack(means).double().numpy())
    return sides[0], sides[1]


def in_units_of_the_gap(
    direction: numpy.ndarray, positive: numpy.ndarray, negative: numpy.ndarray
) -> torch.Tensor:
    direction = direction / numpy.linalg.norm(direction)
    return torch.tensor(direction * ((positive - negative).mean(0) @ direction), dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_pca_is_the_first_singular_direction_of_the_differences(name):
    found = pca_vectors(build(name), *EXAMPLES, range(N_LAYERS), TOKENIZER)
    assert found.method == "pca" and found.layers == tuple(range(N_LAYERS))
    for layer in range(N_LAYERS):
        positive, negative = activations(layer, build(name))
        direction = numpy.linalg.svd(positive - negative)[2][0]
        torch.testing.assert_close(
            found[layer], in_units_of_the_gap(direction, positive, negative), rtol=1e-3, atol=1e-4
        )
        assert float(found[layer].double() @ torch.tensor((positive - negative).mean(0))) > 0


def test_pca_of_one_pair_is_its_difference():
    found = pca_vectors(build("llama"), *(side[:1] for side in EXAMPLES), [2], TOKENIZER)
    truth = caa_vectors(build("llama"), *(side[:1] for side in EXAMPLES), [2], TOKENIZER)
    torch.testing.assert_close(found[2], truth[2], rtol=1e-4, atol=1e-4)


def test_the_probe_is_a_logistic_regressions_direction():
    linear = pytest.importorskip("sklearn.linear_model")
    found = probe_vectors(build("llama"), *EXAMPLES, [1, 3], TOKENIZER)
    for layer in (1, 3):
        positive, negative = activations(layer)
        x = numpy.concatenate([positive, negative])
        x = (x - x.mean(0)) / numpy.sqrt(((x - x.mean(0)) ** 2).mean())
        labels = [1] * len(positive) + [0] * len(negative)
        probe = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, labels)
        truth = in_units_of_the_gap(probe.coef_[0], positive, negative)
        torch.testing.assert_close(found[layer], truth, rtol=1e-2, atol=1e-3)
        assert float(found[layer].double() @ torch.tensor((positive - negative).mean(0))) > 0


def test_swapped_answers_give_the_opposite_vector():
    for compute in (pca_vectors, probe_vectors):
        one = compute(build("llama"), PROMPTS, POSITIVE, NEGATIVE, [2], TOKENIZER)
        other = compute(build("llama"), PROMPTS, NEGATIVE, POSITIVE, [2], TOKENIZER)
        torch.testing.assert_close(one[2], -other[2], rtol=1e-4, atol=1e-4)


def test_activations_are_batched_as_one_by_one():
    pairs = [encode_pair(TOKENIZER, p, a) for p, a in zip(PROMPTS, POSITIVE, strict=True)]
    many = answer_means(adapter_for(build("llama")), pairs, [2])
    few = answer_means(adapter_for(build("llama")), pairs, [2], batch_tokens=1)
    torch.testing.assert_close(many[2], few[2], rtol=1e-4, atol=1e-5)
    assert many[2].dtype == torch.float64 and many[2].shape[0] == len(PROMPTS)


@pytest.mark.parametrize("compute", [pca_vectors, probe_vectors, few_shot_vectors])
def test_wrong_examples_are_errors(compute):
    for examples, layers, message in (
        ((PROMPTS, POSITIVE[:2], NEGATIVE), [1], "4, 2 and 4"),
        (([], [], []), [1], "no examples"),
        (EXAMPLES, [N_LAYERS + 1], f"Layer {N_LAYERS + 1}"),
        (EXAMPLES, [], "no layers"),
        ((PROMPTS, POSITIVE, ["", *NEGATIVE[1:]]), [1], "no tokens"),
    ):
        with pytest.raises(ValidationError, match=message):
            compute(build("llama"), *examples, layers, TOKENIZER)


@pytest.mark.parametrize("compute", [pca_vectors, probe_vectors])
def test_answers_that_do_not_differ_are_an_error(compute):
    with pytest.raises(ValidationError, match="the same for positive and negative"):
        compute(build("llama"), PROMPTS, POSITIVE, POSITIVE, [1], TOKENIZER)


def test_nan_activations_are_an_error():
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValidationError, match="not finite"):
        pca_vectors(model, *EXAMPLES, [2], TOKENIZER)


# Few-shot


def test_few_shot_optimizes_a_vector_per_layer_each_as_alone():
    model = build("llama")
    found = few_shot_vectors(model, *EXAMPLES, [1, -1], TOKENIZER, seed=3, max_iters=6)
    assert (found.method, found.seed, found.layers) == ("few-shot", 3, (1, 3))
    for layer in found.layers:
        alone = few_shot_vectors(model, *EXAMPLES, [layer], TOKENIZER, seed=3, max_iters=6)
        torch.testing.assert_close(found[layer], alone[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.ci
def test_few_shot_prefers_positive_answers_in_every_kind_of_model():
    for name in ("llama", "bloom", "mamba"):
        model = build(name)
        vector = few_shot_vectors(model, *EXAMPLES, None, TOKENIZER, seed=0)

        def preference(model=model) -> float:
            sums = [
                completion_logprobs(model, PROMPTS, side, TOKENIZER).sums.sum()
                for side in (POSITIVE, NEGATIVE)
            ]
            return float(sums[0] - sums[1])

        before = preference()
        with vector.apply(model):
            assert preference() > before + 1


def test_few_shot_gives_the_same_vector_each_time_and_another_for_another_seed():
    first = few_shot_vectors(build("llama"), *EXAMPLES, [1], TOKENIZER, max_iters=2)
    again = few_shot_vectors(build("llama"), *EXAMPLES, [1], TOKENIZER, max_iters=2, seed=0)
    other = few_shot_vectors(build("llama"), *EXAMPLES, [1], TOKENIZER, max_iters=2, seed=1)
    assert first.seed == 0 and torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    with pytest.raises(TypeError, match="no_such"):
        few_shot_vectors(build("llama"), *EXAMPLES, [1], TOKENIZER, no_such=1)


def test_few_shot_refuses_what_would_store_a_random_or_a_wrong_vector():
    model = build("llama")
    with pytest.raises(ValidationError, match="the same for positive and negative"):
        few_shot_vectors(model, PROMPTS, POSITIVE, POSITIVE, [1], TOKENIZER)
    with pytest.raises(ValidationError, match="the same for positive and negative"):
        few_shot_vectors(model, ["A", "A"], [" b", " c"], [" c", " b"], [1], TOKENIZER)
    for options in ({"affine_rank": 1}, {"vector_clamp": 1.0}):
        with pytest.raises(ValidationError, match=f"{next(iter(options))} makes steering"):
            few_shot_vectors(model, *EXAMPLES, [1], TOKENIZER, **options)
    deaf = FAMILIES["llama"]()
    deaf.lm_head.weight.data.zero_()
    with pytest.raises(ValidationError, match="stayed where it started"):
        few_shot_vectors(deaf, *EXAMPLES, [1], TOKENIZER, max_iters=3)


def test_few_shot_sees_every_example_a_few_at_a_time(monkeypatch):
    """What a step costs doesn't grow with the number of examples, and none of them is left out."""
    passes, seen = Passes.run, []

    def run(self, requests):
        seen.extend(request.prompts for request in requests if request.objective is not None)
        return passes(self, requests)

    monkeypatch.setattr(Passes, "run", run)
    many = [[f"{one} {i}" for i in range(10) for one in side] for side in EXAMPLES]
    found = few_shot_vectors(build("llama"), *many, [1], TOKENIZER, max_iters=5)
    assert found.layers == (1,) and max(map(len, seen)) == 16
    assert {prompt for prompts in seen for prompt in prompts} == set(range(40))


# The bundled model


@cache
def bundled() -> Mechanex:
    return Mechanex().load("mx-tiny", backend="transformers")


def heldout_preference(vector_id: str, client: Mechanex) -> float:
    """Share of held-out prompts whose calm answer gains on the angry one under the vector."""
    held = read_pairs(data_path("calm_angry"), split="heldout")
    prompts, sides = held.prompts[:24], (held.positive_answers[:24], held.negative_answers[:24])

    def gaps() -> torch.Tensor:
        found = [
            completion_logprobs(client.local_model, prompts, side, client.tokenizer).sums for side in sides
        ]
        return found[0] - found[1]

    before = gaps()
    with client.vectors.get(vector_id).apply(client.local_model):
        return float((gaps() > before).float().mean())


@pytest.mark.parametrize(
    ("method", "n"), [("few-shot", 4), ("caa", 24), ("pca", 48), ("probe", 48)], ids=lambda value: str(value)
)
def test_every_method_steers_the_bundled_model(method, n):
    client, train = bundled(), read_pairs(data_path("calm_angry"), split="train")
    options = {"seed": 0} if method == "few-shot" else {}
    vector_id = client.steering.generate_vectors(
        train.prompts[:n], train.positive_answers[:n], train.negative_answers[:n], method=method, **options
    )
    vector = client.vectors.get(vector_id)
    assert vector.method == method and vector.seed == options.get("seed")
    assert heldout_preference(vector_id, client) >= 0.9


def held_out_gain(vector: SteeringVector, name: str) -> float:
    """Nats by which the vector makes positive answers likelier than negative ones, on held-out prompts."""
    client, held = bundled(), read_pairs(data_path(name), split="heldout")

    def gap() -> float:
        sides = [
            completion_logprobs(
                client.local_model, held.prompts[:12], side[:12], client.tokenizer
            ).sums.mean()
            for side in (held.positive_answers, held.negative_answers)
        ]
        return float(sides[0] - sides[1])

    before = gap()
    with vector.apply(client.local_model):
        return gap() - before


@pytest.mark.ci
@pytest.mark.parametrize(("name", "layer"), [("paris_rome", 2), ("hopeful_gloomy", 4)])
def test_few_shot_stops_early_without_losing_effect(name, layer):
    """Against small steps on all examples until nothing is to be gained."""
    client, train = bundled(), read_pairs(data_path(name), split="train")
    examples = [side[:96:5] for side in (train.prompts, train.positive_answers, train.negative_answers)]
    usual = few_shot_vectors(client.local_model, *examples, [layer], client.tokenizer)
    told = json.loads(usual.metadata["fit"])[str(layer)]
    assert told["iters"] <= 25 and told["stopped"] in ("plateau", "max_iters")
    data = [TrainingDatapoint(p, [bad], [good]) for p, good, bad in zip(*examples, strict=True)]
    longest = float(usual[layer].norm())
    options = {"eps": 0.0, "do_one_minus": False, "max_norm": longest, "lr": 0.04 * longest / 128**0.5}
    thorough, _ = optimize_vector(
        client.local_model, data, layer, tokenizer=client.tokenizer, max_iters=60, seed=0, **options
    )
    gain = held_out_gain(usual, name)
    assert gain > 10 and gain >= 0.93 * held_out_gain(SteeringVector({layer: thorough}), name)


def test_few_shot_is_the_default_and_makes_calm_words_common():
    client, train = bundled(), read_pairs(data_path("calm_angry"), split="train")
    n = 8
    vector_id = client.steering.generate_vectors(
        train.prompts[:n], train.positive_answers[:n], train.negative_answers[:n], seed=0
    )
    prompts = [str(p) for p in read_pairs(data_path("calm_angry"), split="heldout").prompts[:10]]
    words = tone_words()

    def count(tone: str, **steering) -> int:
        texts = [client.generation.generate(p, 30, "greedy", **steering)[len(p) :].lower() for p in prompts]
        return sum(any(word in text for word in words[tone]) for text in texts)

    steering = {"steering_strength": 1.0, "steering_vector": vector_id}
    assert count("calm", **steering) >= max(6, count("calm") + 3)
    assert count("angry", **steering) <= 2


def test_one_promotion_makes_its_target_the_likeliest_on_held_out_prompts():
    """Optimized on one datapoint, the vector promotes the same completion after other prompts of its kind."""
    client = bundled()
    model, tokenizer = client.local_model, client.tokenizer
    train = read_pairs(data_path("calm_angry"), split="train")
    held = [str(p) for p in read_pairs(data_path("calm_angry"), split="heldout").prompts[:40]]
    target = " Tom was full of fury"
    datapoint = TrainingDatapoint(str(train.prompts[0]), dst_completions=[target])
    vector, _ = optimize_vector(
        model, [datapoint], 4, coldness=1, tokenizer=tokenizer, lr=2.0, seed=0, max_iters=150
    )
    with SteeringVector({4: vector}).apply(model):
        greedy = completion_logprobs(model, held, [target] * len(held), tokenizer, greedy=True).greedy
    assert sum(bool(g.all()) for g in greedy) >= 0.8 * len(held)


def test_one_suppression_lowers_a_named_completion_tenfold():
    client = bundled()
    model, tokenizer = client.local_model, client.tokenizer
    prompt = str(read_pairs(data_path("calm_angry"), split="train").prompts[0])
    likely = sample_most_likely_completions_hf(model, tokenizer, prompt, k=1, iters=0)[0][0]
    vector, _ = optimize_vector(
        model, [TrainingDatapoint(prompt, [likely])], 4, tokenizer=tokenizer, lr=0.5, seed=0, max_iters=60
    )
    before = float(completion_logprobs(model, prompt, [likely], tokenizer).sums)
    with SteeringVector({4: vector}).apply(model):
        after = float(completion_logprobs(model, prompt, [likely], tokenizer).sums)
    assert before - after > 2.303
