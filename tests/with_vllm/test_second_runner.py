"""The V2 model runner, which needs a GPU to start: what is told of its steps, by its own classes, without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from mechanex._private import vllm as parts
from mechanex._private.vllm_steps import Steps, follow
from mechanex.errors import ValidationError

CPU = torch.device("cpu")


class Followed:
    """A runner whose state is vLLM's own, and what was told of its steps."""

    def __init__(self, folder: Path) -> None:
        config = parts.engine_config({"model": str(folder), "skip_tokenizer_init": True})
        self.state: Any = DefaultModelState(config, nn.Module(), None, CPU)
        self.told: list[Any] = []
        follow(
            SimpleNamespace(model_state=self.state), self.begin, lambda: self.told.append("end"), is_v2=True
        )

    def begin(self, steps: Steps) -> None:
        self.told.append([(*one, dict(steps.extra_args(one[0]))) for one in steps.reads()])
        self.known = [one for one in "abc" if steps.knows(one)]

    def add(self, name: str, prompt: int, text: str | None, answer: int = 0) -> None:
        params = SamplingParams(extra_args=text and {"mechanex": text})
        tokens = list(range(prompt + answer))
        data = NewRequestData(
            name, tokens[:prompt], [], params, None, ([],), 0, None, prefill_token_ids=tokens
        )
        self.state.add_request(0, data)

    def step(self, **reads: tuple[int, int]) -> Any:
        """Runs a step that reads (tokens before, tokens now) of requests; what was told."""
        batch = InputBatch.make_dummy(len(reads), sum(n for _, n in reads.values()), InputBuffers(8, 64, CPU))
        batch.req_ids = list(reads)
        batch.num_computed_tokens_np = np.array([before for before, _ in reads.values()])
        batch.num_scheduled_tokens = np.array([now for _, now in reads.values()])
        assert self.state.prepare_inputs(batch, None) == {}
        return self.told[-1]


def test_a_step_tells_what_it_reads(folder: Path) -> None:
    runner = Followed(folder)
    runner.add("a", 3, "x")
    runner.add("b", 9, None)
    assert runner.step(a=(0, 3), b=(0, 5)) == [("a", 0, 3, 3, {"mechanex": "x"}), ("b", 0, 5, 9, {})]
    assert runner.step(b=(5, 4), a=(3, 1)) == [("b", 5, 4, 9, {}), ("a", 3, 1, 3, {"mechanex": "x"})]
    runner.state.remove_request("a")
    runner.add("c", 2, "y")
    assert runner.step(b=(9, 1), c=(0, 2))[1] == ("c", 0, 2, 2, {"mechanex": "y"})
    assert runner.known == ["b", "c"]
    assert runner.told.count("end") == 3, "what a step edited is over before the next one"


def test_a_preempted_request_is_read_from_its_beginning(folder: Path) -> None:
    runner = Followed(folder)
    runner.add("a", 3, "x")
    runner.step(a=(0, 3))
    runner.state.remove_request("a")
    runner.add("a", 3, "x", answer=4)
    assert runner.step(a=(0, 7)) == [("a", 0, 7, 3, {"mechanex": "x"})]


def test_warm_ups_edit_nothing(folder: Path) -> None:
    runner = Followed(folder)
    runner.add("a", 3, "x")
    batch = InputBatch.make_dummy(2, 8, InputBuffers(8, 64, CPU))
    runner.state.prepare_inputs(batch, None)
    assert runner.told == ["end"]


def test_a_request_that_was_not_told_of_is_refused(folder: Path) -> None:
    runner = Followed(folder)
    runner.add("a", 3, "x")
    with pytest.raises(ValidationError, match="reads the request 'b'"):
        runner.step(a=(0, 3), b=(0, 2))
    with pytest.raises(ValidationError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        follow(SimpleNamespace(model_state=object()), runner.begin, list, is_v2=True)
