"""Bodies that the middleware in front of vLLM can't read: none goes on that might ask to be steered."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mechanex.vllm.middleware import SteeringMiddleware

NESTED = b'{"steering_vector": "v", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MANY = b'{"steering_vector": "v", "prompt": [' + b"[]," * 300_000 + b"[]]}"


def asked(body: bytes, path: str = "/v1/completions") -> tuple[int | None, bytes]:
    """The status that the middleware answers a body with, None where it lets it through, and what came of it."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(None)
        sent.append((await receive())["body"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message.get("status") or message["body"])

    state = SimpleNamespace(args=SimpleNamespace(api_key=None), vllm_config=None)
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "app": SimpleNamespace(state=state),
    }
    asyncio.run(SteeringMiddleware(app)(scope, receive, send))
    return sent[0], sent[1]


@pytest.mark.parametrize("body", [NESTED, MANY], ids=["deep", "many"])
def test_what_holds_up_a_parser_is_refused(body: bytes) -> None:
    status, told = asked(body)
    message = json.loads(told)["error"]["message"]
    assert status == 400 and ("nested too deeply" in message or "lists and objects" in message)


@pytest.mark.parametrize("body", [b"{", b"\xff", b'{"prompt": "a"}', b"[1]"])
def test_what_asks_for_no_steering_goes_on_as_it_came(body: bytes) -> None:
    assert asked(body) == (None, body)


def test_a_batch_of_prompts_in_token_ids_goes_on() -> None:
    body = json.dumps({"prompt": [[7] * 1000] * 300}).encode()
    assert asked(body) == (None, body)


@pytest.mark.parametrize("field", ["return", "force_steering", "guided_json", "guided_choice"])
def test_what_vllm_would_leave_out_in_silence_is_refused(field: str) -> None:
    status, told = asked(json.dumps({"prompt": "a", field: {"some": "thing"}}).encode())
    assert status == 400 and json.loads(told)["error"]["param"] == field
