"""What a server's first process does with its part of a model the others do with theirs: the same passes, one by one.

Both are in this process here, each with a whole model, and what one tells the other goes through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import queue
import random
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, build, tiny_tokenizer
from torch.distributed import HashStore

from mechanex.engine.caa import caa_vectors
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.sampling import Sampling
from mechanex.engine.schedules import Schedule, Varying
from mechanex.errors import APIError, MechanexError
from mechanex.server.metrics import Metrics
from mechanex.server.model import wire
from mechanex.server.model.follower import follow
from mechanex.server.model.scheduler import Scheduler
from mechanex.server.model.wire import Lead, Led, Parted
from mechanex.server.settings import ServerSettings

TOKENIZER = tiny_tokenizer()
D_MODEL = 48


class Passes:
    """The calls of a model, and what came of them; one of them may be made to fail."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, []
        self.fails_at: int | None = None
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, _: Any, args: Any, named: Any) -> None:
        ids = named["input_ids"] if "input_ids" in named else args[0]
        self.seen.append([ids.clone(), None])
        if self.fails_at is not None and len(self.seen) >= self.fails_at:
            self.fails_at = None
            raise RuntimeError("out of memory")

    def _end(self, _: Any, __: Any, output: Any) -> None:
        self.seen[-1][1] = output.logits.clone()


