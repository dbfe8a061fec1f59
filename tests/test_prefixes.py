"""Texts that begin like one that was read are read from there on, and come out as if they were read whole."""

from __future__ import annotations

import asyncio
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from families import D_MODEL, build, sliding_family, tiny_tokenizer
from test_scheduler import scheduled
from transformers import DynamicCache

from mechanex.engine.decode.cache import RollingCache
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.prefix_tree import PrefixTree
from mechanex.engine.decode.prefixes import Prefixes
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.positions import selects

FIRST = tuple(range(20, 60))
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))


def add(size: float = 4.0) -> Edit:
    return Edit.add(size * DIRECTION)


class Serving:
    """A decoder that is asked one batch after another, as a server's."""

    def __init__(self, model: Any, most_bytes: int = 2**30, **options: Any) -> None:
        self.prefixes = Prefixes(most_bytes)
        self.decoder = Decoder(adapter_for(model), 0, form="rolling", prefixes=self.prefixes, **options)

    def answers(self, *requests: TextRequest) -> list[Row]:
        rows = [Row(request, tiny_tokenizer(), ()) for request in requests]
        with torch.no_grad():
            reading = self.decoder.read(rows)
            while not self.decoder.advance(reading):
                pass
            self.decoder.join(reading)
            while self.decoder.rows:
                self.decoder.step()
        self.decoder.detach()
        return rows


def fresh(model: Any, request: TextRequest) -> list[int]:
    return Serving(model, 0).answers(request)[0].chosen


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_a_next_turn_reads_only_what_is_new(name: str, overlapped: bool) -> None:
    model = build(name)
    serving = Serving(model, overlapped=overlapped)
    (first,) = serving.answers(TextRequest(FIRST, 7))
    assert first.cached_tokens == 0
    asked = TextRequest([*FIRST, *first.chosen, 5, 6, 7, 8], 7)
    (second,) = serving.answers(asked)
    # The answer's last token was chosen and, where steps don't overlap, never read.
    assert second.cached_tokens == len(FIRST) + 6
    assert second.result is not None and second.result.cached_tokens == second.cached_tokens
    assert second.chosen == fresh(model, asked)
    assert len(serving.prefixes) == 1  # the first turn is part of the second


def test_a_prompt_that_goes_another_way_shares_what_is_before() -> None:
    model, serving = build("llama"), Serving(build("llama"))
    serving.answers(TextRequest(FIRST, 5))
    asked = TextRequest([*FIRST[:25], 7, 8, 9], 5)
    (row,) = serving.answers(asked)
    assert (row.cached_tokens, row.chosen) == (25, fresh(model, asked))
    (again,) = serving.answers(TextRequest(FIRST[:25], 5))  # one token at least is read
    assert (again.cached_tokens, again.chosen) == (24, fresh(model, TextRequest(FIRST[:25], 5)))
    assert serving.answers(TextRequest([9, *FIRST], 2))[0].cached_tokens == 0


@pytest.mark.parametrize(
    ("before", "now", "shared"),
    [
        ((Steer(1, add()),), (Steer(1, add()),), 44),  # alike in content, whichever object it is
        ((), (Steer(1, add()),), 0),
        ((Steer(1, add()),), (), 0),
        ((Steer(1, add()),), (Steer(2, add()),), 0),
        ((Steer(1, add()),), (Steer(1, add(4.1)),), 0),
        ((Steer(1, add()),), (Steer(1, add().gated("norm")),), 0),
        (
            (Steer(1, add()), Steer(1, Edit.ablate(DIRECTION))),
            (Steer(1, Edit.ablate(DIRECTION)), Steer(1, add())),
            0,
        ),
        ((), (Steer(1, add(), slice(30, None)),), 30),
        ((Steer(1, add(), slice(20, 44)),), (Steer(1, add(), slice(20, None)),), 44),
        ((Steer(1, add(), slice(20, 33)),), (Steer(1, add(), slice(20, None)),), 33),
        # From the prompt's end, which lies elsewhere in the longer prompt.
        ((Steer(1, add(), slice(-3, None)),), (Steer(1, add(), slice(-3, None)),), 37),
        ((Steer(1, add(), slice(0, -1)),), (Steer(1, add(), slice(0, 39)),), 44),
    ],
)
def test_only_what_was_steered_alike_is_shared(before: Any, now: Any, shared: int) -> None:
    model, serving = build("llama"), Serving(build("llama"))
    (first,) = serving.answers(TextRequest(FIRST, 5, steering=before))
    asked = TextRequest([*FIRST, *first.chosen, 5, 6, 7, 8], 6, steering=now)
    (row,) = serving.answers(asked)
    assert row.cached_tokens == (shared if shared >= 16 else 0)
    assert row.chosen == fresh(model, asked)


