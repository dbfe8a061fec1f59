"""A server under attack: how long /health takes meanwhile, and how long a short request waits.

    python benchmarks/attacked.py [--only NAME …] [--json FILE]

Each attack is bounded and runs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from server_calls import ENDLESS, PROMPT, call
from server_process import ServerProcess, serving

KEY = "a-key-of-the-operator"
PASSWORD = "wrong donkey cell paperclip"
MOST_HEALTH = 0.1
PROBE_EVERY = 0.01
EXAMPLES = {
    "prompts": ["Anna went to the market. " * 40] * 30,
    "positive_answers": [" It was a good day."] * 30,
    "negative_answers": [" It was a bad day."] * 30,
    "layer_idxs": [2],
}


@dataclass
class Target:
    """The server, the keys of two accounts, and an access token of the first."""

    server: ServerProcess
    keys: tuple[str, str]
    token: str

    def ask(self, path: str, body: Any, key: str = KEY) -> int:
        """The status of an answer; 0 where the connection ended."""
        try:
            return call(self.server, "POST", path, body, authorization=f"Bearer {key}")[0]
        except (OSError, http.client.HTTPException):
            return 0

    def all_at_once(self, asks: Sequence[Callable[[], Any]]) -> list[Any]:
        """What calls give that are made together."""
        with ThreadPoolExecutor(len(asks)) as pool:
            return [one.result() for one in [pool.submit(ask) for ask in asks]]


def nested(target: Target) -> None:
    """Lists in lists, where anyone may send and where keys are asked for."""
    bodies = [[[]] * 1_000_000] * 6
    target.all_at_once([lambda b=b: target.ask("/auth/login", {"email": b}) for b in bodies])
    target.all_at_once([lambda b=b: target.ask("/v1/completions", {"prompt": b}) for b in bodies])


def stalled(target: Target) -> None:
    """Bodies that don't come to an end, and heads that don't."""
    head = b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as held:
        for i in range(64):
            one = held.enter_context(socket.create_connection(("127.0.0.1", target.server.port), timeout=60))
            one.sendall(head if i % 2 else head + b"Content-Length: 8000\r\n\r\n" + b"[" * 4000)
        time.sleep(1)


def log_ins(target: Target) -> None:
    """Passwords, each of which is to be hashed."""
    login = {"email": "ann@example.org", "password": "wrong"}
    target.all_at_once([lambda: target.ask("/auth/login", login)] * 50)


def logprobs(target: Target) -> None:
    """As many log-probabilities as are told at once, whole, echoed and streamed."""
    most = {"prompt": PROMPT, "n": 22, "max_tokens": 430, "logprobs": 20, "logit_bias": ENDLESS["logit_bias"]}
    echoed = {"prompt": [7] * 500, "n": 18, "max_tokens": 5, "logprobs": 20, "echo": True}
    asks = [most, echoed, most | {"stream": True}, echoed | {"stream": True}]
    target.all_at_once([lambda body=body: target.ask("/v1/completions", body) for body in asks])


def examples(target: Target) -> None:
    """Vectors of many long examples, by every method, of senders who leave in the middle too."""
    asks = [
        lambda method=method: target.ask("/steering/generate", EXAMPLES | {"method": method})
        for method in ("caa", "few-shot", "probe")
    ]
    with contextlib.ExitStack() as leaving:
        for key in target.keys:
            gone = http.client.HTTPConnection("127.0.0.1", target.server.port, timeout=60)
            leaving.callback(gone.close)
            headers = {"Content-Type": "application/json", "x-api-key": key}
            gone.request("POST", "/steering/generate", json.dumps(EXAMPLES), headers)
        time.sleep(0.5)
    target.all_at_once(asks)


def crowding(target: Target) -> None:
    """Hundreds of long answers of one account, next to five tokens of another."""
    many, few = target.keys
    long = ENDLESS | {"n": 128, "max_tokens": 100, "temperature": 1}
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(target.ask, "/v1/completions", long, many) for _ in range(4)]
        time.sleep(0.5)
        begun = time.perf_counter()
        status = target.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 5}, few)
        print(f"  another account's five tokens: {time.perf_counter() - begun:.2f} s, status {status}")
        for one in waiting:
            one.result()


def held_database(target: Target) -> None:
    """A lock on the database that another process keeps, and those who write."""
    with contextlib.closing(
        sqlite3.connect(target.server.home / "server.sqlite", isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(50) as pool:
            writers = [pool.submit(target.ask, "/auth/api-keys", {}, target.token) for _ in range(50)]
            for key in (KEY, *target.keys):
                target.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 5}, key)
            other.execute("ROLLBACK")
            for one in writers:
                one.result()


ATTACKS: tuple[Callable[[Target], None], ...] = (
    nested,
    stalled,
    log_ins,
    logprobs,
    examples,
    crowding,
    held_database,
)


@contextlib.contextmanager
def probing(port: int, folder: Path) -> Iterator[Callable[[float], list[float]]]:
    """Asks for /health all the while, from a process of its own; gives the seconds that answers took since a moment."""
    found = folder / "health"
    found.touch()
    probe = subprocess.Popen([sys.executable, __file__, "--probe", str(port), str(found)])

    def since(begun: float) -> list[float]:
        lines = [line.split() for line in found.read_text().splitlines()]
        return [float(line[1]) for line in lines if len(line) == 2 and float(line[0]) >= begun]

    try:
        yield since
    finally:
        probe.kill()
        probe.wait()


def probe(port: int, found: Path) -> None:
    """Writes moments at which /health was asked for, and the seconds that its answer took, until it is killed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with found.open("a", buffering=1) as out:
        while True:
            begun = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            out.write(f"{begun} {time.monotonic() - begun}\n")
            time.sleep(PROBE_EVERY)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def first_token(server: ServerProcess, prompt: str) -> float:
    """Seconds from a request to its first token."""
    body = json.dumps({"prompt": prompt, "max_tokens": 3, "stream": True, "temperature": 0}).encode()
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nx-api-key: %s\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
        )
        seen = b""
        while b"data: " not in seen:
            seen += client.recv(65536)
    return time.perf_counter() - begun


