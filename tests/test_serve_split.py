"""A server whose model is split over two processes answers as one with the whole model; they begin and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serve_split_job
import torch
from click.testing import CliRunner
from server_calls import ENDLESS, PROMPT, call, streaming, until
from server_process import ServerProcess, serving
from test_ranks import JOB, LAUNCHED

from mechanex.bundled import data_path
from mechanex.cli import main
from mechanex.engine.datasets import read_pairs
from mechanex.engine.generate import generate
from mechanex.engine.models.resolve import load
from mechanex.engine.vectors import SteeringVector

START = [*JOB, "2", str(Path(serve_split_job.__file__))]
N_VECTORS = 4
GREEDY = {"temperature": 0, "max_tokens": 24}
TALK = [{"role": "user", "content": "Anna went to the market. What did she buy, and was she calm about it?"}]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors for every client: of one layer and of two, with a schedule, and one that is clamped."""
    folder, draw = tmp_path_factory.mktemp("vectors"), torch.Generator().manual_seed(0)
    for i in range(N_VECTORS):
        layers = {layer: torch.randn(128, generator=draw) for layer in range(1 + i, 2 + i + i % 2)}
        SteeringVector(layers).save(folder / f"v{i}.safetensors")
    one = SteeringVector({3: torch.randn(128, generator=draw)})
    one.scheduled([1.0, 0.5, 0.0], prompt=0.5).save(folder / "scheduled.safetensors")
    one.clamping().save(folder / "clamped.safetensors")
    SteeringVector({3: 2e32 * one[3] / one[3].abs().max()}).save(folder / "vast.safetensors")
    return folder


@pytest.fixture(scope="module")
def options(vectors: Path) -> list[str]:
    return ["--vectors", str(vectors), "--behaviors", "calm_angry", "--pinecone-index", "shelf"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Iterator[ServerProcess]:
    with serving("--tp", *options, home=tmp_path_factory.mktemp("split"), start=START) as running:
        yield running
        os.kill(of_rank(running, 0), signal.SIGTERM)
        assert ended(running, 60) == 0, running.output()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Iterator[ServerProcess]:
    with serving(*options, home=tmp_path_factory.mktemp("whole")) as running:
        yield running


def of_rank(server: ServerProcess, rank: int) -> int:
    """The id of a process that torchrun has started."""
    parent = server.process.pid
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"there is no process {rank}")


def ended(server: ServerProcess, seconds: float) -> int:
    """The exit code of a server that ends by itself; torchrun's is 0 only where that of each process is."""
    try:
        return server.process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the server has not ended in {seconds} s:\n{server.output()}") from None


def asked(server: ServerProcess, path: str, body: Any, status: int = 200) -> Any:
    found, _, answer = call(server, "POST", path, body)
    assert found == status, answer
    return json.loads(answer)


OWN = {"id", "created", "created_at", "steering_vector_id"}


def check_same(one: Any, other: Any, at: str = "") -> None:
    """Two answers say the same, numbers to rounding, but for what is each one's own."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for name in one.keys() - OWN:
            check_same(one[name], other[name], f"{at}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            check_same(a, b, f"{at}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-3, rel=2e-3), at
    else:
        assert one == other, at


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that are made at the same time."""
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, one=one: found.update({i: one()}))  # type: ignore[misc]
        for i, one in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[i] for i in range(len(calls))]


def steered(i: int) -> dict[str, Any]:
    return {
        "prompt": f"{PROMPT} {'She'[: i % 4]}",
        "steering_vector": f"v{i % N_VECTORS}",
        "steering_strength": 0.1 * i,
    }


CONDITION = {"vector": "v1", "layer": 2}
ASKED: dict[str, dict[str, Any]] = {
    "plain": {"prompt": PROMPT},
    "chat": {"messages": TALK},
    "tokens": {"prompt": [5, 90, 17, 44], "return_token_ids": True},
    "drawn": {"prompt": PROMPT, "temperature": 0.9, "top_p": 0.9, "seed": 7, "n": 2},
    "penalties": {"prompt": PROMPT, "frequency_penalty": 1.0, "logit_bias": {"40": 3}, "min_tokens": 4},
    "stop": {"prompt": PROMPT, "stop": [" the", "."], "max_tokens": 60},
    "logprobs": {"prompt": PROMPT, "logprobs": 3, "echo": True},
    "grammar": {"prompt": PROMPT, "guided_choice": [" yes, it was", " no, it was not"]},
    "several": {
        "prompt": PROMPT,
        "steering": [
            {"vector": "v1", "strength": 0.3, "tokens": [-1, None]},
            {"vector": "v3", "strength": -0.4, "layers": [5]},
        ],
    },
    "scheduled": {"prompt": PROMPT, "steering_vector": "scheduled"},
    "clamped": {"prompt": PROMPT, "steering_vector": "clamped", "steering_strength": 0.5},
    "met": {"prompt": PROMPT, **steered(3), "steering_condition": {**CONDITION, "threshold": -1}},
    "not met": {"prompt": PROMPT, **steered(3), "steering_condition": {**CONDITION, "threshold": 1}},
    "behavior": {"prompt": PROMPT, "behavior_names": ["calm_angry"], "steering_strength": 0.5},
    "inside": {
        **steered(5),
        "return": {"activations": [{"layer": 3, "vector_ids": ["v1"], "raw": True}], "logit_differences": 2},
    },
}


