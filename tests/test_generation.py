"""Generation: the text is the prompt and what follows, however it was drawn, steered, stopped or streamed."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import BOS, D_MODEL, EOS, FAMILIES, MAX_POSITIONS, build, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechanex import Mechanex, MechanexError, NotFoundError, SteeringVector, ValidationError
from mechanex.engine.detokenize import Continuation
from mechanex.engine.generate import generate_batch
from mechanex.engine.sampling import end_tokens

PROMPT = "The morning was cold"


@pytest.fixture
def client() -> Mechanex:
    return Mechanex().set_local_model(build("llama"), tiny_tokenizer())


@pytest.fixture
def vector() -> SteeringVector:
    return SteeringVector({1: torch.randn(D_MODEL)})


def generate(client: Mechanex, prompt: Any = PROMPT, max_tokens: int = 12, **options: Any) -> str:
    return client.generation.generate(prompt, max_tokens, **({"seed": 0} | options))


# Which tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "mistral", "gemma2"])
def test_greedy_is_the_likeliest_token_each_time(family: str) -> None:
    model, tokenizer = build(family), tiny_tokenizer()
    ids = tokenizer(PROMPT).input_ids
    for _ in range(8):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    client = Mechanex().set_local_model(model, tokenizer)
    text = client.generation.generate(PROMPT, 8, "greedy")
    # Tokens after an end token are not part of the text.
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(text) and len(text) > len(PROMPT)


@pytest.mark.parametrize("method", ["top-k", "top-p", "min-p", "typical"])
def test_every_method_samples_and_its_strictest_setting_is_greedy(client: Mechanex, method: str) -> None:
    greedy = generate(client, sampling_method="greedy")
    texts = {generate(client, sampling_method=method, seed=seed) for seed in range(4)}
    assert len(texts) > 1
    strict: dict[str, Any] = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}
    if method != "typical":  # the most typical token is not always the likeliest
        assert generate(client, sampling_method=method, **strict) == greedy
    assert generate(client, sampling_method=method, temperature=1e-3, typical_p=1.0) == greedy


def test_a_seed_repeats_the_text_and_leaves_the_global_generator_alone(client: Mechanex) -> None:
    state = torch.get_rng_state()
    first = generate(client, seed=7)
    assert generate(client, seed=7) == first and generate(client, seed=8) != first
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_seed_torch_manual_seed_decides(client: Mechanex) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(client, seed=None))
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_writes_what_single_calls_write(client: Mechanex, vector: SteeringVector) -> None:
    prompts = ["I", "The old man at the corner sold apples", "What is the capital of France?", "The"]
    for steering in ({}, {"vector": vector, "strength": 2.0}):
        texts = generate_batch(
            client.local_model, client.tokenizer, prompts, max_tokens=15, seed=5, **steering
        )
        renamed = {f"steering_{name}": value for name, value in steering.items()}
        single = [generate(client, p, 15, seed=5 + i, **renamed) for i, p in enumerate(prompts)]
        assert texts == single


# Steering


def test_all_kinds_of_vector_steer_alike(client: Mechanex, vector: SteeringVector, tmp_path: Any) -> None:
    vector_id = client.vectors.put(vector)
    vector.save(tmp_path / "v.safetensors")
    path = tmp_path / "v.safetensors"
    plain = generate(client)
    texts = {
        generate(client, steering_vector=source, steering_strength=3)
        for source in (vector, vector_id, dict(vector), {-3: vector[1]}, path, str(path))
    }
    assert len(texts) == 1 and texts != {plain}
    assert generate(client) == plain


def test_strength_multiplies_the_vector(client: Mechanex, vector: SteeringVector) -> None:
    once = generate(client, steering_vector=-3 * vector, steering_strength=1)
    assert once == generate(client, steering_vector=vector, steering_strength=-3)


def test_a_vector_at_strength_0_warns_and_steers_nothing(
    client: Mechanex, vector: SteeringVector, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generate(client)
    assert not caplog.records
    assert generate(client, steering_vector=vector, steering_strength=0) == plain
    assert "strength 0" in caplog.text


def test_a_strength_without_a_vector_is_an_error_not_unsteered_text(client: Mechanex) -> None:
    with pytest.raises(ValidationError, match="no steering_vector"):
        generate(client, steering_strength=2)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("no-such-id", NotFoundError, "no-such-id"),
        ("no such id", NotFoundError, "no such id"),
        ("missing.safetensors", NotFoundError, "missing.safetensors"),
        ("../up", NotFoundError, "up"),
        ({1: torch.ones(7)}, ValidationError, f"7 wide.*{D_MODEL}"),
        ({9: torch.ones(D_MODEL)}, ValidationError, "Layer 9"),
        ({1: torch.ones(D_MODEL), -3: torch.ones(D_MODEL)}, ValidationError, "twice"),
        ({1: torch.full((D_MODEL,), float("nan"))}, ValidationError, "NaN"),
        ({}, ValidationError, "at least one layer"),
        (torch.ones(D_MODEL), ValidationError, "Tensor"),
        (7, ValidationError, "int"),
    ],
)
def test_what_is_no_vector_of_this_model_is_an_error(
    client: Mechanex, source: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises((error, ValidationError), match=says):
        generate(client, steering_vector=source, steering_strength=1)


def test_a_failing_model_is_unsteered_afterwards(client: Mechanex, vector: SteeringVector) -> None:
    plain = generate(client)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = build("llama").model.layers[2].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(client, steering_vector=vector, steering_strength=3)
    finally:
        handle.remove()
    assert generate(client) == plain


def test_logits_that_are_nan_are_an_error_not_text() -> None:
    client = Mechanex().set_local_model(build("gpt2"), tiny_tokenizer())
    huge = SteeringVector({1: torch.full((D_MODEL,), 3e38)})
    for method in ("greedy", "top-k"):
        with pytest.raises(MechanexError, match="NaN: the steering is too strong"):
            generate(client, sampling_method=method, steering_vector=huge, steering_strength=1)
    stream = client.generation.generate(PROMPT, 5, stream=True, steering_vector=huge, steering_strength=1)
    with pytest.raises(MechanexError, match="NaN"):
        list(stream)


# Prompts


def test_prompts_may_be_token_ids_or_chat_messages(client: Mechanex) -> None:
    tokenizer = client.tokenizer
    ids = tokenizer(PROMPT).input_ids
    assert generate(client, ids).removeprefix(tokenizer.decode(ids)) == generate(client)[len(PROMPT) :]
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    text = generate(client, [{"role": "user", "content": "Who are you?"}])
    assert text == tokenizer.bos_token + generate(client, "user: Who are you?\nassistant:")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty"),
        ([3, 10**6], "vocabulary"),
        ([3, -1], "-1"),
        ([3.5], "3.5"),
        (None, "NoneType"),
        (7, "int"),
        ([{"role": "user", "content": "Hi"}], "template"),
        ([5] * MAX_POSITIONS, str(MAX_POSITIONS)),
    ],
)
def test_what_is_no_prompt_is_an_error(client: Mechanex, prompt: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        generate(client, prompt)


def test_an_empty_text_is_a_prompt_only_with_a_bos() -> None:
    tokenizer = tiny_tokenizer()
    assert generate(Mechanex().set_local_model(build("llama"), tokenizer), "")
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    no_bos = PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(ValidationError, match="empty"):
        generate(Mechanex().set_local_model(build("llama"), no_bos), "")


def test_generation_ends_at_the_models_context_and_says_so(
    client: Mechanex, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [5] * (MAX_POSITIONS - 3)
    with caplog.at_level(logging.WARNING):
        text = generate(client, ids, 50)
    assert "stopping after 3 tokens" in caplog.text
    assert text.startswith(client.tokenizer.decode(ids))


def test_a_long_neighbour_leaves_a_short_prompt_its_room() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    prompts = [[5, 6, 7], [5] * (MAX_POSITIONS - 3)]
    alone = [
        generate_batch(model, tokenizer, [p], max_tokens=30, seed=1 + i)[0] for i, p in enumerate(prompts)
    ]
    assert generate_batch(model, tokenizer, prompts, max_tokens=30, seed=1) == alone


@pytest.mark.parametrize("ends", [torch.tensor(5), torch.tensor([5, 6]), [5, 6], 5])
def test_end_tokens_may_be_given_as_a_tensor(ends: object) -> None:
    model = FAMILIES["llama"]()
    model.generation_config.eos_token_id = ends
    assert end_tokens(model, tiny_tokenizer())[0] == 5


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"sampling_method": "beam"},
        {"sampling_method": ""},
        {"top_k": 0},
        {"top_k": -5},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_p": "0.9"},
        {"min_p": 0.0},
        {"typical_p": -0.1},
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"seed": -1},
        {"seed": 1.5},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [3]},
        {"steering_strength": float("nan"), "steering_vector": {1: torch.ones(D_MODEL)}},
    ],
)
def test_arguments_out_of_range_are_refused_before_the_model_runs(
    client: Mechanex, options: dict[str, Any]
) -> None:
    name = next(iter(options))
    for stream in (False, True):
        with pytest.raises(ValidationError, match=name.split("_")[-1]):
            generate(client, **options, stream=stream)


# Text


def test_the_prompt_is_returned_as_it_was_given(client: Mechanex) -> None:
    for prompt in ("  two  spaces ", "tab\t", "line\n", "emoji 🙂", "«", " "):
        assert generate(client, prompt, 3).startswith(prompt)


def test_the_space_that_a_tokenizer_drops_at_the_start_is_kept() -> None:
    words = ["<unk>", "▁The", "▁morning", "▁was", "▁cold", "er", "▁and"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    assert tokenizer.decode([4, 5]) == "colder"
    for ids, text in (([4, 5], " colder"), ([5, 6, 4], "er and cold")):
        row = Continuation(tokenizer, [1, 2, 3])
        for token in ids:
            row.feed(token)
        row.finish()
        assert row.text == text


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2), st.text(max_size=8))
@settings(max_examples=150, deadline=None)
def test_text_that_comes_token_by_token_is_the_text(text: str, stops: list[str], prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    if any(special in text + prompt for special in ("<pad>", "<bos>", "<eos>")):
        return
    row = Continuation(tokenizer, tokenizer(prompt).input_ids, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        row.feed(token)
        pieces.append(row.piece())
        if row.stopped:
            break
    row.finish()
    pieces.append(row.piece())
    ends = [at for at in map(text.find, stops) if at >= 0]
    assert "".join(pieces) == row.text == text[: min(ends, default=len(text))]


def test_stop_texts_end_the_continuation_and_are_cut_off(client: Mechanex) -> None:
    whole = generate(client, max_tokens=20)[len(PROMPT) :]
    stop = whole[5:7]
    for stops in (stop, [stop], ["never there", stop]):
        assert generate(client, max_tokens=20, stop=stops) == PROMPT + whole[: whole.find(stop)]
    assert generate(client, max_tokens=20, stop="never there") == PROMPT + whole
    assert generate(client, "cold stop", 4, stop="cold").startswith("cold stop")


# Streams


def test_a_stream_gives_the_same_text_in_pieces(client: Mechanex, vector: SteeringVector) -> None:
    steering = {"steering_vector": vector, "steering_strength": 2}
    for options in ({}, steering, {"stop": generate(client)[25:27]}):
        pieces = list(client.generation.generate(PROMPT, 12, seed=0, stream=True, **options))
        assert pieces[0] == PROMPT and len(pieces) > 2
        assert "".join(pieces) == generate(client, **options)


def test_a_stream_that_is_closed_stops_the_model_and_its_steering(
    client: Mechanex, vector: SteeringVector
) -> None:
    plain = generate(client)
    before = threading.active_count()
    stream = client.generation.generate(
        PROMPT, 200, stream=True, seed=0, steering_vector=vector, steering_strength=3
    )
    assert isinstance(stream, Iterator)
    assert next(stream) == PROMPT and next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert generate(client) == plain


def test_other_calls_during_a_stream_are_not_steered_by_it(client: Mechanex, vector: SteeringVector) -> None:
    plain = generate(client)
    stream = client.generation.generate(
        PROMPT, 30, stream=True, seed=0, steering_vector=vector, steering_strength=5
    )
    next(stream), next(stream)
    assert generate(client) == plain
    assert "".join(stream)


# The model


def test_the_model_is_left_as_it_was_and_nothing_warns(client: Mechanex, vector: SteeringVector) -> None:
    model = build("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    model.train()
    before = model.generation_config.to_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = generate(client, steering_vector=vector, steering_strength=1)
        assert model.training and all(p.requires_grad for p in model.parameters())
        assert model.generation_config.to_dict() == before
    finally:
        model.eval()
        model.generation_config.temperature, model.generation_config.do_sample = None, None
    assert text == generate(client, steering_vector=vector, steering_strength=1)


def test_a_tokenizer_without_padding_and_a_model_without_end_tokens_will_do() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    model = build("llama")
    saved = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            texts = generate_batch(model, tokenizer, ["The", "The morning was"], max_tokens=5, seed=0)
    finally:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = saved
    assert all(len(text) > 15 or text.startswith("The") for text in texts)


def test_an_end_token_ends_the_text(client: Mechanex) -> None:
    # A bias that makes the end token the likeliest from the start.
    model = build("llama")
    direction = model.lm_head.weight[EOS].detach()
    end = SteeringVector({3: 1e3 * direction / direction.norm()})
    text = generate(client, sampling_method="greedy", steering_vector=end, steering_strength=1, max_tokens=50)
    ids = client.tokenizer(text).input_ids
    assert ids[0] == BOS and len(text) < len(generate(client, sampling_method="greedy", max_tokens=50))
