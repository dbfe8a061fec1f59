"""Whose turn it is among senders: nobody waits for as long as others have much to ask."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_scheduler import PROMPTS, ids_of, scheduled

from mechanex.engine.models.resolve import load
from mechanex.errors import RateLimitError, ValidationError
from mechanex.server.http.limits import RateLimit
from mechanex.server.model.requests import TextRequest
from mechanex.server.model.turns import Turns


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


def test_an_account_has_so_many_running_and_so_many_tokens_a_minute(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    request = TextRequest(ids, 20, owner="a")

    async def some() -> int:
        limits = {"account_running": 2, "account_tokens_per_minute": 10 * (len(ids) + 20)}
        async with scheduled(tiny.model, tiny.tokenizer, **limits) as running:
            generations, most = running.submit_all([request] * 6), 0
            waiting = asyncio.gather(*(one.result() for one in generations))
            while not waiting.done():
                most = max(most, running.n_running)
                await asyncio.sleep(0.001)
            with pytest.raises(RateLimitError, match="tokens of this account"):
                running.submit_all([request] * 5)
            running.submit_all([replace(request, owner="b")] * 5)
            with pytest.raises(ValidationError, match="a minute: ask for less"):
                running.submit_all([replace(request, owner="c")] * 11)
            return most

    assert 1 <= asyncio.run(some()) <= 2


def test_headers_tell_what_is_left() -> None:
    limit = RateLimit("tokens", 100)
    limit.take("a", 30)
    told = limit.headers("a", "tokens")
    assert told["x-ratelimit-limit-tokens"] == "100" and told["x-ratelimit-remaining-tokens"] == "70"
    assert told["x-ratelimit-reset-tokens"].endswith("s")
