"""Whether attention on a GPU goes through cuDNN, which makes a plan for every shape of its arguments.

A plan takes a fifth of a second, and batches of texts have ever new shapes: the engine's calls go without. A step of
one row that is captured once and replayed has one: on an H100 a 1.2 B Llama made 402 steps
a second with it, and 388 without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["with_plans", "without_plans"]

_cuda: Any = torch.backends.cuda
_lock = threading.Lock()
_withheld = 0
"""How many blocks that are running keep attention from cuDNN. torch holds the choice for the whole process."""


@contextmanager
def without_plans() -> Iterator[None]:
    """Runs a block in which attention doesn't go through cuDNN."""
    global _withheld
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not initialized or not (_withheld or _cuda.cudnn_sdp_enabled()):
        yield
        return
    with _lock:
        _withheld += 1
        _cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _lock:
            _withheld -= 1
            if not _withheld:
                _cuda.enable_cudnn_sdp(True)


@contextmanager
def with_plans() -> Iterator[None]:
    """Runs a part of a block of :func:`without_plans` in which attention may go through cuDNN all the same."""
    if not _withheld:
        yield
        return
    _cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        _cuda.enable_cudnn_sdp(False)
