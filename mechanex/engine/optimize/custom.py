"""Loss functions of the user's for the output-constrained phase, and what they may ask about the run they serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from .job import Job

__all__ = ["CustomCost", "running_job"]

_job: ContextVar[Job | None] = ContextVar("mechanex_optimization", default=None)


def running_job() -> Job | None:
    """The job that a custom loss function is being called for, or None."""
    return _job.get()


@contextmanager
def _serving(job: Job) -> Iterator[None]:
    token = _job.set(job)
    try:
        yield
    finally:
        _job.reset(token)


class CustomCost:
    """A user's loss function as a cost of θ; its preparing function is called once, now.

    Args:
        job: whose functions these are.
        theta: where the phase starts.
    """

    def __init__(self, job: Job, theta: Tensor) -> None:
        self._job = job
        prepare = job.settings.custom_output_constr_pre_loss_func
        self._kwargs: Mapping[str, Any] = {}
        if prepare is None:
            return
        with _serving(job):
            kwargs = prepare(*self._arguments(job.parameters.vector(theta), job.parameters.factors(theta)))
        if not isinstance(kwargs, Mapping):
            raise ValidationError(
                "custom_output_constr_pre_loss_func must return a dict of keyword arguments for "
                f"custom_output_constr_loss_func; it returned {type(kwargs).__name__}."
            )
        self._kwargs = kwargs

    def _arguments(self, vector: Tensor, factors: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
        job = self._job
        left, right = (None, None) if factors is None else factors
        only_prompt = job.settings.only_hook_prompt
        return job.adapter.model, job.datapoints, job.layer, vector, left, right, only_prompt

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        """The cost and its gradient [n].

        A function that has called backward() itself may return a number; else what it returns is differentiated.
        """
        job = self._job
        function = job.settings.custom_output_constr_loss_func
        assert function is not None
        with torch.enable_grad():
            vector = job.parameters.vector(theta).detach().clone().requires_grad_()
            factors = job.parameters.factors(theta)
            if factors is not None:
                factors = tuple(f.detach().clone().requires_grad_() for f in factors)  # type: ignore[assignment]
            leaves = [vector, *(factors or ())]
            with _serving(job):
                cost = function(*self._arguments(vector, factors), **self._kwargs)
        if isinstance(cost, Tensor) and cost.requires_grad:
            if cost.numel() != 1:
                raise ValidationError(
                    f"custom_output_constr_loss_func must return a scalar; got a tensor {list(cost.shape)}."
                )
            slopes = torch.autograd.grad(cost.reshape(()), leaves, allow_unused=True)
        else:
            slopes = tuple(leaf.grad for leaf in leaves)
        if all(slope is None for slope in slopes):
            raise ValidationError(
                "custom_output_constr_loss_func returned what doesn't depend on the vector: return a scalar tensor "
                "computed from it, or call backward() inside and return a number."
            )
        made = [torch.zeros_like(leaf) if s is None else s for leaf, s in zip(leaves, slopes, strict=True)]
        gradient = torch.cat([slope.flatten() for slope in made])
        return float(cost.detach() if isinstance(cost, Tensor) else cost), gradient.to(theta)
