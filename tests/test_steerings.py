"""What the server keeps of its clients' steering, beyond what its answers need."""

from __future__ import annotations

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
