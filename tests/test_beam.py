"""Beam search finds the likeliest completions, and gives their scores and texts as documented."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from beam_truth import DST, ROUNDING, SRC, TOKENIZER, sample, token_probs, true_scores
from families import BOS, FAMILIES, build, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mechanex import Mechanex
from mechanex.engine.beam import most_likely_completions
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    sample_most_likely_completions_hf,
)

OPTIONS = [
    dict(zip(("do_one_minus", "reverse", "use_total_probs"), flags, strict=True))
    for flags in itertools.product([False, True], repeat=3)
]


N_TINY = 7
TINY_DST, TINY_SRC = [1, 5, 3, 3, 6], [1, 4]


@cache
def tiny() -> PreTrainedModel:
    return FAMILIES["llama"](vocab_size=N_TINY)


@cache
def next_probs(*ids: int) -> list[float]:
    with torch.no_grad():
        logits = tiny()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    probs: list[float] = (0.6 * logits.double()).softmax(-1).tolist()
    return probs


def looked_up(completion: list[int], src: bool, do_one_minus: bool, reverse: bool, **_: bool) -> list[float]:
    """A tiny completion's scores, at coldness 0.6."""

    def shares(prompt: list[int]) -> list[float]:
        probs = [next_probs(*prompt, *completion[:i])[token] for i, token in enumerate(completion)]
        return [1 - p if do_one_minus else p for p in probs]

    against = shares(TINY_SRC) if src else [0.0] * len(completion)
    scores = [p - q for p, q in zip(shares(TINY_DST), against, strict=True)]
    return [-s for s in scores] if reverse else scores


@pytest.mark.parametrize("src", [False, True], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(n for n in o if o[n]) or "plain")
def test_a_wide_beam_finds_what_enumeration_finds_and_a_narrow_one_what_lists_find(options, src):
    prompts = (TINY_DST, TINY_SRC if src else None)
    rank = math.prod if options["use_total_probs"] else lambda scores: scores[-1]

    def score(completion: Sequence[int]) -> list[float]:
        return looked_up(list(completion), src, **options)

    found = most_likely_completions(
        tiny(), *prompts, TOKENIZER, k=N_TINY**3, iters=2, coldness=0.6, **options
    )
    every = list(itertools.product(range(N_TINY), repeat=3))
    assert sorted(map(tuple, found.token_ids)) == every
    np.testing.assert_allclose(found.scores, [score(ids) for ids in found.token_ids], **ROUNDING)
    ranks = [rank(score(ids)) for ids in found.token_ids]
    np.testing.assert_allclose(ranks, sorted(map(rank, map(score, every)), reverse=True), **ROUNDING)

    for k, iters in ((4, 3), (1, 4)):
        beams: list[list[int]] = [[]]
        for _ in range(iters + 1):
            grown = [[*beam, token] for beam in beams for token in range(N_TINY)]
            beams = sorted(grown, key=lambda ids: rank(score(ids)), reverse=True)[:k]
        found = most_likely_completions(
            tiny(), *prompts, TOKENIZER, k=k, iters=iters, coldness=0.6, **options
        )
        assert found.token_ids == beams


# The documented function


def test_what_is_returned_has_the_documented_shape_and_meaning():
    ids = most_likely_completions(build("llama"), DST, None, TOKENIZER, k=4, iters=3).token_ids
    probs = np.array([token_probs(build("llama"), DST, completion) for completion in ids])
    texts, scores = sample(k=4, iters=3)
    assert len(texts) == 4 and all(isinstance(text, str) for text in texts)
    assert isinstance(scores, np.ndarray) and scores.shape == (4, 4) and scores.dtype == np.float64
    np.testing.assert_allclose(scores, probs, **ROUNDING)
    assert list(scores[:, -1]) == sorted(scores[:, -1], reverse=True)
    options: dict[str, Any]
    for options, expected in (
        ({"return_log_probs": True}, np.log(probs)),
        ({"return_token_probs": False}, probs.prod(1)),
        ({"return_token_probs": False, "return_log_probs": True}, np.log(probs).sum(1)),
    ):
        same, found = sample(k=4, iters=3, **options)
        assert same == texts
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_total_probs_are_returned_as_joints_best_first():
    found = most_likely_completions(build("llama"), DST, None, TOKENIZER, k=6, iters=2, use_total_probs=True)
    joints = np.prod([token_probs(build("llama"), DST, ids) for ids in found.token_ids], axis=1)
    for per_token in (True, False):
        texts, scores = sample(k=6, iters=2, use_total_probs=True, return_token_probs=per_token)
        assert texts == found.texts and scores.shape == (6,)
        np.testing.assert_allclose(scores, joints, **ROUNDING)
        assert list(scores) == sorted(scores, reverse=True)
    _, logs = sample(k=6, iters=2, use_total_probs=True, return_log_probs=True)
    np.testing.assert_allclose(logs, np.log(joints), rtol=1e-4)


