"""A server whose model thread has died, or whose work ends oddly: every door answers, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from families import build, tiny_tokenizer

from mechanex.engine.models import adapter_for
from mechanex.errors import APIError, MechanexError, ValidationError
from mechanex.server.http.middleware import RequestMiddleware
from mechanex.server.http.routes import parsed
from mechanex.server.metrics import Metrics
from mechanex.server.model.requests import Generation, Step, TextRequest
from mechanex.server.model.scheduler import Scheduler
from mechanex.server.openai.streams import _merged
from mechanex.server.settings import ServerSettings

TOKENIZER = tiny_tokenizer()
PATIENCE = 60.0  # seconds after which a test counts as hanging


@asynccontextmanager
async def scheduled(model: Any) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(adapter_for(model), TOKENIZER, [], ServerSettings(host="127.0.0.1"), Metrics())
    scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.drain(0)


class _Dies(BaseException):
    """What a thread can't go on after: not an Exception."""


async def told(waiting: Awaitable[Any]) -> BaseException:
    try:
        await asyncio.wait_for(waiting, PATIENCE)
    except MechanexError as error:
        return error
    raise AssertionError("an answer came from a thread that had died")


async def read_all(generation: Generation) -> None:
    async for _ in generation:
        pass


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("when", [0, 3])
def test_a_dead_model_thread_leaves_nobody_waiting_and_takes_nobody_in(family: str, when: int) -> None:
    model = build(family)
    calls: list[int] = []

    def die(*_: Any) -> None:
        calls.append(1)
        if len(calls) > when:
            raise _Dies

    async def scene() -> None:
        async with scheduled(model) as scheduler:
            while not scheduler.ready:
                await asyncio.sleep(0.01)
            handle = adapter_for(model).layers[0].register_forward_pre_hook(die)
            try:
                asked = [scheduler.submit(TextRequest([5, 6, 7, n], 400, stream=True)) for n in range(3)]
                work = asyncio.ensure_future(
                    scheduler.run(lambda adapter: (die(), die(), die(), die()), None)
                )
                ends = await asyncio.gather(
                    told(asked[0].result()), told(asked[1].result()), told(read_all(asked[2])), told(work)
                )
            finally:
                handle.remove()
            assert all(isinstance(end, MechanexError) for end in ends)
            assert not scheduler.ready
            for known in (True, False):
                # The thread may die between the look at it and the queueing.
                if not known:
                    assert scheduler._worker is not None
                    scheduler._worker.failure = None
                with pytest.raises(APIError, match="model thread has failed") as refused:
                    scheduler.submit(TextRequest([5, 6], 3))
                assert refused.value.status_code == 503
                with pytest.raises(APIError, match="model thread has failed"):
                    await asyncio.wait_for(scheduler.run(lambda adapter: 1, None), PATIENCE)

    asyncio.run(scene())


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), GeneratorExit(), SystemExit(3)])
def test_work_that_ends_oddly_is_told_as_an_error_and_the_server_goes_on(error: BaseException) -> None:
    def work(adapter: Any) -> None:
        raise error

    async def scene() -> None:
        async with scheduled(build("llama")) as scheduler:
            with pytest.raises(MechanexError, match=type(error).__name__):
                await asyncio.wait_for(scheduler.run(work, None), PATIENCE)
            assert (
                await asyncio.wait_for(scheduler.submit(TextRequest([5, 6], 3)).result(), PATIENCE)
            ).completion_tokens

    asyncio.run(scene())


def test_one_of_several_streams_that_fails_ends_them_all() -> None:
    async def scene() -> None:
        first, second = Generation(TextRequest([1])), Generation(TextRequest([1]))
        first.deliver(Step("a"))
        second.deliver(RuntimeError("odd"))
        with pytest.raises(RuntimeError, match="odd"):
            async with asyncio.timeout(PATIENCE):
                async for _ in _merged([first, second]):
                    pass

    asyncio.run(scene())


def test_a_request_that_is_cancelled_is_answered_and_stays_cancelled() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await asyncio.Event().wait()

        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "client": None}
        middleware = RequestMiddleware(app, metrics=Metrics(), max_body_bytes=100)
        task = asyncio.create_task(middleware(scope, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE)
        assert sent[0]["status"] == 503

    asyncio.run(scene())


def test_bodies_that_would_be_looked_at_for_long_are_refused_before() -> None:
    """Looking for its end anew at every quote would take minutes, with nobody let in meanwhile."""
    body = b'{"a":[' + b"[" * 10_001 + b'"' + b'\\"' * 400_000
    with pytest.raises(ValidationError, match="more than 10000 lists"):
        asyncio.run(parsed(body))
    values = b"[" + b"1," * 2**18 + b"1]"
    with pytest.raises(ValidationError, match="more than 262144 values"):
        asyncio.run(parsed(values))
    commas = b'["' + b"," * 2**19 + b'"]'
    assert asyncio.run(parsed(commas)) == ["," * 2**19]
    texts = b'{"a": "' + b"[" * 20_000 + b'"}'
    assert asyncio.run(parsed(texts)) == {"a": "[" * 20_000}
