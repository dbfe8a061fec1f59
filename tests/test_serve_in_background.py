"""A server beside a program that goes on, such as a notebook: served from a thread, stopped by its handle."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from typing import Any

import pytest
from families import build, tiny_tokenizer

import mechanex
from mechanex.errors import MechanexError


@pytest.fixture
def client() -> mechanex.Mechanex:
    return mechanex.Mechanex().set_local_model(build("llama"), tiny_tokenizer())


def answer(url: str, key: str | None) -> dict[str, Any]:
    body = json.dumps(
        {"model": "LlamaForCausalLM", "prompt": "The morning", "max_tokens": 3, "temperature": 0}
    ).encode()
    headers = {"content-type": "application/json"} | (
        {} if key is None else {"authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=300
    ) as got:
        found: dict[str, Any] = json.load(got)
    return found


def is_taken(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_running_loop_serves_from_a_thread_until_stop(client: mechanex.Mechanex, host: str) -> None:
    async def cell() -> str:
        with client.serve(host=host, port=0, block=False) as server:
            assert server is not None and server.running
            assert (server.key is None) == (host == "127.0.0.1")
            found = await asyncio.to_thread(answer, server.url, server.key)
            assert found["usage"]["completion_tokens"] == 3
        assert not server.running
        server.stop()
        return server.url

    assert not is_taken(asyncio.run(cell()))


def test_blocking_in_a_running_loop_says_what_to_do(client: mechanex.Mechanex) -> None:
    async def cell() -> None:
        client.serve(port=0, host="127.0.0.1")

    with pytest.raises(MechanexError, match="block=False"):
        asyncio.run(cell())


def test_two_servers_and_a_taken_port(client: mechanex.Mechanex) -> None:
    with client.serve(host="127.0.0.1", port=0, block=False) as one:
        assert one is not None
        port = int(one.url.rpartition(":")[2])
        with pytest.raises(MechanexError, match="can't listen"):
            client.serve(host="127.0.0.1", port=port, block=False)
        with client.serve(host="127.0.0.1", port=0, block=False) as other:
            assert other is not None
            assert (
                answer(other.url, None)["choices"][0]["text"] == answer(one.url, None)["choices"][0]["text"]
            )
