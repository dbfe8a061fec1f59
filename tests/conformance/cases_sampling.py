"""Cases of how tokens are chosen and what ends an answer."""

from __future__ import annotations

from calling import PROMPT, Api, case


def _ids(api: Api, **fields: object) -> list[int]:
    found: list[int] = api.complete(return_token_ids=True, **fields)["token_ids"]
    return found


@case("vLLM", "top_k=1 gives the greedy answer at any temperature")
def _(api: Api) -> None:
    assert api.complete(temperature=2, top_k=1)["text"] == api.complete()["text"]


@case("vLLM", "top_k, top_p and min_p narrow the same draw")
def _(api: Api) -> None:
    first = api.complete(max_tokens=1, logprobs=5)["logprobs"]["top_logprobs"][0]
    likely = sorted(first, key=first.__getitem__, reverse=True)
    drawn = api.post(
        "/v1/completions", prompt=PROMPT, max_tokens=1, n=64, temperature=2, top_k=3, top_p=1, min_p=0, seed=1
    )
    texts = {choice["text"] for choice in drawn["choices"]}
    assert texts <= set(likely[:3]) and len(texts) > 1
    drawn = api.post("/v1/completions", prompt=PROMPT, max_tokens=1, n=16, temperature=2, top_k=3, min_p=1.0)
    assert {choice["text"] for choice in drawn["choices"]} == {likely[0]}


@case("vLLM", "top_k of -1 and 0 keep all tokens, and min_p of 0 too")
def _(api: Api) -> None:
    plain = api.complete(temperature=1, seed=5)["text"]
    assert api.complete(temperature=1, seed=5, top_k=-1)["text"] == plain
    assert api.complete(temperature=1, seed=5, top_k=0, min_p=0)["text"] == plain


@case("vLLM", "a high repetition_penalty says nothing of the prompt or the answer twice")
def _(api: Api) -> None:
    one = api.post(
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        repetition_penalty=100,
        return_token_ids=True,
        ignore_eos=True,
    )["choices"][0]
    assert len(set(one["token_ids"])) == 24 and not set(one["token_ids"]) & set(one["prompt_token_ids"])


@case("vLLM", "min_tokens holds the end off")
def _(api: Api) -> None:
    plain = api.complete(max_tokens=60, return_token_ids=True)
    assert plain["finish_reason"] == "stop", "the prompt has to end early for this case to say anything"
    n = len(plain["token_ids"])
    longer = api.complete(max_tokens=60, min_tokens=n + 3, return_token_ids=True)
    assert len(longer["token_ids"]) >= n + 3
    assert longer["token_ids"][: n - 1] == plain["token_ids"][:-1]


@case("vLLM", "min_tokens holds stop texts off too")
def _(api: Api) -> None:
    plain = api.complete(ignore_eos=True)["text"]
    stop = plain[3:6]
    assert api.complete(stop=stop, ignore_eos=True)["text"] == plain[: plain.index(stop)]
    assert len(api.complete(stop=stop, ignore_eos=True, min_tokens=8)["text"]) > plain.index(stop)


@case("vLLM", "ignore_eos goes on to max_tokens")
def _(api: Api) -> None:
    one = api.complete(max_tokens=60, ignore_eos=True, return_token_ids=True)
    assert len(one["token_ids"]) == 60 and one["finish_reason"] == "length"


@case("vLLM", "stop_token_ids end an answer, stop_reason names the token, and its text is cut off")
def _(api: Api) -> None:
    ids = _ids(api, ignore_eos=True)
    end = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    one = api.complete(stop_token_ids=[ids[end]], return_token_ids=True, ignore_eos=True)
    assert one["token_ids"] == ids[: end + 1]
    assert (one["finish_reason"], one["stop_reason"]) == ("stop", ids[end])
    whole = api.complete(ignore_eos=True)["text"]
    kept = api.complete(stop_token_ids=[ids[end]], include_stop_str_in_output=True, ignore_eos=True)["text"]
    assert whole.startswith(kept) and kept.startswith(one["text"]) and len(kept) > len(one["text"])


@case("vLLM", "stop_reason names the stop text; an end token and max_tokens have none")
def _(api: Api) -> None:
    plain = api.complete(ignore_eos=True)
    assert plain["stop_reason"] is None
    stop = plain["text"][4:7]
    assert api.complete(stop=["?!?", stop], ignore_eos=True)["stop_reason"] == stop


