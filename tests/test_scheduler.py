"""The rolling batch: every answer is the one that its request gets alone, whatever comes, goes or fails beside it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, SLIDING, build, n_hooks, sliding_family, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from mechanex.engine.caa import caa_vectors
from mechanex.engine.capabilities.decoding import rolls
from mechanex.engine.decode.cache import RollingCache
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.reading import Reading
from mechanex.engine.directions import pca_vectors
from mechanex.engine.few_shot import few_shot_vectors
from mechanex.engine.generate import generate
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.pauses import pass_tokens, pausing
from mechanex.engine.positions import Positions, selects, token_mask
from mechanex.engine.sampling import Sampling, end_tokens
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import APIError, MechanexError, RateLimitError, ValidationError
from mechanex.server.metrics import Metrics
from mechanex.server.model.requests import Generation, Result, ServedRow, Steer, TextRequest
from mechanex.server.model.scheduler import Scheduler
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow

PROMPTS = (
    "Anna went to the market on Friday.",
    "The food in Rome",
    "Hello",
    "The weather was cold, and the people of the city were walking home. The old man at the corner was",
    "Tom said: I am",
)
GREEDY = Sampling("greedy")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("mx-tiny", backend="transformers")


def vector(d_model: int, *layers: int, seed: int = 0, size: float = 2.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector({layer: size * v / v.norm() for layer, v in directions.items()})


def steers(found: SteeringVector, strength: float = 1.0, tokens: Any = None) -> tuple[Steer, ...]:
    return tuple(Steer(layer, Edit.add(strength * v), tokens) for layer, v in found.items())


@contextlib.asynccontextmanager
async def scheduled(model: Any, tokenizer: Any, **limits: Any) -> AsyncIterator[Scheduler]:
    """A scheduler whose thread runs; it is told nothing before it is ready."""
    adapter = adapter_for(model)
    ends = end_tokens(adapter.hf_model, tokenizer)
    scheduler = Scheduler(adapter, tokenizer, ends, ServerSettings(host="127.0.0.1", **limits), Metrics())
    scheduler.start()
    while not scheduler.ready:
        assert scheduler._thread is not None and scheduler._thread.is_alive()
        await asyncio.sleep(0.005)
    try:
        yield scheduler
    finally:
        await scheduler.drain(20)


def run(
    loaded: Any, requests: list[TextRequest], *, apart: float = 0.0, scheduler: dict[str, Any] | None = None
) -> list[Result]:
    """The answers to requests that come one after another."""

    async def all_of_them() -> list[Result]:
        async with scheduled(loaded.model, loaded.tokenizer, **(scheduler or {})) as running:
            generations = []
            for request in requests:
                generations.append(running.submit(request))
                await asyncio.sleep(apart)
            return [await generation.result() for generation in generations]

    return asyncio.run(all_of_them())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def alone(loaded: Any, text: str, found: SteeringVector | None, strength: float, **options: Any) -> str:
    steered = {} if found is None else {"vector": found, "strength": strength}
    return generate(loaded.model, loaded.tokenizer, text, **steered, **options)[len(text) :]


def test_greedy_answers_are_those_of_each_request_alone(tiny: Any) -> None:
    vectors = [vector(128, 2, 4, seed=1), vector(128, 4, seed=2), vector(128, 0, 5, seed=3)]
    asked = [(PROMPTS[i % 5], vectors[i % 3] if i % 4 else None, (-2.0, 1.0)[i % 2]) for i in range(23)]
    lengths = [5 + 3 * (i % 7) for i in range(23)]
    requests = [
        TextRequest(
            ids_of(tiny.tokenizer, text),
            max_tokens=n,
            steering=() if found is None else steers(found, strength),
        )
        for (text, found, strength), n in zip(asked, lengths, strict=True)
    ]
    # They come while others are decoded, and more of them than the batch has places.
    results = run(tiny, requests, apart=0.004, scheduler={"max_batch": 7})
    expected = [
        alone(tiny, *one, sampling_method="greedy", max_tokens=n)
        for one, n in zip(asked, lengths, strict=True)
    ]
    assert [result.text for result in results] == expected
    assert len(set(expected)) > 10  # the vectors do change the answers
    assert all(r.prompt_tokens == len(q.ids) for r, q in zip(results, requests, strict=True))
    assert n_hooks(tiny.model) == 0


@pytest.mark.ci
@pytest.mark.parametrize("family", [*FAMILIES, *(f"{name} with a window" for name in SLIDING)])
def test_every_family_answers_as_alone(family: str) -> None:
    name, _, windowed = family.partition(" ")
    model = sliding_family(name, 8) if windowed else build(name)
    hooks = n_hooks(model)  # transformers may have left some
    tokenizer = tiny_tokenizer()
    loaded = type("Loaded", (), {"model": model, "tokenizer": tokenizer})
    adapter = adapter_for(model)
    found = vector(adapter.d_model, 1, 3, size=4.0)
    asked = [
        ("The morning was cold and", 12),
        ("She", 9),
        ("He knew every child by name, and the old man", 7),
    ]
    requests = [
        TextRequest(ids_of(tokenizer, text), max_tokens=n, steering=steers(found) if i else ())
        for i, (text, n) in enumerate(asked)
    ]
    results = run(loaded, requests, apart=0.02)
    assert rolls(adapter) == (name != "mamba")
    for i, ((text, n), result) in enumerate(zip(asked, results, strict=True)):
        whole = alone(loaded, text, found if i else None, 1.0, sampling_method="greedy", max_tokens=n)
        assert result.text == whole
    assert n_hooks(model) == hooks


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_edits_of_some_tokens_only(name: str) -> None:
    model, tokenizer = build(name), tiny_tokenizer()
    loaded = type("Loaded", (), {"model": model, "tokenizer": tokenizer})
    adapter = adapter_for(model)
    selectors = [None, 2, slice(-1, None), slice(0, -1), slice(3, 9), slice(-3, None, 2)]
    found = vector(adapter.d_model, 1, size=8.0)
    direction = found[1]
    others = [Steer(1, Edit.ablate(direction)), Steer(3, Edit.clamp(direction, 2.0), slice(1, None))]
    requests, expected = [], []
    for i, tokens in enumerate(selectors):
        ids = ids_of(tokenizer, PROMPTS[i % 2])
        steering = (*steers(found, 1.0, tokens), *(others if i % 3 == 2 else ()))
        requests.append(TextRequest(ids, max_tokens=8, steering=steering, stream=True))
        plan = SteeringPlan(Intervention(s.layer, s.edit, s.tokens) for s in steering)
        with plan.apply(model):
            whole = model.generate(
                torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        expected.append(whole[0, len(ids) :].tolist())
    results = run(loaded, [*(TextRequest(r.ids, 8, logprobs=0, steering=r.steering) for r in requests)])
    for result, tokens in zip(results, expected, strict=True):
        chosen = [one.token for one in result.logprobs]
        assert chosen == tokens[: len(chosen)]
        assert chosen


@given(
    start=st.one_of(st.none(), st.integers(-8, 12)),
    stop=st.one_of(st.none(), st.integers(-8, 12)),
    step=st.one_of(st.none(), st.integers(1, 4)),
    place=st.one_of(st.none(), st.integers(-8, 12)),
)
@settings(max_examples=200, deadline=None)
def test_selectors_cover_what_the_engine_says(
    start: int | None, stop: int | None, step: int | None, place: int | None
) -> None:
    tokens = place if place is not None else slice(start, stop, step)
    positions = Positions(torch.arange(11)[None], torch.tensor([[6]]))
    expected = token_mask(tokens, positions)[0].tolist()
    assert [selects(tokens, i, lambda: 6) for i in range(11)] == expected
    assert selects(tokens, numpy.arange(11), lambda: 6).tolist() == expected


def test_sampled_answers_depend_on_their_seed_alone(tiny: Any) -> None:
    samplings = [
        Sampling("top-p", top_p=0.9, temperature=0.8),
        Sampling("top-k", top_k=5),
        Sampling("top-p", top_p=1.0),
        Sampling("min-p", min_p=0.1, temperature=1.5),
    ]
    requests = [
        TextRequest(
            ids_of(tiny.tokenizer, PROMPTS[i % 5]), max_tokens=12, sampling=samplings[i % 4], seed=i // 2
        )
        for i in range(10)
    ]
    results = run(tiny, requests, apart=0.003)
    for i, result in enumerate(results):
        sampling = samplings[i % 4]
        options = {
            "sampling_method": sampling.sampling_method,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "temperature": sampling.temperature,
        }
        expected = alone(tiny, PROMPTS[i % 5], None, 0, max_tokens=12, seed=i // 2, **options)
        assert result.text == expected


def test_logprobs_penalties_and_biases_are_what_they_say(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    banned, wanted = 11, 700
    plain, penalized, biased, neighbour = run(
        tiny,
        [
            TextRequest(ids, 40, logprobs=3, prompt_logprobs=True),
            TextRequest(ids, 40, frequency_penalty=2.0, presence_penalty=2.0, logprobs=0),
            TextRequest(ids, 4, logit_bias=((wanted, 100.0), (banned, -100.0)), logprobs=0),
            TextRequest(ids, 40, logprobs=0),
        ],
    )
    chosen = [one.token for one in plain.logprobs]
    with torch.no_grad():
        shares = tiny.model(torch.tensor([ids + chosen])).logits[0].log_softmax(-1)
    assert plain.prompt_logprobs[0] is None
    for i, one in enumerate([*plain.prompt_logprobs[1:], *plain.logprobs]):
        assert one is not None
        top = shares[i].topk(3)
        assert one.logprob == pytest.approx(float(shares[i, one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == top.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert [one.token for one in neighbour.logprobs] == chosen

    counts: dict[int, int] = {}
    own = [one.token for one in penalized.logprobs]
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids + own])).logits[0, len(ids) - 1 :]
    for step, token in enumerate(own):
        scores = logits[step].clone()
        for seen, times in counts.items():
            scores[seen] -= 2.0 * times + 2.0
        assert int(scores.argmax()) == token
        counts[token] = counts.get(token, 0) + 1
    assert len(set(own)) > len(set(chosen))
    assert {one.token for one in biased.logprobs} == {wanted}
    assert all(one.logprob < -1 for one in biased.logprobs)  # the model's own view, not the biased one


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(tiny: Any) -> None:
    long = (PROMPTS[3] + " ") * 20
    ids = ids_of(tiny.tokenizer, long)[:400]
    text = tiny.tokenizer.decode(ids, skip_special_tokens=True)
    order: list[str] = []

    async def both() -> tuple[Result, Result]:
        async with scheduled(tiny.model, tiny.tokenizer, prefill_tokens=16) as running:
            first = running.submit(TextRequest(ids_of(tiny.tokenizer, "Hello"), 20, stream=True))
            second = running.submit(TextRequest(ids, 5, steering=steers(vector(128, 4), -2.0)))

            async def follow(name: str, generation: Generation) -> Result:
                async for step in generation:
                    if step.text:
                        order.append(name)
                return await generation.result()

            return tuple(await asyncio.gather(follow("short", first), follow("long", second)))  # type: ignore[return-value]

    short, answer = asyncio.run(both())
    assert answer.text == alone(tiny, text, vector(128, 4), -2.0, sampling_method="greedy", max_tokens=5)
    # The long prompt takes 25 passes; the short answer's 20 steps went on between them.
    assert order.index("long") == len(order) - 1
    assert short.text == alone(tiny, "Hello", None, 0, sampling_method="greedy", max_tokens=20)


def test_answers_to_one_prompt_share_its_reading_where_it_is_steered_alike(tiny: Any) -> None:
    ids, found = ids_of(tiny.tokenizer, PROMPTS[0]), vector(128, 3, 4)
    kinds = [(), steers(found, -2.0), steers(found, -2.0, tokens=slice(0, 3)), steers(found, 1.0)]
    sampling = Sampling("top-k", 50, temperature=0.9)
    requests = [
        TextRequest(ids, 12, sampling, seed=i, steering=kinds[kind], logprobs=1, prompt_logprobs=i >= 8)
        for i, kind in enumerate([0, 0, 1, 1, 2, 3, 1, 0, 1, 1, 0, 0])
    ]
    counted: list[float] = []

    async def together() -> list[Result]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            begun, release = threading.Event(), threading.Event()
            held = asyncio.create_task(running.run(_hold(begun, release), 60))
            await _until(begun.is_set)
            generations = [running.submit(request) for request in requests]
            release.set()  # all are here before the first is read
            results = [await generation.result() for generation in generations]
            await held
            counted.append(running._metrics.prompt_tokens._value.get())
            return results

    results = asyncio.run(together())
    assert counted == [
        6 * len(ids)
    ]  # four ways of steering, two of them again for the prompt's log-probabilities
    for request, result in zip(requests, results, strict=True):
        (own,) = run(tiny, [request])
        assert (own.text, own.finish_reason) == (result.text, result.finish_reason)
        for one, other in zip(
            (*own.logprobs, *own.prompt_logprobs), (*result.logprobs, *result.prompt_logprobs), strict=True
        ):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert len({result.text for result in results}) > 8


def test_next_turns_are_read_together_by_what_is_new_of_them(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[3])
    firsts = [[*ids, *ids_of(tiny.tokenizer, text)[1:]] for text in PROMPTS]
    n_read: list[tuple[int, int]] = []
    read = Decoder.read

    def noted(self: Decoder, rows: Any) -> Reading:
        reading = read(self, rows)
        n_read.append((len(rows), reading.columns - reading.done))
        return reading

    monkeypatch.setattr(Decoder, "read", noted)

    async def turns() -> list[Result]:
        async with scheduled(tiny.model, tiny.tokenizer, prefill_tokens=64) as running:
            answers = [await running.submit(TextRequest(one, 6)).result() for one in firsts]
            n_read.clear()
            held = threading.Event()
            work = asyncio.create_task(running.run(lambda _: held.wait(20), None))
            await asyncio.sleep(0)  # all are here before the first is read
            asked = [
                TextRequest([*one, *ids_of(tiny.tokenizer, answer.text)[1:]], 4)
                for one, answer in zip(firsts, answers, strict=True)
            ]
            again = [running.submit(one) for one in asked]
            held.set()
            await work
            return [await one.result() for one in again]

    results = asyncio.run(turns())
    assert all(len(one) > 20 for one in firsts)  # so that a pass has room for two of them
    assert [n for n, _ in n_read] == [len(firsts)]
    assert n_read[0][1] * len(firsts) <= 64
    assert all(result.cached_tokens >= 16 for result in results)


def test_stop_texts_end_tokens_and_lengths(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    (whole,) = run(tiny, [TextRequest(ids, 400)])
    assert whole.finish_reason == "stop"
    word = whole.text.split()[3]
    cut, short, none = run(
        tiny, [TextRequest(ids, 400, stops=(word,)), TextRequest(ids, 3), TextRequest(ids, 0)]
    )
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"
    assert (short.finish_reason, short.completion_tokens) == ("length", 3)
    assert (none.text, none.finish_reason, none.completion_tokens) == ("", "length", 0)


def test_steps_joined_are_the_answer(tiny: Any) -> None:
    async def pieces() -> tuple[list[str], Result]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            generation = running.submit(
                TextRequest(ids_of(tiny.tokenizer, PROMPTS[0]), 30, stream=True, stops=("coins. She",))
            )
            found = [step.text async for step in generation]
            return found, await generation.result()

    found, result = asyncio.run(pieces())
    assert "".join(found) == result.text
    assert len(found) > 1
    assert result.text.endswith("two ")


@pytest.mark.parametrize("stops", [(), ("zzz",)])
def test_a_reader_is_told_at_once_and_then_at_a_pace_that_is_read(tiny: Any, stops: tuple[str, ...]) -> None:
    ids, text = ids_of(tiny.tokenizer, PROMPTS[0]), ""
    row = ServedRow(
        Generation(TextRequest(ids, 60, stops=stops, stream=True)), tiny.tokenizer, (), None, math.inf
    )
    row.pace = 3600.0
    begin, *tokens = ids_of(tiny.tokenizer, PROMPTS[3])
    assert row.take(begin, None) is None  # it has no text
    first, *between = [row.take(token, None) for token in tokens]
    assert first is not None and first.text
    assert between == [None] * len(between)
    text += first.text
    told = row.news()  # what keeps the answer waiting asks for it
    assert told is not None
    text += told.text
    assert row.news() is None
    while row.result is None:
        last = row.take(tokens[len(row.chosen) % len(tokens)], None)
    assert last is not None
    assert text + last.text == row.result.text
    whole = tiny.tokenizer.decode([*ids, *row.chosen], skip_special_tokens=True)
    assert whole == tiny.tokenizer.decode(ids, skip_special_tokens=True) + row.result.text


def test_a_reader_gets_what_was_written_before_other_work_takes_the_model(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedRow, "pace", 3600.0)

    async def pieces() -> tuple[list[str], str]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            generation = running.submit(
                TextRequest(ids_of(tiny.tokenizer, PROMPTS[0]), 400, stream=True, seed=1)
            )
            steps = generation.__aiter__()
            first = (await steps.__anext__()).text
            held = threading.Event()
            work = asyncio.create_task(running.run(lambda _: held.wait(20), None))
            second = (await steps.__anext__()).text  # while the work goes on
            held.set()
            await work
            rest = [step.text async for step in steps]
            return [first, second, *rest], (await generation.result()).text

    found, text = asyncio.run(pieces())
    assert "".join(found) == text
    assert all(found[:2])


def test_a_row_that_breaks_leaves_the_others_alone(tiny: Any) -> None:
    huge = Steer(3, Edit.add(torch.full((128,), 3e38)))
    asked = [TextRequest(ids_of(tiny.tokenizer, PROMPTS[i % 3]), 12) for i in range(6)]

    async def together() -> list[Any]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            first = [running.submit(one) for one in asked[:3]]
            broken = running.submit(TextRequest(asked[3].ids, 12, steering=(huge, huge)))
            # Breaks after some steps, so that what it leaves in the cache is poison.
            later = Steer(3, huge.edit, slice(12, None))
            late = running.submit(TextRequest(asked[3].ids, 12, steering=(later, later)))
            await asyncio.sleep(0.05)
            second = [running.submit(one) for one in asked[3:]]
            return await asyncio.gather(
                *(one.result() for one in (*first, broken, late, *second)), return_exceptions=True
            )

    *first, broken, late, a, b, c = asyncio.run(together())
    for error in (broken, late):
        assert isinstance(error, MechanexError)
        assert "not finite" in str(error)
        assert error.status_code == 400  # whoever asked for such steering is told, and need not ask again
    for request, result in zip(asked, [*first, a, b, c], strict=True):
        text = tiny.tokenizer.decode(request.ids, skip_special_tokens=True)
        assert result.text == alone(tiny, text, None, 0, sampling_method="greedy", max_tokens=12)


def test_log_probabilities_that_are_no_numbers_are_an_error(tiny: Any) -> None:
    huge = Steer(3, Edit.add(torch.full((128,), 3e38)))
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    async def read() -> list[Any]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            asked = [
                TextRequest(ids, n, logprobs=1, prompt_logprobs=True, steering=steering)
                for n, steering in ((0, (huge, huge)), (3, (huge, huge)), (0, ()))
            ]
            return await asyncio.gather(
                *(one.result() for one in running.submit_all(asked)), return_exceptions=True
            )

    *broken, whole = asyncio.run(read())
    for error in broken:
        assert isinstance(error, ValidationError) and "too strong" in str(error)
    assert len(whole.prompt_logprobs) == len(ids)


def test_an_error_of_the_model_ends_its_answers_and_nothing_else(tiny: Any) -> None:
    request = TextRequest(ids_of(tiny.tokenizer, PROMPTS[0]), 12)
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 10):
            raise RuntimeError("secret path /var/weights")

    async def some() -> list[Any]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            handle = tiny.model.model.layers[2].register_forward_pre_hook(fail)
            try:
                found = []
                for _ in range(3):
                    found += await asyncio.gather(running.submit(request).result(), return_exceptions=True)
                return found
            finally:
                handle.remove()

    first, second, third = asyncio.run(some())
    for error in (first, second):
        assert isinstance(error, MechanexError)
        assert "RuntimeError" in str(error)
        assert "secret" not in str(error)
    assert third.text == alone(tiny, PROMPTS[0], None, 0, sampling_method="greedy", max_tokens=12)
    assert n_hooks(tiny.model) == 0


async def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


def test_tokens_that_a_model_rules_out_are_no_error(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    def rule_out(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([ids[2]]), -torch.inf)

    handle = tiny.model.lm_head.register_forward_hook(rule_out)
    try:
        (found,) = run(tiny, [TextRequest(ids, 3, logprobs=1, prompt_logprobs=True)])
    finally:
        handle.remove()
    second = found.prompt_logprobs[2]
    assert second is not None and second.logprob == -math.inf
    assert all(one is None or math.isfinite(one.logprob) for one in found.prompt_logprobs[3:])
    assert found.completion_tokens == 3


@pytest.mark.parametrize("where", ["build", "join", "step"])
def test_an_error_of_the_batch_leaves_nobody_waiting(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Out of memory, say, while some answers have just been finished and others not."""
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    broken = [True]

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def once(self: Any, *arguments: Any, **options: Any) -> Any:
            if broken and rolls_known:
                broken.clear()
                raise torch.OutOfMemoryError("no memory left")
            return original(self, *arguments, **options)

        return once

    target, name = {
        "build": (Reading, "__init__"),
        "join": (RollingCache, "admit"),
        "step": (RollingCache, "drop"),
    }[where]
    rolls_known = rolls(adapter_for(tiny.model))
    monkeypatch.setattr(target, name, failing(getattr(target, name)))

    async def some() -> list[Any]:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            asked = [TextRequest(ids, n, steering=steers(vector(128, 3), n / 10)) for n in (1, 2, 30)]
            ends = await asyncio.wait_for(
                asyncio.gather(*(one.result() for one in running.submit_all(asked)), return_exceptions=True),
                20,
            )
            assert running.ready and not broken
            assert (await running.submit(TextRequest(ids, 3)).result()).completion_tokens == 3
            return ends

    ends = asyncio.run(some())
    assert any(isinstance(end, MechanexError) and end.status_code == 500 for end in ends)
    # What was finished is an answer, whatever happened to the others.
    for end, n in zip(ends, (1, 2, 30), strict=True):
        assert isinstance(end, MechanexError) or end.completion_tokens == n
    if where != "build":
        assert not isinstance(ends[0], MechanexError)
    assert n_hooks(tiny.model) == 0


