"""Builds the CUDA kernels' own sources for the CPU; see tests/cuda_on_host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["CAN_BUILD", "WHY_NOT", "built"]

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")
CAN_BUILD = COMPILER is not None and (HERE.parent / "csrc").is_dir()
WHY_NOT = "needs g++ and the source tree"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Werror",
]


def built(factory: pytest.TempPathFactory, stem: str, name: str | None = None, *more: str) -> Path:
    """The library of ``tests/cuda_on_host/<stem>.cpp``.

    Args:
        factory: pytest's.
        stem: of the source.
        name: of the library; None: the source's.
        more: options of the compiler.
    """
    library = factory.mktemp("cuda") / f"{name or stem}.so"
    source = HERE / "cuda_on_host" / f"{stem}.cpp"
    command = [str(COMPILER), *FLAGS, "-I", str(source.parent), *more, "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library
