"""Measuring: each figure is what it says, the report's forms, the judges, and the data of the eight behaviors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import CliRunner

from mechanex import ValidationError
from mechanex.bundled import data_path, tone_words
from mechanex.cli import main
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import prompt_of, read_lines, read_pairs
from mechanex.engine.doses.ability import ChoiceQuestion, read_questions
from mechanex.engine.doses.dose import edited_by
from mechanex.engine.doses.dose_report import DoseReport
from mechanex.engine.doses.intervals import bootstrap, mean_of
from mechanex.engine.doses.measure import measure
from mechanex.engine.doses.scorers import classifier, word_share
from mechanex.engine.doses.variants import varied
from mechanex.engine.doses.written import repetition
from mechanex.engine.generate import generate_batch
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.score import perplexity, rank_completions
from mechanex.engine.vectors import SteeringVector

ROOT = Path(__file__).parents[1]
BEHAVIORS = ROOT / "benchmarks" / "behaviors"
WORDS = tone_words()
ANGRY = word_share(WORDS["angry"], WORDS["calm"])
QUESTIONS = [
    ChoiceQuestion("Anna went to the", ("market", "moon"), 0),
    ChoiceQuestion("They were full of", ("peace", "chair"), 0),
]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def calm(tiny: LoadedModel) -> SteeringVector:
    pairs = read_pairs(data_path("calm_angry"), split="train")
    examples = (pairs.prompts[:40], pairs.positive_answers[:40], pairs.negative_answers[:40])
    return caa_vectors(tiny.model, *examples, [3], tiny.tokenizer)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [str(prompt) for prompt in read_pairs(data_path("calm_angry"), split="heldout").prompts[:8]]


@pytest.fixture(scope="module")
def report(tiny: LoadedModel, calm: SteeringVector, prompts: list[str]) -> DoseReport:
    return measure(
        tiny.model, calm, prompts, {"angry": ANGRY}, strength=-0.8, questions=QUESTIONS, max_tokens=16
    )


def test_the_figures_are_those_of_the_texts(
    tiny: LoadedModel, calm: SteeringVector, prompts: list[str], report: DoseReport
) -> None:
    assert calm.calibration is None
    for strength, which in ((0.0, "plain"), (-0.8, "steered")):
        vector = calm if strength else None
        texts = generate_batch(
            tiny.model,
            tiny.tokenizer,
            prompts,
            vector=vector,
            strength=strength or 1.0,
            max_tokens=16,
            seed=0,
        )
        answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        assert [getattr(one, which) for one in report.texts] == answers
        figure = getattr(report.effects["angry"], which)
        assert figure.value == pytest.approx(sum(map(ANGRY, answers)) / len(answers))
        assert figure.low <= figure.value <= figure.high
        cost = perplexity(tiny.model, prompts, answers, tiny.tokenizer)
        assert getattr(report.perplexity, which).value == pytest.approx(cost, rel=0.02)
    change = report.perplexity.steered.value / report.perplexity.plain.value
    assert report.perplexity.change.value == pytest.approx(change)
    assert report.effects["angry"].change.low > 0
    assert set(report.brittleness) == {"paraphrased", "longer", "other role"}
    assert report.kl is not None and 0 < report.kl.p50.value < report.kl.p95.value
    assert len(report.kl.by_position) == 16


def test_ability_is_how_often_the_right_choice_is_likeliest(tiny: LoadedModel, report: DoseReport) -> None:
    right = []
    for one in QUESTIONS:
        chat = [{"role": "user", "content": one.question}]
        ranked = rank_completions(tiny.model, chat, one.choices, tiny.tokenizer, normalize="tokens")
        right.append(ranked[0].index == one.answer)
    assert report.ability is not None
    assert report.ability.plain.value == pytest.approx(sum(right) / len(right))


def test_the_report_as_json_table_page_and_picture(report: DoseReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert told["effects"]["angry"]["change"]["value"] == report.effects["angry"].change.value
    assert len(told["texts"]) == 8 and told["steering"].startswith("layers 3: add")
    assert "effect: angry" in report.table() and "KL per token, p95" in report.table()
    report.html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr>") >= 8 + len(list(report.rows())) and "http" not in page
    report.plot(tmp_path / "report.svg")
    assert (tmp_path / "report.svg").stat().st_size > 1000


def test_a_plan_is_measured_as_its_vector_is(
    tiny: LoadedModel, calm: SteeringVector, prompts: list[str]
) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "brittleness": False}
    plan = SteeringPlan([Intervention(3, Edit.add(-0.8 * calm[3]))])
    by_plan = measure(tiny.model, plan, prompts[:3], ANGRY, **options)
    by_vector = measure(tiny.model, calm, prompts[:3], ANGRY, strength=-0.8, **options)
    assert by_plan.texts == by_vector.texts and by_plan.kl == by_vector.kl
    with pytest.raises(ValidationError, match="own strengths"):
        edited_by(tiny.model, plan, 2.0)
    with pytest.raises(ValidationError, match="names rows"):
        edited_by(tiny.model, [Intervention(3, Edit.add(calm[3]), rows=[0])])
    with pytest.raises(ValidationError, match="no prompts"):
        measure(tiny.model, calm, [], ANGRY)
    with pytest.raises(ValidationError, match="no scorers"):
        measure(tiny.model, calm, prompts[:1], {})


def test_a_vector_under_a_condition_is_measured_by_its_texts(
    tiny: LoadedModel, calm: SteeringVector, prompts: list[str]
) -> None:
    never = PromptCondition(1, calm[3], 2.0)
    options: dict[str, Any] = {"max_tokens": 8, "brittleness": False, "questions": QUESTIONS}
    found = measure(tiny.model, calm.when(never), prompts[:3], ANGRY, **options)
    assert all(one.plain == one.steered for one in found.texts)
    assert found.kl is None and found.ability is None


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = numpy.random.default_rng(0)
    held = [
        (found := mean_of(rng.normal(1.0, 2.0, 40).tolist())).low <= 1.0 <= found.high for _ in range(200)
    ]
    assert 0.88 <= sum(held) / len(held) <= 0.99
    assert bootstrap(lambda at: 3.0, 5) == bootstrap(lambda at: 3.0, 5)


def test_judges_of_texts() -> None:
    judge = word_share(["glad*", "fun"], ["sad"])
    assert judge("Gladly! What fun.") == pytest.approx(2 / 3)
    assert judge("sad") == -1 and judge("") == 0
    tone = classifier(["what a lovely day", "lovely weather"], ["an awful day", "awful weather"])
    assert tone("lovely") > 0.6 > 0.5 == tone("unknown") and tone("awful") < 0.4
    with pytest.raises(ValidationError, match="both kinds"):
        classifier([], ["text"])
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9) and repetition([1, 2]) == 0


def test_prompts_asked_otherwise() -> None:
    chat = [{"role": "user", "content": "Why?"}]
    assert varied(["Why?"], "paraphrased")[0].endswith("Why?")
    (role,) = varied([chat], "other role")
    assert (
        role[0]["role"] == "system" and role[1] == chat[0] and chat == [{"role": "user", "content": "Why?"}]
    )
    assert varied([[1, 2]], "longer") == []


@pytest.mark.slow
def test_the_command_measures(tmp_path: Path, calm: SteeringVector) -> None:
    calm.save(tmp_path / "calm.safetensors")
    (tmp_path / "angry.txt").write_text("\n".join(WORDS["angry"]))
    arguments = ["measure", "mx-tiny", "--vector", str(tmp_path / "calm.safetensors"), "--strength=-0.8"]
    arguments += ["--data", "calm_angry", "--split", "heldout", "--most", "3", "--max-tokens", "8"]
    arguments += ["--words", str(tmp_path / "angry.txt"), "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert set(told["effects"]) == {"angry", "naive Bayes"} and told["prompts"] == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.html",
        "report.png",
    }
    wrong = CliRunner().invoke(main, ["measure", "mx-tiny", "--vector", "x"])
    assert wrong.exit_code == 2 and "--data" in wrong.stderr


def test_the_eight_behaviors_have_data_and_judges_that_tell_them() -> None:
    sys.path.insert(0, str(BEHAVIORS))
    scorers = pytest.importorskip("scorers")
    pytest.importorskip("vaderSentiment")
    assert len(scorers.SCORERS) == 8
    for name, scorer in scorers.SCORERS.items():
        pairs = read_pairs(BEHAVIORS / name / "pairs.jsonl")
        asked = [
            json.dumps(prompt)
            for split in ("validation", "test")
            for prompt in read_lines(BEHAVIORS / name / f"{split}.jsonl", prompt_of, None)
        ]
        assert len(pairs) == 60 and len(set(asked)) == 60
        assert not set(asked) & {json.dumps(prompt) for prompt in pairs.prompts}
        told = [
            scorer(a) > scorer(b) for a, b in zip(pairs.positive_answers, pairs.negative_answers, strict=True)
        ]
        assert sum(told) >= 54, name
    questions = read_questions(BEHAVIORS / "ability.jsonl")
    assert len(questions) == 200 and len({one.question for one in questions}) == 200
    assert all(math.isclose(len(set(one.choices)), 4) for one in questions)


def test_bad_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 2}\n')
    with pytest.raises(ValidationError, match="number of a choice"):
        read_questions(path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompts": None}, "prompts is a list of prompts"),
        ({"prompts": 3}, "prompts is a list of prompts"),
        ({"prompts": "one text"}, "put it in a list"),
        ({"prompts": []}, "no prompts"),
        ({"scorers": None}, "scorers is a list of scorers"),
        ({"scorers": ["angry"]}, "a function from a text to a number; got 'angry'"),
        ({"scorers": {"angry": 3}}, "angry is a function from a text to a number; got 3"),
        ({"scorers": {"told": lambda text: text}}, "told gave .* a scorer gives a finite number"),
        ({"scorers": lambda text: None}, "gave None for a text"),
        ({"scorers": lambda text: math.nan}, "gave nan for a text"),
        ({"questions": 3}, "questions is a list of questions"),
        ({"questions": ["Anna went to the"]}, "questions are ChoiceQuestions"),
        ({"steering": [Edit.add(numpy.ones(128))]}, "made of interventions, .*; got Edit"),
    ],
)
def test_what_measuring_cannot_use_is_named(
    tiny: LoadedModel, prompts: list[str], given: dict[str, Any], says: str
) -> None:
    steering = given.pop("steering", {3: numpy.ones(tiny.model.config.hidden_size)})
    asked, scorers = given.pop("prompts", prompts[:1]), given.pop("scorers", ANGRY)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "max_tokens": 2, "brittleness": False, **given}
    with pytest.raises(ValidationError, match=says):
        measure(tiny.model, steering, asked, scorers, **options)


def test_prompts_may_come_one_by_one_and_scores_may_be_truth_values(
    tiny: LoadedModel, prompts: list[str]
) -> None:
    steering = {3: numpy.ones(tiny.model.config.hidden_size)}
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "max_tokens": 2, "brittleness": False}
    scorers = {"said": lambda text: bool(text), "held": lambda text: numpy.bool_(not text)}
    found = measure(tiny.model, steering, (prompt for prompt in prompts[:2]), scorers, **options)
    assert found.prompts == 2
    assert found.effects["said"].plain.value == 1 - found.effects["held"].plain.value
