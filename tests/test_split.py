"""Models that lie in several processes do what they do in one: tensor parallelism and FSDP, over two on CPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import split_job
import torch
from families import build, tiny_tokenizer
from test_ranks import JOB, LAUNCHED, check_alike, results

from mechanex.engine.models.resolve import load
from mechanex.errors import ValidationError

MODELS = ("llama", "qwen3", "gemma", "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models with a tokenizer, as checkpoints."""
    made = tmp_path_factory.mktemp("models")
    for name in (*MODELS, "gpt2"):
        build(name).save_pretrained(made / name)
        tiny_tokenizer().save_pretrained(made / name)
    return made


def job(out: Path, what: str, *folders: Path) -> list[Any]:
    """What two processes found."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [*JOB, "2", str(Path(split_job.__file__)), str(out), what, *map(str, folders)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return results(2, out)


def check_model(folder: Path, found: list[dict[str, Any]]) -> None:
    """What the processes found is the same, and what one finds."""
    told = ("unseeded", "pieces", "after")
    assert all([one[name] for name in told] == [found[0][name] for name in told] for one in found)
    check_alike(found, split_job.found(str(folder)), 1e-4)


@pytest.mark.ci
def test_a_tensor_parallel_model_does_what_it_does_in_one_process(folder: Path, tmp_path: Path) -> None:
    by_rank = job(tmp_path, "tp", *(folder / name for name in MODELS))
    for name in MODELS:
        check_model(folder / name, [one[str(folder / name)] for one in by_rank])


@pytest.mark.ci
def test_a_model_that_is_wrapped_by_fsdp_does_what_it_does_in_one_process(
    folder: Path, tmp_path: Path
) -> None:
    by_rank = job(tmp_path, "fsdp", folder / "llama")
    check_model(folder / "llama", [one[str(folder / "llama")] for one in by_rank])


@pytest.mark.ci
def test_what_needs_a_whole_model_says_so(folder: Path, tmp_path: Path) -> None:
    told, other = job(tmp_path, "refused", folder / "llama", folder / "gpt2")
    assert told == other
    assert "runs only where all of them call it" in told["alone"]
    whole = "of a model that is split over processes"
    assert all(whole in told[name] for name in ("attribution", "orthogonal", "heads", "lens")), told
    assert told["number"] == "tp is 'auto' or the number of processes, 2; got 3."
    assert told["kind"] == "tp is 'auto' or the number of processes that hold the model; got 'all'."
    assert told["device"] == "tp= places the parts of a model itself: leave device= out."
    assert told["plan"].startswith("transformers has no plan to split a gpt2 model over processes")


def test_one_process_splits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValidationError, match=r"and there is one: start the program with torchrun"):
        load("mx-tiny", tp="auto")
    with pytest.raises(ValidationError, match=r"TransformerLens|lens"):
        load("mx-tiny", tp="auto", backend="transformer_lens")
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun --nproc-per-node 1 has it
    assert not any(
        isinstance(one, torch.distributed.tensor.DTensor)
        for one in load("mx-tiny", tp="auto").model.parameters()
    )
