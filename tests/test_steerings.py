"""What the server keeps of its clients' steering, beyond what its answers need."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

from mechanex.engine.decode.request import Steer
from mechanex.engine.intervention import Edit
from mechanex.engine.memory import tensor_bytes
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.schedules import Schedule, Varying
from mechanex.engine.terms import TokenGate
from mechanex.engine.vector_store import VectorStore
from mechanex.engine.vectors import SteeringVector
from mechanex.server.library import steerings as module
from mechanex.server.library.steerings import Steerings
from mechanex.server.settings import ServerSettings


@pytest.fixture
def adapter() -> Iterator[ModelAdapter]:
    yield adapter_for(build("llama"))


@pytest.fixture
def vector(adapter: ModelAdapter) -> SteeringVector:
    layers = range(adapter.n_layers)
    return SteeringVector({layer: torch.randn(adapter.d_model) for layer in layers})


def held(alive: list[weakref.ref[Any]]) -> int:
    """Bytes of the edits that are still there."""
    edits = {id(edit): edit for one in alive if (edit := one()) is not None}
    return tensor_bytes(tensor for edit in edits.values() for tensor in edit.tensors)


@pytest.mark.parametrize("gated", [False, True])
def test_requests_at_many_strengths_hold_one_vector(
    adapter: ModelAdapter, vector: SteeringVector, tmp_path: Path, gated: bool
) -> None:
    if gated:
        vector = vector.when(TokenGate("step", torch.ones(adapter.d_model)))
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    waiting = [kept.edits(vector, 1 + i / 100) for i in range(1024)]
    alive = [weakref.ref(steer.edit) for steers in waiting for steer in steers]
    each = adapter.n_layers * (adapter.d_model * 4 * (1 + gated) + 4 * gated)
    assert held(alive) <= each
    made = [steer.made() for steer in waiting[7]]
    at_once = vector.plan(adapter, 1.07).interventions
    for one, other in zip(made, at_once, strict=True):
        assert all(map(torch.equal, one.tensors, other.edit.tensors))
    assert all(one is steer.made() for one, steer in zip(made, kept.edits(vector, 1.07), strict=True))
    again = weakref.ref(made[0])
    del made, one, at_once
    assert again() is None  # nobody keeps it but who runs it


def test_an_edit_that_was_written_to_is_made_anew(vector: SteeringVector) -> None:
    edit = Edit.add(torch.ones(4))
    steer = Steer(1, edit, strength=2.0)
    before = steer.made()
    edit.bias.mul_(3)
    assert before.bias.tolist() == [2.0] * 4 and steer.made().bias.tolist() == [6.0] * 4


def test_a_schedule_keeps_no_edits_that_nobody_uses() -> None:
    varying = Varying(Schedule(lambda place: 1.0 + place), lambda s: Edit.add(torch.ones(64) * s))
    first = varying.edit(0)
    assert first is varying.edit(0)
    alive = [weakref.ref(edit) for place in range(500) if (edit := varying.edit(place)) is not None]
    del edit
    assert sum(one() is not None for one in alive) == 1


def test_many_strengths_of_a_clamp_take_no_more_memory_than_allowed(
    adapter: ModelAdapter, vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = vector.clamping()
    each = adapter.n_layers * adapter.d_model * 4 * 3
    monkeypatch.setattr(module, "_MOST_EDIT_BYTES", 10 * each)
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    alive: list[weakref.ref[Any]] = []
    for i in range(1024):
        alive += [weakref.ref(steer.edit) for steer in kept.edits(vector, 1 + i / 100)]
    assert held(alive) <= 10 * each
    latest, again = kept.edits(vector, 1 + 1023 / 100), kept.edits(vector, 1 + 1023 / 100)
    assert all(one.edit is other.edit for one, other in zip(latest, again, strict=True))  # rows share them


def test_vectors_without_many_numbers_are_kept_by_their_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(build("llama"))
    vectors = [SteeringVector({1: torch.randn(adapter.d_model)}) for _ in range(100)]
    monkeypatch.setattr(module, "_MOST_KEPT", 10)
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    alive = [weakref.ref(kept.edits(vector, 2.0)[0].edit) for vector in vectors]
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 10
    assert kept.edits(vectors[-1], 3.0)[0].edit is alive[-1]()


def test_vectors_that_steered_are_not_held(tmp_path: Path) -> None:
    adapter = adapter_for(build("llama"))
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    vector = SteeringVector({1: torch.randn(adapter.d_model), 2: torch.randn(adapter.d_model)})
    alive = weakref.ref(vector)
    same = kept.edits(vector, 2.0)
    again = SteeringVector(dict(vector.items()))
    del vector
    gc.collect()
    assert alive() is None
    assert all(one.edit is other.edit for one, other in zip(same, kept.edits(again, 2.0), strict=True))


def test_a_stored_vector_is_hashed_once_whatever_of_it_is_used(tmp_path: Path) -> None:
    adapter = adapter_for(build("llama"))
    store = VectorStore(tmp_path)
    vector_id = store.put(SteeringVector({1: torch.randn(adapter.d_model), 2: torch.randn(adapter.d_model)}))
    kept = Steerings(adapter, ServerSettings(), None, store)

    async def asked() -> list[Any]:
        steers = await kept.by_vector(None, vector_id, 2.0, layers=[2])
        under = await kept.condition(None, vector_id, 0.1, 1)
        return [*(steer.edit for steer in steers), under]

    first = asyncio.run(asked())
    vector = store.get(vector_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SteeringVector, "restricted", None)  # neither cut
        patch.setattr(torch.Tensor, "numpy", None)  # nor read
        again = asyncio.run(asked())
    assert [id(one) for one in first] == [id(one) for one in again]
    assert vector.digest() == SteeringVector(dict(vector.items())).digest() != (2 * vector).digest()
