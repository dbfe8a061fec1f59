"""A call over a network that fails: the right exception in time, nothing repeated that might do harm."""

from __future__ import annotations

import email.utils
import gzip
import json
import logging
import os
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import Close, Continue, Cut, Drip, FaultyProxy, Pass, Raw, Received, Reset, Stall, Status

from mechanex import (
    APIError,
    AuthenticationError,
    Mechanex,
    MechanexError,
    NotFoundError,
    RateLimitError,
    ValidationError,
)
from mechanex.remote import credentials, transport
from mechanex.remote.address import PUBLIC_BACKEND, address
from mechanex.remote.credentials import CredentialStore
from mechanex.remote.identity import Credentials, Tokens
from mechanex.remote.transport import MAX_ANSWER_BYTES, Transport

KEY = "mxk-secret-key-0123456789"
ACCESS, REFRESH = "access-token-secret-1", "refresh-token-secret-1"


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with FaultyProxy() as running:
        yield running


def to(proxy: FaultyProxy, *, timeout: float = 10, key: str | None = KEY) -> Transport:
    return Transport(CredentialStore(key), proxy.url, timeout=timeout)


def everything(error: BaseException) -> str:
    """All that an exception and those it came from hold, to look for secrets in."""
    seen, texts = set(), []
    todo: list[Any] = [error]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseException):
            texts += [str(one), repr(one)]
            todo += [*one.args, *vars(one).values(), one.__cause__, one.__context__]
        elif isinstance(one, (list, tuple)):
            todo += one
        elif isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif hasattr(one, "__dict__"):
            todo += vars(one).values()
        else:
            texts.append(repr(one))
    return "\n".join(texts)


# What a call sends


def test_a_call_carries_its_credentials_and_gives_json(proxy: FaultyProxy) -> None:
    told = to(proxy).get("/models")
    assert told["ok"] and told["path"] == "/models"
    assert told["headers"]["x-api-key"] == KEY and "authorization" not in told["headers"]
    assert told["headers"]["user-agent"].startswith("mechanex/") and told["headers"]["x-request-id"]
    store = CredentialStore()
    store.set_tokens(Tokens(ACCESS), address(proxy.url).origin, persist=False)
    told = Transport(store, proxy.url).post("/generate", {"prompt": "é\ud800"})
    assert told["headers"]["authorization"] == f"Bearer {ACCESS}" and "x-api-key" not in told["headers"]
    assert proxy.requests[-1].json() == {"prompt": "é\ud800"}


def test_netrc_proxies_and_cookies_of_the_user_stay_out_of_it(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    calls = to(proxy)
    proxy.faults = [Status(200, "{}", headers={"Set-Cookie": "a=b"})]
    calls.get("/models")
    told = calls.get("/models")
    assert "authorization" not in told["headers"] and "cookie" not in told["headers"]


def test_one_connection_serves_call_after_call(proxy: FaultyProxy) -> None:
    calls = to(proxy)
    for _ in range(5):
        calls.get("/models")
        calls.post("/generate", {"prompt": "a"})
    with pytest.raises(NotFoundError):
        proxy.faults = [Status(404)]
        calls.get("/none")
    calls.get("/models")
    assert proxy.connections == 1 and len(proxy.requests) == 12
    calls.close()
    calls.get("/models")
    assert proxy.connections == 2


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again(proxy: FaultyProxy) -> None:
    calls = to(proxy)
    proxy.faults = [Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")]
    calls.post("/generate", {})
    time.sleep(0.1)
    assert calls.post("/generate", {})["ok"] and proxy.connections == 2


def test_a_child_process_opens_connections_of_its_own(proxy: FaultyProxy) -> None:
    calls = to(proxy)
    calls.get("/models")
    child = os.fork()
    if child == 0:
        os._exit(0 if calls.get("/models")["ok"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert calls.get("/models")["ok"]
    assert [request.connection for request in proxy.requests] == [1, 2, 1]


def test_redirects_are_not_followed(proxy: FaultyProxy) -> None:
    with FaultyProxy() as elsewhere:
        proxy.faults = [Status(307, "", headers={"Location": f"{elsewhere.url}/models?key=1"})]
        with pytest.raises(APIError, match="base_url") as raised:
            to(proxy).get("/models")
        assert raised.value.status_code == 307 and elsewhere.url in str(raised.value)
        assert "key=1" not in str(raised.value) and not elsewhere.requests


# What an answer means


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ValidationError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (405, APIError),
        (409, APIError),
        (413, APIError),
        (422, ValidationError),
        (429, RateLimitError),
        (500, APIError),
        (501, APIError),
        (507, APIError),
    ],
)
def test_a_status_is_an_exception_with_all_that_the_server_said(
    proxy: FaultyProxy, status: int, kind: type[MechanexError]
) -> None:
    proxy.faults = [Status(status, headers={"x-request-id": "r-17"})] * 4
    with pytest.raises(MechanexError) as raised:
        to(proxy).post("/generate", {})
    error = raised.value
    assert type(error) is kind and error.status_code == status and str(error) == f"[{status}] as told"
    assert error.message == "as told" and error.details == {"detail": "as told"}
    assert error.request_id == "r-17" and len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"detail": [{"loc": ["body", "top_k"], "msg": "too small"}]}', "top_k: too small"),
        (
            '{"detail": [{"loc": ["body", "a", 0], "msg": "x"}, {"loc": [], "msg": "y"}, "z", {"type": 1}]}',
            "a.0: x; y; z; {'type': 1}",
        ),
        ('{"detail": [{"loc": 5, "msg": "bad"}, {"loc": "top_k", "msg": "odd"}]}', "bad; odd"),
        ('{"error": {"message": "as OpenAI says it", "code": "x"}}', "as OpenAI says it"),
        ('{"error": "plain"}', "plain"),
        ('{"detail": {"message": "inside"}}', "inside"),
        ('{"detail": null}', "the server answered Told, with application/json"),
        ("[1, 2]", "the server answered Told"),
        ("", "the server answered Told"),
        ('{"detail": "cut', "the server answered Told"),
        ("[" * 100_000, "the server answered Told"),
    ],
)
def test_every_shape_of_error_has_a_message(proxy: FaultyProxy, body: str, message: str) -> None:
    proxy.faults = [Status(422, body)]
    with pytest.raises(ValidationError) as raised:
        to(proxy).post("/generate", {})
    assert str(raised.value).startswith(f"[422] {message}")


