"""The documented methods over HTTP against a real server, and where each call runs when things go wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from faulty_proxy import Close, Cut, FaultyProxy, Raw, Reset, Stall, Status
from server_process import ServerProcess, serving

import mechanex
from mechanex import (
    APIError,
    AuthenticationError,
    Mechanex,
    MechanexError,
    NotFoundError,
    RateLimitError,
    SteeringVector,
    ValidationError,
)
from mechanex.remote.address import PUBLIC_BACKEND

PROMPT = "Anna met the neighbour at the market."
EXAMPLES: dict[str, list[str]] = {
    "prompts": ["Clara walked into the bakery.", "Omar wrote this on Monday."],
    "positive_answers": [" She shouted furiously.", " I screamed, and we were full of rage."],
    "negative_answers": [" She smiled softly.", " I waited, and we were full of peace."],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for this machine only, which asks for no key."""
    with serving(home=tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Any:
    return Mechanex().load("mx-tiny", backend="transformers")


@pytest.fixture
def local(model: Mechanex) -> Mechanex:
    """A client with mx-tiny loaded and no server."""
    return Mechanex().set_local_model(model.local_model, model.tokenizer)


@pytest.fixture
def remote(server: ServerProcess) -> Mechanex:
    """A client of the server, with nothing loaded."""
    return Mechanex(server.url, "any-key")


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url) as running:
        yield running


@pytest.fixture
def both(proxy: FaultyProxy, model: Mechanex) -> Mechanex:
    """A client with a key for the server behind the proxy, and mx-tiny loaded."""
    return Mechanex(proxy.url, "any-key", timeout=20).set_local_model(model.local_model, model.tokenizer)


# The same results over HTTP and here


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_method": "greedy"},
        {"seed": 3},
        {"seed": 3, "top_k": 5, "temperature": 0.7},
        {"seed": 4, "sampling_method": "top-p", "top_p": 0.8},
        {"seed": 5, "sampling_method": "min-p"},
        {"seed": 5, "sampling_method": "min-p", "min_p": 0.2},
        {"seed": 6, "sampling_method": "typical"},
        {"seed": 7, "stop": ["the", "and"]},
        {"seed": 7, "stop": "."},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_text_there_and_here(remote: Mechanex, local: Mechanex, options: Any) -> None:
    there = remote.generation.generate(PROMPT, 24, **options)
    assert there == local.generation.generate(PROMPT, 24, **options)
    assert there.startswith(PROMPT) and len(there) > len(PROMPT)


def test_seeds_at_their_end_and_none_at_all_are_as_here(remote: Mechanex, local: Mechanex) -> None:
    prompts = [PROMPT, "Tom said: I am"]
    found = [
        client.generation.generate(prompts, 8, seed=numpy.uint64(2**63 - 1)) for client in (remote, local)
    ]
    assert found[0] == found[1]
    for client in (remote, local):
        for seed in ("7", 1.5, -1, 2**63, True):
            for call in (client.generation.generate, client.sae.generate):
                with pytest.raises(ValidationError, match=r"seed is a whole number from 0 to 2\*\*63 - 1"):
                    call(PROMPT, seed=seed)


@pytest.mark.parametrize("method", ["caa", "few-shot"])
def test_vectors_computed_there_steer_as_those_computed_here(
    remote: Mechanex, local: Mechanex, method: str
) -> None:
    ids = [
        client.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method=method)
        for client in (remote, local)
    ]
    assert ids[0] != ids[1]
    for strength in (0.75, -1, 2):
        texts = [
            client.generation.generate(PROMPT, 24, seed=1, steering_vector=one, steering_strength=strength)
            for client, one in zip((remote, local), ids, strict=True)
        ]
        assert texts[0] == texts[1] != local.generation.generate(PROMPT, 24, seed=1)


