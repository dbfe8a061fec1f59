"""Vectors that act on terms: gates, caps, rotations, schedules; what they do to a stream, and their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import D_MODEL, N_LAYERS, build, tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from mechanex import SteeringVector, ValidationError
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.generate import generate
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.schedules import Schedule
from mechanex.engine.terms import TokenGate
from mechanex.vllm.asked import FIELD, AskedEdit, edits_of
from mechanex.vllm.capacity import Capacity
from mechanex.vllm.engine_vectors import EngineVectors, SteerBy
from mechanex.vllm.units import unpacked

X = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
V, W = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(1))
LAYER = 2
PROMPT = "He knew every child by name, and the old man at the"


def projections(x: torch.Tensor) -> torch.Tensor:
    return x @ (V / V.norm())


def test_a_cap_holds_projections_on_one_side_and_leaves_the_others_alone() -> None:
    for options, bound in (({"at_most": 0.5}, torch.clamp_max), ({"at_least": -0.5}, torch.clamp_min)):
        edited = Edit.cap(V, **options).apply(X)
        (limit,) = options.values()
        torch.testing.assert_close(projections(edited), bound(projections(X), limit), atol=1e-5, rtol=1e-5)
        inside = bound(projections(X), limit) == projections(X)
        assert 0 < inside.sum() < len(X)
        assert torch.equal(edited[inside], X[inside])
    with pytest.raises(ValidationError, match="one bound"):
        Edit.cap(V, at_most=1.0, at_least=0.0)


def test_a_rotation_turns_by_its_angle_and_keeps_the_norm_and_what_is_outside_of_the_plane() -> None:
    plane = torch.linalg.qr(torch.stack([W, V], 1))[0]
    for degrees in (30.0, 90.0, 180.0, -45.0):
        edited = Edit.rotate(V, W, degrees).apply(X)
        torch.testing.assert_close(edited.norm(dim=1), X.norm(dim=1))
        inside, turned = X @ plane, edited @ plane
        torch.testing.assert_close(edited - turned @ plane.T, X - inside @ plane.T, atol=1e-5, rtol=1e-5)
        cosines = torch.cosine_similarity(inside, turned)
        torch.testing.assert_close(cosines, torch.full_like(cosines, math.cos(math.radians(degrees))))
    quarter = Edit.rotate(V, V + W, 0.0).apply(X)
    assert torch.equal(quarter, X)
    # From W towards V: W turned by the angle between them is V's direction.
    angle = math.degrees(math.acos(float(torch.cosine_similarity(V, W, dim=0))))
    turned = Edit.rotate(V, W, angle).apply((W / W.norm())[None])
    torch.testing.assert_close(turned, (V / V.norm())[None], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValidationError, match="parallel"):
        Edit.rotate(V, 2 * V, 10.0)


def edited(vector: SteeringVector, strength: float = 1.0) -> torch.Tensor:
    (one,) = vector.plan(build("llama"), strength).interventions
    return one.edit.apply(X)


def test_what_vectors_do_to_each_token_on_their_terms() -> None:
    vector = SteeringVector({LAYER: V})
    assert torch.equal(edited(vector, 0.5), X + 0.5 * V)
    over = (projections(X) > 0.3)[:, None]
    gated = edited(vector.when(TokenGate.above(V, 0.3)), 0.5)
    assert torch.equal(gated, torch.where(over, X + 0.5 * V, X))
    soft = edited(vector.when(TokenGate("sigmoid", W, 0.1)), 2.0)
    torch.testing.assert_close(soft, X + 2 * torch.sigmoid(X @ W + 0.1)[:, None] * V)
    kept = edited(vector.keeping_norm())
    torch.testing.assert_close(kept.norm(dim=1), X.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(kept, X + V), torch.ones(len(X)))
    capped = edited(SteeringVector.capping({LAYER: V}, at_most=0.5))
    torch.testing.assert_close(capped, Edit.cap(V, at_most=0.5).apply(X))
    turned = edited(vector.rotating({LAYER: W}, 20.0), 1.5)
    torch.testing.assert_close(turned, Edit.rotate(V, W, 30.0).apply(X))
    for factor in (1.5, -2.0):
        scaled = edited(factor * vector.rotating({LAYER: W}, 20.0))
        torch.testing.assert_close(scaled, Edit.rotate(V, W, 20.0 * factor).apply(X))


def test_terms_stay_with_a_vector_or_are_refused() -> None:
    vector = SteeringVector({LAYER: V, 3: W}).when({LAYER: TokenGate.above(V, 0.3)})
    assert (2 * vector).terms.gates.keys() == {LAYER}
    assert not vector.restricted([3]).terms.gates
    with pytest.raises(ValidationError, match="different terms"):
        _ = vector + SteeringVector({LAYER: V})
    with pytest.raises(ValidationError, match="already"):
        vector.when(TokenGate("norm"))
    with pytest.raises(ValidationError, match="wide"):
        SteeringVector({LAYER: V}).when(PromptCondition(1, torch.ones(3), 0.0))
    with pytest.raises(ValidationError, match="second vector"):
        vector.rotating({LAYER: W}, 10.0)
    with pytest.raises(ValidationError, match="needs a weight"):
        TokenGate("sigmoid")
    with pytest.raises(ValidationError, match="while the engine generates"):
        SteeringVector({LAYER: V}).when(PromptCondition(1, W, 0.0)).apply(build("llama"))


def in_vllm(vector: SteeringVector, strength: float = 1.0) -> tuple[AskedEdit, Tensor]:
    """How a request carries a vector there, the last of its edits, and what becomes of X by them."""
    vectors = EngineVectors(D_MODEL, 4, Capacity(rank=2, gates=True))
    carried = vectors.asked(SteerBy(vectors.add(vector), strength))
    assert carried.fields
    hidden = X
    for asked in edits_of(carried.fields[FIELD]):
        edit = unpacked(carried.missing[asked.key])[LAYER]
        hidden = hidden + asked.strength * (edit.apply(hidden) - hidden)
    return asked, hidden


@pytest.mark.parametrize("strength", [1.0, -0.5, 2.5])
def test_vllm_does_what_a_vector_says(strength: float) -> None:
    vector = SteeringVector({LAYER: V})
    for one in (
        vector,
        vector.when(TokenGate.above(V, 0.3)),
        vector.clamping(),
        vector.clamping().when(TokenGate.above(V, 0.3)),
        vector.rotating({LAYER: W}, 9),
    ):
        plan = one.plan(build("llama"), strength)
        (wanted,) = [i.edit.apply(X) for i in plan.interventions]
        torch.testing.assert_close(in_vllm(one, strength)[1], wanted, rtol=1e-4, atol=1e-5)
    assert in_vllm(vector.on_tokens("generated"))[0].tokens == slice(-1, None)


def test_vllm_refuses_what_changes_along_a_text() -> None:
    vector = SteeringVector({LAYER: V})
    for one in (vector.when(PromptCondition(1, W, 0.0)), vector.scheduled([1])):
        with pytest.raises(ValidationError, match="vLLM"):
            in_vllm(one)


@pytest.mark.parametrize("make", ["gate", "cap", "rotation", "schedule", "condition"])
def test_a_file_keeps_the_terms(make: str, tmp_path: Path) -> None:
    plain = SteeringVector({LAYER: V, 3: W}, model="m", seed=3, metadata={"note": "n"})
    vector = {
        "gate": lambda: plain.when({LAYER: TokenGate("sigmoid", W, 0.25), 3: TokenGate("norm")}),
        "cap": lambda: SteeringVector.capping({LAYER: V}, at_least=0.5, model="m", metadata={"note": "n"}),
        "rotation": lambda: plain.rotating({LAYER: W, 3: V}, 25.0),
        "schedule": lambda: plain.scheduled([1.0, 0.5], prompt=0.0),
        "condition": lambda: plain.when(PromptCondition(1, W, 0.1, 0.02, 0.97)),
    }[make]()
    path = tmp_path / "v.safetensors"
    vector.save(path)
    found = SteeringVector.load(path)
    assert found == vector
    assert found.terms.text() == vector.terms.text()
    assert found.terms.tensors().keys() == vector.terms.tensors().keys()
    for name, tensor in vector.terms.tensors().items():
        assert torch.equal(found.terms.tensors()[name], tensor)
    assert found.metadata == {"note": "n"}
    for suffix in (".json", ".gguf"):
        with pytest.raises(ValidationError, match="safetensors"):
            vector.save(tmp_path / f"v{suffix}")
    if vector.terms.tensors():
        data = bytearray(path.read_bytes())
        name = next(iter(vector.terms.tensors())).encode()
        at = data.index(b"terms." + name)
        data[at + 6 : at + 7] = b"x"
        path.write_bytes(bytes(data))
        with pytest.raises(ValidationError, match=r"checksum|terms"):
            SteeringVector.load(path)


def test_a_plain_vectors_file_is_what_it_was(tmp_path: Path) -> None:
    SteeringVector({LAYER: V}).save(tmp_path / "v.safetensors")
    data = (tmp_path / "v.safetensors").read_bytes()
    assert b'"format_version":"2"' in data and b"terms" not in data


# Schedules

STRENGTHS = (2.0, 1.0, 0.0, 0.5)


def by_whole_passes(model: Any, ids: list[int], n: int, strength_at: Any) -> list[int]:
    """Greedy text, each token from a whole pass whose every token is edited by its own strength."""
    chosen: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            text = [*ids, *chosen]
            plan = SteeringPlan(
                Intervention(LAYER, Edit.add(V * strength_at(at - (len(ids) - 1))), tokens=at)
                for at in range(len(text))
            )
            with plan.apply(model):
                logits = model(input_ids=torch.tensor([text])).logits
            chosen.append(int(logits[0, -1].argmax()))
    return chosen


def written(model: Any, prompts: list[list[int]], steering: tuple[Steer, ...], n: int = 6) -> list[list[int]]:
    requests = [TextRequest(ids, max_tokens=n, steering=steering) for ids in prompts]
    rows = [Row(one, tiny_tokenizer(), (), prompt=(i, len(prompts))) for i, one in enumerate(requests)]
    decode(adapter_for(model), rows, 0)
    return [row.chosen for row in rows]


def steers(vector: SteeringVector, model: Any, strength: float = 1.0) -> tuple[Steer, ...]:
    found = vector.plan(model, strength).interventions
    return tuple(Steer(i.layer, i.edit, i.tokens, i.varying, i.condition) for i in found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_a_scheduled_strength_is_in_force_at_its_token(family: str) -> None:
    model = build(family)
    prompts = [list(tiny_tokenizer()(text).input_ids) for text in (PROMPT, "She")]
    vector = SteeringVector({LAYER: V}).scheduled(STRENGTHS, prompt=0.25)
    expected = [
        by_whole_passes(model, ids, 6, lambda i: 0.25 if i < 0 else STRENGTHS[min(i, 3)]) for ids in prompts
    ]
    plain = written(model, prompts, ())
    assert written(model, prompts, steers(vector, model)) == expected
    assert [written(model, [ids], steers(vector, model))[0] for ids in prompts] == expected
    assert expected != plain

    function = SteeringVector({LAYER: V}).scheduled(lambda i: 2.0 if i % 2 else 0.0)
    expected = [by_whole_passes(model, ids, 6, lambda i: 2.0 if i % 2 else 0.0) for ids in prompts]
    assert written(model, prompts, steers(function, model)) == expected


def test_a_schedule_steers_transformers_own_generate_too() -> None:
    model = build("llama")
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    vector = SteeringVector({LAYER: V}).scheduled(STRENGTHS, prompt=0.25)
    with vector.apply(model):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert [found[0, ids.shape[1] :].tolist()] == written(model, [ids[0].tolist()], steers(vector, model))


def test_a_constant_schedule_is_the_vector() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    vector = SteeringVector({LAYER: V})
    options: dict[str, Any] = {"sampling_method": "greedy", "max_tokens": 8, "strength": 1.5}
    texts = [
        generate(model, tokenizer, PROMPT, vector=one, **options)
        for one in (vector, vector.scheduled([1.0]), vector.scheduled(lambda i: 1.0))
    ]
    assert len(set(texts)) == 1


def test_what_is_no_schedule_is_refused() -> None:
    for values in ([], [math.nan], ["a"]):
        with pytest.raises(ValidationError, match="schedule"):
            Schedule(values)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="list"):
        SteeringVector({1: torch.ones(N_LAYERS)}).scheduled(lambda i: 1.0).save("v.safetensors")


def test_vectors_of_the_same_terms_add_up_and_of_others_do_not(tmp_path: Path) -> None:
    v = SteeringVector({1: torch.randn(8)}).when(TokenGate("sigmoid", torch.ones(8), 0.5))
    assert (2 * v - v).allclose(v) and (2 * v - v).terms.gates[1].offset == 0.5
    v.save(tmp_path / "v.safetensors")
    assert (SteeringVector.load(tmp_path / "v.safetensors") + v).allclose(2 * v)
    for other in (
        SteeringVector(dict(v)),
        SteeringVector(dict(v)).when(TokenGate("sigmoid", torch.ones(8), 0.4)),
    ):
        with pytest.raises(ValidationError, match="don't add up"):
            v + other
    turned = SteeringVector(dict(v)).rotating({1: torch.randn(8)}, 30)
    with pytest.raises(ValidationError, match=r"rotations.*don't add up"):
        turned + turned  # whose double turns by 60 degrees
    changing = SteeringVector(dict(v)).scheduled(lambda place: 1.0)
    assert (changing + changing).allclose(2 * changing)
    with pytest.raises(ValidationError, match="don't add up"):
        changing + SteeringVector(dict(v)).scheduled(lambda place: 1.0)


def test_a_field_of_another_tool_that_is_called_terms_says_nothing(tmp_path: Path) -> None:
    save_file({"layer_1": torch.ones(8)}, tmp_path / "v.safetensors", {"terms": "of use"})
    assert not SteeringVector.load(tmp_path / "v.safetensors", site="input").terms
    for name in ("layer_1", "1"):
        save_file({name: torch.ones(8), "terms.gate.1": torch.ones(8)}, tmp_path / "v.safetensors")
        with pytest.raises(ValidationError, match=r"nothing explains: gate\.1"):
            SteeringVector.load(tmp_path / "v.safetensors", site="input")