@pytest.mark.ci
@pytest.mark.parametrize("what", ASKED)
def test_answers_are_those_of_the_whole_model(split: ServerProcess, whole: ServerProcess, what: str) -> None:
    body = GREEDY | ASKED[what]
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    check_same(asked(split, path, body), asked(whole, path, body))


@pytest.mark.ci
def test_clients_at_once_are_steered_each_its_own_way(split: ServerProcess, vectors: Path) -> None:
    """With the texts that one process writes, each by itself."""
    n = 8
    texts = at_once(
        *(
            lambda i=i: asked(split, "/v1/completions", GREEDY | steered(i))["choices"][0]["text"]
            for i in range(n)
        )
    )
    loaded = load("mx-tiny", backend="transformers", dtype="float32")
    for i, text in enumerate(texts):
        body = steered(i)
        vector = SteeringVector.load(vectors / f"{body['steering_vector']}.safetensors")
        alone = generate(
            loaded.model,
            loaded.tokenizer,
            body["prompt"],
            vector=vector,
            strength=body["steering_strength"],
            sampling_method="greedy",
            max_tokens=GREEDY["max_tokens"],
        )
        assert alone == body["prompt"] + text
    assert len(set(texts)) > n // 2


@pytest.mark.ci
def test_streams_have_the_text_of_the_whole(split: ServerProcess) -> None:
    body = GREEDY | steered(4) | {"n": 2, "temperature": 0.7, "seed": 3}
    wanted = [one["text"] for one in asked(split, "/v1/completions", body)["choices"]]
    _, _, raw = call(split, "POST", "/v1/completions", body | {"stream": True})
    events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
    found = ["", ""]
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["text"]
    assert found == wanted and len(events) > 2


@pytest.mark.ci
def test_a_client_that_leaves_and_one_with_a_bad_request_disturb_nobody(
    split: ServerProcess, whole: ServerProcess
) -> None:
    bodies = [GREEDY | steered(i) for i in range(3)]
    wanted = [asked(whole, "/v1/completions", body) for body in bodies]
    with streaming(split, ENDLESS):
        found = at_once(*(lambda body=body: asked(split, "/v1/completions", body) for body in bodies))
    check_same(found, wanted)
    until(lambda: split.metric("mechanex_running_requests") == 0)
    strong = GREEDY | {"prompt": PROMPT, "steering": 2 * [{"vector": "vast", "strength": 1e6}]}
    found = at_once(
        *(lambda body=body: asked(split, "/v1/completions", body) for body in bodies),
        lambda: asked(split, "/v1/completions", strong, 400),
        lambda: asked(split, "/v1/completions", GREEDY | {"prompt": PROMPT, "steering_vector": "none"}, 400),
    )
    check_same(found[:3], wanted)
    assert "not finite" in found[3]["error"]["message"]


@pytest.mark.ci
def test_a_second_turn_goes_on_from_what_was_read(split: ServerProcess, whole: ServerProcess) -> None:
    for extra in ({}, {"steering_vector": "v0", "steering_strength": 0.5}):
        talk, cached = list(TALK), []
        for turn in ("And then?", "Why?"):
            body = GREEDY | {"messages": talk} | extra
            found, wanted = (asked(one, "/v1/chat/completions", body) for one in (split, whole))
            check_same(found, wanted)
            talk += [found["choices"][0]["message"], {"role": "user", "content": turn}]
            cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[1] > len(TALK[0]["content"].split())