def test_prompts_of_several_lengths_are_read_together_from_where_all_can() -> None:
    model, serving = build("llama"), Serving(build("llama"))
    firsts = serving.answers(TextRequest(FIRST, 5), TextRequest(FIRST[5:30], 5), TextRequest(FIRST[::-1], 5))
    more = ([7], [8, 9], [3, 4, 5])
    asked = [TextRequest([*row.ids, *row.chosen, *new], 6) for row, new in zip(firsts, more, strict=True)]
    rows = serving.answers(*asked)
    # All are read from their last four tokens on, of which the shorter additions need fewer.
    assert [row.cached_tokens for row in rows] == [42, 28, 44]
    assert [row.chosen for row in rows] == [fresh(model, one) for one in asked]
    mixed = [asked[0], TextRequest([50, 51, 52], 6)]
    assert [row.chosen for row in serving.answers(*mixed)] == [fresh(model, one) for one in mixed]


def test_memory_is_bounded_in_bytes_and_the_latest_stay() -> None:
    model = build("llama")
    per_token = 4 * 2 * 2 * 12 * 4  # layers, keys and values, heads, width, bytes
    serving = Serving(model, most_bytes=100 * per_token)
    for begin in range(5):
        serving.answers(TextRequest([begin + 10, *FIRST], 4))  # 44 tokens each
        assert serving.prefixes.n_bytes <= 100 * per_token
    assert len(serving.prefixes) == 2 and serving.prefixes.n_bytes == 88 * per_token
    cached = [
        serving.prefixes.find(Row(TextRequest([begin + 10, *FIRST]), tiny_tokenizer(), ()))
        for begin in range(5)
    ]
    assert [one is None for one in cached] == [True, True, True, False, False]
    small = Serving(model, most_bytes=10 * per_token)
    small.answers(TextRequest(FIRST, 4))
    assert len(small.prefixes) == 0


def test_texts_of_others_are_not_gone_on_from() -> None:
    serving = Serving(build("llama"))
    serving.answers(TextRequest(FIRST, 5, owner="anna"))
    assert serving.answers(TextRequest(FIRST, 5, owner="ben"))[0].cached_tokens == 0
    assert serving.answers(TextRequest(FIRST, 5))[0].cached_tokens == 0
    assert serving.answers(TextRequest(FIRST, 5, owner="anna"))[0].cached_tokens == 39


def test_what_was_read_under_other_hooks_is_forgotten() -> None:
    model, serving = build("llama"), Serving(build("llama"))
    plain = serving.answers(TextRequest(FIRST, 5))[0]
    with SteeringPlan([Intervention(1, add())]).apply(model):
        (steered,) = serving.answers(TextRequest(FIRST, 5))
        assert steered.cached_tokens == 0 and steered.chosen != plain.chosen
        assert serving.answers(TextRequest(FIRST, 5))[0].cached_tokens == 39
    (after,) = serving.answers(TextRequest(FIRST, 5))
    assert (after.cached_tokens, after.chosen) == (0, plain.chosen)


def test_a_plan_that_comes_while_others_are_answered_lets_no_text_be_gone_on_from() -> None:
    model, serving = build("llama"), Serving(build("llama"))
    edit = add()
    steered = TextRequest(list(range(100, 130)), 30, steering=(Steer(2, edit),))
    running = Row(steered, tiny_tokenizer(), ())
    decoder = serving.decoder

    def joined(row: Row) -> None:
        with torch.no_grad():
            reading = decoder.read([row])
            while not decoder.advance(reading):
                pass
            decoder.join(reading)

    first, second, third = (Row(TextRequest(FIRST, 3), tiny_tokenizer(), ()) for _ in range(3))
    joined(running)
    joined(first)
    with torch.no_grad(), SteeringPlan([Intervention(1, edit)]).apply(model):
        joined(second)  # the first one, which is not done yet, was read without the plan
        while len(decoder.rows) > 1:
            decoder.step()
        joined(third)
        while len(decoder.rows) > 1:
            decoder.step()
        expected = fresh(model, TextRequest(FIRST, 3))
        assert decoder.rows == [running]
        decoder.close()
    assert (second.cached_tokens, second.chosen) == (0, expected)
    assert (third.cached_tokens, third.chosen) == (39, expected) and first.chosen != expected


