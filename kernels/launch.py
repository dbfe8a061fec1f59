"""What every launch decides: how much one program works on, in which dtype, on which device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex._private.torch import stream_of
from mechanex.backends.triton import interpreted

__all__ = [
    "IN_TRITON",
    "MAX_RANK",
    "MAX_WIDTH",
    "OPTIONS",
    "Block",
    "Launcher",
    "adjacent",
    "block_for",
    "contiguous",
    "current",
    "divided_up",
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
_MANY_ROWS = 1024

MAX_WIDTH = _ROW_BLOCKS[-1][0]


def block_for(n_rows: int, width: int, rank: int, wide: torch.dtype) -> Block:
    """The entry of the table for these sizes; float64 takes two registers, so half the rows."""
    return _block(n_rows >= _MANY_ROWS, width, rank > 0, wide)


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
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._direct = _launches_directly()

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: tuple[Tensor | int | None, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        """Put one launch on the current stream of ``device``, which is the current device."""
        if not self._direct:
            self._kernel[grid](*arguments, *constants, num_warps=warps, **OPTIONS)
            return
        key, values = self.described(arguments)
        key = (device.index, warps, constants, key)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*values, *constants, stream=stream_of(device.index))
            return
        compiled = self._kernel[grid](*arguments, *constants, num_warps=warps, **OPTIONS)
        if compiled is not None:
            self._compiled[key] = compiled

    def bound(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        fixed: tuple[Tensor | int | None, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> Callable[[Tensor, Tensor], None]:
        """Launches that differ in where their first two arguments lie alone: what else there is is looked at now.

        Args:
            grid, device, constants, warps: as for a launch.
            fixed: the arguments behind the first two; tensors stay where they are.

        Returns:
            Puts one launch on the current stream of ``device``; its tensors are of one dtype from call to call.
        """
        rest, values = self.described(fixed)
        runners: dict[tuple[bool, bool], Any] = {}

        def start(first: Tensor, second: Tensor) -> None:
            addresses = first.data_ptr(), second.data_ptr()
            aligned = addresses[0] % 16 == 0, addresses[1] % 16 == 0
            runner = runners.get(aligned)
            if runner is not None:
                runner(*addresses, *values, *constants, stream=stream_of(device.index))
                return
            self(grid, device, (first, second, *fixed), constants, warps)
            key, _ = self.described((first, second))
            compiled = self._compiled.get((device.index, warps, constants, (*key, *rest)))
            if compiled is not None:
                runners[aligned] = compiled[grid]

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
