"""The options of vector optimization, checked."""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..whole import as_whole
from .datapoints import TrainingDatapoint

__all__ = ["LIMIT", "LossOptions", "Settings", "settings_of"]

# Steps after which an optimization that was given no max_iters ends.
LIMIT = 10_000
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class LossOptions:
    """What a completion's loss is computed with; see :mod:`.losses`."""

    coldness: float = 0.7
    eps: float = 1e-6
    do_one_minus: bool = True
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every option of ``optimize_vector``, under its name there; its docstring says what each does.

    Raises:
        ValidationError: an option that is out of its range, or options that contradict each other.
        TypeError: an option that doesn't exist.
    """

    eps: float = 1e-6
    lr: float = 0.01
    max_iters: int | None = None
    coldness: float = 0.7
    normalize_token_length: bool = False
    only_hook_prompt: bool = False
    target_loss: float | None = None
    do_target_loss_sum: bool = True
    return_info: bool = True
    return_loss_history: bool = False
    return_vec_history: bool = False
    target_loss_target_iters: int = 1
    satisfice: bool = False
    do_one_minus: bool = True
    max_norm: float | None = None
    starting_norm: float = 1.0
    starting_vec: Any = None
    vector_clamp: float | None = None
    affine_rank: int | None = None
    max_affine_norm: float | None = 2.0
    starting_affine_norm: float = 1.0
    noise_scale: float | None = None
    do_tangent_space_noise: bool = True
    do_noise_abl_relu: bool = False
    noise_iters: int = 1
    do_antipgd: bool = False
    do_output_constr: bool = False
    custom_output_constr_loss_func: Callable[..., Any] | None = None
    custom_output_constr_pre_loss_func: Callable[..., Any] | None = None
    output_constr_norm_initial_scale: float = 1.0
    output_constr_lr: float | None = None
    max_output_constr_iters: int | None = None
    debug: bool = False
    seed: int | None = None
    generator: torch.Generator | None = None
    batch_tokens: int | None = None
    callback: Callable[[int, float, Tensor], Any] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    lr_schedule: str | Callable[[int], float] | None = None
    grad_clip: float | None = None
    eval_datapoints: Sequence[TrainingDatapoint] | None = None
    patience: int | None = None
    keep_on_interrupt: bool = False

    def __post_init__(self) -> None:
        for name, least, strict in _NUMBERS:
            object.__setattr__(self, name, _number(name, getattr(self, name), least, strict))
        for name, least in _WHOLE:
            value = getattr(self, name)
            if value is None and name not in _NEEDED:
                continue
            found = as_whole(value)
            if found is None or found < least:
                raise ValidationError(f"{name} is a whole number of {least} or more; got {value!r}.")
            object.__setattr__(self, name, found)
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

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        Raises:
            ValidationError: a given schedule returns something else than a finite number of at least 0.
        """
        if self.lr_schedule is None:
            return self.lr
        if callable(self.lr_schedule):
            factor = self.lr_schedule(step)
            if not _is_finite(factor) or factor < 0:
                raise ValidationError(
                    f"lr_schedule gave {factor!r} for step {step}; it returns a finite number of at least 0, "
                    "which lr is multiplied by."
                )
            return self.lr * float(factor)
        share = step / max(self.max_iters or 0, 1)
        return self.lr * (1 - share if self.lr_schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)


# Name, least value, whether that value itself is excluded.
_NUMBERS = (
    ("eps", 0.0, False),
    ("lr", 0.0, True),
    ("coldness", 0.0, True),
    ("target_loss", -math.inf, True),
    ("max_norm", 0.0, True),
    ("starting_norm", 0.0, False),
    ("vector_clamp", -math.inf, True),
    ("max_affine_norm", 0.0, True),
    ("starting_affine_norm", 0.0, False),
    ("noise_scale", 0.0, False),
    ("output_constr_norm_initial_scale", 0.0, True),
    ("output_constr_lr", 0.0, True),
    ("grad_clip", 0.0, True),
)
_WHOLE = (
    ("max_iters", 0),
    ("target_loss_target_iters", 1),
    ("affine_rank", 1),
    ("noise_iters", 1),
    ("max_output_constr_iters", 0),
    ("batch_tokens", 1),
    ("patience", 1),
    ("seed", 0),
)
_NEEDED = {
    "eps",
    "lr",
    "coldness",
    "starting_norm",
    "starting_affine_norm",
    "output_constr_norm_initial_scale",
    "target_loss_target_iters",
    "noise_iters",
}


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Settings of options that a caller gave.

    Raises:
        ValidationError: as :class:`Settings`.
        TypeError: an option that doesn't exist; names it and the nearest one that does.
    """
    known = list(Settings.__dataclass_fields__)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise TypeError(f"There is no option {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    return Settings(**options)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return type(value) is not bool and isinstance(value, numbers.Real) and math.isfinite(value)


def _number(name: str, value: Any, least: float, strict: bool) -> float | None:
    """The value as a float; a ValidationError unless it is a finite number in its range."""
    if value is None and name not in _NEEDED:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not _is_finite(value) or value < least or (strict and value == least):
        bound = "" if least == -math.inf else f" {'above' if strict else 'of at least'} {least:g}"
        raise ValidationError(f"{name} is a finite number{bound}; got {value!r}.")
    return float(value)