@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.embed_tokens", "every module"])
def test_what_was_read_before_a_hook_of_others_is_forgotten(place: str) -> None:
    """Wherever it is: it may change what the model makes of a text."""
    model = build("llama")
    serving = Serving(model)
    serving.answers(TextRequest(FIRST, 3))

    def double(module: Any, args: Any, output: Any) -> Any:
        chosen = place != "every module" or module is model.model.layers[1].mlp
        return 2 * output if chosen else None

    if place == "every module":
        handle = torch.nn.modules.module.register_module_forward_hook(double)
    else:
        handle = model.get_submodule(place).register_forward_hook(double)
    try:
        (row,) = serving.answers(TextRequest(FIRST, 3))
        assert (row.cached_tokens, row.chosen) == (0, fresh(model, TextRequest(FIRST, 3)))
    finally:
        handle.remove()
    (row,) = serving.answers(TextRequest(FIRST, 3))
    assert row.cached_tokens == 0


def test_layers_with_a_window_are_gone_on_from_where_they_ended() -> None:
    for window, shared in ((8, 0), (128, 30)):
        model = sliding_family("gemma2", window)
        serving = Serving(model)
        (first,) = serving.answers(TextRequest(FIRST, 5))
        asked = TextRequest([*FIRST, *first.chosen, 5, 6], 5)
        (row,) = serving.answers(asked)
        assert (row.cached_tokens, row.chosen) == (44, fresh(model, asked))
        asked = TextRequest([*FIRST[:30], 7, 8], 5)
        (row,) = serving.answers(asked)
        assert (row.cached_tokens, row.chosen) == (shared, fresh(model, asked))


def test_log_probabilities_of_a_prompt_are_read_whole() -> None:
    serving = Serving(build("llama"))
    serving.answers(TextRequest(FIRST, 3))
    (row,) = serving.answers(TextRequest(FIRST, 3, logprobs=0, prompt_logprobs=True))
    assert row.cached_tokens == 0 and len(row.prompt_logprobs) == len(FIRST)


def test_a_row_that_broke_leaves_nothing_behind() -> None:
    serving = Serving(build("gpt2"))
    huge = Edit.add(torch.full((D_MODEL,), 3e38))
    serving.answers(TextRequest(FIRST, 5, steering=(Steer(1, huge), Steer(1, huge))))
    assert len(serving.prefixes) == 0


def put(prefixes: Prefixes, request: TextRequest) -> None:
    """Keeps a text as if it had been read."""
    n = len(request.ids)
    source = DynamicCache()
    source.update(torch.zeros(1, 1, n, 1), torch.zeros(1, 1, n, 1), 0)
    cache = RollingCache(source)
    cache.admit(source, n)
    prefixes.keep(Row(request, tiny_tokenizer(), ()), n, {"past_key_values": cache}, 0)


def looked_up(prefixes: Prefixes, request: TextRequest) -> int:
    found = prefixes.find(Row(request, tiny_tokenizer(), ()))
    return 0 if found is None else found[1]


def shared(one: TextRequest, other: TextRequest, n: int) -> int:
    """How many first tokens of two texts are the same and edited alike, token by token."""

    def edits(request: TextRequest, place: int) -> list[int]:
        length = len(request.ids)
        return [id(s.edit) for s in request.steering if selects(s.tokens, place, lambda: length)]

    for i in range(min(n, len(one.ids), len(other.ids))):
        if one.ids[i] != other.ids[i] or edits(one, i) != edits(other, i):
            return i
    return min(n, len(one.ids), len(other.ids))


