"""The table of cases, and plain HTTP calls for them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "MODEL", "PROMPT", "Api", "Case", "case"]

MODEL = "mx-tiny"
PROMPT = "Anna went to the market on Friday."


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, ``[DONE]`` as text."""
        found = [one[len("data: ") :] for one in self.raw.decode().split("\n\n") if one.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in found]


class Api:
    """A server that cases ask."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = None if body is None else json.dumps(body).encode()
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        """The body of a right answer."""
        answer = self.call("POST", path, body)
        assert answer.status == 200, answer.raw
        return answer.body

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        """The error object of a 400."""
        answer = self.call("POST", path, body)
        assert answer.status == 400, (answer.status, answer.raw)
        error: dict[str, Any] = answer.body["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        return error

    def complete(self, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
        """The first choice of a greedy completion."""
        whole = self.post(
            "/v1/completions", **{"prompt": prompt, "temperature": 0, "max_tokens": 12} | fields
        )
        choice: dict[str, Any] = whole["choices"][0]
        return choice

    def chat(self, content: str = "Where is Anna?", **fields: Any) -> dict[str, Any]:
        """The first choice of a greedy answer to a chat."""
        messages = [{"role": "user", "content": content}]
        whole = self.post(
            "/v1/chat/completions", **{"messages": messages, "temperature": 0, "max_tokens": 12} | fields
        )
        choice: dict[str, Any] = whole["choices"][0]
        return choice

    def stream(self, path: str, **body: Any) -> list[Any]:
        answer = self.call("POST", path, {**body, "stream": True})
        assert answer.status == 200, answer.raw
        assert answer.events[-1] == "[DONE]"
        return answer.events[:-1]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        client: who expects it.
        right: what is right, in words.
        check: asserts it.
    """

    client: str
    right: str
    check: Callable[[Api], None]


CASES: list[Case] = []


def case(client: str, right: str) -> Callable[[Callable[[Api], None]], Callable[[Api], None]]:
    """Adds a line to the table."""

    def add(check: Callable[[Api], None]) -> Callable[[Api], None]:
        CASES.append(Case(client, right, check))
        return check

    return add
