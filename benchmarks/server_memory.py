"""What memory a server comes to under mixed load: after its first minute, and after ten.

    python benchmarks/server_memory.py [--seconds 600] [--first 60] [--json FILE]

Once as it is, where what is kept of answered requests grows up to its limit and is told by ``/metrics``: the rest must
not grow. And once where 32 MiB are kept, which are full in the first minute: nothing must grow.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from server_calls import call
from server_process import ServerProcess, serving
from serving_data import NAMES, tone_vectors

from mechanex.engine.models.resolve import load

MOST_GROWTH = 1.05
N_CLIENTS = 12
SMALL = 32 * 2**20
WORDS = ("Anna", "Tom", "market", "river", "garden", "school", "food", "Rome", "went", "to", "the", "kind")


def requests(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests of every kind, no two alike."""
    numbers = random.Random(seed)
    while True:
        prompt = " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(20, 120)))
        steered = {"steering_vector": numbers.choice(NAMES), "steering_strength": numbers.uniform(-2, 2)}
        base = {"prompt": prompt, "max_tokens": numbers.randint(1, 60)}
        yield "/v1/completions", base | steered
        yield "/v1/completions", base | {"n": 4, "logprobs": 5, "stream": True}
        chat = [{"role": "user", "content": prompt}]
        yield "/v1/chat/completions", {"messages": chat, "max_tokens": 20, "stream": True} | steered
        yield "/v1/completions", base | {"guided_regex": f"[a-z]{{{numbers.randint(1, 1000)}}}"}
        yield "/v1/embeddings", {"input": [prompt] * 3} | steered
        inside = {
            "activations": [{"layer": 4, "vector_ids": [NAMES[0]], "raw": True}],
            "logit_differences": 3,
        }
        yield "/v1/completions", base | steered | {"return": inside}
        strengths = [0.5, numbers.random()]
        sweep = {"prompt": prompt[:200], "answer": "It is good.", "vector": NAMES[1], "strengths": strengths}
        yield "/page/sweep", sweep
        given = {"prompts": [prompt], "positive_answers": [" Yes."], "negative_answers": [" No."]}
        yield "/steering/generate", given | {"method": "caa"}
        yield "/v1/completions", {"prompt": 3}


def memory(server: ServerProcess) -> tuple[float, float]:
    """MiB that the server's process has in memory, and how many of them are kept of answered requests."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return resident / 2**10, server.metric("mechanex_prefix_bytes") / 2**20


def under_load(server: ServerProcess, first: float, seconds: float) -> list[tuple[float, float]]:
    """Memory after the first seconds of mixed load, and after all of them."""
    done = threading.Event()
    wrong: list[tuple[str, int, bytes]] = []

    def client(i: int) -> None:
        for path, body in requests(i):
            if done.is_set():
                return
            try:
                status, _, told = call(server, "POST", path, body)
            except (OSError, http.client.HTTPException) as error:
                status, told = 0, repr(error).encode()
            if status != (400 if body.get("prompt") == 3 else 200):
                wrong.append((path, status, told[:200]))
                done.set()

    found = []
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        clients = [pool.submit(client, i) for i in range(N_CLIENTS)]
        for wait in (first, seconds - first):
            done.wait(wait)  # or until an answer was wrong
            found.append(memory(server))
        done.set()
        for one in clients:
            one.result()
    assert not wrong, wrong[:5]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="of mixed load")
    parser.add_argument("--first", type=float, default=60, help="after which memory is looked at first")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        local: Any = load("mx-tiny", backend="transformers")
        vectors = Path(folder) / "vectors"
        tone_vectors(local.model, local.tokenizer, vectors)
        for name, kept in (("as it is", None), ("32 MiB kept", SMALL)):
            program = (
                "import sys, mechanex\n"
                f"mechanex.Mechanex().serve('mx-tiny', host='127.0.0.1', port=int(sys.argv[2]), "
                f"vectors={str(vectors)!r}, prefix_bytes={kept})\n"
            )
            with serving(home=Path(folder) / f"home {kept}", program=program, fresh=True) as server:
                early, late = under_load(server, options.first, options.seconds)
            net = (late[0] - late[1]) / (early[0] - early[1])
            figures[name] = {"early MiB": early, "late MiB": late, "net growth": net}
            print(
                f"{name}: {early[0]:.0f} MiB after {options.first:.0f} s, of which {early[1]:.0f} kept of answered "
                f"requests; {late[0]:.0f} and {late[1]:.0f} after {options.seconds:.0f} s; the rest grew to {net:.3f} "
                f"(at most {MOST_GROWTH})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
