"""Sixty-four clients at once, each steered its own way: every greedy answer is the one that its request gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_process import ServerProcess, serving
from serving_data import NAMES, tone_vectors
from serving_load import Job, load, prompt_of, solo_answers

from mechanex.engine.models.resolve import load as load_model

pytestmark = [pytest.mark.ci, pytest.mark.slow]

N_CLIENTS = 64
SECONDS = 3


@pytest.fixture(scope="module")
def local() -> Any:
    return load_model("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def vectors(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vectors")
    return folder, tone_vectors(local.model, local.tokenizer, folder)


@pytest.fixture(scope="module")
def server(vectors: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ("--vectors", str(vectors[0]), "--log-level", "warning")
    with serving(*arguments, home=tmp_path_factory.mktemp("home")) as running:
        yield running


def test_many_clients_get_their_own_answers(local: Any, vectors: Any, server: ServerProcess) -> None:
    # Eight configurations, prompts of 20 and of 200 tokens, answers of different lengths.
    jobs = [
        Job(
            prompt_of(i, 200 if i % 3 == 2 else 20, local.tokenizer),
            NAMES[i % 4],
            (-1.5, 1.0)[i // 4 % 2],
            max_tokens=12 + 4 * (i % 5),
        )
        for i in range(24)
    ]
    expected = solo_answers(jobs, local.model, local.tokenizer, vectors[1])
    assert len({(job.vector, job.strength) for job in jobs}) == 8
    assert len(set(expected.values())) > 15
    answers, _ = load(server.port, jobs, N_CLIENTS, SECONDS)
    assert len(answers) >= N_CLIENTS
    for answer in answers:
        assert (answer.status, answer.errors, answer.done) == (200, [], True)
        assert answer.text == expected[answer.job]
        assert answer.finish_reason in ("stop", "length")
    rows = server.metric("mechanex_batch_rows_sum") / server.metric("mechanex_batch_rows_count")
    assert rows > 8  # they were decoded together
    assert server.metric("mechanex_running_requests") == 0
    assert "Traceback" not in server.output()
