"""torch: what its documentation doesn't name."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "compiled_graphs",
    "default_store",
    "dispatch_modes",
    "exchange_table",
    "global_hooks",
    "is_batched",
    "is_compiled",
    "jit_is_tracing",
    "join_job",
    "parallel_for_address",
    "remove_hook",
    "stream_of",
    "transforms_are_active",
    "tree_flatten",
    "tree_unflatten",
    "unlimited_recompiles",
    "without_hooks",
    "writes",
]


def join_job() -> None:
    """Joins the processes of this job; does nothing where that is done."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def default_store() -> Any:
    """What the processes of a job write to for each other, once they have joined."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many dispatch modes are on: under one, tensors may have no memory to point at."""

jit_is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Whether ``torch.jit.trace`` records what runs: what it doesn't see is a constant to it."""

_functorch = torch._C._functorch
_functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation runs."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, as under ``vmap`` and in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    found: bool = _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
    return found


def writes(tensor: Tensor) -> int:
    """A count that changes when a tensor is written to; 0 for inference tensors, which don't count."""
    return 0 if tensor.is_inference() else tensor._version


stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""From a CUDA device's index to its current stream, as a raw pointer.

A tenth of the cost of ``torch.cuda.current_stream``, which makes a Stream object; torch's own compiler uses it.
"""


def exchange_table() -> object | None:
    """torch's table of C functions for its tensors, a capsule (DLPack's; torch 2.10 and later); None without."""
    table: object | None = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return table


def parallel_for_address() -> int:
    """Address of ``torch_parallel_for`` in torch's own CPU library (torch 2.10 and later), 0 without it."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def global_hooks() -> list[int]:
    """Ids of the forward hooks and pre-hooks that are called with every module of the process."""
    tables = torch.nn.modules.module
    return [*tables._global_forward_hooks, *tables._global_forward_pre_hooks]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch compiles a model or a part of it: as a module in another, in place, or its forward."""
    return any(
        module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def unlimited_recompiles() -> AbstractContextManager[None]:
    """Code called inside is compiled for as many shapes as it meets; else torch gives up after eight."""
    from torch._dynamo import config

    many = 1 << 20
    found: AbstractContextManager[None] = config.patch(recompile_limit=many, accumulated_recompile_limit=many)
    return found


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def remove_hook(module: nn.Module, hook_id: int) -> None:
    """Removes a forward hook or pre-hook, known by its handle's ``id``, from a module; its handle need not be there."""
    for name in _HOOK_TABLES:
        table: dict[int, Any] = getattr(module, name)
        table.pop(hook_id, None)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Runs a block without the forward hooks and pre-hooks that are on a model and its parts."""
    tables = [
        (table, table.copy())
        for module in model.modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
        if table
    ]
    try:
        for table, _ in tables:
            table.clear()
        yield
    finally:
        for table, hooks in tables:
            table.update(hooks)
