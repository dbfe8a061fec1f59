"""What every launch decides: how much one program works on, in which dtype, on which device."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex._private.torch import stream_of
from mechanex.backends.triton import interpreted

__all__ = [
    "IN_TRITON",
    "MANY_ROWS",
    "MAX_RANK",
    "MAX_WIDTH",
    "OPTIONS",
    "Block",
    "Launcher",
    "Recorded",
    "Start",
    "adjacent",
    "block_for",
    "contiguous",
    "current",
    "divided_up",
    "is_watched",
    "recorded",
]

# The dtype of the arithmetic, as torch and as Triton name it.
IN_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}

# Beyond this rank, matrix products are faster.
MAX_RANK = 64
# Said outright, because the default differs between versions of Triton.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Block:
    """What one program works on.

    Attributes:
        rows: rows at a time, a power of two.
        columns: columns at a time, a power of two; all of them when the edit has a rank.
        warps: warps that share the work.
    """

    rows: int
    columns: int
    warps: int


# Edits with a rank: widest row served, rows per program where there are many, warps. At most 16,384 float32
# elements up to 16 warps: the row and its edited copy take 64 registers of each thread.
_ROW_BLOCKS = (
    (128, 16, 4),
    (256, 16, 4),
    (512, 16, 8),
    (1024, 8, 8),
    (2048, 4, 8),
    (4096, 4, 16),
    (8192, 2, 16),
    (16384, 1, 16),
    (32768, 1, 16),
)
# Edits that only add: nothing ties the columns of a row together.
_ADD_BLOCK = (1024, 4, 4)
# From here on, one row per program fills any GPU several times over.
MANY_ROWS = 1024

MAX_WIDTH = _ROW_BLOCKS[-1][0]


def block_for(n_rows: int, width: int, rank: int, wide: torch.dtype) -> Block:
    """The entry of the table for these sizes; float64 takes two registers, so half the rows."""
    return _block(n_rows >= MANY_ROWS, width, rank > 0, wide)


@functools.lru_cache(maxsize=256)
def _block(many: bool, width: int, ranked: bool, wide: torch.dtype) -> Block:
    if not ranked:
        columns, rows, warps = _ADD_BLOCK
        columns = min(triton.next_power_of_2(width), columns)
    else:
        most, rows, warps = next(entry for entry in _ROW_BLOCKS if width <= entry[0])
        columns = min(triton.next_power_of_2(width), most)
    if wide is torch.float64:
        rows = max(1, rows // 2)
    return Block(rows if many else 1, columns, warps)


def _launches_directly() -> bool:
    """Whether a compiled kernel takes all arguments of its function (Triton 3.3), and by what it was compiled is known.

    On ROCm it depends on the size of a tensor's memory too.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not interpreted() and torch.version.hip is None and version >= (3, 3)


_SETTINGS = getattr(getattr(triton, "knobs", None), "runtime", None)


def is_watched() -> bool:
    """Whether somebody, say a profiler, wants to hear of launches, or Triton (before 3.4) doesn't tell."""
    if _SETTINGS is None:
        return True
    enter, leave = _SETTINGS.launch_enter_hook, _SETTINGS.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


class Recorded(NamedTuple):
    """How Triton starts a compiled kernel while nobody watches: ``launch(x, y, z, stream, *fixed, *values)``.

    Attributes:
        launch: Triton's compiled function.
        fixed: what is the same from launch to launch.
        nested: whether the values come as one tuple.
    """

    launch: Callable[..., object]
    fixed: tuple[Any, ...]
    nested: bool


def recorded(compiled: Any, n_values: int) -> Recorded | None:
    """What a compiled kernel's launcher hands on to its compiled function, found by a launch that starts nothing.

    The form differs between versions of Triton; None where it is none that is known here, or where a launch has more to
    do, such as to make room for what the kernel notes.
    """
    given: list[tuple[Any, ...]] = []
    x, y, z, stream, *unset = (object() for _ in range(7))
    values = tuple(object() for _ in range(n_values))
    try:
        launcher = copy.copy(compiled.run)
        launch, launcher.launch = launcher.launch, lambda *handed: given.append(handed)
        launcher(x, y, z, stream, compiled.function, compiled.packed_metadata, *unset, *values)
        (handed,) = given
    except Exception:
        return None
    nested = isinstance(handed[-1], tuple) and handed[-1] == values
    end = len(handed) - (1 if nested else n_values)
    fixed = tuple(None if one in unset else one for one in handed[4:end])
    marks = {x, y, z, stream, *values}
    known = handed[:4] == (x, y, z, stream) and (nested or handed[end:] == values)
    if not known or any(type(one) is object and one in marks for one in fixed):
        return None
    return Recorded(launch, fixed, nested) if compiled.function in fixed else None


class Start:
    """Starts one compiled kernel.

    Args:
        compiled: Triton's.
        n_values: how many arguments it takes, constants included.
    """

    __slots__ = ("_compiled", "recorded")

    def __init__(self, compiled: Any, n_values: int) -> None:
        self._compiled = compiled
        self.recorded = recorded(compiled, n_values)

    def __call__(self, grid: tuple[int, int, int], stream: int, values: tuple[Any, ...]) -> None:
        """One launch on the current device; of tensors the values are the addresses."""
        if self.recorded is None or is_watched():
            self._compiled[grid](*values, stream=stream)
            return
        launch, fixed, nested = self.recorded
        if nested:
            launch(*grid, stream, *fixed, values)
        else:
            launch(*grid, stream, *fixed, *values)


class Launcher:
    """Launches one kernel; from the second call of a kind on without Triton's look-up, which costs several launches.

    That look-up binds, describes and hashes every argument as text. Here a compiled kernel is found by what Triton's
    specialization may depend on: a tensor's dtype and whether its address is a multiple of 16, whether a number is 1,
    a multiple of 16 or beyond int32, what is None, and the constants themselves.

    Args:
        kernel: a function under ``triton.jit``, its ``tl.constexpr`` arguments last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._starts: dict[tuple[Any, ...], Start] = {}
        self._direct = _launches_directly()

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: tuple[Tensor | int | None, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> Start | None:
        """Put one launch on the current stream of ``device``, which is the current device.

        Returns:
            What makes launches of its kind; None where only Triton's look-up does.
        """
        if not self._direct:
            self._kernel[grid](*arguments, *constants, num_warps=warps, **OPTIONS)
            return None
        key, values = self.described(arguments)
        key = (device.index, warps, constants, key)
        start = self._starts.get(key)
        if start is not None:
            start(grid, stream_of(device.index), (*values, *constants))
            return start
        compiled = self._kernel[grid](*arguments, *constants, num_warps=warps, **OPTIONS)
        if compiled is None:
            return None
        start = self._starts[key] = Start(compiled, len(values) + len(constants))
        return start

    @staticmethod
    def described(arguments: tuple[Tensor | int | None, ...]) -> tuple[tuple[Any, ...], list[int | None]]:
        """What a compiled kernel is found by, and what it is given: addresses for tensors."""
        key: list[Any] = []
        values: list[int | None] = []
        for argument in arguments:
            if argument is None:
                key.append(None)
                values.append(None)
            elif type(argument) is int:
                key.append((argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31))
                values.append(argument)
            else:
                address = argument.data_ptr()
                key.append((argument.dtype, address % 16 == 0))
                values.append(address)
        return tuple(key), values


def divided_up(n: int, by: int) -> int:
    """``n / by``, rounded up; Triton's own costs as much as a launch."""
    return -(-n // by)


def adjacent(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def contiguous(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
