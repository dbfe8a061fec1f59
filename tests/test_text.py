"""Where a prompt ends and its completion begins, in tokens."""

from __future__ import annotations

import logging

import pytest
from families import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mechanex.engine import joins
from mechanex.engine.text import encode_pair, encode_pairs, encode_prompt
from mechanex.errors import ValidationError

TOKENIZER = tiny_tokenizer()
printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30)


@given(printable, printable.filter(bool))
@settings(deadline=None)
def test_nothing_is_lost_between_prompt_and_completion(prompt, completion):
    ids, answer = encode_pair(TOKENIZER, prompt, completion)
    assert ids[0] == TOKENIZER.bos_token_id and TOKENIZER.bos_token_id not in ids[1:]
    assert TOKENIZER.decode(ids[1:] + answer) == prompt + completion


@given(printable)
@settings(deadline=None)
def test_a_prompts_tokens_do_not_depend_on_its_completions(prompt):
    one, _ = encode_pair(TOKENIZER, prompt, " one answer")
    other, _ = encode_pair(TOKENIZER, prompt, " another")
    assert one == other


def test_the_pair_is_encoded_together_when_the_prompt_is_a_prefix():
    ids, answer = encode_pair(TOKENIZER, "The morning was", " cold")
    assert ids + answer == TOKENIZER("The morning was cold")["input_ids"]
    assert TOKENIZER.decode(answer) == " cold"


def test_spaces_that_end_the_prompt_go_to_the_completion():
    assert encode_pair(TOKENIZER, "The morning was ", "cold") == encode_pair(
        TOKENIZER, "The morning was", " cold"
    )


def test_a_token_across_the_join_is_split_and_logged_once(caplog):
    joins._warned.clear()
    with caplog.at_level(logging.WARNING, "mechanex"):
        for completion in ("rning", "rnings"):
            ids, answer = encode_pair(TOKENIZER, "The mo", completion)
            assert TOKENIZER.decode(ids[1:]) == "The mo" and TOKENIZER.decode(answer) == completion
    assert len(caplog.records) == 1


class Wrapped:
    """A tokenizer that adds an EOS of its own, as T5's and some Llama ones do."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __call__(self, text, add_special_tokens=True, **kwargs):
        out = self._inner(text, add_special_tokens=add_special_tokens, **kwargs)
        if add_special_tokens:
            out["input_ids"] = [*out["input_ids"], self._inner.eos_token_id]
        return out


def test_an_eos_that_the_tokenizer_appends_is_stripped():
    tokenizer = Wrapped(TOKENIZER)
    assert encode_pair(tokenizer, "The morning was", " cold") == encode_pair(
        TOKENIZER, "The morning was", " cold"
    )
    assert encode_prompt(tokenizer, "The morning") == encode_prompt(TOKENIZER, "The morning")


def test_a_written_bos_is_not_doubled():
    ids = encode_prompt(TOKENIZER, TOKENIZER.bos_token + "The morning")
    assert ids == encode_prompt(TOKENIZER, "The morning")


def test_token_ids_are_taken_as_they_are():
    assert encode_prompt(None, [5, 6, 7]) == [5, 6, 7]
    assert encode_pair(None, [5, 6], [7]) == ([5, 6], [7])
    ids, answer = encode_pair(TOKENIZER, [5, 6], " cold")
    assert ids == [5, 6] and TOKENIZER.decode(answer) == " cold"


def test_chat_messages_go_through_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": "Where are you going?"}]
    written = "user: Where are you going?\nassistant:"
    assert encode_prompt(tokenizer, messages) == encode_prompt(tokenizer, written)
    assert encode_pair(tokenizer, messages, " home") == encode_pair(tokenizer, written, " home")
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValidationError, match="no chat template"):
        encode_prompt(bare, messages)


def test_an_empty_completion_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        encode_pair(TOKENIZER, "The morning", "")


def test_an_empty_prompt_needs_a_bos():
    assert encode_pair(TOKENIZER, "", "The")[0] == [TOKENIZER.bos_token_id]
    with pytest.raises(ValueError, match="nothing comes before"):
        encode_pair(None, [], [3])


@pytest.mark.parametrize("prompt", [3, None, {"role": "user"}, [1, "two"], [-1], [True]])
def test_what_is_no_prompt_is_an_error(prompt):
    with pytest.raises(ValidationError):
        encode_prompt(TOKENIZER, prompt)


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(ValidationError, match="tokenizer"):
        encode_prompt(None, "text")


def test_a_template_alone_decides_on_special_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "The"}])
    assert ids == tokenizer("The", add_special_tokens=False)["input_ids"]


def test_an_eos_that_was_written_stays_and_an_appended_one_goes():
    tokenizer, eos = Wrapped(TOKENIZER), TOKENIZER.eos_token_id
    assert encode_prompt(tokenizer, "The" + TOKENIZER.eos_token)[-2:] == [
        encode_prompt(tokenizer, "The")[-1],
        eos,
    ]
    assert encode_pair(tokenizer, "The", " cold" + TOKENIZER.eos_token)[1].count(eos) == 1


def test_a_prompt_that_comes_again_is_encoded_once():
    calls = []

    def tokenizer(text, **options):
        calls.append(text)
        return TOKENIZER(text, **options)

    tokenizer.bos_token_id = TOKENIZER.bos_token_id
    tokenizer.decode = TOKENIZER.decode
    pairs = [("The morning was", answer) for answer in (" cold", " calm", " long")]
    assert encode_pairs(tokenizer, pairs) == [encode_pair(TOKENIZER, *pair) for pair in pairs]
    assert calls.count("The morning was") == 1 and len(calls) == 4