def test_a_file_of_examples_and_the_default_layer(remote: Mechanex, local: Mechanex, tmp_path: Path) -> None:
    names = ("prompt", "positive", "negative")
    lines = [json.dumps(dict(zip(names, line, strict=True))) for line in zip(*EXAMPLES.values(), strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    texts = []
    for client in (remote, local):
        vector = client.steering.generate_from_jsonl(tmp_path / "pairs.jsonl", method="caa")
        texts.append(
            client.generation.generate(PROMPT, 20, "greedy", steering_vector=vector, steering_strength=2)
        )
    assert texts[0] == texts[1]


def test_a_streamed_text_is_the_whole_one_and_begins_with_the_prompt(remote: Mechanex) -> None:
    pieces = list(remote.generation.generate(PROMPT, 10, seed=2, stream=True))
    assert pieces[0] == PROMPT and "".join(pieces) == remote.generation.generate(PROMPT, 10, seed=2)


def test_strength_zero_steers_nothing_and_says_so(remote: Mechanex, caplog: pytest.LogCaptureFixture) -> None:
    vector = remote.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method="caa")
    given = {"seed": 2, "steering_vector": vector}
    steered = remote.generation.generate(PROMPT, 10, steering_strength=0, **given)
    assert steered == remote.generation.generate(PROMPT, 10, seed=2)
    assert "steers nothing" in caplog.text
    whole = remote.generation.generate(PROMPT, 10, steering_strength=1, **given)
    assert remote.generation.generate(PROMPT, 10, **given) == whole != steered


def test_sessions_passwords_and_the_end_of_an_account(server: ServerProcess) -> None:
    client = Mechanex(server.url)
    client.signup("last@example.com", "a long password")
    client.set_key(client.create_api_key("notebook")["key"])
    assert client.login("last@example.com", "a long password")
    other = Mechanex(server.url)
    other.login("last@example.com", "a long password", persist=False)
    assert len(client.list_sessions()) == 3
    token = other.transport.credentials.current(other.transport.address.origin).access_token
    assert token is not None and other.logout() is True
    with pytest.raises(AuthenticationError, match="session has ended"):
        Mechanex(server.url).set_token(token).whoami()
    client.login("last@example.com", "a long password")
    with pytest.raises(AuthenticationError, match="password is wrong"):
        client.change_password("another password", "the next password")
    told = client.change_password("a long password", "the next password")
    assert told["session"]["access_token"] == "***"
    (session,) = client.list_sessions()
    with pytest.raises(NotFoundError, match="no session of this account"):
        client.end_session("../sessions")
    client.end_session(session["id"])
    with pytest.raises(AuthenticationError, match="log-in with the password"):
        client.end_session(session["id"])
    client.login("last@example.com", "the next password")
    client.delete_account("the next password")
    assert not client.is_remote
    with pytest.raises(AuthenticationError, match="address or the password"):
        client.login("last@example.com", "the next password")


def test_logging_out_works_without_the_server(caplog: pytest.LogCaptureFixture) -> None:
    client = Mechanex("http://127.0.0.1:9").set_token("an-access-token", "a-refresh-token")
    client.logout()
    assert not client.is_remote and "goes on at the server" in caplog.text
    assert "a-refresh-token" not in caplog.text


def test_an_account_from_its_first_to_its_last_moment(server: ServerProcess) -> None:
    client = Mechanex(server.url)
    answer = client.signup("first@example.com", "a long password")
    assert answer["user"]["email"] == "first@example.com" and answer["session"]["access_token"] == "***"
    assert client.whoami()["email"] == "first@example.com"
    made = client.create_api_key("notebook")
    (listed,) = client.list_api_keys()
    assert listed["name"] == "notebook" and made["key"] not in str(listed)
    with_key = Mechanex(server.url, made["key"])
    assert with_key.whoami()["email"] == "first@example.com"
    vector = with_key.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method="caa")
    steered = client.generation.generate(PROMPT, 4, seed=1, steering_vector=vector, steering_strength=1)
    assert steered.startswith(PROMPT)
    assert client.set_model("mx-tiny")["model_name"] == "mx-tiny"
    with pytest.raises(NotFoundError):
        client.set_model("another")
    client.delete_api_key(listed["id"])
    assert client.list_api_keys() == []
    for key_id in (listed["id"], "../api-keys", "a?b#c"):
        with pytest.raises(NotFoundError, match="no API key of this account"):
            client.delete_api_key(key_id)
    with pytest.raises(ValidationError, match="isn't empty"):
        client.delete_api_key("")
    assert Mechanex(server.url).whoami()["email"] == "first@example.com"  # from the file
    assert client.logout()
    again = Mechanex(server.url)
    with pytest.raises(AuthenticationError) as raised:
        again.login("first@example.com", "a wrong password")
    assert raised.value.status_code == 401 and "wrong password" not in str(raised.value.details)
    again.login("first@example.com", "a long password")
    other = Mechanex(server.url)
    other.signup("second@example.com", "a long password", persist=False)
    with pytest.raises(NotFoundError):
        other.generation.generate(PROMPT, 4, steering_vector=vector, steering_strength=1)
    with pytest.raises(ValidationError):
        other.signup("third@example.com", "short")


