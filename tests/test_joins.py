"""A completion's tokens continue the prompt's, also with tokenizers that put a space before every text."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from spaced_tokenizers import KINDS, spaced_tokenizer, word_piece_tokenizer

from mechanex.engine.caa import caa_vectors
from mechanex.engine.optimize.datapoints import completions_of
from mechanex.engine.score import completion_logprobs
from mechanex.engine.text import encode_pair, encode_prompt
from mechanex.utils.optimization import TrainingDatapoint

TOKENIZERS = {kind: spaced_tokenizer(kind) for kind in KINDS} | {"byte-level": tiny_tokenizer()}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
words = st.text("Aant meo.\n", max_size=14)


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@kinds
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Anna m", "et the"),
        ("Anna", " met the"),
        ("The dog m", "et Anna."),
        ("Anna met th", "e"),
        ("", "Anna"),
    ],
)
def test_a_completion_continues_the_prompts_text(kind, as_ids, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    before = encode_prompt(tokenizer, prompt)
    ids, answer = encode_pair(tokenizer, before if as_ids else prompt, completion)
    assert ids == before
    whole = encode_prompt(tokenizer, prompt + completion)
    assert read(tokenizer, ids + answer) == read(tokenizer, whole)
    if whole[: len(before)] == before:
        assert ids + answer == whole


@pytest.mark.parametrize(
    ("prompt", "completion", "pieces"),
    [
        ("Anna m", "et the", ["##et", "the"]),
        ("The dog m", "et Anna.", ["##et", "anna", "."]),
        ("Anna met", " the", ["the"]),
        ("Anna met", "the", ["##t", "##h", "##e"]),
        ("Anna met ", "the", ["the"]),
        ("Anna met.", "The", ["the"]),
        ("the wea", "ther, the dog.", ["##t", "##her", ",", "the", "dog", "."]),
        ("", "Anna", ["anna"]),
    ],
)
def test_word_pieces_go_on_with_a_word_that_the_prompt_ends_within(prompt, completion, pieces):
    tokenizer = word_piece_tokenizer()
    ids, answer = encode_pair(tokenizer, prompt, completion)
    assert tokenizer.convert_ids_to_tokens(answer) == pieces
    assert encode_pair(tokenizer, ids, completion)[1] == answer or prompt.endswith(" ")
    # What ends each text of BERT's kind stands neither between the two nor behind them.
    assert tokenizer.sep_token_id not in ids and ids == encode_prompt(tokenizer, prompt)
    assert encode_prompt(tokenizer, "the [SEP]")[-1:] == [tokenizer.sep_token_id]


@given(st.text("adehmnot ", min_size=1, max_size=14), st.text("adehmnot ", max_size=14))
@settings(deadline=None, max_examples=60)
def test_word_pieces_read_as_the_whole_text(prompt, completion):
    tokenizer = word_piece_tokenizer()
    if not prompt.strip() or not completion.strip():
        return
    ids, answer = encode_pair(tokenizer, prompt, completion)
    assert read(tokenizer, ids + answer) == read(tokenizer, encode_prompt(tokenizer, prompt + completion))


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_goes_on_gets_no_space(kind):
    tokenizer = TOKENIZERS[kind]
    _, answer = encode_pair(tokenizer, [1, *encode_pair(tokenizer, "", "Anna m")[1]], "et the")
    tokens = tokenizer.convert_ids_to_tokens(answer)
    assert "".join(tokens).replace("Ġ", "▁") == "et▁the"


@kinds
@given(words.filter(lambda text: text == text.rstrip()), words.filter(bool))
@settings(deadline=None, max_examples=60)
def test_texts_and_token_ids_are_joined_alike(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    ids, answer = encode_pair(tokenizer, prompt, completion)
    assert encode_pair(tokenizer, ids, completion) == (ids, answer)
    assert read(tokenizer, ids + answer) == read(tokenizer, encode_prompt(tokenizer, prompt + completion))


@kinds
@pytest.mark.parametrize("space", [" ", "\n", " \n\n", "\t", "\u3000"])
def test_all_whitespace_that_ends_a_prompt_goes_to_the_completion(kind, space):
    tokenizer = TOKENIZERS[kind]
    assert encode_pair(tokenizer, "Anna met" + space, "the") == encode_pair(
        tokenizer, "Anna met", space + "the"
    )


def test_whitespace_stays_where_nothing_else_would_come_before_the_completion():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # no BOS
    bare = tokenizer("\n", add_special_tokens=False).input_ids
    ids, answer = encode_pair(tokenizer, "\n", "The")
    assert ids == bare and read(tokenizer, answer) == "The"


def test_token_ids_and_chats_end_as_they_are():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:{{ '\n' }}"
    )
    chat = [{"role": "user", "content": "Where?"}]
    ids = encode_prompt(tokenizer, chat)
    assert read(tokenizer, ids).endswith("assistant:\n")
    for prompt in (chat, ids):
        assert encode_pair(tokenizer, prompt, "home") == (
            ids,
            tokenizer("home", add_special_tokens=False).input_ids,
        )


def test_ids_that_no_text_gives_are_continued_too():
    tokenizer = TOKENIZERS["always"]
    split = [1, *tokenizer.convert_tokens_to_ids(["▁", "A", "n", "n", "a"])]
    assert encode_pair(tokenizer, split, " met")[1] == tokenizer.convert_tokens_to_ids(["▁met"])
    no_bos = split[1:]
    assert encode_pair(tokenizer, no_bos, " met")[1] == tokenizer.convert_tokens_to_ids(["▁met"])


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"](vocab_size=704)


def test_every_door_joins_alike(model):
    tokenizer = TOKENIZERS["always"]
    prompt, completion = encode_prompt(tokenizer, "Anna m"), "et the"
    right = tokenizer.convert_tokens_to_ids(["et", "▁the"])
    scored = completion_logprobs(model, prompt, [completion], tokenizer)
    assert scored.token_ids == [right]
    point = TrainingDatapoint(prompt, dst_completions=[completion])
    assert [list(found.ids) for found in completions_of([point], tokenizer)] == [right]
    other = tokenizer.convert_tokens_to_ids(["▁the"])
    by_text = caa_vectors(model, [prompt], [completion], [" the"], [1], tokenizer)
    by_ids = caa_vectors(model, [prompt], [right], [other], [1], tokenizer)
    assert torch.equal(by_text[1], by_ids[1])


def test_the_harness_joins_alike(model):
    pytest.importorskip("lm_eval", reason="lm-eval (the eval extra) is not installed")
    from mechanex.eval import LM

    tokenizer = TOKENIZERS["always"]
    harness = LM(model, tokenizer=tokenizer)
    for prompt, completion in [("Anna m", "et the"), ("Anna met \n", "the"), ("Anna", " met")]:
        assert harness._encode_pair(prompt, completion) == encode_pair(tokenizer, prompt, completion)
