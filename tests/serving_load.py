"""Many streaming clients at once, as light as clients can be, and the answers that each should get."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Job", "answers_of", "load", "prompt_of", "solo_answers"]

_SUBJECTS = ("Anna", "The baker", "A teacher", "The old man", "Tom", "The doctor", "Maria", "A driver")
_PLACES = ("market", "station", "kitchen", "school", "restaurant", "garden", "river", "office")


@dataclass(frozen=True)
class Job:
    """One greedy request: a prompt, how it is steered, and whether all of its tokens are wanted (``fixed``)."""

    prompt: str
    vector: str | None = None
    strength: float = 0.0
    max_tokens: int = 32
    fixed: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """The body of POST /v1/completions."""
        steering = {"steering_vector": self.vector, "steering_strength": self.strength} if self.vector else {}
        endless = {"logit_bias": {"1": -100, "5": -100}} if self.fixed else {}
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **steering,
            **endless,
        }


@dataclass
class Answer:
    """What came back for a job."""

    job: Job
    status: int = 0
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    done: bool = False
    errors: list[Any] = field(default_factory=list)


def prompt_of(i: int, n_tokens: int, tokenizer: Any) -> str:
    """The i-th prompt, of about so many tokens."""
    text = f"{_SUBJECTS[i % 8]} went to the {_PLACES[i // 8 % 8]} on Friday."
    while len(tokenizer(text)["input_ids"]) < n_tokens:
        i += 3
        text += f" {_SUBJECTS[i % 8]} was in the {_PLACES[i % 7]} and talked about the weather."
    return text


def answers_of(raw: bytes, job: Job) -> Answer:
    """Reads a whole HTTP/1.0 answer with server-sent events."""
    head, _, body = raw.partition(b"\r\n\r\n")
    answer = Answer(job, status=int(head.split(b" ", 2)[1]) if head else 0)
    if answer.status != 200:
        answer.errors.append(body.decode(errors="replace"))
        return answer
    for line in body.decode().split("\n\n"):
        if line == "data: [DONE]":
            answer.done = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.errors.append(event["error"])
                continue
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                answer.text += choice["text"]
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    return answer


async def _ask(port: int, job: Job) -> Answer:
    body = json.dumps(job.body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    raw = await reader.read(-1)
    writer.close()
    return answers_of(raw, job)


def load(port: int, jobs: Sequence[Job], n_clients: int, seconds: float) -> tuple[list[Answer], float]:
    """Lets clients ask one job after another for so many seconds, and each one job at least.

    Returns:
        All answers, those included that ended later, and the seconds until the last one.
    """

    async def client(first: int, until: float) -> list[Answer]:
        got: list[Answer] = []
        place = first
        while not got or time.monotonic() < until:
            got.append(await _ask(port, jobs[place % len(jobs)]))
            place += n_clients
        return got

    async def everyone() -> list[Answer]:
        until = time.monotonic() + seconds
        return [
            a for found in await asyncio.gather(*(client(i, until) for i in range(n_clients))) for a in found
        ]

    begun = time.monotonic()
    answers = asyncio.run(everyone())
    return answers, time.monotonic() - begun


def solo_answers(jobs: Sequence[Job], model: Any, tokenizer: Any, vectors: dict[str, Any]) -> dict[Job, str]:
    """The continuation of each different job by ``mechanex.engine.generate``, one after the other."""
    from mechanex.engine.generate import generate

    found: dict[Job, str] = {}
    for job in dict.fromkeys(jobs):
        steered = {"vector": vectors[job.vector], "strength": job.strength} if job.vector else {}
        whole = generate(
            model, tokenizer, job.prompt, max_tokens=job.max_tokens, sampling_method="greedy", **steered
        )
        found[job] = whole[len(job.prompt) :]
    return found