def close_to(found: Any, expected: Any) -> bool:
    """Whether two answers are the same but for the rounding of their numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close_to(found[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close_to, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, abs=1e-3))
    return bool(found == expected)


def test_structure_and_attribution_are_the_same_here_and_there(remote: Mechanex, local: Mechanex) -> None:
    assert remote.model.get_graph() == local.model.get_graph()
    paths = remote.model.get_paths()
    assert paths == local.model.get_paths()
    prompts = ("Anna went home. She was calm. She", "Anna went home. She was angry. She")
    for options in (
        {},
        {"steps": 3, "metric": (" smiled", " shouted"), "target_module_paths": tuple(paths[:4])},
        {"edges": True, "positions": False},
        {
            "drop_layers": True,
            "recompute_attention": True,
            "target_module_paths": ["model.layers.1.self_attn.q_proj"],
        },
    ):
        there = remote.attribution.compute_scores(*prompts, **options)  # type: ignore[arg-type]
        here = local.attribution.compute_scores(*prompts, **options)  # type: ignore[arg-type]
        assert close_to(there, here)
        assert bool(there.get("edges")) == ("edges" in options)
    with pytest.raises(ValidationError, match="Paths like it"):
        remote.attribution.compute_scores(*prompts, ["model.layers.1.self_atn"])
    with pytest.raises(ValidationError, match="align='tokens'"):
        remote.attribution.compute_scores("Anna", "Anna went home.")
    with pytest.raises(MechanexError, match="a function as metric runs locally"):
        remote.attribution.compute_scores(*prompts, metric=lambda logits: logits[:, 0])


def test_behaviors_are_kept_by_the_server(remote: Mechanex, tmp_path: Path) -> None:
    before = remote.sae.list_behaviors()
    made = remote.sae.create_behavior("angry", **EXAMPLES, description="shouting")
    assert made["behavior_name"] == "angry" and made["steering_vector_id"]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "He", "positive": " ran", "negative": " slept"}')
    remote.sae.create_behavior_from_jsonl(
        "fast", tmp_path / "pairs.jsonl", "running", made["steering_vector_id"]
    )
    made_here = remote.sae.list_behaviors()[len(before) :]
    assert [one["behavior_name"] for one in made_here] == ["angry", "fast"]
    with pytest.raises(ValidationError, match="that of the behavior 'angry', 'fast'"):
        remote.steering.delete_vectors(made["steering_vector_id"])
    remote.sae.delete_behavior("angry")
    with pytest.raises(NotFoundError, match="no behavior of this account"):
        remote.sae.delete_behavior("angry")
    remote.sae.delete_behavior("fast")
    remote.steering.delete_vectors(made["steering_vector_id"])
    with pytest.raises(NotFoundError):
        remote.steering.delete_vectors(made["steering_vector_id"])
    assert remote.sae.list_behaviors() == before


def test_models_of_a_server_are_listed_without_a_key(server: ServerProcess) -> None:
    assert Mechanex.get_huggingface_models("127.0.0.1", server.port) == ["mx-tiny"]
    assert mechanex.get_huggingface_models(port=server.port) == ["mx-tiny"]
    with FaultyProxy() as friendly:
        port = int(friendly.url.rpartition(":")[2])
        answers = [
            '["a", {"name": "b"}, {"id": "c"}]',
            '{"models": []}',
            '{"models": [{}]}',
            '{"other": 1}',
            "3",
        ]
        friendly.faults = [Status(200, answer) for answer in answers]
        assert Mechanex.get_huggingface_models(port=port) == ["a", "b", "c"]
        assert Mechanex.get_huggingface_models(port=port) == []
        for _ in range(3):
            with pytest.raises(APIError, match="get_huggingface_models"):
                Mechanex.get_huggingface_models(port=port)
        assert not any("x-api-key" in request.headers for request in friendly.requests)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.raag.generate([]), "at least one"),
        (lambda c: c.raag.generate([{}]), "neither"),
        (lambda c: c.raag.generate([{}], docs=[{}], pinecone_index_name="x"), "both"),
        (lambda c: c.raag.generate({"question": "x"}, docs=[]), "list"),
        (lambda c: c.attribution.compute_scores("a", "b", "path"), "put it in a list"),
        (lambda c: c.attribution.compute_scores("a", None), "corrupted_prompt"),
        (lambda c: c.sae.generate(["a"]), "prompt is a text"),
        (lambda c: c.sae.generate("a", behavior_names="angry"), "behavior_names"),
        (lambda c: c.sae.create_behavior("", **EXAMPLES), "behavior_name"),
        (lambda c: c.sae.create_behavior("x", [], [], []), "at least 1"),
        (lambda c: c.sae.create_behavior("x", ["a"], ["b"], ["c", "d"]), "'negative_answers': 2"),
        (lambda c: c.sae.create_behavior("x", "abc", ["b"], ["c"]), "are lists.*a single text as prompts"),
        (lambda c: c.sae.create_behavior("x", ["a"], None, ["c"]), "are lists.*NoneType as positive_answers"),
        (lambda c: c.sae.generate("a", force_steering=5), "force_steering is a list of names; got int"),
        (lambda c: c.attribution.compute_scores("a", "b", 5), "target_module_paths is a list"),
        (lambda c: c.raag.generate(5), "qa_entries is a list"),
        (lambda c: c.raag.generate([{}], docs=5), "docs is a list"),
        (lambda c: c.steering.generate_vectors(None, ["b"], ["c"]), "are lists.*NoneType as prompts"),
        (lambda c: c.steering.generate_vectors(["a"], "b", ["c"]), "are lists.*a single text"),
        (
            lambda c: c.steering.generate_vectors(["a"], ["b"], ["c"], 3),
            r"list of layers; got 3: write \[3\]",
        ),
        (lambda c: c.generation.generate("a", stop=5), "stop is a list of texts; got int"),
        (lambda c: c.get_huggingface_models(host=None), "host is a name"),
        (lambda c: c.get_huggingface_models(port="x"), "port is an int"),
        (lambda c: c.steering.generate_vectors(["a"], ["b"], [], method="caa"), "one length"),
        (lambda c: c.steering.generate_vectors(["a"], ["b"], ["c"], method="magic"), "'magic'"),
        (lambda c: c.generation.generate("a", steering_strength=1), "no steering_vector"),
        (lambda c: c.set_model(""), "model"),
        (lambda c: c.create_api_key(" "), "name"),
    ],
)
def test_bad_arguments_are_not_sent(both: Mechanex, proxy: FaultyProxy, call: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        call(both)
    assert not proxy.requests


def test_iterators_serve_the_server_and_then_the_local_model(both: Mechanex, proxy: FaultyProxy) -> None:
    for faults in ([], [Close()]):
        proxy.faults = list(faults)
        once = {name: iter(given) for name, given in EXAMPLES.items()}
        vector = both.steering.generate_vectors(**once, layer_idxs=iter([3]), method="caa")  # type: ignore[arg-type]
        assert both.has_vector(vector) is bool(faults)
        assert proxy.requests[-1].json() == {**EXAMPLES, "layer_idxs": [3], "method": "caa"}
    proxy.faults = [Close()]
    texts = [
        both.generation.generate(PROMPT, 20, seed=7, stop=stop)  # type: ignore[call-overload]
        for stop in (iter(["the", "and"]), ["the", "and"])
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"top_k": 0},
        {"top_p": 2.0},
        {"temperature": -1.0},
        {"sampling_method": "beam"},
    ],
    ids=str,
)
def test_what_the_server_finds_wrong_is_raised_and_not_tried_here(
    both: Mechanex, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, options: Any
) -> None:
    with pytest.raises(ValidationError) as raised:
        both.generation.generate(PROMPT, **options)
    assert raised.value.status_code in (400, 422) and len(proxy.requests) == 1
    assert "local model" not in caplog.text


def test_bodies_are_those_of_the_wire_contract(proxy: FaultyProxy, both: Mechanex) -> None:
    both.generation.generate("Hi", 3)
    assert proxy.requests[-1].json() == {
        "prompt": "Hi",
        "sampling_method": "top-k",
        "max_tokens": 3,
        "top_k": 50,
        "top_p": 0.9,
        "steering_vector_id": None,
        "steering_strength": 0,
    }
    both.generation.generate("Hi", 3, seed=0, temperature=2.0, min_p=0.1, stop=("x",))
    sent = proxy.requests[-1].json()
    assert {name: sent[name] for name in ("seed", "temperature", "min_p", "stop")} == {
        "seed": 0,
        "temperature": 2.0,
        "min_p": 0.1,
        "stop": ["x"],
    }
    both.steering.generate_vectors(**EXAMPLES, layer_idxs=(3, -1), method="caa")
    assert proxy.requests[-1].path == "/steering/generate"
    assert proxy.requests[-1].json() == {**EXAMPLES, "layer_idxs": [3, -1], "method": "caa"}
    both.sae.create_behavior("b", **EXAMPLES)
    assert proxy.requests[-1].json() == {**EXAMPLES, "behavior_name": "b", "description": ""}
    with pytest.raises(MechanexError, match="has no question"):
        both.raag.generate([{"q": 1}], pinecone_index_name="index")
    assert proxy.requests[-1].json() == {"qa_entries": [{"q": 1}], "pinecone_index_name": "index"}
    assert both.sae.generate("Hi").startswith("Hi")  # here, after the server's 501
    assert proxy.requests[-1].json() == {
        "prompt": "Hi",
        "max_new_tokens": 50,
        "behavior_names": None,
        "force_steering": None,
    }


def test_both_shapes_of_an_answer_are_taken() -> None:
    with FaultyProxy() as server:
        client = Mechanex(server.url, "a-key")
        keys = [{"id": "1", "name": "n", "key": "k…"}]
        server.faults = [Status(200, json.dumps(keys)), Status(200, json.dumps({"keys": keys}))]
        assert client.list_api_keys() == client.list_api_keys() == keys
        server.faults = [Status(200, '{"key": "new"}'), Status(200, '{"api_key": "new"}')]
        assert [client.create_api_key()["key"] for _ in range(2)] == ["new", "new"]
        for name, call in (("graph", client.model.get_graph), ("paths", client.model.get_paths)):
            server.faults = [Status(200, '["a"]'), Status(200, json.dumps({name: ["a"]}))]
            assert call() == call() == ["a"]
        server.faults = [Status(200, '[{"a": 1}]')]
        assert client.sae.list_behaviors() == [{"a": 1}]
        server.faults = [Status(200, "")]
        assert client.set_model("m") == {}


@pytest.mark.parametrize("answer", ["null", "[]", "{}", '"text"', '{"output": 3}', '{"output": null}', "3"])
def test_an_answer_without_what_it_promises_is_an_error(answer: str) -> None:
    with FaultyProxy() as server:
        server.faults = [Status(200, answer)] * 3
        client = Mechanex(server.url, "a-key")
        with pytest.raises(APIError, match=r"generation\.generate"):
            client.generation.generate("Hi")
        with pytest.raises(APIError, match="create_api_key"):
            client.create_api_key()
        with pytest.raises(APIError, match=r"session|login"):
            client.login("a@b.c", "password")


@pytest.mark.parametrize("answer", ['"mxk-made"', '["mxk-made"]', '{"key": {"secret": "mxk-made"}}'])
def test_a_new_key_in_an_unexpected_place_is_in_no_error(answer: str) -> None:
    with FaultyProxy() as server:
        server.faults = [Status(200, answer)]
        with pytest.raises(APIError, match="create_api_key") as raised:
            Mechanex(server.url, "a-key").create_api_key()
        assert "mxk-made" not in repr((raised.value.args, vars(raised.value)))


# Where a call runs

FALLS_BACK = {
    "401": Status(401),
    "403": Status(403),
    "500": Status(500),
    "501": Status(501),
    "503": Status(503),
    "reset": Reset(),
    "reset in the middle": Reset(after=40),
    "close": Close(),
    "cut": Cut(),
    "not http": Raw(b"hello\r\n"),
}


@pytest.mark.parametrize("fault", FALLS_BACK.values(), ids=FALLS_BACK)
def test_auto_runs_here_with_one_warning_when_the_server_fails(
    both: Mechanex, local: Mechanex, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    proxy.faults = [fault]
    assert both.generation.generate(PROMPT, 8, seed=1) == local.generation.generate(PROMPT, 8, seed=1)
    assert len(proxy.requests) == 1
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "generation.generate runs on the local model" in warnings[0].getMessage()
    caplog.clear()
    proxy.faults = [fault]
    vector = both.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method="caa")
    assert set(local.steering.get_vectors(vector)) == {3}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_auto_runs_here_within_the_timeout_when_the_server_is_silent_or_down(
    proxy: FaultyProxy, local: Mechanex, model: Mechanex
) -> None:
    proxy.faults = [Stall(60)]
    here = local.generation.generate(PROMPT, 4, seed=1)
    for url in (proxy.url, "http://127.0.0.1:9"):
        client = Mechanex(url, "key", timeout=0.5).set_local_model(model.local_model, model.tokenizer)
        assert client.generation.generate(PROMPT, 4, seed=1) == here


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ValidationError),
        (404, NotFoundError),
        (409, APIError),
        (422, ValidationError),
        (429, RateLimitError),
    ],
)
def test_auto_raises_what_the_server_says_about_the_call(
    both: Mechanex, proxy: FaultyProxy, status: int, kind: type[Exception]
) -> None:
    proxy.faults = [Status(status)]
    with pytest.raises(kind):
        both.generation.generate(PROMPT, 4)
    assert len(proxy.requests) == 1


WRONG = {
    "moved": Status(307, "", headers={"Location": "/elsewhere"}),
    "cut json": Cut(honest=True),
    "page": Status(200, "<html>", "text/html"),
    "empty": Status(200, ""),
    "list": Status(200, "[]"),
    "another field": Status(200, '{"text": "x"}'),
    "another type": Status(200, '{"output": 3}'),
}


@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_auto_raises_an_answer_that_is_no_failure_of_the_server(
    both: Mechanex, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    proxy.faults = [fault]
    with pytest.raises(APIError):
        both.generation.generate(PROMPT, 4)
    assert len(proxy.requests) == 1 and not caplog.records


@pytest.mark.parametrize("fault", [Status(401), Status(500), Close()], ids=str)
def test_without_a_model_the_error_names_both_ways_on(proxy: FaultyProxy, fault: Any) -> None:
    client = Mechanex(proxy.url, "any-key")
    for mode, says in (("auto", True), ("remote", False)):
        proxy.faults = [fault]
        with pytest.raises((APIError, AuthenticationError)) as raised:
            client.set_execution_mode(mode).generation.generate(PROMPT, 4)
        assert ("load a model" in str(raised.value)) is says


def test_a_servers_vector_is_not_looked_for_here_when_the_server_is_down(
    both: Mechanex, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    vector = both.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method="caa")
    steered = {"steering_vector": vector, "steering_strength": 1}
    assert both.generation.generate(PROMPT, 2, **steered).startswith(PROMPT)
    proxy.faults = [Close()]
    with pytest.raises(APIError, match="the connection failed") as raised:
        both.generation.generate(PROMPT, 2, **steered)
    assert not isinstance(raised.value, NotFoundError) and not caplog.records


def test_the_tensors_of_a_servers_vectors_are_not_here(remote: Mechanex, tmp_path: Path) -> None:
    vector = remote.steering.generate_vectors(**EXAMPLES, layer_idxs=[3], method="caa")
    for call in (
        lambda: remote.steering.get_vectors(vector),
        lambda: remote.steering.save_vectors(vector, tmp_path / "v.json"),
    ):
        with pytest.raises(
            NotFoundError, match=r"this machine.*generate there.*set_execution_mode\('local'\)"
        ):
            call()
    with pytest.raises(NotFoundError) as raised:
        Mechanex().steering.get_vectors(vector)
    assert "generate there" not in str(raised.value)


@pytest.mark.parametrize("fault", [Status(401), Status(500), Close()], ids=str)
def test_remote_mode_and_a_client_without_a_model_raise_every_error(
    both: Mechanex, proxy: FaultyProxy, fault: Any
) -> None:
    for client in (both.set_execution_mode("remote"), Mechanex(proxy.url, "any-key")):
        proxy.faults = [fault]
        with pytest.raises((APIError, AuthenticationError)):
            client.generation.generate(PROMPT, 4)


def test_auto_says_at_every_call_that_the_session_has_ended(
    model: Mechanex, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(answer=lambda request: Status(401)) as server:
        client = Mechanex(server.url).set_token("an-access", "a-refresh")
        client.set_local_model(model.local_model, model.tokenizer)
        for _ in range(3):
            caplog.clear()
            assert client.generation.generate(PROMPT, 2, seed=1)
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(warnings) == 1 and "session has ended" in warnings[0].getMessage()


def test_local_mode_and_auto_without_a_key_ask_no_server(
    both: Mechanex, proxy: FaultyProxy, local: Mechanex, model: Mechanex, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = local.generation.generate(PROMPT, 4, seed=1)
    assert both.set_execution_mode("local").generation.generate(PROMPT, 4, seed=1) == here
    without_key = Mechanex(proxy.url).set_local_model(model.local_model, model.tokenizer)
    assert without_key.generation.generate(PROMPT, 4, seed=1) == here
    both.unload()
    with pytest.raises(MechanexError, match="needs a model"):
        both.generation.generate(PROMPT, 4)
    assert not proxy.requests
    monkeypatch.setenv("MECHANEX_API_KEY", "a-key")
    assert without_key.generation.generate(PROMPT, 4, seed=1) == here and len(proxy.requests) == 1


def test_a_server_of_ones_own_needs_no_key_where_there_is_no_model(server: ServerProcess) -> None:
    assert Mechanex(server.url).generation.generate(PROMPT, 2).startswith(PROMPT)
    keyless = Mechanex(server.url).set_execution_mode("remote")
    assert keyless.generation.generate(PROMPT, 2).startswith(PROMPT)


def test_the_public_server_is_not_asked_without_a_key() -> None:
    client = Mechanex()
    assert client.transport.address.url == PUBLIC_BACKEND
    for mode in ("auto", "remote"):
        with pytest.raises(MechanexError, match=r"login.*MECHANEX_API_KEY"):
            client.set_execution_mode(mode).generation.generate("Hi")


# What can't be sent


def only_here(local: Mechanex, tmp_path: Path) -> dict[str, dict[str, Any]]:
    vector = SteeringVector({3: torch.ones(local.local_model.config.hidden_size)})  # type: ignore[union-attr]
    vector.save(tmp_path / "v.safetensors")
    steered = {"steering_strength": 1.0}
    return {
        "ids": {"prompt": local.tokenizer(PROMPT).input_ids},
        "object": {"prompt": PROMPT, "steering_vector": vector, **steered},
        "dict": {"prompt": PROMPT, "steering_vector": dict(vector), **steered},
        "path": {"prompt": PROMPT, "steering_vector": tmp_path / "v.safetensors", **steered},
        "path text": {"prompt": PROMPT, "steering_vector": str(tmp_path / "v.safetensors"), **steered},
        "stored": {"prompt": PROMPT, "steering_vector": local.vectors.put(vector), **steered},
    }


@pytest.mark.parametrize("what", ["ids", "object", "dict", "path", "path text", "stored"])
def test_what_cannot_be_sent_runs_here_or_is_a_validation_error(
    both: Mechanex,
    proxy: FaultyProxy,
    local: Mechanex,
    tmp_path: Path,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = only_here(local, tmp_path)[what]
    here = local.generation.generate(max_tokens=6, seed=1, **options)
    assert both.generation.generate(max_tokens=6, seed=1, **options) == here
    assert not proxy.requests and not caplog.records
    with pytest.raises(ValidationError, match=r"generation\.generate|on this machine only"):
        both.set_execution_mode("remote").generation.generate(max_tokens=6, seed=1, **options)
    assert len(proxy.requests) == (1 if what == "stored" else 0)
    without_model = Mechanex(proxy.url, "any-key")
    with pytest.raises(
        MechanexError, match=r"needs a model here, since it can't run on a server|on this machine only"
    ) as raised:
        without_model.generation.generate(max_tokens=6, seed=1, **options)
    assert "login" not in str(raised.value)


def test_prompts_of_token_ids_make_vectors_here_only(both: Mechanex, proxy: FaultyProxy) -> None:
    ids = [both.tokenizer(prompt).input_ids for prompt in EXAMPLES["prompts"]]
    answers = EXAMPLES["positive_answers"], EXAMPLES["negative_answers"]
    vector = both.steering.generate_vectors(ids, *answers, layer_idxs=[3], method="caa")
    assert both.steering.get_vectors(vector) and not proxy.requests
    with pytest.raises(ValidationError, match="token ids"):
        both.set_execution_mode("remote").steering.generate_vectors(ids, *answers, method="caa")


def test_an_unknown_vector_is_an_error_and_never_an_unsteered_text(both: Mechanex, remote: Mechanex) -> None:
    for client in (both, remote):
        with pytest.raises(NotFoundError, match="nowhere"):
            client.generation.generate(PROMPT, 4, steering_vector="nowhere", steering_strength=1)


# The package's doors


def test_the_packages_names_act_on_the_default_client() -> None:
    default = mechanex.client.default_client()
    for name in (
        "signup",
        "login",
        "logout",
        "set_key",
        "set_token",
        "list_api_keys",
        "create_api_key",
        "whoami",
    ):
        assert getattr(mechanex, name).__self__ is default
    assert mechanex.set_model.__self__ is default and mechanex.serve.__self__ is default
    assert mechanex.sae.create_behavior.__self__ is default.sae
    assert mechanex.model.get_graph.__self__ is default.model
    assert mechanex.attribution.compute_scores.__self__ is default.attribution
    assert mechanex.raag.generate.__self__ is default.raag
    assert callable(mechanex.raag.truncate_text) and callable(mechanex.get_huggingface_models)


def test_remote_work_needs_no_torch(server: ServerProcess) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import sys, mechanex\n"
        "print(mechanex.generation.generate('Hi', 2))\n"
        "vector = mechanex.steering.generate_vectors(['a'], [' b'], [' c'], method='caa')\n"
        "mechanex.generation.generate('Hi', 2, steering_vector=vector, steering_strength=1)\n"
        "mechanex.sae.list_behaviors()\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"MECHANEX_BASE_URL": server.url, "MECHANEX_API_KEY": "any-key"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hi")
