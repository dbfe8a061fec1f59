"""CUDA graphs: a step's shapes never change, so that a GPU can be given its whole work at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["captured"]

_log = logging.getLogger(__name__)
_told: set[str] = set()


def captured(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """``run`` as CUDA graphs of its forward and backward passes, or ``run`` itself where that can't be.

    Args:
        run: from tensors that require gradients to one tensor; does the same work at every call.
        inputs: an example of its arguments, which are of these shapes at every call.
    """
    if inputs[0].device.type != "cuda":
        return run
    sample = tuple(t.detach().clone().requires_grad_() for t in inputs)
    try:
        graphed: Callable[..., Tensor] = torch.cuda.make_graphed_callables(run, sample)  # type: ignore[assignment]
    except Exception as error:  # a model's own code may wait for the GPU, or choose by what it computed
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason not in _told:
            _told.add(reason)
            _log.info(
                "The optimization step is not captured in a CUDA graph, which makes it slower: %s", reason
            )
        torch.cuda.synchronize(inputs[0].device)
        return run
    return graphed
