"""Cases of token ids, models, and the form of answers and streams."""

from __future__ import annotations

from calling import MODEL, PROMPT, Api, case


@case("vLLM", "return_token_ids gives the prompt's and the answer's ids")
def _(api: Api) -> None:
    one = api.complete(return_token_ids=True)
    assert one["prompt_token_ids"] == api.post("/tokenize", prompt=PROMPT)["tokens"]
    assert api.post("/detokenize", tokens=one["token_ids"])["prompt"].strip().startswith(one["text"].strip())
    assert "token_ids" not in api.complete()


@case("vLLM", "return_token_ids in streams gives every id once, the prompt's in the first event")
def _(api: Api) -> None:
    whole = api.complete(return_token_ids=True)
    for path, given in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Where is Anna?"}]}),
    ):
        events = api.stream(path, temperature=0, max_tokens=12, return_token_ids=True, **given)
        choices = [event["choices"][0] for event in events]
        ids = [token for choice in choices for token in choice.get("token_ids", [])]
        prompts = [choice["prompt_token_ids"] for choice in choices if "prompt_token_ids" in choice]
        assert len(prompts) == 1 and prompts[0]
        if path == "/v1/completions":
            assert ids == whole["token_ids"] and prompts == [whole["prompt_token_ids"]]
        else:
            assert ids == api.chat(return_token_ids=True)["token_ids"]


@case("vLLM", "prompts of texts and token ids are mixed")
def _(api: Api) -> None:
    ids = api.post("/tokenize", prompt="The food in Rome")["tokens"]
    both = api.post("/v1/completions", prompt=[ids, PROMPT], temperature=0, max_tokens=8)["choices"]
    assert [choice["text"] for choice in both] == [
        api.complete(ids, max_tokens=8)["text"],
        api.complete(PROMPT, max_tokens=8)["text"],
    ]
    assert api.refused("/v1/completions", prompt=[PROMPT, 5])["param"] == "prompt"


@case("OpenAI", "HEAD is answered as GET, without a body")
def _(api: Api) -> None:
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/health", "/version"):
        head = api.call("HEAD", path)
        assert (head.status, head.raw) == (200, b"") and head.headers["content-type"] == "application/json"
    assert api.call("HEAD", "/v1/nothing").status == 404
    assert api.call("HEAD", "/v1/completions").status == 405


@case("vLLM", "/v1/models tells max_model_len")
def _(api: Api) -> None:
    (one,) = api.call("GET", "/v1/models").body["data"]
    assert one["max_model_len"] == 512 == api.call("GET", f"/v1/models/{MODEL}").body["max_model_len"]


@case("vLLM", "/version tells the version")
def _(api: Api) -> None:
    assert set(api.call("GET", "/version").body) == {"version"}


@case("vLLM", "/tokenize and /detokenize are each other's inverse")
def _(api: Api) -> None:
    one = api.post("/tokenize", model=MODEL, prompt=PROMPT, return_token_strs=True)
    assert one["count"] == len(one["tokens"]) == len(one["token_strs"]) and one["max_model_len"] == 512
    bare = api.post("/tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"]
    assert api.post("/detokenize", tokens=bare)["prompt"] == PROMPT


@case("vLLM", "/tokenize gives the ids that a chat is read as")
def _(api: Api) -> None:
    messages = [{"role": "user", "content": "Where is Anna?"}]
    assert (
        api.post("/tokenize", messages=messages)["tokens"]
        == api.chat(return_token_ids=True)["prompt_token_ids"]
    )


@case("vLLM", "/tokenize refuses both or neither, /detokenize unknown ids, with OpenAI's envelope")
def _(api: Api) -> None:
    api.refused("/tokenize")
    api.refused("/tokenize", prompt="a", messages=[{"role": "user", "content": "a"}])
    for token in (10**7, -1):
        api.refused("/detokenize", tokens=[token])
        assert api.refused("/v1/completions", prompt="a", stop_token_ids=[token])["param"] == "stop_token_ids"
    assert api.refused("/detokenize", tokens=["a"])["param"] == "tokens"


@case("vLLM", "continuous_usage_stats puts the usage into every event")
def _(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = api.stream(
        "/v1/completions", prompt=PROMPT, temperature=0, max_tokens=8, stream_options=options, ignore_eos=True
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 8
    assert {event["usage"]["prompt_tokens"] for event in events} == {events[-1]["usage"]["prompt_tokens"]}


@case("OpenAI", "the last chunk has a finish_reason and an empty delta, then one of usage alone")
def _(api: Api) -> None:
    messages = [{"role": "user", "content": "Where is Anna?"}]
    events = api.stream(
        "/v1/chat/completions",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream_options={"include_usage": True},
    )
    *told, last, usage = events
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["usage"] is None and all(event["usage"] is None for event in told)
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] > 8
    assert all(event["choices"][0]["finish_reason"] is None for event in told)
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({event["id"] for event in events}) == 1


@case("OpenAI", "a character that the prompt has begun is whole in the echo and in the answer")
def _(api: Api) -> None:
    letters = api.post("/tokenize", prompt="Zoë é", add_special_tokens=False)["tokens"]
    for cut in range(1, len(letters)):
        bias = {str(letters[cut]): 100}
        one = api.complete(letters[:cut], max_tokens=1, echo=True, logit_bias=bias)
        assert one["text"] == api.post("/detokenize", tokens=letters[: cut + 1])["prompt"].removesuffix(
            "\ufffd"
        ) or (cut + 1 < len(letters))
        if cut + 1 == len(letters):
            assert one["text"] == "Zoë é"
            assert api.complete(letters[:cut], max_tokens=1, logit_bias=bias)["text"].endswith("é")
