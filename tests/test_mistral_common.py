"""Tokenizers of mistral-common: control tokens come from chats alone, never from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

mistral_common = pytest.importorskip("mistral_common", reason="mistral-common is not installed")

import torch  # noqa: E402
from families import FAMILIES  # noqa: E402
from test_scheduler import run  # noqa: E402
from transformers.utils import is_mistral_common_available  # noqa: E402

if not is_mistral_common_available():
    pytest.skip("transformers takes newer versions of mistral-common only", allow_module_level=True)

from transformers.tokenization_mistral_common import MistralCommonBackend  # noqa: E402

from mechanex import Chat, ValidationError  # noqa: E402
from mechanex.engine.detokenize import Continuation  # noqa: E402
from mechanex.engine.generate import generate, stream  # noqa: E402
from mechanex.engine.models.resolve import LoadedModel  # noqa: E402
from mechanex.engine.sampling import Sampling  # noqa: E402
from mechanex.engine.score import completion_logprobs  # noqa: E402
from mechanex.engine.text import encode_pair, encode_prompt, prompt_text  # noqa: E402
from mechanex.engine.token_texts import TokenTexts  # noqa: E402
from mechanex.engine.tool_calls import call_format, knows_tools  # noqa: E402
from mechanex.server.model.requests import TextRequest  # noqa: E402
from mechanex.server.model.texts import PromptEncoder  # noqa: E402

QUESTION = [{"role": "user", "content": "Where is Anna?"}]
STARTED = [*QUESTION, {"role": "assistant", "content": "She is at the"}]
BEGIN, INST, END_INST = 1, 3, 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The SentencePiece one that the package brings: control tokens, and a space before every text."""
    data = Path(mistral_common.__file__).parent / "data"
    found = next(iter(sorted(data.glob("mistral_instruct_tokenizer_*.model.v3"))), None)
    if found is None:
        pytest.skip("this version of mistral-common brings no tokenizer")
    return MistralCommonBackend(found)


@pytest.fixture(scope="module")
def loaded(tokenizer: Any) -> LoadedModel:
    return LoadedModel(FAMILIES["llama"](vocab_size=len(tokenizer)), tokenizer, "tiny", "transformers")


def test_chats_are_answered_and_go_on(tokenizer: Any) -> None:
    asked = encode_prompt(tokenizer, QUESTION)
    assert asked[:2] == [BEGIN, INST] and asked[-1] == END_INST
    going_on = encode_prompt(tokenizer, Chat(STARTED, continue_final_message=True))
    assert going_on[: len(asked)] == asked
    assert tokenizer.decode(going_on[len(asked) :], skip_special_tokens=True) == "She is at the"
    with pytest.raises(ValidationError, match="continue_final_message"):
        encode_prompt(tokenizer, STARTED)


def test_calls_of_tools_are_written_where_the_tokens_have_their_mark(tokenizer: Any) -> None:
    assert knows_tools(tokenizer) and call_format(tokenizer) == "mistral"
    first = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if first.is_file():
        assert not knows_tools(MistralCommonBackend(first))


def test_a_completion_continues_a_chat_and_a_text(tokenizer: Any) -> None:
    going_on = Chat(STARTED, continue_final_message=True)
    before = encode_prompt(tokenizer, going_on)
    ids, answer = encode_pair(tokenizer, going_on, " park")
    assert ids == before
    assert tokenizer.decode(ids + answer, skip_special_tokens=True).endswith("She is at the park")
    for prompt in ("Anna m", encode_prompt(tokenizer, "Anna m")):
        ids, answer = encode_pair(tokenizer, prompt, "et the")
        assert tokenizer.decode(ids + answer, skip_special_tokens=True) == "Anna met the"


def test_it_generates_scores_and_streams(loaded: LoadedModel) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "sampling_method": "greedy"}
    going_on = Chat(STARTED, continue_final_message=True)
    text = generate(loaded.model, loaded.tokenizer, going_on, **options)
    assert text.startswith(prompt_text(loaded.tokenizer, going_on))
    assert "".join(stream(loaded.model, loaded.tokenizer, going_on, **options)) == text
    assert generate(loaded.model, loaded.tokenizer, STARTED, continue_final_message=True, **options) == text
    ids = encode_prompt(loaded.tokenizer, going_on)
    scored = completion_logprobs(loaded.model, going_on, [" park"], loaded.tokenizer)
    right = completion_logprobs(loaded.model, ids, [scored.token_ids[0]])
    assert torch.equal(scored.sums, right.sums)


def test_the_server_takes_them(loaded: LoadedModel) -> None:
    encoder = PromptEncoder(loaded.tokenizer, 256, "tiny")
    chat = Chat(STARTED, continue_final_message=True)
    ids = encoder.encode_chat(chat)
    assert ids == encode_prompt(loaded.tokenizer, chat)
    (answer,) = run(loaded, [TextRequest(ids, 6, Sampling("greedy"), stops=("[INST]",))])
    whole = generate(loaded.model, loaded.tokenizer, chat, max_tokens=6, sampling_method="greedy")
    assert whole.endswith(answer.text)
    assert TokenTexts(loaded.tokenizer).is_special(INST)


def test_a_control_token_is_a_stop_text(tokenizer: Any) -> None:
    row = Continuation(tokenizer, encode_prompt(tokenizer, QUESTION), ["[INST]"])
    for token in encode_pair(tokenizer, "", "Anna met")[1]:
        row.feed(token)
    assert not row.stopped
    row.feed(INST)
    assert row.stopped and row.text.strip() == "Anna met"
