"""Vectors without a strength, several at once, plans and lists of prompts, through the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import mechanex
from mechanex import Mechanex, SteeringVector, ValidationError
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.prompt_conditions import PromptCondition

PROMPT = "Anna went to the market"


@pytest.fixture(scope="module")
def client() -> Iterator[Mechanex]:
    made = Mechanex()
    made.load("mx-tiny", backend="transformers")
    made.set_execution_mode("local")
    yield made


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    return SteeringVector({3: 6 * direction / direction.norm()})


def write(client: Mechanex, prompt: Any = PROMPT, **given: Any) -> Any:
    return client.generation.generate(prompt, 12, "greedy", **given)


def test_a_vector_without_a_strength_steers_at_1(client: Mechanex, vector: SteeringVector) -> None:
    whole = write(client, steering_vector=vector, steering_strength=1)
    assert write(client, steering_vector=vector) == whole != write(client)


def test_both_names_of_the_strength_work_but_not_together(client: Mechanex, vector: SteeringVector) -> None:
    other = write(client, steering_vector=vector, steering_strength=-1.5)
    assert write(client, steering_vector=vector, strength=-1.5) == other
    with pytest.raises(ValidationError, match="two names of one argument"):
        write(client, steering_vector=vector, strength=1, steering_strength=1)


@pytest.mark.parametrize("name", ["strength", "steering_strength"])
def test_a_0_that_is_written_steers_nothing_and_warns(
    client: Mechanex, vector: SteeringVector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert write(client, steering_vector=vector, **{name: 0}) == write(client)
    assert "strength 0" in caplog.text


def test_a_strength_without_a_vector_is_refused(client: Mechanex) -> None:
    with pytest.raises(ValidationError, match="no steering_vector"):
        write(client, strength=2)


def test_the_documented_default_reads_as_0() -> None:
    import inspect

    default = inspect.signature(mechanex.generation.generate).parameters["steering_strength"].default
    assert default == 0 and repr(default) == "0" and json.dumps(default) == "0"


def test_a_list_of_prompts_gives_what_each_gives_alone(client: Mechanex, vector: SteeringVector) -> None:
    prompts = [PROMPT, client.tokenizer("The old man").input_ids, [{"role": "user", "content": "Hello"}]]
    kept = [one for one in prompts if not isinstance(one[0], dict) or client.tokenizer.chat_template]
    found = client.generation.generate(kept, 8, seed=3, steering_vector=vector)
    alone = [
        client.generation.generate(one, 8, seed=3 + i, steering_vector=vector) for i, one in enumerate(kept)
    ]
    assert found == alone and isinstance(found, list)
    assert write(client, [PROMPT]) == [write(client)]


def test_a_list_of_prompts_is_not_streamed(client: Mechanex) -> None:
    with pytest.raises(ValidationError, match="stream each"):
        client.generation.generate([PROMPT, PROMPT], stream=True)  # type: ignore[call-overload]


def test_several_vectors_act_together(client: Mechanex, vector: SteeringVector, tmp_path: Path) -> None:
    other = SteeringVector({4: torch.full((128,), 0.4)})
    other.save(tmp_path / "other.safetensors")
    together = write(client, steering_vector=vector + other)
    assert write(client, steering_vector=[vector, tmp_path / "other.safetensors"]) == together
    mixed = write(client, steering_vector=2 * vector - other)
    assert write(client, steering_vector=[vector, other], strength=[2, -1]) == mixed
    with pytest.raises(ValidationError, match="3 strengths and 2 vectors"):
        write(client, steering_vector=[vector, other], strength=[1, 2, 3])


def test_a_plan_steers_generate_as_it_steers_the_model(client: Mechanex, vector: SteeringVector) -> None:
    plan = SteeringPlan(
        [Intervention(3, Edit.add(2 * vector[3])), Intervention(-1, Edit.ablate(vector[3].roll(1)))]
    )
    with plan.apply(client.local_model):  # type: ignore[arg-type]
        applied = write(client)
    assert write(client, steering_vector=plan) == applied != write(client)
    assert write(client, steering_vector=plan, strength=0) == write(client)
    with pytest.raises(ValidationError, match="strengths of their own"):
        write(client, steering_vector=plan, strength=2)


def test_rows_of_a_plan_are_prompts_of_the_list(client: Mechanex, vector: SteeringVector) -> None:
    plan = SteeringPlan([Intervention(3, Edit.add(vector[3]), rows=[1])])
    found = write(client, [PROMPT, PROMPT], steering_vector=plan)
    assert found == [write(client), write(client, steering_vector=vector)]
    with pytest.raises(ValidationError, match="edits row 1"):
        write(client, steering_vector=plan)


def test_plans_save_and_load(client: Mechanex, vector: SteeringVector, tmp_path: Path) -> None:
    v = vector[3]
    parts = [
        Intervention(3, Edit.add(v), tokens=slice(1, None)),
        Intervention(2, Edit.clamp(v, 0.5).gated("sigmoid", v, 0.25), tokens=-1),
        Intervention(5, Edit.dense(v, torch.eye(128) * 0.1)),
        *vector.scheduled([2.0, 0.0, 1.0], prompt=0.5).plan(client.local_model).interventions,  # type: ignore[arg-type]
    ]
    SteeringPlan(parts).save(tmp_path / "plan.safetensors")
    loaded = SteeringPlan.load(tmp_path / "plan.safetensors")
    texts = [write(client, steering_vector=plan) for plan in (SteeringPlan(parts), loaded)]
    assert texts[0] == texts[1] != write(client)
    for one, back in zip(parts, loaded.interventions, strict=True):
        assert (one.layer, one.tokens, one.rows) == (back.layer, back.tokens, back.rows)
        assert all(torch.equal(a, b) for a, b in zip(one.edit.tensors, back.edit.tensors, strict=True))


def test_a_plan_that_was_damaged_is_refused(vector: SteeringVector, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    SteeringPlan([Intervention(3, Edit.add(vector[3]))]).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValidationError, match="checksum"):
        SteeringPlan.load(path)
    vector.save(path)
    with pytest.raises(ValidationError, match=r"SteeringVector\.load reads vectors"):
        SteeringPlan.load(path)


def test_a_schedule_by_a_function_is_no_file(
    client: Mechanex, vector: SteeringVector, tmp_path: Path
) -> None:
    plan = vector.scheduled(lambda place: 1.0).plan(client.local_model)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="function can't be saved"):
        plan.save(tmp_path / "plan.safetensors")


def test_numbers_of_numpy_are_saved_too(vector: SteeringVector, tmp_path: Path) -> None:
    edit = Edit.add(vector[3])
    condition = PromptCondition(
        numpy.int64(2),  # type: ignore[arg-type]
        vector[3],
        numpy.float32(0.25),  # type: ignore[arg-type]
        numpy.float32(0.5),  # type: ignore[arg-type]
    )
    parts = [
        Intervention(numpy.int64(3), edit, rows=numpy.array([0, 2])),  # type: ignore[arg-type]
        Intervention(3, edit, tokens=numpy.int64(2)),  # type: ignore[arg-type]
        Intervention(3, edit, tokens=slice(numpy.int64(1), None, numpy.int8(2)), condition=condition),
    ]
    SteeringPlan(parts).save(tmp_path / "plan.safetensors")
    found = SteeringPlan.load(tmp_path / "plan.safetensors").interventions
    assert [(one.layer, one.tokens, one.rows) for one in found] == [
        (3, None, (0, 2)),
        (3, 2, None),
        (3, slice(1, None, 2), None),
    ]
    kept = found[2].condition
    assert kept is not None and (kept.layer, kept.threshold, kept.false_positives) == (2, 0.25, 0.5)
    vector.when(condition).save(tmp_path / "vector.safetensors")
    assert SteeringVector.load(tmp_path / "vector.safetensors").terms.condition.threshold == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"layer": 1.5}, {"layer": "3"}, {"layer": True}, {"tokens": 1.5}])
def test_an_intervention_says_where_it_is(vector: SteeringVector, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="int"):
        Intervention(**{"layer": 3, "edit": Edit.add(vector[3]), **wrong})


def test_an_empty_list_of_vectors_is_no_unsteered_text(client: Mechanex) -> None:
    with pytest.raises(ValidationError, match="empty list"):
        write(client, steering_vector=[])


def test_text_without_a_tokenizer_says_how_a_client_gets_one(client: Mechanex) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = client.local_model
    bare = Mechanex().set_local_model(AutoModelForCausalLM.from_config(model.config))
    for call in (bare.generation.generate, lambda text: bare.model.activations([text])):
        with pytest.raises(ValidationError, match=r"set_local_model\(model, tokenizer\)"):
            call(PROMPT)
