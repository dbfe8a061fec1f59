"""Whose turn it is among senders: nobody waits for as long as others have much to ask."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from test_scheduler import PROMPTS, _until, ids_of, scheduled

from mechanex.engine.models.resolve import load
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import RateLimitError
from mechanex.server.app import create_app
from mechanex.server.http.limits import TokenQuota
from mechanex.server.model.requests import TextRequest
from mechanex.server.model.turns import Turns
from mechanex.server.senders import sent_by
from mechanex.server.settings import ServerSettings


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("mx-tiny", backend="transformers")


def row(sender: str, arrived: float = 0.0) -> Any:
    return SimpleNamespace(sender=sender, arrived=arrived, generation=SimpleNamespace(cancelled=False))


def test_those_who_wait_come_in_turn() -> None:
    turns, waiting = Turns(), [*(row("a") for _ in range(4)), row("b"), row("b"), row("c")]
    turns.meet(one.sender for one in waiting)
    order = "".join(one.sender for one in turns.in_turn(waiting, lambda one: 10))
    assert order == "abcaba" + "a"
    turns.note("a", 100)
    assert "".join(one.sender for one in turns.in_turn(waiting, lambda one: 10)) == "bcbaaaa"
    # Who stayed away has saved up nothing.
    turns.note("b", 50)
    turns.meet(["a", "b", "d"])
    assert turns.served("d") == turns.served("b") == 0 and turns.served("a") == 50


def test_a_sender_without_a_place_gets_one_of_whoever_has_most() -> None:
    turns, running = Turns(), [row("a", 1), row("a", 2), row("b", 3)]
    turns.note("a", 10)
    assert turns.who_makes_way([row("c")], running) is running[1]
    assert turns.who_makes_way([row("b")], running) is None
    assert turns.who_makes_way([row("c")], running[1:]) is None
    turns.note("c", 20)
    assert turns.who_makes_way([row("c")], running) is None


def test_an_account_with_many_long_requests_does_not_starve_another(tiny: Any) -> None:
    """Its own come out as if nobody had been let in between."""
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    long = [TextRequest(ids, 60, owner="many", seed=i) for i in range(24)]
    short = TextRequest(ids_of(tiny.tokenizer, PROMPTS[1]), 5, owner="few")

    async def some() -> tuple[int, list[list[int]]]:
        async with scheduled(tiny.model, tiny.tokenizer, max_batch=4) as running:
            many = running.submit_all(long)
            while not running.n_running:
                await asyncio.sleep(0.001)
            await running.submit(short).result()
            done = sum(one._end is not None for one in many)
            return done, [(await one.result()).tokens for one in many]

    done, texts = asyncio.run(some())
    assert done <= 4
    assert texts == [texts[0]] * len(long)


def test_a_full_queue_of_one_account_keeps_no_other_out(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    async def crowd() -> None:
        async with scheduled(tiny.model, tiny.tokenizer, max_batch=1, max_waiting=8) as running:
            many = running.submit_all([TextRequest(ids, 8, owner="a")] * 9)
            with pytest.raises(RateLimitError):
                running.submit(TextRequest(ids, 1, owner="a"))
            others = [running.submit(TextRequest(ids, 1, owner="b")) for _ in range(3)]
            for one in (*others, *many):
                await one.result()

    asyncio.run(crowd())


def test_other_work_of_one_sender_keeps_no_other_waiting(tiny: Any) -> None:
    async def crowd() -> list[str]:
        done: list[str] = []
        begun, release = threading.Event(), threading.Event()
        async with scheduled(tiny.model, tiny.tokenizer) as running:

            def hold(_: Any) -> None:
                begun.set()
                assert release.wait(60)

            async def ask(sender: str, work: Any = None) -> None:
                sent_by(sender)
                await running.run(work or (lambda _: done.append(sender)))

            asked = [asyncio.create_task(ask("many", hold))]
            await _until(begun.is_set)
            asked += [asyncio.create_task(ask("many")) for _ in range(64)]
            await asyncio.sleep(0.01)
            with pytest.raises(RateLimitError):
                await asyncio.create_task(ask("many"))
            asked += [asyncio.create_task(ask(one)) for one in ("few", "other")]
            await asyncio.sleep(0.01)
            release.set()
            await asyncio.gather(*asked)
        return done

    done = asyncio.run(crowd())
    assert sorted(done[:3]) == ["few", "many", "other"]
    assert done.count("many") == 64


def test_an_account_has_so_many_running(tiny: Any) -> None:
    request = TextRequest(ids_of(tiny.tokenizer, PROMPTS[0]), 20, owner="a")

    async def some() -> int:
        async with scheduled(tiny.model, tiny.tokenizer, account_running=2) as running:
            generations, most = running.submit_all([request] * 6), 0
            waiting = asyncio.gather(*(one.result() for one in generations))
            while not waiting.done():
                most = max(most, running.n_running)
                await asyncio.sleep(0.001)
            return most

    assert 1 <= asyncio.run(some()) <= 2


def test_an_account_has_so_many_tokens_a_minute_of_prompts_and_answers(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    # Who says nothing of a length asks for all that the context has, and uses what the answer comes to.
    request = TextRequest(ids, 400, owner="a")

    async def some() -> tuple[list[int], list[int]]:
        used, left = [], []
        async with scheduled(tiny.model, tiny.tokenizer, account_tokens_per_minute=500) as running:
            quota = running.quota
            assert quota is not None
            quota._clock = lambda: 0.0  # nothing comes back meanwhile
            for sender in ("a", "203.0.113.7"):
                sent_by(sender)
                owner = "a" if sender == "a" else None
                result = await running.submit(replace(request, owner=owner)).result()
                used.append(result.completion_tokens)
                left.append(int(quota.headers(sender)["x-ratelimit-remaining-tokens"]))
            quota.spend("a", 500)
            with pytest.raises(RateLimitError, match="500 tokens") as refused:
                running.submit(request)
            assert refused.value.retry_after
            await running.submit(replace(request, owner=None)).result()
            return used, left

    used, left = asyncio.run(some())
    assert used[0] < 400 and left == [500 - len(ids) - n for n in used]


LONG = "Clara walked into the bakery. " * 30
EXAMPLES = {
    "prompts": [LONG] * 4,
    "positive_answers": [" She smiled."] * 4,
    "negative_answers": [" He shouted."] * 4,
}
DOCUMENTS = [{"text": f"{LONG} The key is under the {place}."} for place in ("stone", "mat")]
READ = {
    "/v1/embeddings": {"input": [LONG] * 3},
    "/page/compare": {"prompt": LONG, "answers": [" She smiled."] * 2},
    "/page/sweep": {"prompt": LONG, "answer": " She smiled.", "vector": "calm", "strengths": [1, 2, 3]},
    "/steering/generate": EXAMPLES | {"method": "caa"},
    "/behaviors/create": {name: given[:3] for name, given in EXAMPLES.items()},
    "/attribution-patching/scores": {
        "clean_prompt": LONG,
        "corrupted_prompt": LONG.replace("Clara", "Peter"),
    },
    "/raag/generate": {
        "qa_entries": [{"question": "Where is the key?", "answer": "mat"}] * 2,
        "docs": DOCUMENTS,
    },
}


@pytest.mark.parametrize("path", READ)
def test_texts_that_are_only_read_count_too(tiny: Any, path: str, tmp_path: Path) -> None:
    SteeringVector({3: torch.ones(128)}).save(tmp_path / "calm.safetensors")
    settings = ServerSettings(host="127.0.0.1", account_tokens_per_minute=500, vectors=tmp_path)
    app = create_app(settings, tiny)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        app.state.token_quota._clock = lambda: 0.0  # nothing comes back meanwhile
        bodies = [READ[path] | ({"behavior_name": name} if "behaviors" in path else {}) for name in "ab"]
        statuses = [client.post(path, json=body).status_code for body in bodies]
    assert statuses == [200, 429]


def test_what_an_account_is_refused_costs_it_nothing(tiny: Any) -> None:
    app = create_app(ServerSettings(host="127.0.0.1", account_tokens_per_minute=10_000), tiny)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        app.state.token_quota._clock = lambda: 0.0
        told = client.post("/steering/generate", json=EXAMPLES | {"method": "none"})
        assert told.status_code == 400
        left = client.get("/models").headers["x-ratelimit-remaining-tokens"]
    assert left == "10000"


def test_an_answer_that_is_read_again_counts_again(tiny: Any) -> None:
    app = create_app(ServerSettings(host="127.0.0.1", account_tokens_per_minute=10_000), tiny)
    body = {"prompt": "Anna", "max_tokens": 8, "temperature": 0}

    def left(told: Any) -> int:
        return int(told.headers["x-ratelimit-remaining-tokens"])

    with TestClient(app, base_url="http://127.0.0.1") as client:
        app.state.token_quota._clock = lambda: 0.0
        once = client.post("/v1/completions", json=body)
        again = client.post(
            "/v1/completions", json=body | {"return": {"activations": [{"layer": 2, "raw": True}]}}
        )
        known = client.post("/v1/embeddings", json={"input": [[7]]})
    used = once.json()["usage"]["total_tokens"]
    assert left(once) == 10_000 - used
    assert again.status_code == 200 and left(known) == 10_000 - 3 * used - 1


def test_tokens_that_are_spent_at_once_all_count() -> None:
    def clock() -> float:
        time.sleep(1e-4)  # another thread's turn
        return 0.0

    quota = TokenQuota(100_000, clock)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: quota.spend("a", 1), range(400)))
    assert quota.headers("a")["x-ratelimit-remaining-tokens"] == "99600"


def test_tokens_come_back_evenly() -> None:
    now = [0.0]
    quota = TokenQuota(600, lambda: now[0])
    quota.check("a")
    quota.spend("a", 700)
    with pytest.raises(RateLimitError, match=r"Try again in 11 s") as refused:
        quota.check("a")
    assert refused.value.retry_after == 11
    told = {name.removeprefix("x-ratelimit-"): value for name, value in quota.headers("a").items()}
    assert told == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "70s"}
    quota.check("b")
    now[0] = 10.1
    quota.check("a")
    now[0] = 1000.0
    assert quota.headers("a")["x-ratelimit-remaining-tokens"] == "600"
    for i in range(30_000):  # strangers who come once are not remembered for ever
        now[0] += 1
        quota.spend(f"stranger {i}", 1)
    assert len(quota._left) <= 10_001
