"""Steering over HTTP: this server's fields in the bodies of vLLM's OpenAI API. For vLLM's ``--middleware``."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic import ValidationError as InvalidBody

from ..engine.intervention import Edit
from ..engine.vector_store import VectorStore
from ..errors import APIError, AuthenticationError, MechanexError, NotFoundError, ValidationError
from ..server.http.body import Body
from ..server.http.errors import error_envelope, status_of
from ..server.http.routes import parsed
from ..server.library.folder import SharedVectors
from ..server.openai.bodies import GenerationBody
from .asked import FIELD
from .engine_vectors import EngineVectors, SteerBy
from .llm import vectors_of

__all__ = ["VECTORS_VARIABLE", "SteeringMiddleware"]

VECTORS_VARIABLE = "MECHANEX_VLLM_VECTORS"
"""The environment variable that names a folder of vector files for every client."""

_OPEN = ("/health", "/ping", "/ready")
_STEERED = ("/v1/completions", "/v1/chat/completions")
_REGISTER = "/v1/steering/vectors"
_FIELDS = ("steering_vector", "steering_vector_id", "steering_strength", "steering")
_ELSEWHERE = ("behavior_names", "corrected_behaviors", "force_steering", "behavior_action", "behavior_scores")
_MOST_BYTES = 64 * 2**20
# Not ValueError, which our own refusals are too.
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class VectorBody(Body):
    """POST /v1/steering/vectors."""

    id: str | None = Field(default=None, min_length=1, max_length=256)
    layers: dict[str, list[float]] = Field(min_length=1, max_length=1024)
    edit: Literal["add", "ablate", "clamp"] = "add"
    value: float = Field(
        default=0.0, description="What a clamp sets the projection to, in lengths of the vector."
    )


class SteeringMiddleware:
    """Turns steering fields into what the workers read, and keeps the vectors that clients register.

    Nothing is answered unsteered that was asked to be steered: an unknown id, a field that vLLM can't honour, and a
    steering field sent to another address of the server are a 400. Where the server has a key, all but the addresses
    that say whether it lives ask for it.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._vectors: EngineVectors | None = None
        folder = os.environ.get(VECTORS_VARIABLE)
        self._shared = SharedVectors(Path(folder) if folder else None)
        self._stored = VectorStore()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            scope = _with_key(scope, headers, path)
            if path == _REGISTER or path.startswith(f"{_REGISTER}/"):
                await _answer(send, 200, await self._registered(scope, receive, path))
                return
            if scope["method"] == "POST" and "json" in headers.get("content-type", "json"):
                body = await _body(receive)
                receive = _again(await self._translated(scope, body, path), receive)
                kept = [one for one in scope["headers"] if one[0].lower() != b"content-length"]
                scope = {**scope, "headers": kept}
        except MechanexError as error:
            await _answer(send, status_of(error), error_envelope(error))
            return
        await self._app(scope, receive, send)

    async def _registered(self, scope: _Scope, receive: _Receive, path: str) -> dict[str, Any]:
        """The answer to a request about vectors."""
        state, method = scope["app"].state, scope["method"]
        vectors = self._known(state)
        if method == "GET" and path == _REGISTER:
            return {
                "object": "list",
                "data": [{"id": one, "object": "steering_vector"} for one in vectors.ids],
            }
        if method == "DELETE" and path != _REGISTER:
            vectors.remove(path.removeprefix(f"{_REGISTER}/"))
            return {"deleted": True}
        if method != "POST" or path != _REGISTER:
            raise APIError(f"There is no {method} {path}.", 405)
        if (getattr(state.args, "api_server_count", None) or 1) > 1:
            raise ValidationError(
                "vectors are registered with one API server (--api-server-count 1), and this has several: put them "
                "into the folder of --vectors."
            )
        try:
            body = VectorBody.model_validate(await parsed(await _body(receive)))
        except InvalidBody as error:
            raise _invalid(error) from error
        except _NO_JSON as error:
            raise ValidationError(f"The body must be a JSON object ({error}).") from error
        if body.id is not None and (self._shared.loaded(body.id) or body.id in self._stored):
            raise ValidationError(f"{body.id!r} is a vector of the server's own: choose another id.")
        edits = {_layer(layer): _edit(body, numbers) for layer, numbers in body.layers.items()}
        return {"id": vectors.add(edits, body.id), "object": "steering_vector"}

    async def _translated(self, scope: _Scope, body: bytes, path: str) -> bytes:
        """The body as vLLM takes it."""
        try:
            fields = await parsed(body) if body else {}
        except _NO_JSON:
            return body  # vLLM says what is wrong
        if not isinstance(fields, dict):
            return body
        if FIELD in (fields.get("vllm_xargs") or {}):
            raise _refused(
                f"vllm_xargs[{FIELD!r}] is the server's own: send steering_vector or steering.", "vllm_xargs"
            )
        other = [name for name in _ELSEWHERE if fields.get(name)]
        if other:
            raise _refused(
                f"{other[0]} is not served by vLLM: leave it out, or serve without --use-vllm.", other[0]
            )
        ours = {name: fields.pop(name) for name in (*_FIELDS, *_ELSEWHERE) if name in fields}
        if not any(value is not None for value in ours.values()):
            return json.dumps(fields).encode() if ours else body
        if path not in _STEERED:
            raise _refused(f"{path} is not steered; {' and '.join(_STEERED)} are.", next(iter(ours)))
        text = await self._asked(scope["app"].state, ours)
        if text is not None:
            fields["vllm_xargs"] = {**(fields.get("vllm_xargs") or {}), FIELD: text}
        return json.dumps(fields).encode()

    async def _asked(self, state: Any, ours: Mapping[str, Any]) -> str | None:
        """What the request carries, once the workers have its vectors."""
        try:
            body = GenerationBody.model_validate(ours)
        except InvalidBody as error:
            raise _invalid(error) from error
        wanted: list[tuple[str, SteerBy]] = []
        one = body.steering_vector or body.steering_vector_id
        if one is not None:
            strength = 1.0 if body.steering_strength is None else body.steering_strength
            wanted.append(("steering_vector", SteerBy(one, strength)))
        elif body.steering_strength and not body.steering:
            raise _refused(
                f"steering_strength is {body.steering_strength} and there is nothing to steer with: give a "
                "steering_vector.",
                "steering_strength",
            )
        for item in body.steering or ():
            wanted.append(("steering", SteerBy(item.vector, item.strength, item.layers, item.selector)))
        vectors = self._known(state)
        for param, by in wanted:
            try:
                await self._find(vectors, by.vector)
            except (NotFoundError, ValidationError) as error:
                raise _refused(error.message, param) from error
        try:
            asked = vectors.asked([by for _, by in wanted])
        except (NotFoundError, ValidationError) as error:
            raise _refused(error.message, wanted[0][0]) from error
        for key, data in asked.missing.items():
            await state.engine_client.collective_rpc("steering_register", args=(data,))
            vectors.sent([key])
        return asked.text

    async def _find(self, vectors: EngineVectors, vector_id: str) -> None:
        """Takes in a vector of the server's own when it is first asked for."""
        if vector_id in vectors:
            return
        found = await asyncio.to_thread(self._shared.get, vector_id)
        if found is None and vector_id in self._stored:
            found = await asyncio.to_thread(self._stored.get, vector_id)
        if found is not None:
            vectors.add(found, vector_id)

    def _known(self, state: Any) -> EngineVectors:
        if self._vectors is None:
            self._vectors = vectors_of(state.vllm_config)
        return self._vectors


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


def _edit(body: VectorBody, numbers: list[float]) -> Edit:
    vector = torch.tensor(numbers, dtype=torch.float32)
    if vector.numel() == 0:
        raise ValidationError("a layer has no numbers.")
    if body.edit == "ablate":
        return Edit.ablate(vector)
    return Edit.clamp(vector, body.value) if body.edit == "clamp" else Edit.add(vector)


def _layer(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise ValidationError(f"layers are named by their numbers; got {name[:40]!r}.") from None


def _refused(message: str, param: str) -> ValidationError:
    return ValidationError(message, details={"param": param})


def _invalid(error: InvalidBody) -> ValidationError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return _refused(
        f"Invalid value for {where[:100]!r}: {first['msg'][:500]}", str(first["loc"][:1] or where)
    )
