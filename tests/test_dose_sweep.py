"""Sweeps: what they cost, that they go on where they were, what they choose; and what tuned vectors carry."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import N_LAYERS, build, tiny_tokenizer

from mechanex import Mechanex, SteeringVector, ValidationError
from mechanex.bundled import data_path
from mechanex.cli import main
from mechanex.engine.caa import default_layer
from mechanex.engine.datasets import ContrastivePairs, read_pairs
from mechanex.engine.doses.dose import Dose, kind_of
from mechanex.engine.doses.families import Family, apart, around, families_of, worth
from mechanex.engine.doses.halving import front, rounds
from mechanex.engine.doses.scorers import word_share
from mechanex.engine.doses.sweep import sweep
from mechanex.engine.doses.swept import Setting
from mechanex.engine.doses.written import mean_logprobs, write
from mechanex.engine.generate import generate_batch
from mechanex.engine.models import adapter_for
from mechanex.engine.sampling import Options

NOUNS = ("river", "man", "woman", "morning", "letter", "road", "garden", "house", "day", "night")
PAIRS = ContrastivePairs(
    [f"The {noun} was" for noun in NOUNS] + [f"She saw the {noun} and" for noun in NOUNS],
    [" good and happy"] * 10 + [" was happy that it came"] * 10,
    [" bad and angry"] * 10 + [" was angry at all of it"] * 10,
)
PROMPTS = [f"{who} looked at the {noun}" for who in ("He", "She", "They") for noun in NOUNS]


def test_two_thousand_settings_cost_sixty_evaluations_at_most() -> None:
    """Counted in tokens that blocks of the model were given, whoever gave them."""
    model, tokenizer = build("llama"), tiny_tokenizer()
    adapter = adapter_for(model)
    seen = 0

    def count(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        hidden = args[0] if args else kwargs["hidden_states"]
        seen += hidden.shape[0] * hidden.shape[1]

    counting = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in adapter.layers]
    (texts,) = write(adapter, tokenizer, PROMPTS, [()], Options(max_tokens=40, seed=0))
    seen = 0
    (texts,) = write(adapter, tokenizer, PROMPTS, [()], Options(max_tokens=40, seed=0))
    mean_logprobs(adapter, texts)
    whole, seen = seen, 0
    strengths = [0.1 * i for i in range(1, 76)]
    found = sweep(
        model, PAIRS, layers=range(1, N_LAYERS), strengths=strengths, validation=PROMPTS, max_tokens=40,
        tokenizer=tokenizer,
    )  # fmt: skip
    for handle in counting:
        handle.remove()
    assert len(found.settings) >= 2000
    assert seen / whole <= 60
    assert found.evaluations == pytest.approx(seen / whole, rel=0.35)


def quick(**options: Any) -> Any:
    return sweep(
        build("llama"),
        PAIRS,
        tokenizer=tiny_tokenizer(),
        **{
            "layers": [1, 2],
            "strengths": [0.5, 1.0],
            "tokens": ["all"],
            "finalists": 3,
            "validation": PROMPTS[:6],
            "test": PROMPTS[6:12],
            "max_tokens": 8,
            **options,
        },
    )


def test_a_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.json"
    whole = quick(checkpoint=path)
    kept = json.loads(path.read_text())
    assert sum(map(len, kept["forced"].values())) >= 12 and len(kept["written"]) >= 4
    # Of an interrupted one a part is there.
    first = next(iter(kept["forced"]["0"]))
    kept["forced"] = {"0": {first: kept["forced"]["0"][first]}}
    kept["written"].popitem()
    path.write_text(json.dumps(kept))
    again = quick(checkpoint=path)
    assert again.chosen.dose == whole.chosen.dose and again.evaluations < whole.evaluations
    assert [one.dose for one in again.settings] == [one.dose for one in whole.settings]
    with pytest.raises(ValidationError, match="another sweep"):
        quick(checkpoint=path, seed=5)
    path.write_text("{}")
    with pytest.raises(ValidationError, match="no checkpoint"):
        quick(checkpoint=path)


def test_the_chosen_dose_has_the_largest_effect_at_a_bearable_price() -> None:
    found = quick(scorer=lambda text: float(len(text)), most_perplexity=1.5)
    texts = [one.texts for one in found.settings if one.texts is not None]
    bearable = [t.effect for t in texts if t.perplexity <= 1.5 and t.repetition <= 0.1]
    assert found.chosen.texts.effect == max(bearable)
    assert found.sentence.startswith(str(found.chosen.dose)) and "perplexity" in found.sentence
    assert found.confirmed is not None and set(found.confirmed) == {"plain", "effect", "perplexity"}
    assert found.confirmed["effect"].low <= found.confirmed["effect"].value <= found.confirmed["effect"].high
    best = found.front
    assert all(a.texts.effect < b.texts.effect for a, b in pairwise(best))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"edits": ["melt"]}, "an edit is one of"),
        ({"tokens": ["some"]}, "tokens to steer"),
        ({"methods": ["magic"]}, "method is one of"),
        ({"layers": [99]}, "Layer 99"),
        ({"strengths": []}, "strengths is a list"),
        ({"strengths": [0.0]}, "other than 0"),
        ({"validation": []}, "validation is an empty list"),
        ({"widths": [0]}, "no dose of widths|a width of 1"),
        ({"widths": [2], "edits": ["clamp"]}, "no dose of widths"),
        ({"widths": 2}, "widths is a list"),
        ({"finalists": 0}, "finalists is a whole number of 1 or more"),
        ({"most_evaluations": "2"}, "most_evaluations is a number above 0"),
    ],
)
def test_what_can_t_be_swept_is_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        quick(**wrong)


def test_the_front_and_the_rounds() -> None:
    effects, prices = [1.0, 3.0, 2.0, 0.5, 9.0], [1.0, 2.0, 2.5, 1.5, 50.0]
    assert front(effects, prices) == [0, 1, 4]
    plan = rounds(2000, 20, 8, 5000)
    assert plan[0] == (2000, 1) and plan[-1][0] <= 32
    assert all(b[0] < a[0] and b[1] >= a[1] for a, b in pairwise(plan))
    assert rounds(3, 20, 8, 5000) == [(3, 20)]


def test_kinds_of_dose_are_compared_at_one_price() -> None:
    """A dose that rises slowly isn't beaten by one that is stronger where it was tried."""
    settings = [Setting(Dose(1, s), s, s**2, s**2, 1) for s in (0.5, 1.0, 2.0)]
    settings += [Setting(Dose(2, s), 2 * s, 16 * s**2, s, 1) for s in (2.0, 1.0, 0.5)]
    settings += [Setting(Dose(2, -s), -s, s**2, s, 1) for s in (0.5, 1.0)]
    slow, steep, other = families_of(settings)
    assert slow.strengths == [0.5, 1.0, 2.0] == steep.strengths and other.strengths == [-0.5, -1.0]

    def at(family: Family, price: float) -> tuple[float, float, bool]:
        prices, gains = [one.kl for one in family.settings], [one.gain for one in family.settings]
        return worth(family.strengths, prices, gains, price)

    assert at(slow, 2.25) == (pytest.approx(1.5), pytest.approx(1.5), True)
    assert at(steep, 9.0) == (pytest.approx(0.75), pytest.approx(1.5), True)
    assert at(slow, 100.0) == (2.0, 2.0, True)  # nothing dearer was tried
    strength, gain, within = at(steep, 1.0)
    assert (strength, within) == (0.5, False) and gain < 1.0
    assert at(other, 0.5)[0] == pytest.approx(-(0.5**0.5))
    assert [one.dose.strength for one in around(slow, 1.5)] == [1.0, 2.0]
    assert [one.dose.strength for one in around(slow, 9.0)] == [1.0, 2.0]
    assert [one.dose.strength for one in around(slow, 0.1)] == [0.5, 1.0]


