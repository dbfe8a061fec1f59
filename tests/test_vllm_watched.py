"""Watched answers in vLLM without vLLM: the stream that is scored and corrected, and what a client is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm_stream import LAYERS, WIDTH, Model, OneTensor, TwoTensors, random
from torch import Tensor

from mechanex.engine.intervention import Edit
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import ProbeDetector
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.watching import Watch
from mechanex.errors import ValidationError
from mechanex.vllm.answers import WatchedAnswer
from mechanex.vllm.capacity import Capacity
from mechanex.vllm.plan import PlacedEdit, RequestRead, plan_step
from mechanex.vllm.stream import SteeredStream, decoder_layers
from mechanex.vllm.units import packed, packed_behavior, unpacked_unit
from mechanex.vllm.watched import SHOWED, AskedWatch, WatchedRead, Watches, watch_of


def behavior(name: str, direction: Tensor, threshold: float, layer: int) -> Behavior:
    direction = direction / direction.norm()
    probe, correction = ProbeDetector(direction, 0.0, 1.0), Correction("clamp", direction, 0.0, 1.0)
    point = HookPoint("resid", layer)
    return Behavior(name, "", "m", None, WIDTH, point, "probe", probe, None, None, threshold, correction)


EARLY, LATE = behavior("early", random(), -1e9, 1), behavior("late", random(), 1e9, LAYERS)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", [OneTensor, TwoTensors])
@torch.no_grad()
def test_tokens_of_answers_are_scored_and_corrected(kind: type[OneTensor], compiled: bool) -> None:
    """After the step's edits; prompts are not watched, and what is read again is corrected again."""
    model = Model(kind)
    layers = list(decoder_layers(model, LAYERS))
    stream = SteeredStream(
        layers, WIDTH, Capacity(2, 1, 1, behaviors=True), 16, torch.device("cpu"), torch.float32
    )
    stream.wrap(layers, lambda layer: isinstance(layer, TwoTensors))
    stream.fill(0, {1: Edit.add(random())})
    run: Any = torch.compile(model, backend="eager", fullgraph=True, dynamic=True) if compiled else model
    watch, hidden = Watch((EARLY, LATE)), random(5)
    reads = [RequestRead(0, 2, 2), RequestRead(0, 3, 2, [PlacedEdit(0, 2.0)])]

    def passed(watches: list[WatchedRead]) -> Tensor:
        stream.stage(plan_step(reads))
        stream.watched.stage(watches)
        out = run(hidden)
        stream.clear()
        assert isinstance(out, Tensor)
        return out

    plain = passed([])
    found = passed([WatchedRead(watch, 2, 3, -2)])
    assert torch.equal(found[:4], plain[:4]) and not torch.allclose(found[4], plain[4])
    (seen,) = watch.seen
    assert (seen.detected, seen.corrected) == (("early",), ("early",))
    whole = [*Model(kind).layers]
    x = hidden[4:] + whole[0].linear(hidden[4:]) if isinstance(whole[0], OneTensor) else hidden
    x = x + 2.0 * stream._filled[0][1].bias
    assert seen.scores["early"] == pytest.approx(float(EARLY.scores(x)[0]), abs=1e-4)
    x = EARLY.correction(x)
    for layer in whole[1:]:
        x = x + layer.linear(x)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found[4:], x)
    assert seen.scores["late"] == pytest.approx(float(LATE.scores(x)[0]), abs=1e-4)
    again = passed([WatchedRead(watch, 2, 3, -2)])
    assert torch.equal(again, found) and watch.seen == [seen]


def test_a_request_says_what_it_has_watched() -> None:
    asked = AskedWatch("n", ("a", "b"), "abort", told=True)
    assert watch_of(asked.as_text()) == asked and not asked.alters
    assert AskedWatch("n", ("a",), "correct").alters
    for text in ("", "[]", '["n", ["a"], "stop", [], false]', '["n", 1, "abort", [], false]'):
        with pytest.raises(ValidationError):
            watch_of(text)


def test_scores_are_told_once_and_those_of_nobody_go_with_their_requests() -> None:
    watches, known = Watches(), {"a": EARLY}
    told = watches.of("1", AskedWatch("x", ("a",), "abort", told=True), known.__getitem__)
    watches.of("2", AskedWatch("y", ("a",), "abort"), known.__getitem__)
    assert watches.of("1", AskedWatch("x", ("a",), "abort", told=True), known.__getitem__) is told
    told.note(HookPoint("resid", 1), {"early": 2.0}, ["early"])
    assert watches.ending == ["1"]
    watches.release(lambda request_id: False)
    assert watches.ending == []
    assert watches.take("x") == [{"detected": ["early"], "tokens": [[{"early": 2.0}, ["early"], []]]}]
    assert watches.take("x") == watches.take("y") == []


