"""vLLM: what its documentation doesn't name. Importing this imports vLLM; only its own processes and tests do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import vllm
import vllm.v1.core.kv_cache_utils as cache_keys
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.request import RequestStatus

from ..errors import ValidationError

__all__ = [
    "STOPPED",
    "VERSION",
    "ended_in",
    "engine_config",
    "is_elsewhere",
    "layer_calls",
    "llm_class",
    "loaded_model",
    "salt_blocks",
    "scheduler_class",
    "server_main",
    "tokenizer_of",
    "with_ended",
    "worker_class",
]

VERSION: str = vllm.__version__

STOPPED = RequestStatus.FINISHED_STOPPED
"""The state of a request whose answer has ended by itself."""

_ENDED = "mechanex_ended"  # what pickles with a ModelRunnerOutput, which is no class of slots
_SALTED = "_gen_prompt_embeds_extra_hash_keys"  # of (request, first token, token after the last) -> list


def worker_class() -> Any:
    """vLLM's worker for this platform."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def scheduler_class(vllm_config: Any) -> Any:
    """The scheduler that vLLM takes with this configuration, where none is named."""
    return AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler


def salt_blocks(salt: Callable[[Any, int, int], Sequence[str]]) -> None:
    """Has the hash of each block of the prefix cache hold what ``salt`` says of it.

    For this process, and once: another call changes the salt.

    Args:
        salt: gives texts for a request and the first token and the one after the last of a block.
    """
    inner = getattr(cache_keys, _SALTED)
    inner = getattr(inner, "unsalted", inner)

    def salted(request: Any, start: int, stop: int) -> list[Any]:
        return [*inner(request, start, stop), *salt(request, start, stop)]

    salted.unsalted = inner  # type: ignore[attr-defined]
    setattr(cache_keys, _SALTED, salted)


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether a layer is the placeholder of one that another pipeline rank has."""
    return isinstance(layer, PPMissingLayer)


@contextmanager
def layer_calls(
    model: Any, vllm_config: Any, layers: Sequence[nn.Module], device: torch.device
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Runs a block with the arguments by which a loaded model calls some of its layers.

    Within the block they may be called one by one, too. Attention gives zeros in it.
    """

    def zeros(module: nn.Module, args: Any, out: Any) -> Any:
        return torch.zeros_like(out)  # without a cache some leave what memory held before

    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    found = {module for layer in layers for module in layer.modules() if hasattr(module, "kv_cache")}
    handles = [module.register_forward_hook(zeros) for module in found]
    handles += [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    before = None
    if not get_pp_group().is_first_rank:
        dtype = vllm_config.model_config.dtype
        before = model.make_empty_intermediate_tensors(batch_size=2, dtype=dtype, device=device)
    two = torch.arange(2, device=device)
    try:
        with (
            torch.inference_mode(),
            set_current_vllm_config(vllm_config),
            set_forward_context(None, vllm_config, slot_mapping={}, skip_compiled=True),
        ):
            model(input_ids=two, positions=two, intermediate_tensors=before, inputs_embeds=None)
            unread = [i for i, layer in enumerate(layers) if layer not in calls]
            if unread:
                raise ValidationError(
                    f"the model's forward pass doesn't run its layers {unread} (predict-ahead blocks?), and "
                    "steering in vLLM can't leave them out: serve it with mechanex serve."
                )
            yield [calls[layer] for layer in layers]
    finally:
        for handle in handles:
            handle.remove()


def with_ended(output: Any, request_ids: Sequence[str]) -> Any:
    """The output of a step, which tells the scheduler whose answers are to end before the token that it chose."""
    if not request_ids or output is None:
        return output
    output = copy(output)  # it may be one that all steps share
    if isinstance(output, AsyncModelRunnerOutput):
        inner = output.get_output
        output.get_output = lambda: with_ended(inner(), request_ids)
    else:
        setattr(output, _ENDED, frozenset(request_ids))
    return output


def ended_in(output: Any) -> frozenset[str]:
    """Whose answers are to end so."""
    found: frozenset[str] = getattr(output, _ENDED, frozenset())
    return found


def loaded_model(runner: Any) -> nn.Module:
    """The model of a runner."""
    model = runner.get_model()
    assert isinstance(model, nn.Module)
    return model


def server_main(arguments: Sequence[str]) -> None:
    """Runs vLLM's OpenAI server with these arguments, until SIGINT or SIGTERM."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    validate_api_server_args(args)
    uvloop.run(run_server(args))


def tokenizer_of(engine: Any) -> Any:
    """The tokenizer of a server's engine."""
    return engine.renderer.get_tokenizer()


def engine_config(options: Mapping[str, Any]) -> Any:
    """The configuration of an engine with these options, which isn't started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**options).create_engine_config()


def llm_class() -> Any:
    """``vllm.LLM``."""
    from vllm import LLM

    return LLM
