"""Differently steered requests in one batch of vLLM: each gets, token for token, what transformers gives it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, WIDTH, Case, batch, by_engine, by_transformers, by_vllm, hf_model, vectors

from mechanex.engine.intervention import Edit
from mechanex.errors import NotFoundError, ValidationError
from mechanex.vllm import SteerBy

ROOM = {"steering_rank": 2, "steering_gates": True}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return batch(vectors())


@pytest.fixture(scope="module")
def truth(folder: Path, cases: list[Case]) -> list[list[int]]:
    found = [by_transformers(hf_model(folder), case) for case in cases]
    assert len({tuple(one) for one in found}) >= len(cases) - 1, "these edits must change what is said"
    return found


def started(engines: Any, folder: Path, **options: Any) -> Any:
    llm = engines(folder, **{**ROOM, **options})
    for name, edits in vectors().items():
        llm.register(edits, name)
    return llm


def test_the_engine_says_the_same(folder: Path, cases: list[Case], truth: list[list[int]]) -> None:
    assert by_engine(hf_model(folder), cases) == truth


def test_one_batch_read_in_pieces(
    engines: Any, folder: Path, cases: list[Case], truth: list[list[int]]
) -> None:
    """Prompts of 130 tokens, 64 tokens a step."""
    assert by_vllm(started(engines, folder), cases) == truth


def test_a_warm_prefix_cache_in_another_order(
    engines: Any, folder: Path, cases: list[Case], truth: list[list[int]]
) -> None:
    llm = started(engines, folder)
    by_vllm(llm, cases)
    order = [6, 12, 5, 3, 10, 4, 2, 8, 11, 7, 0, 9, 1]
    assert by_vllm(llm, [cases[i] for i in order]) == [truth[i] for i in order]
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": list(cases[12].prompt)}
    asked = [None, SteerBy("b", 2.0, tokens="generated"), SteerBy("b", 2.5)]
    cached = [
        one.num_cached_tokens for one in llm.generate([prompt] * 3, params, steering=asked, use_tqdm=False)
    ]
    assert cached == [128, 128, 0], "what isn't steered is shared, what is steered otherwise isn't"


def test_alone_as_together(engines: Any, folder: Path, cases: list[Case], truth: list[list[int]]) -> None:
    llm = started(engines, folder)
    for i in (0, 3, 11):
        assert by_vllm(llm, [cases[i]]) == [truth[i]]


def test_requests_wait_for_a_slot(
    engines: Any, folder: Path, cases: list[Case], truth: list[list[int]]
) -> None:
    """Eight different sets of edits, and room for two at a time."""
    llm = started(engines, folder, steering_slots=2, steering_per_token=2)
    assert by_vllm(llm, cases) == truth


def test_forced_preemption(engines: Any, folder: Path, cases: list[Case], truth: list[list[int]]) -> None:
    """The prompts of 130 tokens take five blocks each, so that with 11 some have to make way and are read again."""
    llm = started(engines, folder, num_gpu_blocks_override=11, max_model_len=256, disable_log_stats=False)
    long = [i for i, case in enumerate(cases) if len(case.prompt) > 100]
    n = 40
    expected = [by_transformers(hf_model(folder), cases[i], n) for i in long]
    assert by_vllm(llm, [cases[i] for i in long], n) == expected
    preempted = [one.value for one in llm.engine.get_metrics() if one.name == "vllm:num_preemptions"]
    assert preempted and sum(preempted) > 0


def test_an_unknown_id_is_an_error(engines: Any, folder: Path, cases: list[Case]) -> None:
    llm = started(engines, folder)
    with pytest.raises(NotFoundError, match="unheard_of"):
        llm.generate("x", steering=SteerBy("unheard_of"))


@pytest.mark.parametrize(
    ("steering", "text"),
    [
        ([[SteerBy("a")] * 5], "steers by 5 vectors"),
        (SteerBy("a", float("nan")), "finite"),
        (SteerBy("a", layers=[1]), "has layers \\[2\\]"),
        (SteerBy("a", tokens="some"), "tokens is"),  # type: ignore[arg-type]
        ([None, None], "1 prompts and 2 steering"),
    ],
)
def test_what_a_request_may_not_ask(engines: Any, folder: Path, steering: Any, text: str) -> None:
    llm = started(engines, folder)
    with pytest.raises(ValidationError, match=text):
        llm.generate({"prompt_token_ids": [3, 4]}, steering=steering)


def test_what_has_no_room(engines: Any, folder: Path) -> None:

    llm = started(engines, folder)
    for vector, text in (
        ({1: torch.zeros(WIDTH + 1)}, "made for another model"),
        ({LAYERS + 1: torch.zeros(WIDTH)}, "layers are 0 to 4"),
        ({1: Edit.affine(torch.ones(WIDTH), torch.ones(3, WIDTH), torch.ones(3, WIDTH))}, "rank 3"),
        ({1: torch.full((WIDTH,), float("inf"))}, "infinite"),
    ):
        with pytest.raises(ValidationError, match=text):
            llm.register(vector)
