"""Answers that are watched in vLLM: the same tokens, scores, corrections and ends as from this project's own engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, WIDTH, batch, hf_model, vectors

from mechanex._private import vllm as parts
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import ProbeDetector
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.watching import Seen, Watch, WatchingSteering
from mechanex.errors import NotFoundError, ValidationError
from mechanex.vllm import SteerBy, WatchBy
from mechanex.vllm.supported import why_unwatched

N_NEW = 40


def behavior(
    seed: int, threshold: float, layer: int = 2, kind: Any = "resid", way: Any = "subtract"
) -> Behavior:
    """One that some tokens of a random model show."""
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    direction /= direction.norm()
    point = HookPoint(kind, layer)
    correction = Correction(way, direction, 0.0, 0.5, 3.0)
    probe = ProbeDetector(direction, 0.0, 0.1)
    return Behavior(
        f"b{seed}", "", "tiny", None, WIDTH, point, "probe", probe, None, None, threshold, correction
    )


BEHAVIORS = (
    behavior(1, 348.0),
    behavior(2, 28.0, layer=3, way="cap"),
    behavior(3, 14.5, layer=LAYERS),
    behavior(4, 1e9, layer=0),
)
WATCHES: list[tuple[tuple[int, ...], Any]] = [
    ((), "correct"),
    ((0,), "correct"),
    ((0, 1, 2, 3), "correct"),
    ((0, 2), "report"),
    ((1, 2), "abort"),
    ((3, 1), "abort"),
    ((2, 1), "correct"),
    ((0, 1), "correct"),
]


def asked() -> list[tuple[Any, tuple[int, ...], Any]]:
    """A prompt with its steering, and what is watched in its answer."""
    return [(case, *watch) for case, watch in zip(batch(vectors())[:8], WATCHES, strict=True)]


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[tuple[list[int], str | None, list[Seen]]]:
    """What the engine makes of them."""
    model = hf_model(folder)
    tokenizer = load("mx-tiny", backend="transformers").tokenizer
    watches = [Watch(tuple(BEHAVIORS[i] for i in which), action) for _, which, action in asked()]
    rows = []
    for i, ((case, which, _), watch) in enumerate(zip(asked(), watches, strict=True)):
        ends = {"prompt": slice(0, len(case.prompt)), "generated": slice(len(case.prompt), None)}
        steering = tuple(Steer(n, edit, ends.get(t, t)) for n, edit, t in case.steers)  # type: ignore[arg-type]
        request = TextRequest(
            case.prompt, max_tokens=N_NEW, steering=steering, onlooker=watch if which else None
        )
        rows.append(Row(request, tokenizer, (), prompt=(i, len(watches))))
    adapter = adapter_for(model)
    decode(adapter, rows, 0, steering=WatchingSteering(adapter))
    found = [
        (row.chosen, row.result and row.result.finish_reason, watch.seen)
        for row, watch in zip(rows, watches, strict=True)
    ]
    reasons = [reason for _, reason, _ in found]
    assert reasons.count("behavior") == 2, "two answers are ended"
    corrected = [sum(bool(one.corrected) for one in seen) for _, _, seen in found]
    assert sum(0 < n < N_NEW - 1 for n in corrected) >= 3, "some are corrected from somewhere on"
    return found  # type: ignore[return-value]


def watched(llm: Any, order: list[int]) -> list[tuple[list[int], str, list[Seen]]]:
    from vllm import SamplingParams

    for name, edits in vectors().items():
        llm.register(edits, name)
    names = [llm.register_behavior(one) for one in BEHAVIORS]
    params = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True, detokenize=False)
    requests = [asked()[i] for i in order]
    answers = llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case, _, _ in requests],
        params,
        steering=[case.asked for case, _, _ in requests],
        watching=[
            WatchBy([names[i] for i in which], action) if which else None for _, which, action in requests
        ],
        use_tqdm=False,
    )
    outputs = [answer.outputs[0] for answer in answers]
    return [(list(one.token_ids), one.finish_reason, getattr(one, "seen", [])) for one in outputs]


def same(found: Any, wanted: Any) -> None:
    for (tokens, reason, seen), (tokens_wanted, reason_wanted, seen_wanted) in zip(
        found, wanted, strict=True
    ):
        assert (tokens, reason) == (tokens_wanted, reason_wanted)
        bare = [(one.detected, one.corrected) for one in seen]
        assert bare == [(one.detected, one.corrected) for one in seen_wanted]
        for one, other in zip(seen, seen_wanted, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-2)


ROOM = {"steering_rank": 2, "steering_gates": True}
EVERYONE = list(range(len(WATCHES)))


def test_one_batch_and_again_with_a_warm_cache(engines: Any, folder: Path, truth: Any) -> None:
    llm = engines(folder, **ROOM)
    same(watched(llm, EVERYONE), truth)
    order = [5, 2, 7, 1, 0, 3, 6, 4]
    same(watched(llm, order), [truth[i] for i in order])


def test_who_is_preempted_is_corrected_again(engines: Any, folder: Path, truth: Any) -> None:
    llm = engines(folder, num_gpu_blocks_override=11, max_model_len=256, disable_log_stats=False, **ROOM)
    same(watched(llm, EVERYONE), truth)
    preempted = [one.value for one in llm.engine.get_metrics() if one.name == "vllm:num_preemptions"]
    assert preempted and sum(preempted) > 0


def test_what_is_not_watched(engines: Any, folder: Path) -> None:
    llm = engines(folder, **ROOM)
    with pytest.raises(ValidationError, match="residual stream alone"):
        llm.register_behavior(behavior(5, 1.0, kind="mlp_out"))
    with pytest.raises(ValidationError, match="make it for this model"):
        llm.register_behavior(replace(behavior(5, 1.0), width=WIDTH + 1))
    with pytest.raises(NotFoundError, match="unheard_of"):
        llm.generate({"prompt_token_ids": [3, 4]}, watching=WatchBy("unheard_of"))
    llm.register_behavior(BEHAVIORS[0])
    with pytest.raises(ValidationError, match="action is"):
        llm.generate({"prompt_token_ids": [3, 4]}, watching=WatchBy("b1", "stop"))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="2 watching"):
        llm.generate({"prompt_token_ids": [3, 4]}, watching=[WatchBy("b1")] * 2)
    llm.generate({"prompt_token_ids": [3, 4]}, steering=[[SteerBy(llm.register(vectors()["a"]))]])


def test_compiled_code_is_asked_for_it(
    engines: Any, folder: Path, truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    llm = engines(folder, enforce_eager=False, **ROOM)
    llm.register_behavior(BEHAVIORS[0])
    with pytest.raises(ValidationError, match="steering_behaviors=True"):
        llm.generate({"prompt_token_ids": [3, 4]}, watching=WatchBy("b1"))
    llm = engines(folder, enforce_eager=False, steering_behaviors=True, **ROOM)
    same(watched(llm, EVERYONE), truth)
    engines.close()


def test_workers_in_processes_of_their_own(
    engines: Any, folder: Path, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers correct alike, and the scheduler is told whose answers end."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = engines(folder, tensor_parallel_size=2, **ROOM)
    same(watched(llm, EVERYONE), truth)
    engines.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2), "pipeline parallelism"),
        (lambda config: setattr(config.device_config, "device_type", "cuda"), "eager mode alone"),
    ],
)
def test_engines_that_do_not_watch(folder: Path, change: Any, text: str) -> None:
    config = parts.engine_config({"model": str(folder), "skip_tokenizer_init": True})
    change(config)
    assert text in (why_unwatched(config) or "")
    config.model_config.enforce_eager = True
    assert (why_unwatched(config) is None) == ("eager" in text)
