"""Cases of what none of the others has: the model's inside with an answer, and embeddings."""

from __future__ import annotations

import base64
import math
import struct

from calling import PROMPT, Api, case

STEERED = {"steering_vector": "calm_angry", "steering_strength": 3.0}


def _item(**more: object) -> dict[str, object]:
    return {"return": {"activations": [{"layer": 4, **more}]}}


@case(
    "mechanex",
    "return.activations gives projections of every token of the answer, steered ones moved along the vector",
)
def _(api: Api) -> None:
    wanted = {"vector_ids": ["calm_angry"], "raw": True, "prompt": True}
    fields = {"ignore_eos": True, "return_token_ids": True}
    plain = api.complete(**fields, **_item(**wanted))
    (told,) = plain["activations"]
    n = len(plain["prompt_token_ids"]) + len(plain["token_ids"])
    projections = told["projections"]["calm_angry"]
    assert told["layer"] == 4 and told["begin"] == 0 and len(projections) == len(told["raw"]) == n
    steered = api.complete(**fields, **STEERED, **_item(**wanted))["activations"][0]["projections"][
        "calm_angry"
    ]
    n_prompt = len(plain["prompt_token_ids"])
    assert all(after > before for after, before in zip(steered[:n_prompt], projections, strict=False))
    answer = api.complete(**fields, **_item(vector_ids=["calm_angry"]))["activations"][0]
    assert answer["begin"] == n_prompt and "raw" not in answer
    assert all(
        math.isclose(a, b, abs_tol=1e-3)
        for a, b in zip(answer["projections"]["calm_angry"], projections[n_prompt:], strict=True)
    )
    # A projection is the stream's part along the vector's direction.
    same = [sum(x * x for x in row) for row in told["raw"]]
    assert all(p * p <= s * 1.001 for p, s in zip(projections, same, strict=True))


@case("mechanex", "return.logit_differences tells what steering did to each token")
def _(api: Api) -> None:
    one = api.complete(logprobs=0, ignore_eos=True, **STEERED, **{"return": {"logit_differences": 3}})
    told = one["logit_differences"]
    assert [each["token"] for each in told] == one["logprobs"]["tokens"]
    assert all(each["kl"] >= 0 and len(each["raised"]) == 3 for each in told)
    assert all(top["difference"] > 0 for each in told for top in each["raised"])
    # The first token's is the steered log-probability less the plain model's.
    first = one["logprobs"]["top_logprobs"][0]
    plain = api.complete(max_tokens=1, logprobs=20)["logprobs"]["top_logprobs"][0]
    token = one["logprobs"]["tokens"][0]
    if token in plain:
        assert math.isclose(told[0]["difference"], first[token] - plain[token], abs_tol=1e-3)


@case("mechanex", "streams have the same inside in the last event of each answer")
def _(api: Api) -> None:
    fields = {**STEERED, **_item(vector_ids=["calm_angry"])}
    whole = api.chat(**fields)
    events = api.stream(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Where is Anna?"}],
        temperature=0,
        max_tokens=12,
        **fields,
    )
    told = [event["choices"][0] for event in events if "activations" in event["choices"][0]]
    assert len(told) == 1 and told[0]["finish_reason"]
    near = zip(
        told[0]["activations"][0]["projections"]["calm_angry"],
        whole["activations"][0]["projections"]["calm_angry"],
        strict=True,
    )
    assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in near)


@case("mechanex", "what can't be returned is a 400 that says why")
def _(api: Api) -> None:
    for wanted, says in (
        ({"activations": [{"layer": 40, "raw": True}]}, "layer"),
        ({"activations": [{"layer": 4, "vector_ids": ["nope"]}]}, "nope"),
        ({"activations": [{"layer": 4}]}, "vector_ids"),
        ({"logit_differences": 3}, "steering"),
        ({}, "activations"),
    ):
        error = api.refused("/v1/completions", prompt="a", **{"return": wanted})
        assert error["param"] == "return" and says in error["message"]


@case("OpenAI", "embeddings of texts and token ids have norm 1, as floats and as base64")
def _(api: Api) -> None:
    ids = api.post("/tokenize", prompt=PROMPT)["tokens"]
    two = api.post("/v1/embeddings", model="mx-tiny", input=[PROMPT, ids])
    first, second = (one["embedding"] for one in two["data"])
    assert first == second and math.isclose(sum(x * x for x in first), 1, abs_tol=1e-5)
    assert two["usage"] == {"prompt_tokens": 2 * len(ids), "total_tokens": 2 * len(ids)}
    packed = api.post("/v1/embeddings", input=PROMPT, encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(first)}f", base64.b64decode(packed))) == first
    assert "dimensions" in api.refused("/v1/embeddings", input="a", dimensions=3)["message"]
    many = api.refused("/v1/embeddings", input=["a"] * 129)
    assert many["param"] == "input" and "129 texts" in many["message"]


@case(
    "mechanex", "embeddings are the residual stream at a layer, its mean or its last token's, steered or not"
)
def _(api: Api) -> None:
    one = api.complete(max_tokens=1, **_item(raw=True, prompt=True), return_token_ids=True)
    stream = one["activations"][0]["raw"][: len(one["prompt_token_ids"])]
    mean = [sum(column) / len(stream) for column in zip(*stream, strict=True)]
    for pooling, right in (("mean", mean), ("last", stream[-1])):
        found = api.post("/v1/embeddings", input=PROMPT, layer=4, pooling=pooling, normalize=False)["data"][0]
        assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(found["embedding"], right, strict=True))
    steered = api.post("/v1/embeddings", input=PROMPT, layer=4, normalize=False, **STEERED)["data"][0][
        "embedding"
    ]
    assert max(abs(a - b) for a, b in zip(steered, mean, strict=True)) > 0.05
    assert api.refused("/v1/embeddings", input="a", layer=99)["param"] == "layer"