def test_of_many_texts_the_one_that_shares_most_is_found() -> None:
    rng, edits = random.Random(0), [add(size) for size in (1.0, 2.0)]
    selectors = [None, slice(20, None), slice(0, -3), slice(18, 30), 25, slice(0, 40, 2)]
    for most_bytes in (2**30, 2500):  # of which the second forgets most of them
        prefixes, kept = Prefixes(most_bytes), []
        for _ in range(150):
            begun = rng.choice(kept).ids[: rng.randrange(50)] if kept and rng.random() < 0.8 else ()
            ids = [*begun, *(rng.randrange(3) for _ in range(rng.randrange(16, 40)))]
            steering = tuple(
                Steer(1, rng.choice(edits), rng.choice(selectors)) for _ in range(rng.choice((0, 0, 1, 2)))
            )
            request = TextRequest(ids, 1, steering=steering)
            found = looked_up(prefixes, request)
            best = max((shared(request, one, len(ids) - 1) for one in kept), default=0)
            if most_bytes == 2**30:
                assert found == (best if best >= 16 else 0)
            else:
                assert found in (0, *(shared(request, one, len(ids) - 1) for one in kept))
            put(prefixes, request)
            kept.append(request)
            assert prefixes.n_bytes == sum(one.n_bytes for one in prefixes._kept.values()) <= most_bytes
    assert len(prefixes) < 30
    prefixes.clear()
    assert looked_up(prefixes, kept[-1]) == 0


def test_looking_among_many_texts_that_begin_alike_takes_no_longer() -> None:
    def calls(n_kept: int) -> int:
        rng, prefixes = random.Random(0), Prefixes(2**30)
        texts = [TextRequest([*FIRST, *(rng.randrange(1000) for _ in range(40))], 1) for _ in range(n_kept)]
        for text in texts:
            put(prefixes, text)
        row = Row(TextRequest([*texts[7].ids[:60], 1001, 1002], 1), tiny_tokenizer(), ())
        n = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal n
            n += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            found = prefixes.find(row)
        finally:
            sys.setprofile(None)
        assert found is not None and found[1] == 60
        return n

    assert calls(300) <= 2 * calls(10)


def test_requests_can_be_added_while_others_are_looked_for_among_what_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = load("mx-tiny", backend="transformers")
    found, free = Prefixes.find, []

    async def ask() -> None:
        async with scheduled(tiny.model, tiny.tokenizer) as running:

            def find(self: Prefixes, row: Row) -> Any:
                with ThreadPoolExecutor(1) as other:
                    changed = running._worker.changed  # type: ignore[union-attr]
                    free.append(other.submit(lambda: changed.acquire(timeout=30)).result())
                    if free[-1]:
                        other.submit(changed.release).result()
                return found(self, row)

            monkeypatch.setattr(Prefixes, "find", find)
            generations = running.submit_all([TextRequest([*FIRST, i], 2) for i in range(3)])
            for generation in generations:
                assert (await generation.result()).completion_tokens == 2

    asyncio.run(ask())
    assert len(free) >= 3 and all(free)


def test_a_tree_of_texts_finds_what_looking_at_each_finds() -> None:
    """Random texts of few tokens, so that many begin others; added and removed in any order."""
    draw = random.Random(0)
    for _ in range(60):
        tree, here = PrefixTree(), {}
        for number in range(40):
            labels = numpy.array([[draw.randrange(2), 0] for _ in range(draw.randrange(1, 9))], numpy.int64)
            if here and draw.random() < 0.3:
                gone = draw.choice(list(here))
                tree.remove(here.pop(gone))
            if not any(numpy.array_equal(labels, one) for one in here.values()):
                tree.add(labels, number)
                here[number] = labels
            asked = numpy.array([[draw.randrange(2), 0] for _ in range(draw.randrange(1, 9))], numpy.int64)
            found = list(tree.sharing(asked))
            want = {n: length for n, one in here.items() if (length := _shared(one, asked))}
            assert {n: length for length, n in found} == want and len(found) == len(want)
            assert [length for length, _ in found] == sorted(want.values(), reverse=True)
            begins = [n for n, one in here.items() if _shared(one, asked) == len(one)]
            assert sorted(tree.beginning(asked)) == sorted(begins)
            assert bool(tree) == bool(here)


def _shared(one: Any, other: Any) -> int:
    n = min(len(one), len(other))
    apart = (one[:n] != other[:n]).any(axis=1)
    return int(apart.argmax()) if apart.any() else n