@pytest.mark.ci
def test_other_work_is_done_by_all_processes_between_steps(
    split: ServerProcess, whole: ServerProcess
) -> None:
    pairs = read_pairs(data_path("calm_angry"), split="train")
    examples = {
        "prompts": pairs.prompts[:8],
        "positive_answers": pairs.positive_answers[:8],
        "negative_answers": pairs.negative_answers[:8],
    }
    steering = [{"vector": "v1", "strength": 0.5}]
    calls: list[tuple[str, Any]] = [
        ("/v1/embeddings", {"input": [PROMPT, "She was calm."], "layer": 4}),
        ("/page/compare", {"prompt": PROMPT, "answers": [" She bought bread."], "steering": steering}),
        (
            "/page/sweep",
            {
                "prompt": PROMPT,
                "answer": " She bought bread.",
                "vector": "v1",
                "strengths": [-1, 1],
                "examples": examples,
            },
        ),
        ("/steering/generate", {**examples, "method": "caa", "layer_idxs": [2, 4]}),
        ("/behaviors/create", {**examples, "behavior_name": "calm", "description": "calm answers"}),
    ]
    long = GREEDY | {
        "prompt": PROMPT,
        "max_tokens": 100,
        "logit_bias": {"1": -100, "5": -100},
        "stream": True,
    }
    texts: list[bytes] = []
    for server in (split, whole):
        decoding = threading.Thread(
            target=lambda one=server: texts.append(call(one, "POST", "/v1/completions", long)[2])
        )
        decoding.start()
        found = [asked(server, path, body) for path, body in calls]
        decoding.join(120)
        made = {"steering_vector": found[3]["steering_vector_id"], "steering_strength": 2.0}
        found.append(asked(server, "/v1/completions", GREEDY | {"prompt": PROMPT} | made))
        for action in ("correct", "abort", "report"):
            watched = {"behavior_names": ["calm"], "behavior_action": action, "behavior_scores": True}
            found.append(asked(server, "/v1/completions", GREEDY | {"prompt": pairs.prompts[50]} | watched))
        if server is split:
            ours = found
    check_same(ours, found)
    written = [
        "".join(
            json.loads(line[6:])["choices"][0]["text"]
            for line in raw.decode().splitlines()
            if line.startswith("data: {")
        )
        for raw in texts
    ]
    assert written[0] == written[1]


@pytest.mark.ci
def test_what_needs_the_whole_model_says_so(split: ServerProcess) -> None:
    body = {"clean_prompt": "She was calm.", "corrupted_prompt": "She was angry."}
    told = asked(split, "/attribution-patching/scores", body, 400)
    assert "of a model that is split over processes" in told["detail"]
    asking = {"qa_entries": [{"question": "What did Anna buy?"}], "pinecone_index_name": "shelf"}
    assert "give docs" in asked(split, "/raag/generate", asking, 501)["detail"]


@pytest.mark.ci
def test_silence_ends_nothing(split: ServerProcess, whole: ServerProcess) -> None:
    """Longer than a process waits for another one's word."""
    time.sleep(serve_split_job.PATIENCE + 1)
    check_same(*(asked(one, "/v1/completions", GREEDY | steered(1)) for one in (split, whole)))


@pytest.mark.ci
def test_sigterm_ends_all_processes(tmp_path: Path) -> None:
    with serving("--tp", home=tmp_path, start=START) as running:
        asked(running, "/v1/completions", GREEDY | {"prompt": PROMPT})
        os.kill(of_rank(running, 0), signal.SIGTERM)
        assert ended(running, 60) == 0, running.output()
        assert "Traceback" not in running.output() and running.output().count("Serving mx-tiny") == 1


@pytest.mark.ci
def test_a_process_that_is_killed_ends_the_server(tmp_path: Path) -> None:
    with serving("--tp", home=tmp_path, start=START) as running, streaming(running, ENDLESS):
        os.kill(of_rank(running, 1), signal.SIGKILL)
        assert ended(running, 30) != 0
        assert "Error: another process of the split model can't be reached" in running.output()


@pytest.mark.ci
@pytest.mark.parametrize("ranks", ["0,1", "0", "1"])
def test_sigterm_ends_all_processes_in_the_midst_of_a_pass(ranks: str, tmp_path: Path) -> None:
    """Those that wait in it for another one's part too."""
    stuck = tmp_path / "stuck"
    environment = {serve_split_job.STUCK: str(stuck), serve_split_job.STUCK_IN: ranks}
    with serving("--tp", home=tmp_path, start=START, environment=environment) as running:
        with streaming(running, ENDLESS):
            stuck.touch()
            until(lambda: stuck.read_text() == "begun")
            os.kill(of_rank(running, 0), signal.SIGTERM)
            assert ended(running, 40) == 0, running.output()
        assert "Traceback" not in running.output()


@pytest.mark.ci
def test_a_thread_of_the_model_that_fails_ends_all_processes_with_an_error(tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    environment = {serve_split_job.FAILING: str(failing)}
    with serving("--tp", home=tmp_path, start=START, environment=environment) as running:
        failing.touch()
        status, _, answer = call(running, "POST", "/v1/completions", GREEDY | {"prompt": PROMPT})
        assert status == 503 and "model thread has failed" in str(answer)
        assert ended(running, 60) != 0
        assert "Error: the model's thread has failed" in running.output()


def test_a_split_server_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for extra, said in (
        ([], "torchrun --nproc-per-node 2 -m mechanex serve mx-tiny --tp"),
        (["--use-vllm"], "--tensor-parallel-size=2 in the place of --tp"),
        (["--device", "cpu"], "leave --device out"),
    ):
        result = CliRunner().invoke(main, ["serve", "mx-tiny", "--tp", *extra])
        assert result.exit_code == 1 and said in result.stderr
