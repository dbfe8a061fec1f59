"""The benchmark beside other libraries: ours reads and writes what transformers does with a hook of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mechanex.engine.models.resolve import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import others


@pytest.mark.ci
def test_ours_agrees_with_transformers_and_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_task: others.Task) -> dict[str, others.Work]:
        raise ImportError("no such library")

    libraries = {"mechanex": others.ours, "transformers": others.by_hand, "absent": missing}
    monkeypatch.setattr(others, "LIBRARIES", libraries)
    loaded = load("mx-tiny", backend="transformers", dtype="float32")
    loaded.tokenizer.padding_side = "left"
    vector = torch.randn(loaded.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    chats = ["Peter looked out of the window.", "Clara walked into the bakery on Monday."]
    task = others.Task(
        loaded.model, loaded.tokenizer, ["Tom came home.", "It rained."], chats, 3, 0.3 * vector, 8
    )
    found = others.measured(task, rounds=1)
    assert found["failed"] == {"absent": "ImportError: no such library"}
    rows = {(row["task"], row["library"]): row for row in others.compared(found)}
    assert rows["mean", "mechanex"]["agrees"] < 1e-5 and rows["mean", "mechanex"]["layers"] == 6
    assert rows["write", "mechanex"]["agrees"] == 1
    assert all(found["results"]["mechanex"]["write"])
