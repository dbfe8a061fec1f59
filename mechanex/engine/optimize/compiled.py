"""Blocks compiled by torch for the steps of an optimization: norms, rotations and activations in fewer kernels.

Off unless ``MECHANEX_COMPILE_STEPS=1``, and used only where the step is captured in a CUDA graph: compiling takes
seconds to minutes, and what it brings on a GPU isn't measured yet.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import torch
from torch import nn

from ..._private.torch import compiled_graphs, unlimited_recompiles

__all__ = ["SWITCH", "CompiledBlock", "wanted"]

SWITCH = "MECHANEX_COMPILE_STEPS"

_log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether blocks are to be compiled; read at each call."""
    return os.environ.get(SWITCH) == "1"


class CompiledBlock:
    """A block as torch compiles it at its first call; as it is, if that fails.

    Args:
        block: a layer of a model; hooks on it run between pieces of compiled code.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._run: Any = torch.compile(block, dynamic=False)
        self._is_known = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Layers share their code and so its compiled forms, of which torch makes only a few: one for each length.
        with unlimited_recompiles():
            return self._run(*args, **kwargs) if self._is_known else self._first(*args, **kwargs)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        begun, before = time.monotonic(), compiled_graphs()
        try:
            found = self._run(*args, **kwargs)
        except Exception as error:
            # A compiler may raise anything; an error of the block itself comes again here.
            self._run = self._block
            found = self._block(*args, **kwargs)
            _log.warning("A layer runs as it is, torch can't compile it: %s", str(error).splitlines()[:1])
        else:
            if compiled_graphs() > before:
                _log.info("A layer's forward pass was compiled in %.1f s.", time.monotonic() - begun)
        self._is_known = True
        return found