def test_finalists_are_no_neighbours() -> None:
    kinds = [Dose(4, 1.0), Dose(5, 1.0), Dose(5, 1.0, "clamp"), Dose(6, 1.0), Dose(4, 1.0, width=2)]
    ranked = families_of(Setting(dose, 0.0, 0.0, 0.0, 1) for dose in kinds)
    assert [one.at(1.0) for one in apart(ranked, 4, 2)] == [kinds[i] for i in (0, 2, 3, 4)]
    assert [one.at(1.0) for one in apart(ranked, 5, 2)] == [kinds[i] for i in (0, 2, 3, 4, 1)]


def test_finalists_write_texts_at_the_price_that_is_allowed() -> None:
    found = quick(scorer=lambda text: float(len(text)), strengths=[0.25, 1.0, 4.0], most_perplexity=1.5)
    prices: dict[Dose, list[float]] = {}
    for one in found.settings:
        if one.texts is not None:
            prices.setdefault(replace(one.dose, strength=1.0), []).append(
                abs(math.log(one.texts.perplexity / 1.5))
            )
    again = [each for each in prices.values() if len(each) > 1]
    assert again and all(min(each[1:]) < each[0] or each[0] < 0.1 for each in again)


def test_the_usual_dose_is_among_those_that_write_texts() -> None:
    """So that what is recommended is no worse on the validation prompts, whatever given answers say."""
    usual = Dose(default_layer(N_LAYERS), 1.0)
    found = quick(finalists=2, layers=range(1, N_LAYERS), edits=["add", "norm"], strengths=[1.0])
    assert usual in {replace(one.dose, strength=1.0) for one in found.settings if one.texts is not None}