def test_logs_stay_exact_where_probabilities_leave_a_float():
    _, logs = sample(k=3, iters=1, coldness=5000.0, dst_prompt=DST, return_log_probs=True)
    _, probs = sample(k=3, iters=1, coldness=5000.0, dst_prompt=DST)
    assert probs[-1, 0] == 0 and np.isfinite(logs).all() and logs[-1, 0] < -745


def test_the_product_of_many_small_scores_still_ranks():
    """200 tokens whose products are far below what a float holds."""
    model = FAMILIES["llama"]()
    found = most_likely_completions(
        model, DST, SRC, TOKENIZER, k=2, iters=200, coldness=0.05, use_total_probs=True
    )
    assert float(found.joint.abs().max()) == 0
    size = found.scores.abs().log().sum(1)
    assert size.isfinite().all()
    sign = found.scores.sign().prod(1)
    assert sign[0] > sign[1] or (sign[0] == sign[1] and (size[0] - size[1]) * sign[0] > 0)


def test_zero_iterations_give_the_likeliest_next_tokens():
    with torch.no_grad():
        probs = build("llama")(torch.tensor([DST])).logits[0, -1].double().softmax(-1)
    texts, scores = sample(k=5, iters=0)
    assert scores.shape == (5, 1)
    np.testing.assert_allclose(scores[:, 0], probs.topk(5).values, **ROUNDING)
    assert texts == [TOKENIZER.decode([token]) for token in probs.topk(5).indices.tolist()]


def test_a_beam_wider_than_the_vocabulary_grows_as_far_as_there_are_completions():
    for iters, expected in ((0, N_TINY), (1, N_TINY**2), (2, 100)):
        texts, scores = sample(model=tiny(), dst_prompt=TINY_DST, k=100, iters=iters)
        assert len(texts) == expected and scores.shape == (expected, iters + 1)


def test_a_search_against_the_same_prompt_finds_nothing_and_ties_are_broken_by_token_id():
    model = FAMILIES["llama"](vocab_size=N_TINY)
    nn.init.zeros_(model.lm_head.weight)  # every token as likely as any other
    for src in (None, TINY_SRC, TINY_DST):
        found = most_likely_completions(model, TINY_DST, src, TOKENIZER, k=3, iters=2)
        assert found.token_ids == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
        assert found.scores.unique().numel() == 1
    assert most_likely_completions(model, TINY_DST, None, TOKENIZER, k=9, iters=1).token_ids == [
        *([0, i] for i in range(N_TINY)),
        [1, 0],
        [1, 1],
    ]


def test_impossible_tokens_come_last_at_any_coldness():
    model = FAMILIES["llama"](vocab_size=N_TINY)
    handle = model.lm_head.register_forward_hook(
        lambda m, a, out: out.index_fill(-1, torch.tensor([2]), -math.inf)
    )
    for coldness in (1.0, 0.0, -2.0):
        found = most_likely_completions(
            model, TINY_DST, None, TOKENIZER, k=N_TINY, iters=0, coldness=coldness
        )
        assert found.token_ids[-1] == [2] and float(found.scores[-1]) == 0
        assert float(found.joint.sum()) == pytest.approx(1)
    handle.remove()


def test_prompts_may_be_text_ids_or_chat_messages():
    text = "The morning was cold"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": text}]
    forms = [text, tokenizer(text).input_ids, chat]
    found = [
        sample_most_likely_completions_hf(build("llama"), tokenizer, prompt, "She said", k=3, iters=2)
        for prompt in forms
    ]
    swapped = [
        sample_most_likely_completions_hf(build("llama"), tokenizer, "She said", prompt, k=3, iters=2)
        for prompt in forms
    ]
    for texts, scores in (found[1], found[2]):
        assert texts == found[0][0] and (scores == found[0][1]).all()
    for texts, scores in (swapped[1], swapped[2]):
        assert texts == swapped[0][0] and (scores == swapped[0][1]).all()


def test_arguments_go_to_the_model_on_every_call():
    model, seen = build("gpt2"), []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    sample(model=model, k=2, iters=2)  # the self-check calls the model too
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    plain = sample(model=model, k=2, iters=2)
    extra = sample(model=model, k=2, iters=2, output_hidden_states=True, return_dict=False, gc_interval=1)
    handle.remove()
    assert [call.get("output_hidden_states") for call in seen] == [None] * 3 + [True] * 3
    assert plain[0] == extra[0] and (plain[1] == extra[1]).all()
    # One position's logits at a time, for the new tokens of k rows alone.
    assert [tuple(call["input_ids"].shape) for call in seen[:3]] == [(1, len(DST)), (2, 1), (2, 1)]
    assert {call["logits_to_keep"] for call in seen} == {1}


