"""Engines of several processes, compiled code, and two workers: what one worker in one process says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import Case, batch, by_transformers, by_vllm, hf_model, vectors


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return batch(vectors())


@pytest.fixture(scope="module")
def truth(folder: Path, cases: list[Case]) -> list[list[int]]:
    return [by_transformers(hf_model(folder), case) for case in cases]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"enforce_eager": False}, id="compiled"),
        pytest.param({"tensor_parallel_size": 2}, id="tensor parallel"),
        # In eager mode, with a cache of a given size, vLLM skips the warm-up that makes what stages hand on.
        pytest.param({"pipeline_parallel_size": 2, "enforce_eager": False}, id="pipeline parallel"),
    ],
)
def test_the_same_answers(
    engines: Any,
    folder: Path,
    cases: list[Case],
    truth: list[list[int]],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    llm = engines(folder, steering_rank=2, steering_gates=True, **options)
    for name, edits in vectors().items():
        llm.register(edits, name)
    assert by_vllm(llm, cases) == truth
    assert by_vllm(llm, cases[::-1]) == truth[::-1]
    engines.close()