def short_beside_long(target: Target, n: int = 40) -> dict[str, float]:
    """First tokens of short requests on an idle server and next to 32 long ones, and the step of those."""
    server, key = target.server, target.keys[0]
    idle = [first_token(server, f"{i} {PROMPT}") for i in range(n)]
    beside: list[float] = []
    steps: list[float] = []
    going, done = threading.Event(), threading.Event()

    def long() -> None:
        body = ENDLESS | {"n": 32, "max_tokens": 400, "temperature": 1}
        while not done.is_set():
            going.set()
            target.ask("/v1/completions", body, key)

    def counted() -> tuple[float, float]:
        text = call(server, "GET", "/metrics", x_api_key=KEY)[2].decode()
        values = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in text.splitlines()}
        seconds = values['mechanex_model_seconds_total{kind="decode"}']
        return float(seconds), float(values["mechanex_batch_rows_count"])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(long)
        going.wait()
        time.sleep(1)
        before = counted()
        for i in range(n):
            beside.append(first_token(server, f"{i} beside: {PROMPT}"))
            time.sleep(0.02)
        after = counted()
        steps.append((after[0] - before[0]) / (after[1] - before[1]))
        done.set()
        running.result()
    return {
        "idle p95": quantile(idle, 0.95),
        "beside 32 p50": statistics.median(beside),
        "beside 32 p95": quantile(beside, 0.95),
        "step": steps[0],
        "bound": quantile(idle, 0.95) + 2 * steps[0],
    }


def account(server: ServerProcess, email: str) -> tuple[str, str]:
    """An API key and an access token of a new account."""
    login = {"email": email, "password": PASSWORD}
    session = json.loads(call(server, "POST", "/auth/signup", login, x_api_key=KEY)[2])["session"]
    token = str(session["access_token"])
    return str(
        json.loads(call(server, "POST", "/auth/api-keys", {}, authorization=f"Bearer {token}")[2])["key"]
    ), token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [attack.__name__ for attack in ATTACKS]
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="these attacks alone")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    parser.add_argument("--probe", nargs=2, metavar=("PORT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(int(options.probe[0]), Path(options.probe[1]))
    figures: dict[str, Any] = {}
    arguments = ("--log-level", "error")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            *arguments, home=Path(folder) / "home", environment={"MECHANEX_SERVER_KEY": KEY}, fresh=True
        ) as server,
    ):
        (ann, token), (bob, _) = account(server, "ann@example.org"), account(server, "bob@example.org")
        target = Target(server, (ann, bob), token)
        with probing(server.port, Path(folder)) as since:
            every: list[float] = []
            for attack in ATTACKS:
                if attack.__name__ not in options.only:
                    continue
                begun = time.monotonic()
                attack(target)
                time.sleep(0.1)
                found = since(begun)
                every += found
                told = {"p50": statistics.median(found), "p99": quantile(found, 0.99), "most": max(found)}
                figures[attack.__name__] = told | {"seconds": time.monotonic() - begun}
                line = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in told.items())
                print(f"/health through {attack.__name__}: {line}, of {len(found)}", flush=True)
        if every:
            figures["health p99"] = quantile(every, 0.99)
            print(
                f"/health through all: p99 {1000 * figures['health p99']:.1f} ms (at most {1000 * MOST_HEALTH:.0f})"
            )
        figures["first token"] = short_beside_long(target)
        told = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in figures["first token"].items())
        print(f"first token of a short request: {told}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