class Pair:
    """A scheduler that leads, and a thread that follows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: queue.Queue[bytes | None] = queue.Queue()
        """What the first process says; None where it is gone."""
        door = threading.Barrier(2)

        def hand(end: Any, buffer: bytearray, timeout: timedelta | None) -> None:
            with end._reaching():
                if isinstance(end, Lead):
                    if self.error is not None:
                        raise RuntimeError("Connection closed by peer")
                    self.told.put(bytes(buffer))
                    return
                said = self.told.get(timeout=30)
                if said is None:
                    raise RuntimeError("Connection closed by peer")
                buffer[:] = said

        def meet(end: Any) -> None:
            with end._reaching():
                try:
                    door.wait(2)
                except threading.BrokenBarrierError:
                    raise RuntimeError("Rank 1 failed to pass monitoredBarrier") from None

        monkeypatch.setattr(wire._Wire, "__init__", lambda end, own: setattr(end, "_own", own))
        monkeypatch.setattr(wire._Wire, "_pass", hand)
        monkeypatch.setattr(wire._Wire, "meet", meet)
        monkeypatch.setattr(wire.atexit, "register", lambda *_: None)
        store = HashStore()
        monkeypatch.setattr(wire, "default_store", lambda: store)
        model = FAMILIES["llama"]()
        self.passes = [Passes(model), Passes(copy.deepcopy(model))]
        self.error: BaseException | None = None
        self.lead = Lead({"tokenizer": TOKENIZER})
        self._follower = threading.Thread(target=self._follow, args=(Led({"tokenizer": TOKENIZER}),))
        self._follower.start()

    def _follow(self, led: Led) -> None:
        try:
            follow(adapter_for(self.passes[1].model), led)
        except BaseException as error:
            self.error = error

    @contextlib.asynccontextmanager
    async def serving(self, **limits: Any) -> AsyncIterator[Scheduler]:
        settings = ServerSettings(host="127.0.0.1", **limits)
        adapter = adapter_for(self.passes[0].model)
        scheduler = Scheduler(adapter, TOKENIZER, [2], settings, Metrics(), self.lead)
        scheduler.start()
        try:
            yield scheduler
        finally:
            await scheduler.drain(20)

    def end(self) -> None:
        """The end of both, without an error."""
        self.lead.end()
        self.join()
        assert self.error is None

    def join(self) -> None:
        """Waits until the follower has ended."""
        self._follower.join(30)
        assert not self._follower.is_alive()

    def check(self) -> None:
        """Both have made the same passes and ended."""
        self.end()
        ours, theirs = (one.seen for one in self.passes)
        assert len(ours) == len(theirs)
        for (ids, logits), (their_ids, their_logits) in zip(ours, theirs, strict=True):
            assert torch.equal(ids, their_ids)
            assert (logits is None) == (their_logits is None)
            assert logits is None or torch.equal(logits, their_logits)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(monkeypatch)
    yield made
    if made._follower.is_alive():
        made.error = made.error or Parted("the test has ended")
        with contextlib.suppress(MechanexError):
            made.lead.end()


def drawn_requests(n: int) -> list[TextRequest]:
    """Requests of every kind, some of which begin alike."""
    draw, weights = random.Random(1), torch.Generator().manual_seed(1)
    edits = [Edit.add(torch.randn(D_MODEL, generator=weights)) for _ in range(3)]
    varying = Varying(Schedule([1.0, 0.5], prompt=0.25), edits[0].scaled)
    conditions = [
        PromptCondition(2, torch.randn(D_MODEL, generator=weights), threshold) for threshold in (-1, 0, 1)
    ]
    begins = [[draw.randrange(3, 370) for _ in range(length)] for length in (5, 20, 40)]
    found = []
    for i in range(n):
        steering = tuple(
            Steer(
                draw.randrange(5),
                draw.choice(edits),
                draw.choice([None, None, slice(-1, None), 2]),
                varying if draw.random() < 0.2 else None,
                draw.choice([None, None, *conditions]),
                draw.choice([1.0, 0.5]),
            )
            for _ in range(draw.randrange(3))
        )
        found.append(
            TextRequest(
                [*draw.choice(begins), *(draw.randrange(3, 370) for _ in range(draw.randrange(4)))],
                max_tokens=draw.choice([0, 1, 6, 12, 25]),
                sampling=Sampling(draw.choice(["greedy", "top-p"])),
                seed=i,
                stops=draw.choice([(), ("a", "the")]),
                steering=steering,
                logprobs=draw.choice([None, 2]),
                prompt_logprobs=draw.random() < 0.15,
                stream=draw.random() < 0.5,
                owner=draw.choice([None, "ann"]),
            )
        )
    return found


def test_all_kinds_of_requests_are_the_same_passes(pair: Pair) -> None:
    """With rows that make way where the cache is full, clients that leave, and texts that are gone on from."""
    requests = drawn_requests(60)

    async def answered() -> int:
        async with pair.serving(
            max_batch=6, max_cache_tokens=200, prefill_tokens=24, prefix_bytes=2**18
        ) as scheduler:
            generations = []
            for i, request in enumerate(requests):
                generations.append(scheduler.submit(request))
                if i % 3 == 0:
                    await asyncio.sleep(0.02)
                if i % 11 == 10:
                    generations[-1].cancel()
            ends = await asyncio.gather(*(one.result() for one in generations), return_exceptions=True)
            assert scheduler.prefix_bytes > 0
            results = [one for one in ends if not isinstance(one, BaseException)]
            assert all(isinstance(one, APIError) for one in ends if isinstance(one, BaseException))
            assert any(one.cached_tokens for one in results)
            return len(results)

    assert asyncio.run(answered()) > 50
    pair.check()
    assert len(pair.passes[0].seen) > 60


async def fails(scheduler: Scheduler) -> MechanexError:
    with pytest.raises(MechanexError) as failed:
        await scheduler.submit(TextRequest([5, 6, 7], max_tokens=20)).result()
    return failed.value


@pytest.mark.parametrize("after", [1, 3])
def test_a_pass_that_fails_in_all_ends_its_answers_alone(pair: Pair, after: int) -> None:
    """In the prompt's reading, and later."""

    async def answered() -> str:
        async with pair.serving() as scheduler:
            before = await scheduler.submit(TextRequest([5, 6, 7], max_tokens=5)).result()
            for one in pair.passes:  # of which the second may not have come as far yet
                one.fails_at = len(pair.passes[0].seen) + after
            assert "RuntimeError" in (await fails(scheduler)).message
            again = await scheduler.submit(TextRequest([5, 6, 7], max_tokens=5)).result()
            assert again.tokens == before.tokens
            return again.text

    assert asyncio.run(answered())
    pair.check()