# Wrong input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k is"),
        ({"k": 2.0}, "k is"),
        ({"k": True}, "k is"),
        ({"iters": -1}, "iters is"),
        ({"iters": None}, "iters is"),
        ({"coldness": math.nan}, "coldness"),
        ({"coldness": math.inf}, "coldness"),
        ({"coldness": "1"}, "coldness"),
        ({"dst_prompt": []}, "empty"),
        ({"dst_prompt": None}, "NoneType"),
        ({"src_prompt": []}, "empty"),
        ({"src_prompt": [BOS, 10**6]}, "vocabulary"),
        ({"dst_prompt": [{"role": "user", "content": "Hi"}]}, "template"),
        ({"input_ids": torch.ones(1, 1)}, "sets input_ids itself"),
        ({"attention_mask": torch.ones(1, 1), "past_key_values": 1}, "attention_mask, past_key_values"),
        ({"return_log_probs": True, "src_prompt": SRC}, "return_log_probs"),
        ({"return_log_probs": True, "reverse": True}, "return_log_probs"),
        ({"model": "gpt2"}, "mechanex.load"),
    ],
)
def test_wrong_input_is_an_error_that_is_also_a_value_error(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        sample(**options)
    assert isinstance(caught.value, ValidationError)


def test_a_search_past_the_last_position_is_refused_and_up_to_it_runs():
    model = FAMILIES["gpt2"](n_positions=20)
    assert len(sample(model=model, k=2, iters=20 - len(DST))[0]) == 2
    with pytest.raises(ValidationError, match="20 positions"):
        sample(model=model, k=2, iters=21 - len(DST))


def test_without_a_tokenizer_it_says_so():
    with pytest.raises(ValidationError, match="tokenizer"):
        most_likely_completions(FAMILIES["llama"](), DST)


# Text


def test_text_follows_the_prompt_as_written():
    """mx-tiny's completions, put behind their prompt, are encoded as what was found."""
    client = Mechanex().load("mx-tiny", backend="transformers")
    tokenizer, prompt = client.tokenizer, "The weather in Paris is"
    texts, _ = sample_most_likely_completions_hf(client.local_model, tokenizer, prompt, use_total_probs=True)
    found = most_likely_completions(client.local_model, prompt, use_total_probs=True)
    assert found.texts == texts and all(text.startswith(" ") for text in texts)
    start = tokenizer(prompt).input_ids
    assert [tokenizer(prompt + text).input_ids for text in texts] == [start + ids for ids in found.token_ids]


@settings(max_examples=40, deadline=None)
@given(prompt=st.lists(st.integers(0, 383), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_ids_that_are_no_text_are_searched_like_any_other(prompt, seed):
    """Bytes in the middle of a character, special tokens, and ids that the tokenizer doesn't have."""
    model = build("llama")
    src = torch.randint(0, 384, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = most_likely_completions(model, prompt, src, TOKENIZER, k=3, iters=2, reverse=bool(seed % 2))
    assert [len(ids) for ids in found.token_ids] == [3, 3, 3] and all(isinstance(t, str) for t in found.texts)
    sign = -1 if seed % 2 else 1
    expected = [sign * true_scores(model, ids, prompt, src) for ids in found.token_ids]
    np.testing.assert_allclose(found.scores, expected, **ROUNDING)


def test_the_space_that_a_tokenizer_drops_at_the_start_is_kept():
    words = ["<unk>", "▁The", "▁morning", "▁was", "▁cold", "er", "▁and"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    assert tokenizer.decode([4, 5]) == "colder"
    found = most_likely_completions(tiny(), [1, 2, 3], None, tokenizer, k=N_TINY**2, iters=1)
    texts = {tuple(ids): text for ids, text in zip(found.token_ids, found.texts, strict=True)}
    assert texts[4, 5] == " colder" and texts[5, 6] == "er and"


def test_ids_beyond_a_tokenizer_written_in_python_are_no_error():
    found = most_likely_completions(build("llama"), DST, None, ByT5Tokenizer(extra_ids=0), k=300, iters=0)
    assert max(ids[0] for ids in found.token_ids) >= 259  # bytes and three special tokens


def test_end_tokens_are_written_by_name_and_characters_that_are_cut_off_are_marked():
    euro = TOKENIZER("€", add_special_tokens=False).input_ids
    assert len(euro) == 3

    def forced(ids: list[int]) -> str:
        """The text of the completion ``ids``, which a model is made to give."""
        model = FAMILIES["llama"]()
        steps = iter(ids)

        def choose(_m: Any, _a: Any, logits: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(logits).index_fill(-1, torch.tensor([next(steps)]), 50.0)

        sample(model=model, k=1, iters=1)  # the self-check is over
        handle = model.lm_head.register_forward_hook(choose)
        try:
            return sample(model=model, k=1, iters=len(ids) - 1)[0][0]
        finally:
            handle.remove()

    assert forced(euro) == "€"
    assert forced(euro[:2]) == "\ufffd"
    assert forced([TOKENIZER.eos_token_id, *euro]) == "<eos>€"
