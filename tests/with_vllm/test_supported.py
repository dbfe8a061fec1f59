"""What steering refuses of vLLM, and the parts of vLLM that it hangs on, which its documentation doesn't name."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mechanex._private import vllm as parts
from mechanex.errors import ValidationError
from mechanex.vllm import LLM
from mechanex.vllm.capacity import Capacity
from mechanex.vllm.options import steering_options
from mechanex.vllm.supported import SCHEDULER, TESTED, WORKER, check_config, check_version


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        ({"enable_lora": True}, "LoRA"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker_cls"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls"),
    ],
)
def test_what_steering_was_not_tried_with(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        LLM(folder, dtype="float32", skip_tokenizer_init=True, **options)


def test_a_quantized_model_is_refused(folder: Path) -> None:
    config = parts.engine_config({"model": str(folder), "skip_tokenizer_init": True})
    config.model_config.quantization = "fp8"
    with pytest.raises(ValidationError, match="quantized"):
        check_config(config)


def test_an_engine_without_our_classes_is_refused(folder: Path) -> None:
    config = parts.engine_config({"model": str(folder), "skip_tokenizer_init": True})
    with pytest.raises(ValidationError, match="worker_cls"):
        check_config(config)


def test_other_versions_are_refused() -> None:
    check_version(parts.VERSION)
    for version in ("0.29.1", "0.33.0", "1.0"):
        with pytest.raises(ValidationError, match=f"tested with vLLM {TESTED[0]}"):
            check_version(version)


def test_compiled_code_is_kept_apart() -> None:
    """vLLM's key of compiled code doesn't see that layers are wrapped; it does see additional_config."""
    from vllm.config import VllmConfig

    small, large = (VllmConfig(additional_config=Capacity(slots).config()) for slots in (8, 16))
    assert len({VllmConfig().compute_hash(), small.compute_hash(), large.compute_hash()}) == 3


def test_vllms_own_command_knows_our_options() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = steering_options(Capacity(slots=8))
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model=m", *options])
    assert given.worker_cls == WORKER and given.scheduler_cls == SCHEDULER
    assert given.middleware and Capacity.of(given.additional_config) == Capacity(slots=8)


# Parts of vLLM


def test_the_model_runner_tells_what_a_step_reads() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner)
    assert "self._model_forward(" in source, "steps can't be followed (mechanex/_private/vllm.py)"
    for name in ("self.query_start_loc", "self.requests", "self.input_batch"):
        assert name in source
    batch = inspect.getsource(InputBatch)
    for name in ("num_computed_tokens_cpu", "num_prompt_tokens", "req_ids", "num_reqs"):
        assert name in batch, f"{name} is gone: where tokens stand isn't known (mechanex/_private/vllm.py)"


def test_the_prefix_cache_takes_a_salt_for_each_block() -> None:
    import vllm.v1.core.kv_cache_utils as utils

    request: Any = SimpleNamespace(
        prompt_embeds=None, cache_salt=None, lora_request=None, mm_features=[], sampling_params=None
    )
    try:
        parts.salt_blocks(lambda request, start, stop: [f"{start}-{stop}"] if start else [])
        parts.salt_blocks(lambda request, start, stop: [f"{start}–{stop}"] if start else [])
        found = [utils.generate_block_hash_extra_keys(request, at, at + 4, 0)[0] for at in (0, 4)]
        assert found == [None, ("4–8",)], "steered and plain keys and values would mix"
    finally:
        parts.salt_blocks(lambda request, start, stop: [])


def test_the_scheduler_has_the_places_that_are_used() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert issubclass(AsyncScheduler, Scheduler)
    for name in (
        "add_request",
        "schedule",
        "finish_requests",
        "_free_request",
        "get_num_unfinished_requests",
        "get_request_counts",
        "pause_state",
    ):
        assert hasattr(Scheduler, name), f"{name} is gone: requests can't wait (mechanex/vllm/scheduler.py)"