def test_a_behavior_travels_as_its_file() -> None:
    found = unpacked_unit(packed_behavior(EARLY))
    assert isinstance(found, Behavior) and found.name == "early" and found.point == EARLY.point
    x = random(3)
    assert torch.equal(found.correction(x), EARLY.correction(x)) and torch.equal(
        found.scores(x), EARLY.scores(x)
    )
    edits = {1: Edit.add(random())}
    assert not isinstance(unpacked_unit(packed(edits)), Behavior)


# What a client is told

SEEN = [
    {
        "detected": ["early"],
        "tokens": [[{"early": 2.0}, ["early"], []], [{"early": float("inf")}, ["early"], ["early"]]],
    }
]
FIELD = {
    "detected": ["early"],
    "tokens": [
        {"token": "<5>", "scores": {"early": 2.0}, "detected": ["early"], "corrected": []},
        {"token": "<6>", "scores": {"early": None}, "detected": ["early"], "corrected": ["early"]},
        {"token": "<7>", "scores": {}, "detected": [], "corrected": []},
    ],
}


class Texts:
    def __getitem__(self, token: int) -> tuple[str, bytes]:
        return f"<{token}>", b""


def told(kind: bytes, parts: list[bytes], status: int = 200, scores: bool = True) -> bytes:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def seen() -> list[Any]:
        return SEEN

    async def run() -> None:
        texts: Any = Texts
        answer = WatchedAnswer(send, seen if scores else None, texts, hides_ids=True)
        headers = [(b"content-type", kind), (b"content-length", b"1")]
        await answer.send({"type": "http.response.start", "status": status, "headers": headers})
        for i, part in enumerate(parts):
            await answer.send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(parts)})

    asyncio.run(run())
    body = b"".join(one.get("body", b"") for one in sent)
    lengths = [value for name, value in sent[0]["headers"] if name == b"content-length"]
    assert lengths in ([], [str(len(body)).encode()])
    return body


def choice(reason: str | None, stop: str | int | None, ids: list[int]) -> dict[str, Any]:
    return {"text": "t", "finish_reason": reason, "stop_reason": stop, "token_ids": ids}


def test_a_whole_answer_says_why_it_ended_and_what_was_seen() -> None:
    body = json.dumps({"choices": [choice("stop", SHOWED, [5, 6, 7])], "prompt_token_ids": [1]}).encode()
    said = json.loads(told(b"application/json", [body[:9], body[9:]]))
    (one,) = said["choices"]
    assert (one["finish_reason"], one["stop_reason"], one["token_ids"]) == ("behavior", None, None)
    assert one["behaviors"] == FIELD and said["prompt_token_ids"] is None
    (one,) = json.loads(told(b"application/json", [body], scores=False))["choices"]
    assert one["finish_reason"] == "behavior" and "behaviors" not in one
    body = json.dumps({"choices": [choice("stop", "behavior", [5, 6, 7])]}).encode()
    (one,) = json.loads(told(b"application/json", [body], scores=False))["choices"]
    assert (one["finish_reason"], one["stop_reason"]) == ("stop", "behavior"), "that is a stop text"
    assert told(b"application/json", [b'{"error": 1}'], status=400) == b'{"error": 1}'


def test_a_stream_says_it_in_its_last_part() -> None:
    parts = [choice(None, None, [5]), choice(None, None, [6]), choice("length", None, [7])]
    events = b"".join(b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n" for one in parts)
    events += b"data: [DONE]\n\n"
    body = told(b"text/event-stream; charset=utf-8", [events[i : i + 50] for i in range(0, len(events), 50)])
    *found, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    choices = [json.loads(one.removeprefix(b"data: "))["choices"][0] for one in found]
    assert [one["finish_reason"] for one in choices] == [None, None, "length"]
    assert [one.get("behaviors") for one in choices] == [None, None, FIELD]


def test_files_that_are_no_behaviors_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechanex.vllm import launch

    monkeypatch.setattr(launch, "check_installed", lambda: None)
    (tmp_path / "examples.jsonl").write_text("{}")
    for name in ("examples.jsonl", "missing.safetensors"):
        with pytest.raises(ValidationError, match=r"names \.safetensors files of behaviors"):
            launch.serve_vllm("mx-tiny", {"behaviors": (tmp_path / name,), "host": "127.0.0.1"})