def test_layers_that_share_a_strength() -> None:
    found = quick(widths=[3], edits=["add"], layers=[1])
    dose = found.chosen.dose
    assert list(dose.layers) == [1, 2, 3] and "layers 1 to 3" in found.sentence
    vector = found.vector()
    assert vector.layers == (1, 2, 3)
    for layer in dose.layers:
        torch.testing.assert_close(vector[layer], found.vectors["caa"][layer] * (dose.strength / 3))
    adapter = adapter_for(build("llama"))
    both = write(
        adapter, tiny_tokenizer(), PROMPTS[:4],
        [dose.of(found.vectors["caa"]), tuple(vector.plan(adapter, 1.0).interventions)], Options(max_tokens=8, seed=2),
    )  # fmt: skip
    assert [one.ids for one in both[0]] == [one.ids for one in both[1]]
    with pytest.raises(ValidationError, match="a width of 1 or more"):
        Dose(1, 1.0, "clamp", width=2)


@pytest.mark.slow
def test_strength_one_of_a_tuned_vector_is_the_chosen_dose(tmp_path: Path) -> None:
    pairs = read_pairs(data_path("calm_angry"), split="train")
    some = ContrastivePairs(pairs.prompts[:40], pairs.positive_answers[:40], pairs.negative_answers[:40])
    client = Mechanex()
    client.load("mx-tiny")
    options = {
        "layers": [3],
        "strengths": [0.5, 0.8],
        "finalists": 2,
        "max_tokens": 12,
        "most_evaluations": 10,
    }
    tuned = client.steering.tune(some, **options)
    found = sweep(client.local_model, some, **options)
    assert tuned.metadata["recommendation"] == found.sentence
    dose = found.chosen.dose
    for layer in dose.layers:
        torch.testing.assert_close(tuned[layer], dose.strength / dose.width * found.vectors["caa"][layer])
    assert (kind_of(tuned), tuned.tokens) == (dose.edit, dose.tokens)
    assert tuned.calibration.strength == 1.0 and dict(tuned.calibration.seen)[1.0] == tuned.calibration.kl
    tuned.save(tmp_path / "tuned.safetensors")
    again = SteeringVector.load(tmp_path / "tuned.safetensors")
    prompts = [str(prompt) for prompt in pairs.prompts[50:54]]
    adapter = adapter_for(client.local_model)
    (steered,) = write(
        adapter, adapter.tokenizer, prompts, [dose.of(found.vectors["caa"])], Options(max_tokens=12, seed=3)
    )
    texts = generate_batch(
        client.local_model, adapter.tokenizer, prompts, vector=again, strength=1.0, max_tokens=12, seed=3
    )
    assert texts == [prompt + one.text for prompt, one in zip(prompts, steered, strict=True)]


@pytest.mark.slow
def test_the_command_sweeps_and_writes_the_tuned_vector(tmp_path: Path) -> None:
    arguments = ["sweep", "mx-tiny", "--data", "calm_angry", "--split", "heldout", "--layer", "3", "--out"]
    arguments += [str(tmp_path / "s"), "--strength", "0.6", "--tokens", "all", "--edit", "add"]
    arguments += ["--finalists", "1", "--max-tokens", "8", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert told["chosen"]["dose"]["layer"] == 3 and told["confirmed"]["effect"]["low"] is not None
    assert SteeringVector.load(tmp_path / "s" / "vector.safetensors").calibration is not None
    assert (tmp_path / "s" / "sweep.png").exists() and json.loads((tmp_path / "s" / "sweep.json").read_text())
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "--resume" in refused.stderr
    again = CliRunner().invoke(main, [*arguments, "--resume"])
    assert again.exit_code == 0 and json.loads(again.stdout)["chosen"] == told["chosen"]


def test_settings_of_one_seed_draw_alike() -> None:
    adapter = adapter_for(build("llama"))
    torch.manual_seed(0)
    vector = SteeringVector({1: torch.zeros(adapter.d_model) + 1e-9})
    both = write(
        adapter, tiny_tokenizer(), PROMPTS[:3], [(), Dose(1, 1.0).of(vector)], Options(max_tokens=8, seed=1)
    )
    assert [one.ids for one in both[0]] == [one.ids for one in both[1]]


def test_one_text_is_no_list_of_words_nor_of_examples() -> None:
    with pytest.raises(ValidationError, match="put it in a list"):
        word_share("calm")
    with pytest.raises(ValidationError, match="prompts is a list"):
        ContrastivePairs("aaaa", "bbbb", "cccc")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="2 prompts, 1 positive_answers"):
        ContrastivePairs(["a", "b"], ["c"], ["d"])
