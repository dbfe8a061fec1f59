"""A server from its start to its end: steering for all, files that come later, signals, and the Python call."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from server_calls import ENDLESS, PROMPT, call, streaming, until
from server_process import serving

from mechanex.bundled import model_path
from mechanex.engine.vectors import SteeringVector

pytestmark = [pytest.mark.ci, pytest.mark.slow]


def test_sigterm_under_load_ends_streams_within_ten_seconds(tmp_path: Path) -> None:
    with serving(home=tmp_path) as running:
        ends: list[bytes] = []

        def follow() -> None:
            with streaming(running, ENDLESS) as client:
                seen = b""
                while piece := client.recv(65536):
                    seen = (seen + piece)[-4000:]
                ends.append(seen)

        clients = [threading.Thread(target=follow) for _ in range(12)]
        for client in clients:
            client.start()
        until(lambda: running.metric("mechanex_running_requests") == 12)
        assert running.stop(signal.SIGTERM, timeout=120) == 0
        for client in clients:
            client.join(300)
        assert len(ends) == 12
        for end in ends:
            assert end.endswith(b"data: [DONE]\n\n")  # finished, or an error event before it
            assert b'"finish_reason":"length"' in end or b"shutting down" in end
        assert "Traceback" not in running.output()


MANY = {
    "prompts": [f"{i} {'the man and the woman went to the market and ' * 40}" for i in range(256)],
    "positive_answers": [" yes"] * 256,
    "negative_answers": [" no"] * 256,
    "layer_idxs": [1, 2, 3, 4],
}


@pytest.mark.parametrize("stuck", [False, True])
def test_sigterm_while_a_vector_is_computed_is_a_clean_end(tmp_path: Path, stuck: bool) -> None:
    """With the usual time to end. Work ends at its next pause, or, in a pass that takes for ever, with the process."""
    begun = tmp_path / "begun"
    program = (
        "import mechanex, pathlib, sys, time\nimport mechanex.engine.few_shot as few\nvisit = few.visit_residuals\n"
        f"def begin(*a, **k):\n    pathlib.Path({str(begun)!r}).touch()\n"
        f"    return time.sleep(600) if {stuck} else visit(*a, **k)\n"
        "few.visit_residuals = begin\n"
    )
    program += "mechanex.Mechanex().serve('mx-tiny', host='127.0.0.1', port=int(sys.argv[2]))\n"
    with serving(home=tmp_path, program=program, fresh=stuck) as running:
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(call(running, "POST", "/steering/generate", MANY))
        )
        asking.start()
        until(begun.exists)  # its examples are read, and the model is at work
        assert running.stop(signal.SIGTERM, timeout=120) == 0, running.output()
        asking.join(300)
        status, _, answer = answers[0]
        assert status == 503 and b"shutting down" in answer
        assert ("the process ends without it" in running.output()) is stuck
        assert "Traceback" not in running.output()


def test_a_damaged_vector_that_comes_later_is_an_error_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    with serving(
        "--vectors",
        str(folder),
        "--behaviors",
        "kind_rude",
        "--corrected-behavior",
        "kind_rude",
        "--log-prompts",
        home=tmp_path,
    ) as running:
        good = SteeringVector({4: torch.ones(128)})
        good.save(folder / "good.safetensors")
        (folder / "bad.safetensors").write_bytes(b"no vector")

        def ask(vector: str) -> tuple[int, dict[str, Any]]:
            body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "steering_vector": vector}
            status, _, answer = call(running, "POST", "/v1/completions", body)
            return status, json.loads(answer)

        assert ask("good")[0] == 200
        status, answer = ask("bad")
        assert status == 500
        assert "bad.safetensors" in answer["error"]["message"]
        assert str(folder) not in answer["error"]["message"]
        # Every answer is steered by the corrected behavior; a request may ask for more of it, and not for less.
        texts = [
            json.loads(
                call(running, "POST", "/v1/completions", {"prompt": PROMPT, "temperature": 0, **extra})[2]
            )
            for extra in (
                {},
                {"behavior_names": ["kind_rude"]},
                {"behavior_names": ["kind_rude"], "steering_strength": 0},
                {"behavior_names": ["kind_rude"], "steering_strength": -4},
                {"behavior_names": ["kind_rude"], "steering_strength": 4},
            )
        ]
        same, more = {one["choices"][0]["text"] for one in texts[:4]}, texts[4]["choices"][0]["text"]
        assert len(same) == 1 and more not in same
        until(lambda: f'"prompt": "{PROMPT}"' in running.output())  # asked for with --log-prompts


def test_serve_of_a_client(tmp_path: Path) -> None:
    program = (
        "import mechanex, sys\n"
        "mx = mechanex.Mechanex()\n"
        "mx.serve('mx-tiny', host='127.0.0.1', port=int(sys.argv[2]), max_batch=3)\n"
        "print('served', mx.model_name)\n"
    )
    with serving(home=tmp_path, program=program) as running:
        assert json.loads(running.get("/v1/models"))["data"][0]["id"] == "mx-tiny"
        assert running.stop(signal.SIGINT) == 0
        assert "served mx-tiny" in running.output()


def test_an_ended_server_leaves_nothing_but_its_log(tmp_path: Path) -> None:
    with serving(home=tmp_path, fresh=True) as running:
        assert call(running, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 4})[0] == 200
        assert running.stop(signal.SIGINT) == 0
        lines = running.output().splitlines()
        (told,) = [line for line in lines if not line.startswith("{")]
        assert told.startswith("Serving mx-tiny at http://127.0.0.1:")
        assert {json.loads(line)["level"] for line in lines if line != told} == {"info"}


def test_the_end_comes_in_the_middle_of_a_body(tmp_path: Path) -> None:
    with serving(home=tmp_path) as running, socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        time.sleep(0.5)
        assert running.stop(signal.SIGTERM, timeout=120) == 0
        assert "Traceback" not in running.output()


def test_a_folders_name_is_the_models(tmp_path: Path) -> None:
    shutil.copytree(model_path("mx-tiny"), tmp_path / "private" / "my-model")
    (tmp_path / "vectors").mkdir()
    SteeringVector({4: torch.ones(128)}).save(tmp_path / "vectors" / "v1.2 calm.safetensors")
    arguments = ("--vectors", str(tmp_path / "vectors"))
    with serving(*arguments, model=str(tmp_path / "private" / "my-model"), home=tmp_path) as running:
        assert json.loads(running.get("/v1/models"))["data"][0]["id"] == "my-model"
        body = {"model": "my-model", "prompt": PROMPT, "max_tokens": 2, "steering_vector": "v1.2 calm"}
        assert call(running, "POST", "/v1/completions", body)[0] == 200


def test_whatever_a_library_says_is_a_line_of_json() -> None:
    code = (
        "import logging, warnings\n"
        "from mechanex.commands.serve import _log_json\n"
        "_log_json('info')\n"
        "from transformers.utils import logging as of_transformers\n"
        "of_transformers.get_logger('transformers.models').warning('of transformers\\nin two lines')\n"
        "warnings.warn('of torch')\n"
        "logging.getLogger('torch').warning('by a logger')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    told = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert done.returncode == 0 and not done.stdout
    for wanted in ("of transformers\nin two lines", "of torch", "by a logger"):
        assert sum(wanted in line for line in told) == 1
