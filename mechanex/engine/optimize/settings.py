"""The options of vector optimization, checked."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..given import as_finite
from ..whole import as_whole
from .datapoints import TrainingDatapoint

__all__ = ["LIMIT", "LossOptions", "OptimizeSettings", "settings_of"]

# Steps after which an optimization that was given no max_iters ends.
LIMIT = 10_000
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class _Range:
    """The numbers that an option takes: whole ones or any, from ``least`` on, which ``above`` itself leaves out."""

    least: float = -math.inf
    above: bool = False
    whole: bool = False
    needed: bool = True

    def checked(self, name: str, value: Any) -> Any:
        """The value as an int or a float; a ValidationError unless it is a number in the range."""
        if value is None and not self.needed:
            return None
        if self.whole:
            found = as_whole(value)
            if found is None or found < self.least:
                raise ValidationError(f"{name} is a whole number of {self.least} or more; got {value!r}.")
            return found
        number = as_finite(value)
        if number is None or number < self.least or (self.above and number == self.least):
            start = f" {'above' if self.above else 'of at least'} {self.least:g}"
            bound = "" if self.least == -math.inf else start
            raise ValidationError(f"{name} is a finite number{bound}; got {value!r}.")
        return number


def _number(
    default: float | None, least: float = -math.inf, *, above: bool = False, needed: bool = True
) -> Any:
    wanted = _Range(least, above, needed=needed and default is not None)
    return field(default=default, metadata={"range": wanted})


def _whole(default: int | None, least: int) -> Any:
    return field(default=default, metadata={"range": _Range(least, whole=True, needed=default is not None)})


@dataclass(frozen=True)
class LossOptions:
    """What a completion's loss is computed with; see :mod:`.objective`."""

    coldness: float = 0.7
    eps: float = 1e-6
    do_one_minus: bool = True
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizeSettings:
    """Every option of ``optimize_vector``, under its name there; its docstring says what each does.

    Raises:
        ValidationError: an option that is out of its range, or options that contradict each other.
        TypeError: an option that doesn't exist.
    """

    eps: float = _number(1e-6, 0)
    lr: float = _number(0.01, 0, above=True)
    max_iters: int | None = _whole(None, 0)
    coldness: float = _number(0.7, 0, above=True)
    normalize_token_length: bool = False
    only_hook_prompt: bool = False
    target_loss: float | None = _number(None)
    do_target_loss_sum: bool = True
    return_info: bool = True
    return_loss_history: bool = False
    return_vec_history: bool = False
    target_loss_target_iters: int = _whole(1, 1)
    satisfice: bool = False
    do_one_minus: bool = True
    max_norm: float | None = _number(None, 0, above=True)
    starting_norm: float = _number(1.0, 0)
    starting_vec: Any = None
    vector_clamp: float | None = _number(None)
    affine_rank: int | None = _whole(None, 1)
    max_affine_norm: float | None = _number(2.0, 0, above=True, needed=False)
    starting_affine_norm: float = _number(1.0, 0)
    noise_scale: float | None = _number(None, 0)
    do_tangent_space_noise: bool = True
    do_noise_abl_relu: bool = False
    noise_iters: int = _whole(1, 1)
    do_antipgd: bool = False
    do_output_constr: bool = False
    custom_output_constr_loss_func: Callable[..., Any] | None = None
    custom_output_constr_pre_loss_func: Callable[..., Any] | None = None
    output_constr_norm_initial_scale: float = _number(1.0, 0, above=True)
    output_constr_lr: float | None = _number(None, 0, above=True)
    max_output_constr_iters: int | None = _whole(None, 0)
    debug: bool = False
    seed: int | None = _whole(None, 0)
    generator: torch.Generator | None = None
    batch_tokens: int | None = _whole(None, 1)
    callback: Callable[[int, float, Tensor], Any] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    lr_schedule: str | Callable[[int], float] | None = None
    grad_clip: float | None = _number(None, 0, above=True)
    eval_datapoints: Sequence[TrainingDatapoint] | None = None
    patience: int | None = _whole(None, 1)
    plateau: float | None = _number(None, 0, above=True)
    keep_on_interrupt: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            if "range" in option.metadata:
                found = option.metadata["range"].checked(option.name, getattr(self, option.name))
                object.__setattr__(self, option.name, found)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.vector_clamp is not None and self.affine_rank is not None:
            raise ValidationError(
                "vector_clamp and affine_rank contradict each other: clamp steering has a matrix of its own; "
                "give one of them."
            )
        if self.vector_clamp is not None and self.starting_vec is None and self.starting_norm == 0:
            raise ValidationError(
                "Clamp steering needs a direction, but starting_norm is 0; give one above 0."
            )
        custom = self.custom_output_constr_loss_func
        for name in ("custom_output_constr_loss_func", "custom_output_constr_pre_loss_func"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ValidationError(f"{name} is a function; got {function!r}.")
            if function is not None and not self.do_output_constr:
                raise ValidationError(
                    f"{name} is for the output-constrained phase: pass do_output_constr=True."
                )
        if self.custom_output_constr_pre_loss_func is not None and custom is None:
            raise ValidationError(
                "custom_output_constr_pre_loss_func prepares custom_output_constr_loss_func: pass both."
            )
        if self.seed is not None and self.generator is not None:
            raise ValidationError(
                "seed and generator both say where random numbers come from; give one of them."
            )
        if self.patience is not None and self.eval_datapoints is None:
            raise ValidationError("patience watches the loss of eval_datapoints: pass those too.")
        if self.callback is not None and not callable(self.callback):
            raise ValidationError(f"callback is a function (step, loss, vector); got {self.callback!r}.")
        self._check_schedule()

    def _check_schedule(self) -> None:
        schedule = self.lr_schedule
        if schedule is None or callable(schedule):
            return
        if schedule not in SCHEDULES:
            known = ", ".join(map(repr, SCHEDULES))
            raise ValidationError(f"lr_schedule is {known} or a function of the step; got {schedule!r}.")
        if self.max_iters is None:
            raise ValidationError(f"lr_schedule={schedule!r} needs to know the last step: pass max_iters.")

    @property
    def loss_options(self) -> LossOptions:
        """What completions' losses are computed with."""
        return LossOptions(self.coldness, self.eps, self.do_one_minus, self.normalize_token_length)

    @property
    def noisy(self) -> bool:
        """Whether noise is added."""
        return bool(self.noise_scale)

    @property
    def step_limit(self) -> int:
        """The most steps that are taken."""
        return LIMIT if self.max_iters is None else self.max_iters

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        Raises:
            ValidationError: a given schedule returns something else than a finite number of at least 0.
        """
        if self.lr_schedule is None:
            return self.lr
        if callable(self.lr_schedule):
            given = self.lr_schedule(step)
            factor = as_finite(given)
            if factor is None or factor < 0:
                raise ValidationError(
                    f"lr_schedule gave {given!r} for step {step}; it returns a finite number of at least 0, "
                    "which lr is multiplied by."
                )
            return self.lr * factor
        share = step / max(self.max_iters or 0, 1)
        return self.lr * (1 - share if self.lr_schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)


def settings_of(**options: Any) -> OptimizeSettings:
    """Settings of options that a caller gave, by their names or the documented alias of one.

    Raises:
        ValidationError: as :class:`OptimizeSettings`.
        TypeError: an option that doesn't exist; names the nearest one that does.
    """
    if "normalize_completion_length" in options:
        alias = options.pop("normalize_completion_length")
        options["normalize_token_length"] = bool(alias or options.get("normalize_token_length"))
    known = [option.name for option in fields(OptimizeSettings)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"There is no option {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    return OptimizeSettings(**options)
