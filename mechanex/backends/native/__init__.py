"""The compiled kernels (`csrc/`), on the CPU and on CUDA."""

from __future__ import annotations

from ..backend import Backend, Kernel
from . import clusters
from .edits import (
    TORCH_RANK,
    TORCH_TABLE,
    declines_steer,
    refuses_steer,
    refuses_steer_many,
    steer,
    steer_many,
)
from .logprob import LOGPROB
from .modules import describe, direct, levels, missing, missing_cuda, replays
from .sae import TORCH_ROWS, declines_many_rows, refuses, sae_features, sae_top_features

__all__ = [
    "BACKEND",
    "TORCH_RANK",
    "TORCH_ROWS",
    "TORCH_TABLE",
    "clusters",
    "describe",
    "direct",
    "levels",
    "missing",
    "replays",
]

BACKEND = Backend(
    "native",
    "compiled kernels",
    ("cpu", "cuda"),
    {
        "steer": Kernel(steer, refuses_steer, declines_steer),
        "steer_many": Kernel(steer_many, refuses_steer_many),
        "completion_logprob": LOGPROB.kernel(),
        "sae_features": Kernel(sae_features, refuses, declines_many_rows),
        "sae_top_features": Kernel(sae_top_features, refuses, declines_many_rows),
    },
    missing,
    describe,
    {"cuda": missing_cuda},
)
