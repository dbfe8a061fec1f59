"""The proxies of docs/serving.md in front of a server: clients are told apart, streams come as they are written."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, free_port, serving

pytestmark = [
    pytest.mark.ci,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 are addresses of Linux alone"),
]

KEY = "a-key-of-the-operator"
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
A_MINUTE = 3  # requests to the account endpoints


def documented(language: str, here: int, server: int) -> str:
    """The configuration in the documentation, without TLS, at these ports."""
    found = re.search(
        rf"^```{language}\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    text = found[1].replace("127.0.0.1:8000", f"127.0.0.1:{server}")
    if language == "caddy":
        return "{\n  admin off\n  auto_https off\n}\n" + text.replace(
            "llm.example.org", f"http://localhost:{here}"
        )
    text = re.sub(r"^ *ssl_.*\n", "", text, flags=re.MULTILINE)
    return text.replace("listen 443 ssl", f"listen 127.0.0.1:{here}")


def nginx(folder: Path, here: int, server: int) -> list[str]:
    """How nginx is started as the documentation has it."""
    paths = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off;\n{paths}\n{documented('nginx', here, server)}}}\n"
    )
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, here: int, server: int) -> list[str]:
    """How Caddy is started as the documentation has it."""
    (folder / "Caddyfile").write_text(documented("caddy", here, server))
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@pytest.fixture(params=[nginx, caddy])
def port(request: pytest.FixtureRequest, tmp_path: Path, server: ServerProcess) -> Iterator[int]:
    """A port where a proxy listens."""
    start: Callable[[Path, int, int], list[str]] = request.param
    if shutil.which(start.__name__) is None:
        pytest.skip(f"{start.__name__} is not installed")
    here = free_port()
    variables = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = start(tmp_path, here, server.port)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if asked(here, "127.0.0.1", "GET", "/ready").status == 200:
                    break
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield here
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    program = (
        "import sys, mechanex\n"
        f"mechanex.Mechanex().serve('mx-tiny', host='127.0.0.1', port=int(sys.argv[2]), rate_limit={A_MINUTE}, "
        "trusted_proxies=['127.0.0.1'])\n"
    )
    with serving(
        home=tmp_path / "home", environment={"MECHANEX_SERVER_KEY": KEY}, program=program
    ) as running:
        yield running


def asked(
    port: int, source: str, method: str, path: str, body: object = None, **headers: str
) -> http.client.HTTPResponse:
    """What a client of this address is answered."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60, source_address=(source, 0))
    sent = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request(method, path, None if body is None else json.dumps(body), sent)
    return connection.getresponse()


def test_clients_are_told_apart_and_streams_come_as_they_are_written(port: int) -> None:
    def refreshed(source: str, number: int) -> int:
        claimed = f"203.0.113.{number}"  # which is not believed
        body = {"refresh_token": "mxr-none"}
        return asked(port, source, "POST", "/auth/refresh", body, X_Forwarded_For=claimed).status

    assert [refreshed("127.0.0.2", i) for i in range(A_MINUTE + 1)] == [401] * A_MINUTE + [429]
    assert refreshed("127.0.0.3", 0) == 401
    body = {"prompt": "Anna", "max_tokens": 400, "ignore_eos": True, "stream": True}
    answer = asked(port, "127.0.0.2", "POST", "/v1/completions", body, Authorization=f"Bearer {KEY}")
    pieces = []
    while piece := answer.read1():
        pieces.append(piece)
    assert pieces[0].startswith(b"data: ") and pieces[-1].endswith(b"data: [DONE]\n\n")
    assert len(pieces) > 1
