"""What the server keeps of its clients' steering, beyond what its answers need."""

from __future__ import annotations

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
