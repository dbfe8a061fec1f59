"""Steering over HTTP: this server's fields in the bodies of vLLM's OpenAI API. For vLLM's ``--middleware``."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError as InvalidBody

from ..engine.answering import FormKind
from ..engine.token_texts import TokenTexts
from ..errors import APIError, AuthenticationError, MechanexError, ValidationError
from ..server.http.errors import error_envelope, status_of
from ..server.http.routes import parsed
from .answers import WatchedAnswer
from .asked import FIELD, Carried
from .served import FIELDS, AskedSteering, ServedSteering, VectorBody, invalid, refused
from .watched import WATCH_FIELD

__all__ = ["SteeringMiddleware"]

_OPEN = ("/health", "/ping", "/ready")
_STEERED = ("/v1/completions", "/v1/chat/completions")
_REGISTER = "/v1/steering/vectors"
_GUIDED = tuple(f"guided_{kind}" for kind in get_args(FormKind))
_ELSEWHERE = ("force_steering", "return", *_GUIDED)
_MOST_BYTES = 64 * 2**20
_MOST_NUMBERS = 2**24  # of a vector: every layer of the largest models; and of prompts in token ids
# Not ValueError, which our own refusals are too.
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class SteeringMiddleware:
    """Turns steering fields into what the workers read, and keeps the vectors that clients register.

    Nothing is answered unsteered that was asked to be steered: an unknown id, a field that vLLM can't honour, and a
    steering field sent to another address of the server are a 400. Where the server has a key, all but the addresses
    that say whether it lives ask for it.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._made: ServedSteering | None = None

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        with ExitStack() as leases:
            try:
                scope = _with_key(scope, headers, path)
                if path == _REGISTER or path.startswith(f"{_REGISTER}/"):
                    await _answer(send, 200, await self._registered(scope, receive, path))
                    return
                if scope["method"] == "POST" and "json" in headers.get("content-type", "json"):
                    body = await _body(receive)
                    fields = await _fields(body)
                    if fields is not None:
                        asked = await self._translated(scope, fields, path)
                        if asked is not None and asked.carried.fields:
                            steering = self._steering(scope)
                            leases.enter_context(steering.vectors.held.lease(asked.carried.keys))
                            await steering.hold(asked.carried)
                            send = self._followed(scope, send, fields, asked)
                        if asked is not None:
                            body = json.dumps(fields).encode()
                    receive = _again(body, receive)
                    kept = [one for one in scope["headers"] if one[0].lower() != b"content-length"]
                    scope = {**scope, "headers": kept}
            except MechanexError as error:
                await _answer(send, status_of(error), error_envelope(error))
                return
            await self._app(scope, receive, send)

    async def _registered(self, scope: _Scope, receive: _Receive, path: str) -> dict[str, Any]:
        """The answer to a request about vectors."""
        steering, method = self._steering(scope), scope["method"]
        if method == "GET" and path == _REGISTER:
            return {
                "object": "list",
                "data": [{"id": one, "object": "steering_vector"} for one in steering.vectors.ids],
            }
        if method == "DELETE" and path != _REGISTER:
            steering.vectors.remove(path.removeprefix(f"{_REGISTER}/"))
            return {"deleted": True}
        if method != "POST" or path != _REGISTER:
            raise APIError(f"There is no {method} {path}.", 405)
        try:
            body = VectorBody.model_validate(await parsed(await _body(receive), _MOST_NUMBERS))
        except InvalidBody as error:
            raise invalid(error) from error
        except _NO_JSON as error:
            raise ValidationError(f"The body must be a JSON object ({error}).") from error
        return {"id": steering.register(body), "object": "steering_vector"}

    async def _translated(self, scope: _Scope, fields: dict[str, Any], path: str) -> AskedSteering | None:
        """What a request asks for; in ``fields``, what vLLM takes stands in the place of what is ours.

        None where nothing is ours.
        """
        for name in (FIELD, WATCH_FIELD):
            if name in (fields.get("vllm_xargs") or {}):
                raise refused(
                    f"vllm_xargs[{name!r}] is the server's own: send steering_vector or steering.",
                    "vllm_xargs",
                )
        other = [name for name in _ELSEWHERE if fields.get(name)]
        if other:
            raise refused(
                f"{other[0]} is not served by vLLM: "
                f"{'say it by structured_outputs' if other[0] in _GUIDED else 'leave it out'}, or serve without "
                "--use-vllm.",
                other[0],
            )
        ours = {name: fields.pop(name) for name in FIELDS if name in fields}
        if not ours:
            return None
        if all(value is None or value is False for value in ours.values()):
            return AskedSteering(Carried())
        if path not in _STEERED:
            raise refused(f"{path} is not steered; {' and '.join(_STEERED)} are.", next(iter(ours)))
        asked = await self._steering(scope).asked(ours)
        if asked.carried.fields and fields.get("use_beam_search"):
            raise refused(
                "in vLLM a beam search is neither steered nor watched: leave use_beam_search out.",
                "use_beam_search",
            )
        if asked.carried.fields:
            fields["vllm_xargs"] = {**(fields.get("vllm_xargs") or {}), **asked.carried.fields}
        if asked.scores and (_n_answers(fields) != 1 or fields.get("echo")):
            raise refused(
                "in vLLM behavior_scores are told of one answer, without echo: leave n and best_of at 1, and send one "
                "prompt.",
                "behavior_scores",
            )
        return asked

    def _followed(self, scope: _Scope, send: _Send, fields: dict[str, Any], asked: AskedSteering) -> _Send:
        """What the answer is to be sent by."""
        watch = asked.watch
        if watch is None:
            return send
        hides = not fields.get("return_token_ids")
        steering, engine = self._steering(scope), scope["app"].state.engine_client
        if asked.scores:
            fields["return_token_ids"] = True
        seen = (lambda: steering.seen(watch)) if asked.scores else None
        return WatchedAnswer(send, seen, lambda: _texts(engine), asked.scores and hides).send

    def _steering(self, scope: _Scope) -> ServedSteering:
        if self._made is None:
            self._made = ServedSteering(scope["app"].state)
        return self._made