@case("vLLM", "include_stop_str_in_output keeps the stop text, in streams too")
def _(api: Api) -> None:
    plain = api.complete(ignore_eos=True)["text"]
    stop = plain[4:7]
    fields = {"stop": stop, "include_stop_str_in_output": True, "ignore_eos": True}
    wanted = plain[: plain.index(stop) + len(stop)]
    assert api.complete(**fields)["text"] == wanted
    events = api.stream("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=12, **fields)
    assert "".join(event["choices"][0]["text"] for event in events) == wanted


@case("vLLM", "skip_special_tokens=false writes special tokens out")
def _(api: Api) -> None:
    ids = _ids(api, max_tokens=60)
    written = api.post("/detokenize", tokens=ids)["prompt"]
    one = api.complete(max_tokens=len(ids) + 1, skip_special_tokens=False, ignore_eos=True)["text"]
    assert one.startswith(written)
    assert not api.complete(max_tokens=60)["text"].startswith(written)


@case("vLLM", "unknown stop_token_ids are refused by name")
def _(api: Api) -> None:
    assert api.refused("/v1/completions", prompt="a", stop_token_ids=[10**6])["param"] == "stop_token_ids"


@case("vLLM", "truncate_prompt_tokens keeps the prompt's last tokens")
def _(api: Api) -> None:
    ids = api.post("/tokenize", prompt=PROMPT)["tokens"]
    one = api.complete(truncate_prompt_tokens=3, return_token_ids=True)
    assert one["prompt_token_ids"] == ids[-3:]
    assert one["text"] == api.complete(ids[-3:])["text"]
    assert (
        len(api.complete(ids * 200, truncate_prompt_tokens=-1, return_token_ids=True)["prompt_token_ids"])
        > 99
    )


@case("OpenAI", "best_of gives the likeliest of several answers, and usage counts all")
def _(api: Api) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 6, "seed": 3, "logprobs": 0, "ignore_eos": True}
    drawn = api.post("/v1/completions", n=5, **fields)["choices"]
    best = max(drawn, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    one = api.post("/v1/completions", n=1, best_of=5, **fields)
    assert [choice["text"] for choice in one["choices"]] == [best["text"]]
    assert one["usage"]["completion_tokens"] == 30
    api.refused("/v1/completions", prompt="a", n=3, best_of=2)
    assert "best_of" in api.refused("/v1/completions", prompt="a", best_of=2, stream=True)["message"]


@case("OpenAI", "suffix is refused with what to do instead")
def _(api: Api) -> None:
    error = api.refused("/v1/completions", prompt="a", suffix="b")
    assert "fill" in error["message"]
    assert api.complete(suffix="")["text"] == api.complete(suffix=None)["text"]


@case("OpenAI", "whole numbers may be written as 5.0, and 5.5 is refused")
def _(api: Api) -> None:
    one = api.complete(max_tokens=5.0, n=1.0, seed=3.0, logprobs=2.0, top_k=40.0, ignore_eos=True)
    assert len(one["logprobs"]["tokens"]) == 5
    assert api.chat(max_tokens=5, max_completion_tokens=5.0, top_logprobs=1.0, logprobs=True)
    assert api.refused("/v1/completions", prompt="a", max_tokens=5.5)["param"] == "max_tokens"


@case("OpenAI", "fields that change nothing are taken")
def _(api: Api) -> None:
    plain = api.chat()["message"]
    fields = {"reasoning_effort": "low", "verbosity": "low", "prompt_cache_retention": "24h", "user": "u"}
    more = {"service_tier": "auto", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True}
    assert api.chat(**fields, **more)["message"] == plain
    assert api.chat(priority=1, cache_salt="a", include_reasoning=False, request_id="r")["message"] == plain


@case("OpenAI", "unknown fields are refused by name")
def _(api: Api) -> None:
    error = api.refused("/v1/completions", prompt="a", temprature=0)
    assert "temprature" in error["message"] and error["code"] == "unknown_parameter"


@case("vLLM", "greedy, penalized and narrowed rows of one batch are what they are alone")
def _(api: Api) -> None:
    alone = [api.complete(f, max_tokens=10)["text"] for f in (PROMPT, "The food in Rome")]
    both = api.post("/v1/completions", prompt=[PROMPT, "The food in Rome"], temperature=0, max_tokens=10)
    assert [choice["text"] for choice in both["choices"]] == alone


@case("OpenAI", "null is the default: max_tokens of completions is 16, also as a bound of min_tokens")
def _(api: Api) -> None:
    for given in ({"max_tokens": None}, {}):
        assert (
            "at most max_tokens: got 20 and 16"
            in api.refused("/v1/completions", prompt="a", min_tokens=20, **given)["message"]
        )
    assert api.complete(max_tokens=None, ignore_eos=True)["finish_reason"] == "length"


@case("OpenAI", "checks between fields name the field, as checks of one do")
def _(api: Api) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for path, body, param in (
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "behavior_action": "report"}, "behavior_action"),
        (
            "/v1/completions",
            {"prompt": "a", "steering_condition": {"vector": "a", "threshold": 0}},
            "steering_condition",
        ),
        ("/v1/chat/completions", chat | {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", chat | {"tool_choice": "required"}, "tool_choice"),
        (
            "/v1/chat/completions",
            chat | {"max_tokens": 2, "max_completion_tokens": 3},
            "max_completion_tokens",
        ),
        (
            "/v1/chat/completions",
            chat | {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ("/v1/chat/completions", chat | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (
            "/v1/chat/completions",
            chat | {"tools": tools, "tool_choice": "required", "ignore_eos": True},
            "ignore_eos",
        ),
        ("/v1/responses", {"input": "a", "previous_response_id": "b"}, "previous_response_id"),
        ("/v1/responses", {"input": "a", "background": True}, "background"),
        ("/tokenize", {}, "prompt"),
    ):
        error = api.refused(path, **body)
        assert error["param"] == param, (path, body, error)


@case("OpenAI", "token ids may be written as 5.0, wherever a prompt may have them")
def _(api: Api) -> None:
    ids = api.post("/tokenize", prompt=PROMPT)["tokens"]
    floats = [float(one) for one in ids]
    assert api.complete(floats)["text"] == api.complete(ids)["text"] == api.complete()["text"]
    assert api.post("/detokenize", tokens=floats) == api.post("/detokenize", tokens=ids)
    assert api.refused("/v1/completions", prompt=[5.5])["param"] == "prompt"