@pytest.mark.parametrize("which", [0, 1])
def test_a_pass_that_fails_in_one_of_them_is_the_end(pair: Pair, which: int) -> None:
    async def answered() -> None:
        async with pair.serving() as scheduler:
            await scheduler.submit(TextRequest([5, 6, 7], max_tokens=5)).result()
            pair.passes[which].fails_at = len(pair.passes[0].seen) + 3
            await fails(scheduler)
            if which == 1:  # of whole models none waits for the other in a pass; of parts all do
                while not scheduler.has_failed:
                    await asyncio.sleep(0.01)

    asyncio.run(answered())
    if which == 1:
        assert isinstance(pair.error, MechanexError) and "has failed in this process" in pair.error.message
        with pytest.raises(MechanexError, match="can't be reached"):
            pair.lead.end()
    else:
        pair.end()


def test_work_is_done_by_all_and_pauses_in_all(pair: Pair) -> None:
    texts = ["She said that the bread was warm"] * 12, [" yes"] * 12, [" no it was not"] * 12
    vectors = partial(
        caa_vectors,
        prompts=texts[0],
        positive_answers=texts[1],
        negative_answers=texts[2],
        layers=[1, 2],
        tokenizer=TOKENIZER,
        batch_tokens=16,
    )

    async def answered() -> None:
        async with pair.serving() as scheduler:
            long = scheduler.submit(TextRequest([5, 6, 7], max_tokens=150, logit_bias=((2, -100.0),)))
            found = await asyncio.gather(*(scheduler.run(vectors) for _ in range(3)))
            alone = vectors(adapter_for(build("llama")))
            torch.testing.assert_close(dict(found[0]), dict(alone))
            with pytest.raises(MechanexError, match="split over processes") as unsent:
                await scheduler.run(lambda adapter: adapter.n_layers)
            assert unsent.value.status_code == 501
            with pytest.raises(ZeroDivisionError):
                await scheduler.run(_failing)
            with pytest.raises(APIError, match="longer than the server allows"):
                await scheduler.run(vectors, timeout=1e-4)
            assert len((await long.result()).tokens) == 150
            assert await scheduler.run(_n_layers) == 4

    asyncio.run(answered())
    pair.check()


def test_work_in_which_the_processes_part_says_that_the_server_ends(pair: Pair) -> None:
    async def answered() -> None:
        async with pair.serving() as scheduler:
            assert await scheduler.run(_n_layers) == 4
            with pytest.raises(APIError, match="a part of its model is gone") as ended:
                await scheduler.run(_parting)
            assert ended.value.status_code == 503
            while not scheduler.has_failed:
                await asyncio.sleep(0.01)

    asyncio.run(answered())
    assert isinstance(pair.error, MechanexError)
    with pytest.raises(MechanexError, match="can't be reached"):
        pair.lead.end()


def _parting(adapter: ModelAdapter) -> None:
    raise Parted("gone")


def _failing(adapter: ModelAdapter) -> float:
    return 1 / 0


def _n_layers(adapter: ModelAdapter) -> int:
    return adapter.n_layers


class GoneStore:
    def check(self, _: Any) -> bool:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("first", ["has left", "is lost", "is lost with the store"])
def test_a_process_ends_in_order_only_where_the_first_has(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(wire, "_leave", codes.append)
    monkeypatch.setattr(wire, "_LOOK", 60.0)  # no watcher is to come first
    pair = Pair(monkeypatch)
    if first == "has left":
        pair.lead.leave()
    elif first == "is lost with the store":
        monkeypatch.setattr(wire, "default_store", GoneStore)
    pair.told.put(None)
    pair.join()
    if first == "has left":
        assert codes == [0] and pair.error is None
    else:
        assert codes == [] and isinstance(pair.error, MechanexError)
        assert "can't be reached" in str(pair.error)


def test_what_is_shared_is_sent_once_and_let_go(pair: Pair) -> None:
    sizes: list[int] = []
    edit = Edit.dense(torch.zeros(D_MODEL), torch.zeros(D_MODEL, D_MODEL))

    async def answered() -> None:
        async with pair.serving() as scheduler:
            send = pair.lead._pass
            pair.lead._pass = lambda buffer, timeout: (sizes.append(len(buffer)), send(buffer, timeout))  # type: ignore
            for _ in range(3):
                request = TextRequest([5, 6, 7], max_tokens=3, steering=(Steer(1, edit),))
                await scheduler.submit(request).result()

    asyncio.run(answered())
    assert sum(size > 4 * D_MODEL**2 for size in sizes) == 1
    pair.check()