@cache
def _texts(engine: Any) -> TokenTexts:
    from .._private.vllm import tokenizer_of

    return TokenTexts(tokenizer_of(engine))


def _n_answers(fields: Mapping[str, Any]) -> int:
    prompt = fields.get("prompt")
    several = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return several * max(_count(fields.get("n")), _count(fields.get("best_of")))


def _count(given: Any) -> int:
    try:
        return int(given or 1)
    except (TypeError, ValueError):
        return 1  # vLLM says what is wrong


async def _fields(body: bytes) -> dict[str, Any] | None:
    """The fields of a body; None where vLLM says what is wrong with it.

    Raises:
        ValidationError: as ``parsed``.
    """
    try:
        fields = await parsed(body, _MOST_NUMBERS) if body else {}
    except _NO_JSON:
        return None
    return fields if isinstance(fields, dict) else None


def _with_key(scope: _Scope, headers: Mapping[str, str], path: str) -> _Scope:
    """The scope with the client's key where vLLM looks for it.

    Raises:
        AuthenticationError: the server has keys, and the client sent none of them.
    """
    given = getattr(scope["app"].state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    keys = [key for key in given if key]
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        sent = headers.get("x-api-key", "")
    if (
        keys
        and path not in _OPEN
        and not any(hmac.compare_digest(sent.encode(), key.encode()) for key in keys)
    ):
        raise AuthenticationError(
            "This server needs its key: send it as 'Authorization: Bearer KEY' or 'x-api-key'."
        )
    bearer = (b"authorization", f"Bearer {sent}".encode("latin-1"))
    return {**scope, "headers": [h for h in scope["headers"] if h[0].lower() != b"authorization"] + [bearer]}


async def _body(receive: _Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise APIError("The client went away.", 499)
        part = message.get("body", b"")
        size += len(part)
        if size > _MOST_BYTES:
            raise APIError(f"A body has {_MOST_BYTES} bytes at most.", 413)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: _Receive) -> _Receive:
    """A body to be received once, and then what comes after it."""
    told = False

    async def one() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return one


async def _answer(send: _Send, status: int, body: Mapping[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})