def test_a_page_in_place_of_an_answer_is_an_error(proxy: FaultyProxy) -> None:
    page = "<html><body>Please log in</body></html>"
    for status in (200, 502):
        proxy.faults = [Status(status, page, "text/html")]
        with pytest.raises(APIError, match="text/html") as raised:
            to(proxy).post("/generate", {})
        assert raised.value.status_code == status and "<html>" not in str(raised.value)
    assert raised.value.details == page


def test_an_empty_answer_is_none(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(200, ""), Status(200, "null"), Status(204, "")]
    assert [to(proxy).post("/x", {}) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0", 0.0), ("", None), ("soon", None), ("-3", None), ("1.5", None), ("²", None)],
)
def test_retry_after_in_seconds(proxy: FaultyProxy, header: str, seconds: float | None) -> None:
    headers = {"Retry-After": header} if header.isascii() else {}
    proxy.faults = [Status(429, headers=headers)]
    with pytest.raises(RateLimitError) as raised:
        to(proxy).post("/generate", {})
    assert raised.value.retry_after == seconds


def test_retry_after_as_a_date_counts_from_the_servers_clock(proxy: FaultyProxy) -> None:
    theirs = time.time() - 40 * 86400  # a clock that is far off
    for ahead, expected in ((90, 90.0), (-90, 0.0)):
        dates = {
            "Date": email.utils.formatdate(theirs, usegmt=True),
            "Retry-After": email.utils.formatdate(theirs + ahead, usegmt=True),
        }
        proxy.faults = [Status(429, headers=dates)]
        with pytest.raises(RateLimitError) as raised:
            to(proxy).post("/generate", {})
        assert raised.value.retry_after == expected


# A network that fails

