"""What the server keeps of its clients' steering, beyond what its answers need."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

from mechanex.engine.memory import tensor_bytes
from mechanex.engine.models import adapter_for
from mechanex.engine.vector_store import VectorStore
from mechanex.engine.vectors import SteeringVector
from mechanex.server.library import steerings as module
from mechanex.server.library.steerings import Steerings
from mechanex.server.settings import ServerSettings


def test_many_strengths_of_a_vector_take_no_more_memory_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(build("llama"))
    layers = range(adapter.n_layers)
    vector = SteeringVector({layer: torch.randn(adapter.d_model) for layer in layers})
    each = adapter.n_layers * adapter.d_model * 4
    monkeypatch.setattr(module, "_MOST_EDIT_BYTES", 10 * each)
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    alive: list[weakref.ref[Any]] = []
    for i in range(1024):
        alive += [weakref.ref(steer.edit) for steer in kept.edits(vector, 1 + i / 100)]
    edits = [edit for ref in alive if (edit := ref()) is not None]
    assert tensor_bytes(tensor for edit in edits for tensor in edit.tensors) <= 10 * each
    latest, again = kept.edits(vector, 1 + 1023 / 100), kept.edits(vector, 1 + 1023 / 100)
    assert all(one.edit is other.edit for one, other in zip(latest, again, strict=True))  # rows share them


def test_vectors_without_many_numbers_are_kept_by_their_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(build("llama"))
    vector = SteeringVector({1: torch.randn(adapter.d_model)})
    monkeypatch.setattr(module, "_MOST_KEPT", 10)
    kept = Steerings(adapter, ServerSettings(), None, VectorStore(tmp_path))
    alive = [weakref.ref(kept.edits(vector, 1 + i / 100)[0].edit) for i in range(100)]
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 10
    assert kept.edits(vector, 1.99)[0].edit is alive[-1]()


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
