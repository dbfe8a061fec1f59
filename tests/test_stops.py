"""Stop texts that are special tokens, and what a model's own generation_config may not decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import run
from tokenizers import AddedToken
from transformers import GenerationConfig

from mechanex.engine.detokenize import Continuation, special_tokens
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.models.resolve import LoadedModel
from mechanex.engine.sampling import Sampling
from mechanex.engine.token_texts import TokenTexts
from mechanex.server.model.requests import TextRequest

PROMPT = "The morning was cold"
TOKENS = 12
MARK, END = "<|im_end|>", 376
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "sampling_method": "greedy"}


def marked_tokenizer() -> Any:
    """The tiny tokenizer with a special token that isn't among its named ones, as in many chat models."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A model that now and then writes the special token, in the place of the one that it would write sixth."""
    model, tokenizer = FAMILIES["llama"](), marked_tokenizer()
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        model.lm_head.weight[END] = 1.02 * model.lm_head.weight[ids[-1]]
    return LoadedModel(model, tokenizer, "tiny", "transformers")


def answer(loaded: LoadedModel, **options: Any) -> str:
    """What ``generate`` gives, seen to be the same in a batch, a stream and the server."""
    settings: dict[str, Any] = OPTIONS | options
    text = generate(loaded.model, loaded.tokenizer, PROMPT, **settings)
    assert generate_batch(loaded.model, loaded.tokenizer, ["The old man", PROMPT], **settings)[1] == text
    assert "".join(stream(loaded.model, loaded.tokenizer, PROMPT, **settings)) == text
    stops = settings.get("stop") or ()
    request = TextRequest(
        loaded.tokenizer(PROMPT).input_ids,
        TOKENS,
        Sampling("greedy"),
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
    )
    (served,) = run(loaded, [request])
    assert PROMPT + served.text == text
    return text[len(PROMPT) :]


def written(loaded: LoadedModel) -> str:
    """The greedy answer with the special token written out."""
    ids = loaded.tokenizer(PROMPT).input_ids
    n = len(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = [*ids, int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(loaded.tokenizer.decode(ids[n:]))


def test_a_stop_text_may_be_a_special_token(loaded: LoadedModel) -> None:
    whole = written(loaded)
    before, mark, after = whole.partition(MARK)
    assert mark and before and after
    assert answer(loaded).startswith(before + after.split(MARK)[0])
    assert answer(loaded, stop=MARK) == before
    assert answer(loaded, stop=["never there", MARK]) == before
    assert answer(loaded, stop=before[-1] + MARK) == before[:-1]
    assert answer(loaded, stop=MARK + after[:2]) == before
    assert answer(loaded, stop=MARK + "never there") == answer(loaded)
    assert answer(loaded, stop="im_end") == answer(loaded)  # the text has none


def test_the_server_reports_nothing_of_the_token_that_stopped_it(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(PROMPT).input_ids
    (found,) = run(loaded, [TextRequest(ids, TOKENS, Sampling("greedy"), stops=(MARK,), logprobs=0)])
    assert found.finish_reason == "stop"
    assert END not in [one.token for one in found.logprobs]
    assert len(found.logprobs) == found.completion_tokens - 1


pieces = st.lists(st.sampled_from(["a", "b", " the", "\n", "é", MARK, "<pad>", "im_"]), max_size=10)


@given(pieces, st.lists(st.sampled_from(["b", MARK, "a" + MARK, MARK + "\n", MARK + MARK, "ab"]), max_size=2))
@settings(deadline=None)
def test_the_first_stop_text_cuts_wherever_special_tokens_stand(parts: list[str], stops: list[str]) -> None:
    tokenizer = marked_tokenizer()
    prompt = tokenizer("The").input_ids
    row, shown = Continuation(tokenizer, prompt, stops), ""
    for part in parts:
        for token in tokenizer(part, add_special_tokens=False).input_ids:
            if not row.stopped:
                row.feed(token)
                shown += row.piece()
    row.finish()
    marks = list(special_tokens(tokenizer).values())

    def plain(text: str) -> str:
        for mark in marks:
            text = text.replace(mark, "")
        return text

    whole, text = "".join(parts), plain("".join(parts))
    cuts = [text.find(stop) for stop in stops if stop == plain(stop) and stop in text]
    with_mark = plain_but(whole, MARK, marks)
    cuts += [
        len(plain(with_mark[: with_mark.find(stop)])) for stop in stops if MARK in stop and stop in with_mark
    ]
    assert row.text == (text[: min(cuts)] if cuts else text)
    assert shown + row.piece() == row.text


def plain_but(text: str, kept: str, marks: list[str]) -> str:
    for mark in marks:
        text = text if mark == kept else text.replace(mark, "")
    return text


def test_special_tokens_are_all_that_decoding_leaves_out() -> None:
    tokenizer = marked_tokenizer()
    found = special_tokens(tokenizer)
    assert found == {0: "<pad>", 1: "<bos>", 2: "<eos>", END: MARK}
    assert TokenTexts(tokenizer).is_special(END)


# ServerSettings of a model's generation_config, each of which changes or breaks transformers' generate.
SETTINGS: dict[str, Any] = {
    "min_new_tokens": 11,
    "min_length": 60,
    "bad_words_ids": [[i] for i in range(3, 200)],
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "sequence_bias": [[[7], 50.0]],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 2,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": (1, 5.0),
    "guidance_scale": 3.0,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_length": 5,
    "max_new_tokens": 2,
    "max_time": 1e-6,
    "stop_strings": ["e"],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0},
    "prompt_lookup_num_tokens": 3,
    "use_cache": False,
    "cache_implementation": "static",
    "output_scores": True,
    "return_dict_in_generate": True,
    "prefill_chunk_size": 2,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_models_own_settings_change_nothing(loaded: LoadedModel, name: str) -> None:
    model, plain = loaded.model, loaded.model.generation_config
    right = generate(model, loaded.tokenizer, PROMPT, **OPTIONS)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    setattr(model.generation_config, name, SETTINGS[name])
    try:
        assert generate(model, loaded.tokenizer, PROMPT, **OPTIONS) == right
        assert getattr(model.generation_config, name) == SETTINGS[name]
    finally:
        model.generation_config = plain


def test_all_of_them_at_once_change_nothing_at_any_door(loaded: LoadedModel) -> None:
    model, plain = loaded.model, loaded.model.generation_config
    right = answer(loaded)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    for name, value in SETTINGS.items():
        setattr(model.generation_config, name, value)
    try:
        assert answer(loaded) == right
    finally:
        model.generation_config = plain


def test_its_end_tokens_end_an_answer(loaded: LoadedModel) -> None:
    model, plain = loaded.model, loaded.model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[2, END], pad_token_id=0)
    try:
        assert answer(loaded) == written(loaded).partition(MARK)[0]
    finally:
        model.generation_config = plain