FAULTS = {
    "reset": Reset(),
    "reset in the middle": Reset(after=30),
    "reset in the body": Reset(after=150),
    "close": Close(),
    "cut": Cut(),
    "not http": Raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "502": Status(502),
    "503": Status(503),
    "504": Status(504, "<html>timeout</html>", "text/html"),
    "429": Status(429),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_get_is_tried_again_and_a_post_is_not(proxy: FaultyProxy, fault: Any) -> None:
    proxy.faults = [fault, fault]
    assert to(proxy).get("/models")["ok"]
    assert proxy.paths() == ["/models"] * 3
    ids = {request.headers["x-request-id"] for request in proxy.requests}
    assert len(ids) == 1
    proxy.faults = [fault]
    with pytest.raises((APIError, RateLimitError)):
        to(proxy).post("/generate", {})
    assert len(proxy.requests) == 4


def test_a_delete_is_tried_again_and_what_is_gone_then_is_deleted(proxy: FaultyProxy) -> None:
    calls = to(proxy)
    for fault in (Close(), Status(502), Reset(after=30)):
        proxy.faults = [fault, Status(404)]
        calls.delete("/behaviors/", "angry")
    assert proxy.paths() == ["/behaviors/angry"] * 6
    for faults in ([Status(404)], [Status(503), Status(404)], [Status(429), Status(404)]):
        proxy.faults = list(faults)  # nothing was done: it wasn't there
        with pytest.raises(NotFoundError):
            calls.delete("/behaviors/", "angry")


@pytest.mark.parametrize("name", ["", ".", "..", None, 5])
def test_names_that_lead_elsewhere_are_not_deleted(proxy: FaultyProxy, name: Any) -> None:
    with pytest.raises(ValidationError, match="isn't empty, nor"):
        to(proxy).delete("/auth/api-keys/", name)
    assert not proxy.requests
    to(proxy).delete("/auth/api-keys/", "../a/..?b#c")
    assert proxy.paths() == ["/auth/api-keys/..%2Fa%2F..%3Fb%23c"]


def test_a_base_url_for_openais_clients_is_pointed_out(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(404), Status(500), Status(404)]
    calls = Transport(CredentialStore(KEY), proxy.url + "/v1/")
    with pytest.raises(NotFoundError, match=r"as told\. base_url ends in /v1.*leave it out"):
        calls.post("/generate", {})
    with pytest.raises(APIError) as raised:
        calls.post("/generate", {})
    assert "/v1" not in str(raised.value)
    with pytest.raises(NotFoundError) as missing:
        to(proxy).post("/generate", {})
    assert "/v1" not in str(missing.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500, 501])
def test_what_another_try_would_not_better_is_not_tried_again(proxy: FaultyProxy, status: int) -> None:
    proxy.faults = [Status(status)]
    with pytest.raises(MechanexError):
        to(proxy).get("/models")
    assert len(proxy.requests) == 1


def test_json_that_is_cut_is_an_error_and_no_half_answer(proxy: FaultyProxy) -> None:
    proxy.faults = [Cut(honest=True)]
    with pytest.raises(APIError, match="not JSON"):
        to(proxy).get("/models")
    proxy.faults = [Cut()]
    with pytest.raises(APIError, match="connection failed") as raised:
        to(proxy).post("/generate", {})
    assert raised.value.status_code is None and raised.value.request_id


def test_a_storm_of_errors_ends_after_a_few_tries(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(503)] * 100
    with pytest.raises(APIError) as raised:
        to(proxy).get("/models")
    assert raised.value.status_code == 503 and len(proxy.requests) == 4