def test_cancelled_and_late_requests_free_their_places(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    endless = TextRequest(ids, 480, logit_bias=((1, -100.0), (5, -100.0)))

    async def some() -> tuple[Any, ...]:
        async with scheduled(tiny.model, tiny.tokenizer, max_batch=2) as running:
            first, second, third = (running.submit(endless) for _ in range(3))
            await _until(lambda: running.n_running == 2 and running.n_waiting == 1)
            first.cancel()
            await _until(lambda: running.n_waiting == 0)  # the third one has its place
            second.cancel()
            third.cancel()
            await _until(lambda: running.n_running == 0)
            ended = (await running.submit(TextRequest(ids, 2)).result()).completion_tokens
        async with scheduled(tiny.model, tiny.tokenizer, request_timeout=0.15) as hurried:
            with pytest.raises(APIError, match="longer than the server allows") as error:
                await hurried.submit(endless).result()
            await _until(lambda: hurried.n_running == 0)
            return ended, error.value.status_code

    assert asyncio.run(some()) == (2, 504)


def test_a_full_queue_refuses_and_says_when_to_come_back(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    async def crowd() -> None:
        async with scheduled(tiny.model, tiny.tokenizer, max_batch=1, max_waiting=2) as running:
            entered, leave = threading.Event(), threading.Event()

            def hold(adapter: Any) -> None:
                entered.set()
                leave.wait(60)

            job = asyncio.create_task(running.run(hold, None))
            await _until(entered.is_set)
            kept = [running.submit(TextRequest(ids, 1)) for _ in range(2)]
            with pytest.raises(RateLimitError) as error:
                running.submit(TextRequest(ids, 1))
            assert error.value.status_code == 429
            assert error.value.retry_after is not None
            assert error.value.retry_after >= 1
            # One whose client has gone only waits to be swept out.
            kept[1].cancel()
            kept.append(running.submit(TextRequest(ids, 1)))
            with pytest.raises(RateLimitError):
                running.submit(TextRequest(ids, 1))
            leave.set()
            await job
            assert [(await kept[i].result()).completion_tokens for i in (0, 2)] == [1, 1]
            # What is more than may wait is taken as a whole by an empty queue, or could never be asked for.
            many = running.submit_all([TextRequest(ids, 1)] * 5)
            with pytest.raises(RateLimitError):
                running.submit_all([TextRequest(ids, 1)] * 2)
            assert [(await one.result()).completion_tokens for one in many] == [1] * 5

    asyncio.run(crowd())


def test_other_work_runs_between_steps_and_its_errors_come_back(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    with torch.no_grad():
        truth = tiny.model(torch.tensor([ids])).logits

    async def mixed() -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            steered = steers(vector(128, 3))
            generation = running.submit(
                TextRequest(ids, 40, steering=steered, logit_bias=((1, -100.0), (5, -100.0)))
            )
            await _until(lambda: running.n_running == 1)
            ours = await running.run(lambda adapter: adapter.call(input_ids=torch.tensor([ids])).logits, None)
            assert torch.equal(ours.detach(), truth)  # the answer's steering is not on the model meanwhile
            with pytest.raises(ValidationError, match="that won't do"):
                await running.run(_raise(ValidationError("that won't do")), None)
            assert (await generation.result()).completion_tokens == 40

    asyncio.run(mixed())


@pytest.mark.ci
def test_text_goes_on_while_a_vector_is_computed_and_neither_changes(tiny: Any) -> None:
    def examples(n: int) -> tuple[list[str], list[str], list[str]]:
        return (
            [f"{i} {text}" for i, text in zip(range(n), PROMPTS * n, strict=False)],
            [" She smiled softly and was glad."] * n,
            [" He shouted and was angry at all."] * n,
        )

    given = {caa_vectors: examples(40), few_shot_vectors: examples(8)}
    asked = [
        TextRequest(ids_of(tiny.tokenizer, text), 12, steering=steers(vector(128, 3), strength))
        for text, strength in zip(PROMPTS, (-2.0, 1.0, 0.5), strict=False)
    ]
    expected = [run(tiny, [request])[0].text for request in asked]

    async def both(compute: Any) -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            bounds = []

            def job(adapter: Any) -> SteeringVector:
                bounds.append(pass_tokens(sys.maxsize))  # passes of other sizes round otherwise
                return compute(adapter, *given[compute], [2, 4], tiny.tokenizer)  # type: ignore[no-any-return]

            work = asyncio.create_task(running.run(job, 60))
            worker = running._worker
            await _until(lambda: worker is not None and worker.jobs.busy)
            texts = [(await running.submit(request).result()).text for request in asked]
            assert texts == expected
            if compute is few_shot_vectors:
                assert not work.done()  # the texts didn't wait for its fifty steps
            found = await work
            with pausing(lambda: None, bounds[0]):
                assert found == compute(tiny.model, *given[compute], [2, 4], tiny.tokenizer)

    for compute in given:
        asyncio.run(both(compute))
    assert n_hooks(tiny.model) == 0


def test_work_that_nobody_waits_for_ends_at_its_next_pause(tiny: Any) -> None:
    examples = ([f"{i} {PROMPTS[0]}" for i in range(400)], [" Yes."] * 400, [" No."] * 400)

    async def leave() -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            for compute in (caa_vectors, pca_vectors, few_shot_vectors):
                passes: list[int] = []

                def work(adapter: Any, compute: Any = compute, passes: list[int] = passes) -> Any:
                    handle = adapter.layers[0].register_forward_hook(lambda *_: passes.append(1))
                    try:
                        return compute(adapter, *examples, None, tiny.tokenizer)
                    finally:
                        handle.remove()

                with pytest.raises(APIError, match="took longer"):
                    await running.run(work, 0.05)
                # As many as may wait have gone, too, and don't keep others out.
                begun, release = threading.Event(), threading.Event()
                hold = asyncio.create_task(running.run(_hold(begun, release), 60))
                await _until(begun.is_set)
                worker = running._worker
                gone = [asyncio.create_task(running.run(work, 60)) for _ in range(64)]
                await asyncio.sleep(0.05)
                for one in gone:
                    one.cancel()
                await asyncio.gather(*gone, return_exceptions=True)
                last = asyncio.create_task(running.run(lambda _: "done", 60))
                release.set()
                assert await last == "done"
                await hold
                await _until(lambda worker=worker: worker is not None and not worker.jobs.busy)
                assert len(passes) < 12  # of dozens

    asyncio.run(leave())


def _hold(begun: threading.Event, release: threading.Event) -> Callable[[Any], None]:
    """Work that is at it from ``begun`` to ``release``."""

    def wait(adapter: Any) -> None:
        begun.set()
        assert release.wait(60)

    return wait


def _raise(error: Exception) -> Callable[[Any], Any]:
    def fail(adapter: Any) -> Any:
        raise error

    return fail


def test_prompts_that_fill_the_context_are_refused(tiny: Any) -> None:
    async def some() -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            with pytest.raises(ValidationError, match="context") as error:
                running.submit(TextRequest([7] * 512, 1))
            assert error.value.details == {"code": "context_length_exceeded"}
            last = await running.submit(TextRequest([7] * 511, 10)).result()
            assert last.completion_tokens == 1

    asyncio.run(some())


def test_shutdown_ends_what_it_cant_finish(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])

    async def end() -> list[Any]:
        async with scheduled(tiny.model, tiny.tokenizer, max_batch=2) as running:
            generations = [
                running.submit(TextRequest(ids, 400, logit_bias=((1, -100.0), (5, -100.0)))) for _ in range(3)
            ]
            await _until(lambda: running.n_running == 2)
            await running.drain(0.05)
            with pytest.raises(APIError, match="shutting down"):
                running.submit(TextRequest(ids, 1))
            return await asyncio.gather(*(one.result() for one in generations), return_exceptions=True)

    for error in asyncio.run(end()):
        assert isinstance(error, APIError)
        assert error.status_code == 503
    assert n_hooks(tiny.model) == 0


def test_shutdown_waits_for_other_work_and_then_gives_it_up(tiny: Any) -> None:
    release = threading.Event()

    async def end() -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            short = asyncio.create_task(running.run(lambda adapter: time.sleep(0.2), None))
            await asyncio.sleep(0.05)
            await running.drain(20)
            assert await short is None
        async with scheduled(tiny.model, tiny.tokenizer) as running:
            long = asyncio.create_task(running.run(lambda adapter: release.wait(120), None))
            await asyncio.sleep(0.05)
            draining = asyncio.create_task(running.drain(0.05))
            with pytest.raises(APIError, match="shutting down") as error:
                await long
            assert error.value.status_code == 503 and running.alive
            release.set()
            await draining
            assert not running.alive

    asyncio.run(end())


def test_the_batch_holds_no_more_positions_than_allowed(tiny: Any) -> None:
    ids = ids_of(tiny.tokenizer, PROMPTS[0])
    seen: list[int] = []

    async def some() -> None:
        # Each needs 9 + 31 positions, so two fit at once; the last one needs more than all by itself, and runs alone.
        async with scheduled(tiny.model, tiny.tokenizer, max_cache_tokens=80) as running:
            generations = [
                running.submit(TextRequest(ids, n, logit_bias=((1, -100.0), (5, -100.0)))) for n in (31,) * 4
            ]
            generations.append(running.submit(TextRequest(ids, 90, logit_bias=((1, -100.0), (5, -100.0)))))

            async def watch() -> None:
                while True:
                    seen.append(running.n_running)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            results = [await one.result() for one in generations]
            watching.cancel()
            assert [r.completion_tokens for r in results] == [31, 31, 31, 31, 90]

    asyncio.run(some())
    assert max(seen) == 2


def test_rows_that_outgrow_the_cache_wait_and_go_on_where_they_were(tiny: Any) -> None:
    found, endless = vector(128, 3), ((1, -100.0), (5, -100.0))
    requests = [
        TextRequest(ids_of(tiny.tokenizer, PROMPTS[0]), 220, logit_bias=endless, stream=True),
        TextRequest(
            ids_of(tiny.tokenizer, PROMPTS[1]), 190, logit_bias=endless, steering=steers(found, -2.0)
        ),
        TextRequest(
            ids_of(tiny.tokenizer, PROMPTS[0]),
            200,
            Sampling("top-k", 50),
            seed=4,
            logit_bias=endless,
            logprobs=1,
        ),
        TextRequest(
            ids_of(tiny.tokenizer, PROMPTS[2]),
            170,
            logit_bias=endless,
            steering=steers(found, 1.0, slice(4, 90)),
        ),
    ]
    truths = [run(tiny, [request])[0] for request in requests]
    most: list[int] = []
    rows: list[int] = []
    n_read = 0

    async def together() -> list[Result]:
        nonlocal n_read
        async with scheduled(tiny.model, tiny.tokenizer, max_cache_tokens=600) as running:
            batch = running._worker._decoder  # type: ignore[union-attr]
            step = batch.step

            def watched() -> Any:
                most.append((batch.columns + 1) * len(batch.rows))
                rows.append(len(batch.rows))
                return step()

            batch.step = watched  # type: ignore[method-assign]
            generations = [running.submit(request) for request in requests]
            results = [await generation.result() for generation in generations]
            n_read = int(running._metrics.prompt_tokens._value.get())
            return results

    results = asyncio.run(together())
    assert max(most) <= 600
    assert max(rows) == 4  # none of them is kept out for what it may need later
    assert n_read <= sum(len(request.ids) for request in requests)  # what is read again is not counted again
    for truth, result in zip(truths, results, strict=True):
        assert (truth.text, truth.finish_reason) == (result.text, result.finish_reason)
        assert (truth.prompt_tokens, truth.completion_tokens) == (
            result.prompt_tokens,
            result.completion_tokens,
        )
        assert len(truth.logprobs) == len(result.logprobs)


def _filled(lengths: list[int], seed: int, window: int) -> DynamicCache:
    """A cache as a model fills it with left-padded rows: a plain layer and one with a window."""
    from transformers import MistralConfig

    config = MistralConfig(
        num_hidden_layers=2, sliding_window=window, layer_types=["full_attention", "sliding_attention"]
    )
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        states = torch.randn(len(lengths), 2, max(lengths), 3, generator=generator)
        values = states + 1
        for i, length in enumerate(lengths):
            states[i, :, : max(lengths) - length] = values[i, :, : max(lengths) - length] = 0
        cache.update(states, values, layer)
    return cache


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_cache_shows_every_row_its_own_past(data: st.DataObject) -> None:
    """Against the plainest model of it: for each row the list of its columns."""
    window = 5
    cache: RollingCache | None = None
    rows: list[list[torch.Tensor]] = []  # per row, per layer: [2, length, 3]
    columns = 0
    for action in data.draw(
        st.lists(st.sampled_from(["admit", "step", "drop", "poison"]), min_size=3, max_size=14)
    ):
        if action == "admit":
            lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
            source = _filled(lengths, data.draw(st.integers(0, 99)), window)
            keep = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
            cache = cache or RollingCache(source)
            longest = max(lengths[i] for i in keep)
            columns = max(columns, longest)
            cache.admit(source, columns, keep, longest)
            for i in keep:
                rows.append([layer.keys[i][:, -lengths[i] :].clone() for layer in source.layers])
        elif action == "step" and rows and cache is not None:
            new = torch.randn(len(rows), 2, 1, 3)
            shown = [cache.update(new, new + 1, layer) for layer in range(2)]
            columns += 1
            for i, row in enumerate(rows):
                for layer in range(2):
                    row[layer] = torch.cat([row[layer], new[i]], 1)
                    past = row[layer] if layer == 0 else row[layer][:, -window:]
                    keys, values = shown[layer]
                    n = min(past.shape[1], keys.shape[2])
                    assert torch.equal(keys[i][:, -n:], past[:, -n:])
                    assert torch.equal(values[i][:, -n:], past[:, -n:] + 1)
                    # What left the cache must not come back in anyone's padding, least of all as NaN.
                    if layer == 0:
                        assert (keys[i][:, : keys.shape[2] - n] == 0).all()
                    assert keys.isfinite().all()
        elif action == "poison" and rows and cache is not None:
            length = data.draw(st.integers(1, 12))
            broken = _filled([length], 0, window)
            for layer in broken.layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
            cache.admit(broken, max(columns, length), None, length)
            cache.drop(len(rows))
            cache.trim(columns)
        elif action == "drop" and len(rows) > 1 and cache is not None:
            i = data.draw(st.integers(0, len(rows) - 1))
            cache.drop(i)
            rows[i] = rows[-1]
            rows.pop()
            columns = max(row[0].shape[1] for row in rows)
            cache.trim(columns)
        if cache is not None:
            assert cache.get_seq_length() == columns


def test_what_a_broken_row_left_is_wiped_when_the_batch_widens_again() -> None:
    broken = _filled([12], 0, 50)
    for layer in broken.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    cache = RollingCache(broken)
    cache.admit(_filled([2, 2, 2, 2], 1, 50), 2)
    for row in (3, 2, 1):  # there is room for them still, so that nothing is moved to a new place
        cache.drop(row)
    cache.admit(broken, 12)
    cache.drop(1)
    cache.trim(2)
    cache.admit(_filled([1], 2, 50), 2)  # takes the broken row's place
    cache.admit(_filled([9], 3, 50), 9)
    for layer in cache.layers:
        assert layer.keys.shape == (3, 2, 9, 3)
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()
        assert (layer.keys[:2, :, :7] == 0).all()