def test_pauses_grow_and_the_servers_wish_is_honoured(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    proxy.faults = [Status(503)] * 3
    to(proxy).get("/models")
    assert 0 < pauses[0] < pauses[1] < 8 and len(pauses) == 2 and len(proxy.requests) == 4
    pauses.clear()
    theirs = email.utils.formatdate(0, usegmt=True), email.utils.formatdate(2, usegmt=True)
    dates = dict(zip(("Date", "Retry-After"), theirs, strict=True))
    proxy.faults = [Status(429, headers={"Retry-After": "3"}), Status(503, headers=dates)]
    to(proxy).get("/models")
    assert pauses == [3, 2]


def test_a_pause_that_is_longer_than_the_call_is_not_waited_for(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(429, headers={"Retry-After": "3600"})]
    with pytest.raises(RateLimitError) as raised:
        to(proxy).get("/models")
    assert raised.value.retry_after == 3600 and len(proxy.requests) == 1


SLOW = {
    "silent": Stall(60),
    "dripping": Drip(0.01),
    "dripping head": Drip(0.01, head=True),
    "dripping, then silent": Drip(0.05, most=8),
    "head dripping, then silent": Drip(0.05, head=True, most=8),
    "continue without end": Continue(),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("fault", SLOW.values(), ids=SLOW)
def test_a_slow_server_costs_no_more_than_the_timeout(proxy: FaultyProxy, method: str, fault: Any) -> None:
    proxy.faults = [fault] * 10
    with pytest.raises(APIError, match=r"no answer in time|time for this call is over") as raised:
        to(proxy, timeout=0.5).call(method, "/models", {} if method == "POST" else None)
    assert str(raised.value).startswith(f"{method} {proxy.url}/models: ") and len(proxy.requests) <= 1


def test_an_upload_may_take_longer_than_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_CONNECT_TIMEOUT", 0.5)
    with FaultyProxy(reads_after=1.5) as proxy:
        assert to(proxy, timeout=30).post("/generate", {"prompt": "x" * (32 << 20)})["ok"]
        assert len(proxy.requests[0].json()["prompt"]) == 32 << 20


def test_an_upload_that_nobody_reads_costs_no_more_than_the_timeout() -> None:
    with FaultyProxy(reads_after=60) as proxy:
        with pytest.raises(APIError, match=r"no answer in time|time for this call is over"):
            to(proxy, timeout=1).post("/generate", {"prompt": "x" * (8 << 20)})
        assert proxy.connections <= 1  # on a busy machine the time is over before there is one


def test_the_timeout_holds_all_tries_together(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    proxy.faults = [Status(503), Status(503), Stall(60)]
    with pytest.raises(APIError, match=r"no answer in time|time for this call is over"):
        to(proxy, timeout=1).get("/models")
    assert proxy.paths() == ["/models"] * 3


def test_a_server_that_is_down_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(APIError, match=f"{url}/models: the connection failed.*refused.*is it up"):
        Transport(CredentialStore(KEY), url).get("/models")
    with pytest.raises(APIError, match=r"nowhere\.invalid"):
        Transport(CredentialStore(KEY), "https://nowhere.invalid", timeout=3).get("/models")


def test_a_proxy_on_the_way_keeps_to_the_timeout_too(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    calls = Transport(CredentialStore(), "http://nowhere.invalid", timeout=0.5)
    assert calls.get("/models")["path"] == "http://nowhere.invalid/models"
    tunnelled = Transport(CredentialStore(), "https://nowhere.invalid", timeout=0.5)
    for through in (calls, tunnelled):
        proxy.faults = [Drip(0.01, head=True)]
        with pytest.raises(APIError, match=r"no answer in time|time for this call is over"):
            through.get("/models")
    assert proxy.requests[-1].method == "CONNECT"
    proxy.faults = [Status(403)]
    with pytest.raises(APIError, match=r"connection failed.*403"):
        Transport(CredentialStore(), "https://nowhere.invalid", timeout=0.5).post("/generate", {})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost, in a file with its key; it vouches for itself."""
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout both.pem -out cert.pem -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost"
    )
    if subprocess.run(command.split(), cwd=folder, capture_output=True).returncode:
        pytest.skip("there is no openssl command to make a certificate with")
    both = folder / "both.pem"
    both.write_text(both.read_text() + (folder / "cert.pem").read_text())
    return both


def secure_proxy(certificate: Path, **options: Any) -> FaultyProxy:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return FaultyProxy(tls=context, **options)


def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    with secure_proxy(certificate) as proxy:
        with pytest.raises(APIError, match=r"not secure.*certificate") as raised:
            to(proxy, timeout=5).get("/models")
        assert not proxy.requests and proxy.connections == 1 and KEY not in everything(raised.value)


def test_tls_is_as_good_as_plain_http_and_keeps_to_the_timeout(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with secure_proxy(certificate) as proxy:
        assert to(proxy).post("/generate", {"prompt": "x" * (8 << 20)})["ok"]
        calls = to(proxy, timeout=1)
        assert calls.get("/models")["ok"] and calls.get("/models")["ok"] and proxy.connections == 2
        for fault in (Stall(60), *SLOW.values()):
            proxy.faults = [fault]
            with pytest.raises(APIError, match=r"no answer in time|time for this call is over"):
                to(proxy, timeout=0.5).get("/models")


def test_a_handshake_that_is_cut_is_a_connection_that_failed(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with secure_proxy(certificate, cut_handshakes=2) as proxy:
        assert to(proxy).get("/models")["ok"] and proxy.connections == 3
        proxy.cut_handshakes = 1
        with pytest.raises(APIError, match="the connection failed"):
            to(proxy).post("/generate", {})
        assert proxy.connections == 4 and len(proxy.requests) == 1


# Tokens that expire


def tokens_server(
    valid: set[str], *, fresh: list[str], refuse: bool = False, pause: float = 0.0
) -> FaultyProxy:
    """Accepts these access tokens; sells the fresh ones, each refresh token once."""
    spent: set[str] = set()

    def answer(request: Received) -> Any:
        if request.path == "/auth/refresh":
            token = request.json()["refresh_token"]
            assert "authorization" not in request.headers
            if refuse or token in spent:
                return Status(401, '{"detail": "refresh token used twice"}')
            spent.add(token)
            time.sleep(pause)
            access = fresh.pop(0)
            valid.clear()
            valid.add(access)
            return Status(
                200, f'{{"session": {{"access_token": "{access}", "refresh_token": "r-of-{access}"}}}}'
            )
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        return None if bearer in valid or ("x-api-key" in request.headers and not bearer) else Status(401)

    return FaultyProxy(answer=answer)


def test_an_expired_token_is_renewed_once_and_the_call_repeated() -> None:
    with tokens_server(set(), fresh=["access-2"]) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH)
        assert client.transport.post("/generate", {"prompt": "a"})["ok"]
        assert server.paths() == ["/generate", "/auth/refresh", "/generate"]
        assert server.requests[0].body == server.requests[2].body
        assert client.transport.get("/models")["ok"] and len(server.requests) == 4
        assert not client.transport.credentials.file.path.exists()


def test_eight_threads_with_one_expired_token_renew_it_once() -> None:
    with tokens_server(set(), fresh=["access-2", "access-3"], pause=0.2) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH)
        gate = threading.Barrier(8)

        def call(number: int) -> Any:
            gate.wait()
            return client.transport.post("/generate", {"prompt": str(number)})

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(call, range(8)))
        assert all(answer["ok"] for answer in answers)
        assert server.paths().count("/auth/refresh") == 1
        done = [
            r.json()["prompt"] for r in server.requests if "access-2" in r.headers.get("authorization", "")
        ]
        assert sorted(done) == sorted(map(str, range(8)))


def test_another_threads_renewal_costs_a_call_no_more_than_its_timeout() -> None:
    asked, go_on = threading.Event(), threading.Event()

    def exchange(token: str) -> Tokens:
        asked.set()
        assert go_on.wait(30)
        return Tokens("access-2", "refresh-2")

    store, origin = CredentialStore(), "https://here.example"
    store.set_tokens(Tokens(ACCESS, REFRESH), origin, persist=False)
    used = store.current(origin)
    with ThreadPoolExecutor(1) as pool:
        renewal = pool.submit(store.refresh, used, origin, exchange, time.monotonic() + 60)
        try:
            assert asked.wait(30)
            assert store.current(origin) == used  # and nobody waits to read
            with pytest.raises(APIError, match="another thread"):
                store.refresh(used, origin, exchange, time.monotonic() + 0.2)
            store.set_key(KEY, origin, same_account=True, persist=False)
        finally:
            go_on.set()
        both = Credentials(KEY, "access-2", "refresh-2")
        assert renewal.result(30) == store.current(origin) == both


def test_a_log_out_during_a_renewal_holds() -> None:
    store, origin = CredentialStore(), "https://here.example"
    store.set_tokens(Tokens(ACCESS, REFRESH), origin, persist=False)

    def exchange(token: str) -> Tokens:
        store.forget()
        return Tokens("access-2", "refresh-2")

    used = store.current(origin)
    assert store.refresh(used, origin, exchange, time.monotonic() + 60) == used
    assert not store.current(origin)


def test_a_key_set_during_a_renewal_does_not_cost_the_file_its_session() -> None:
    origin = "https://here.example"
    CredentialStore().set_tokens(Tokens(ACCESS, REFRESH), origin, persist=True)
    store = CredentialStore()

    def exchange(token: str) -> Tokens:
        store.set_key(KEY, origin, persist=False)
        return Tokens("access-2", "refresh-2")

    used = store.current(origin)
    assert store.refresh(used, origin, exchange, time.monotonic() + 60) == Credentials(KEY)
    assert CredentialStore().current(origin) == Credentials(None, "access-2", "refresh-2")


def test_two_clients_with_one_file_renew_the_token_once_between_them() -> None:
    with tokens_server(set(), fresh=["access-2", "access-3"]) as server:
        one = Mechanex(server.url).set_token(ACCESS, REFRESH, persist=True)
        two, three = Mechanex(server.url), Mechanex(server.url)
        assert three.is_remote
        for client in (one, two, three, one):
            assert client.transport.post("/generate", {})["ok"]
        assert server.paths().count("/auth/refresh") == 1
        stored = Mechanex(server.url).transport.credentials.file.read()
        assert (stored["access_token"], stored["refresh_token"]) == ("access-2", "r-of-access-2")


def test_processes_with_one_file_renew_the_token_once_between_them() -> None:
    import sys

    with tokens_server(set(), fresh=["access-2", "access-3"], pause=0.3) as server:
        Mechanex(server.url).set_token(ACCESS, REFRESH, persist=True)
        code = "import mechanex; print(mechanex.Mechanex().transport.post('/generate', {})['ok'])"
        environment = os.environ | {"MECHANEX_BASE_URL": server.url}
        running = [
            subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        assert [process.communicate(timeout=60)[0].strip() for process in running] == ["True"] * 3
        assert server.paths().count("/auth/refresh") == 1


def test_a_session_that_has_ended_is_an_authentication_error_and_is_not_asked_for_again() -> None:
    with tokens_server(set(), fresh=[], refuse=True) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH)
        with pytest.raises(AuthenticationError) as raised:
            client.transport.get("/models")
        assert raised.value.status_code == 401
        assert server.paths() == ["/models", "/auth/refresh"]
        with pytest.raises(AuthenticationError):
            client.transport.get("/models")
        assert server.paths().count("/auth/refresh") == 1


def test_no_call_goes_out_unsigned_after_a_session_has_ended() -> None:
    """A server without a key of its own would run it as its shared account."""

    def answer(request: Received) -> Any:
        signed = "authorization" in request.headers or request.path == "/auth/refresh"
        return Status(401) if signed else None

    with FaultyProxy(answer=answer) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH)
        for call in (client.whoami, client.whoami, lambda: client.generation.generate("a", 1)):
            with pytest.raises(AuthenticationError, match=r"The session has ended: login\(email, password\)"):
                call()
        assert server.paths() == ["/auth/whoami", "/auth/refresh"]
        assert client.transport.call("GET", "/models", signed="no")["ok"]
        assert client.set_key(KEY).whoami()["ok"]  # a key of its own is no session


@pytest.mark.parametrize("logs_in", [True, False], ids=["logged in itself", "read the file"])
def test_a_session_that_has_ended_is_made_good_by_a_log_in_elsewhere(logs_in: bool) -> None:
    valid: set[str] = set()
    with tokens_server(valid, fresh=[], refuse=True) as server:
        first = Mechanex(server.url).set_token(ACCESS, REFRESH, persist=True)
        client = first if logs_in else Mechanex(server.url)
        for _ in range(2):
            with pytest.raises(AuthenticationError, match="session has ended: login"):
                client.transport.get("/models")
            assert client.is_remote
        valid.add("access-9")
        Mechanex(server.url).set_token("access-9", "refresh-9", persist=True)
        asked = len(server.requests)
        assert client.transport.get("/models")["ok"] and len(server.requests) == asked + 1
        client.logout()
        assert not client.is_remote


def test_a_session_that_has_ended_leaves_the_key_its_use() -> None:
    with tokens_server(set(), fresh=[], refuse=True) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH).set_key(KEY)
        assert client.transport.get("/models")["ok"]
        assert server.paths() == ["/models", "/auth/refresh", "/models"]
        assert client.transport.get("/models")["ok"] and len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Status(500), APIError),
        (Close(), APIError),
        (Status(429, headers={"Retry-After": "9"}), RateLimitError),
        (Status(200, '{"session": null}'), APIError),
        (Status(200, '{"session": {"access_token": "two\\nlines"}}'), APIError),
        (Status(200, '{"session": {"access_token": "a", "refresh_token": 5}}'), APIError),
        (Status(200, "<html>", "text/html"), APIError),
        (Stall(60), APIError),
    ],
    ids=["500", "close", "429", "no session", "two lines", "number", "page", "silent"],
)
def test_a_renewal_that_fails_loses_no_token(fault: Any, kind: type[MechanexError]) -> None:
    failing = [fault]

    def answer(request: Received) -> Any:
        if request.path != "/auth/refresh":
            return None if "new-access" in request.headers["authorization"] else Status(401)
        new = '{"session": {"access_token": "new-access", "refresh_token": "new-refresh"}}'
        return failing.pop() if failing else Status(200, new)

    with FaultyProxy(answer=answer) as server:
        client = Mechanex(server.url, timeout=1).set_token(ACCESS, REFRESH, persist=True)
        with pytest.raises(kind) as raised:
            client.transport.post("/generate", {})
        assert REFRESH not in everything(raised.value) and ACCESS not in everything(raised.value)
        assert client.transport.credentials.file.read()["refresh_token"] == REFRESH
        assert client.transport.post("/generate", {})["ok"]


# Secrets


def test_no_log_exception_or_repr_shows_a_secret(
    proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    client = (
        Mechanex(proxy.url, KEY, timeout=20)
        .set_token(ACCESS, REFRESH, persist=True)
        .set_key(KEY, persist=True)
    )
    quoting = f'{{"detail": "{KEY} {ACCESS}", "{KEY}": ["Bearer {ACCESS}"]}}'
    shown = [repr(client.transport.credentials.current(proxy.url)), repr(client), repr(vars(client))]
    shown.append(repr(Credentials(KEY, ACCESS, REFRESH)))
    for fault in (
        *FAULTS.values(),
        Status(418, quoting),
        Status(418, f"{KEY}{ACCESS}", "text/plain"),
        *(Status(418, "x" * (500 - kept) + KEY, "text/plain") for kept in (8, len(KEY) - 1)),
        Status(307, headers={"Location": f"/to/{KEY}/models?key={KEY}"}, body=""),
        Status(418, "", headers={"x-request-id": KEY}),
        Raw(f"HTTP/1.1 418 no {KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
        Raw(f"HTTP/1.1 200 OK\r\nContent-Type: {KEY}\r\nContent-Length: 1\r\n\r\n<".encode()),
        Raw(f"HTTP/{KEY} 200 OK\r\n\r\n".encode()),
        Status(200, "x"),
    ):
        for call in (lambda: client.transport.post("/generate", {}), lambda: client.transport.get("/models")):
            proxy.faults = [fault] * 4
            with pytest.raises(MechanexError) as raised:
                call()
            shown.append(everything(raised.value))
    proxy.faults = [
        Status(422, '{"detail": [{"loc": ["body", "password"], "msg": "m", "input": "pa$s w0rd"}]}')
    ]
    with pytest.raises(ValidationError) as error:
        client.login("a@b.c", "pa$s w0rd")
    assert error.value.details["detail"][0]["input"] == "***"
    shown += [everything(error.value), caplog.text]
    for secret in (KEY, ACCESS, REFRESH, "pa$s w0rd"):
        assert not any(secret in text for text in shown)
    assert not any(KEY[:8] in text for text in shown)


def test_plain_http_to_other_machines_carries_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Transport(CredentialStore(KEY), "http://192.0.2.1:8000", timeout=0.2)
    for call in (lambda: there.get("/models"), lambda: there.post("/generate", {})):
        with pytest.raises(ValidationError, match=r"plain http.*https.*MECHANEX_ALLOW_HTTP=1"):
            call()
    with pytest.raises(ValidationError, match="plain http"):
        Mechanex("http://192.0.2.1").login("a@b.c", "password")
    with pytest.raises(APIError):
        Transport(CredentialStore(KEY), "http://192.0.2.1:8000", timeout=0.2, allow_http=True).get("/models")
    monkeypatch.setenv("MECHANEX_ALLOW_HTTP", "1")
    with pytest.raises(APIError):
        there.get("/models")
    monkeypatch.setenv("MECHANEX_ALLOW_HTTP", "0")
    with pytest.raises(ValidationError):
        there.get("/models")


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://localhost:8000", True),
        ("http://LOCALHOST", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:80", True),
        ("http://0.0.0.0:8000", True),
        ("http://localhost.example.com", False),
        ("http://127.0.0.1.example.com", False),
        ("http://192.168.0.1", False),
        ("http://[2001:db8::1]", False),
    ],
)
def test_which_addresses_are_this_machine(url: str, loopback: bool) -> None:
    assert address(url).is_loopback is loopback


# The address


def test_the_environment_names_the_server_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address().url == PUBLIC_BACKEND and not address().chosen
    assert address("https://one.example/api/").url == "https://one.example/api"
    monkeypatch.setenv("MECHANEX_BASE_URL", " HTTPS://Two.example:443/ ")
    assert address("https://one.example").url == "https://two.example"
    assert address("https://one.example").origin == "https://two.example" and address().chosen
    monkeypatch.setenv("MECHANEX_BASE_URL", "")
    assert address().url == PUBLIC_BACKEND


@pytest.mark.parametrize(
    "url",
    [
        "mxk-secret-key-0123456789",
        "ftp://mxk-secret-key-0123456789",
        "https://user:mxk-secret-key-0123456789@host",
        "https://host/?key=mxk-secret-key-0123456789",
        "https://host:mxk-secret-key-0123456789",
        "https://",
        "https://[::1",
        "https://a\nmxk-secret-key-0123456789",
    ],
)
def test_what_is_no_address_is_an_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url") as raised:
        Mechanex(url, KEY).transport.get("/models")
    assert "secret" not in everything(raised.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5"])
def test_a_timeout_is_a_number_above_zero(timeout: Any) -> None:
    with pytest.raises(ValidationError, match="timeout"):
        Mechanex(timeout=timeout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, b"x"])
def test_a_body_that_json_cannot_hold_is_not_sent(proxy: FaultyProxy, value: Any) -> None:
    with pytest.raises(ValidationError, match="JSON"):
        to(proxy).post("/generate", {"prompt": value})
    assert not proxy.requests


def test_an_answer_without_end_is_given_up(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(200, '"' + "x" * 2000 + '"'), Pass()]
    client = Mechanex(proxy.url, KEY, max_answer_bytes=1000)
    with pytest.raises(APIError, match="more than 1,000 bytes; give the client a larger max_answer_bytes"):
        client.transport.get("/models")
    assert client.transport.get("/models")["ok"]
    for wrong in (0, -1, 1.5, True, "64 MiB"):
        with pytest.raises(ValidationError, match="max_answer_bytes is a whole number above 0"):
            Mechanex(max_answer_bytes=wrong)  # type: ignore[arg-type]


def packed(body: bytes, encoding: str = "gzip", status: str = "200 OK") -> Raw:
    head = f"HTTP/1.1 {status}\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
    return Raw(head.encode() + body)


def test_an_answer_that_is_packed_unasked_is_unpacked_within_bounds(proxy: FaultyProxy) -> None:
    answer = json.dumps({"text": "x" * 100_000}).encode()
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    ways = [
        (gzip.compress(answer), "gzip"),
        (gzip.compress(answer[:40_000]) + gzip.compress(b"") + gzip.compress(answer[40_000:]), "gzip"),
        (zlib.compress(answer), "Deflate"),
        (raw.compress(answer) + raw.flush(), "deflate"),
    ]
    proxy.faults = [packed(*way) for way in ways]
    for _ in ways:
        assert to(proxy).get("/models") == json.loads(answer)
    bomb = gzip.compress(b'"' + bytes(MAX_ANSWER_BYTES) + b'"')
    for given, why in (
        (packed(bomb), "unpacks to more than 67,108,864 bytes: give the client a larger max_answer_bytes"),
        (packed(gzip.compress(b'"') + gzip.compress(bytes(MAX_ANSWER_BYTES))), "unpacks to more than"),
        (packed(zlib.compress(bytes(MAX_ANSWER_BYTES + 1)), "deflate"), "unpacks to more than"),
        (packed(gzip.compress(answer)[:-20]), "cut off"),
        (packed(gzip.compress(answer) + gzip.compress(answer)[:-20]), "cut off"),
        (packed(zlib.compress(answer)[:-20], "deflate"), "cut off"),
        (packed(gzip.compress(answer) + b"rubbish"), "damaged"),
        (packed(b"no gzip at all"), "damaged"),
        (packed(answer, "br"), "packed as 'br', which it wasn't asked for"),
    ):
        proxy.faults = [given]
        with pytest.raises(APIError, match=why):
            to(proxy).post("/generate", {})


@pytest.mark.parametrize(
    "status, kind",
    [
        ("401 Unauthorized", AuthenticationError),
        ("404 Not Found", NotFoundError),
        ("429 Too Many Requests", RateLimitError),
        ("400 Bad Request", ValidationError),
    ],
)
def test_what_cannot_be_unpacked_keeps_its_status(
    proxy: FaultyProxy, status: str, kind: type[MechanexError]
) -> None:
    proxy.faults = [packed(b"?", "br", status), packed(b"rubbish", "gzip", status)]
    for _ in range(2):
        with pytest.raises(kind) as error:
            to(proxy).post("/generate", {})
        assert error.value.status_code == int(status[:3])
    proxy.faults = [packed(b"?", "br")]
    with pytest.raises(APIError) as error:
        to(proxy).post("/generate", {})
    assert error.value.status_code == 200 and error.value.request_id


@pytest.mark.parametrize(
    "body, why",
    [
        ('{"a":' * 200 + "1" + "}" * 200, "nests more than 100 deep"),
        ("[" * 200_000 + "]" * 200_000, "nests more than 100 deep"),
        ('{"loss": NaN}', "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
    ],
)
def test_what_no_program_can_work_on_is_not_taken_for_an_answer(
    proxy: FaultyProxy, body: str, why: str
) -> None:
    proxy.faults = [Status(200, body), Status(400, body)]
    with pytest.raises(APIError, match=why):
        to(proxy).get("/models")
    with pytest.raises(ValidationError):
        to(proxy).get("/models")
    proxy.faults = [Status(200, "[" * 100 + "]" * 100)]
    assert to(proxy).get("/models")


def test_a_message_with_half_of_a_surrogate_pair_can_be_printed(proxy: FaultyProxy) -> None:
    proxy.faults = [Status(400, '{"detail": "not \\ud83e"}')]
    with pytest.raises(ValidationError) as error:
        to(proxy).get("/models")
    assert str(error.value).encode() == b"[400] not \\ud83e"


def test_a_session_that_a_server_refused_by_mistake_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose clock was ahead for a while, and took the session for one that had expired."""
    ahead = [True]

    def answer(request: Received) -> Any:
        if request.path == "/auth/refresh" and not ahead[0]:
            return Status(200, '{"session": {"access_token": "access-2", "refresh_token": "refresh-2"}}')
        return None if request.headers.get("authorization") == "Bearer access-2" else Status(401)

    with FaultyProxy(answer=answer) as server:
        client = Mechanex(server.url).set_token(ACCESS, REFRESH)
        with pytest.raises(AuthenticationError, match="session has ended"):
            client.whoami()
        ahead[0] = False
        with pytest.raises(AuthenticationError, match="session has ended"):
            client.whoami()  # not asked for again at once
        now = time.monotonic()
        monkeypatch.setattr(credentials.time, "monotonic", lambda: now + 61)
        monkeypatch.setattr(client.transport, "_timeout", 600.0)
        assert client.whoami()["ok"]
