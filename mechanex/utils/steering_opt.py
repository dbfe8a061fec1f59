"""The documented functions of steering and vector optimization, under one name; see the modules they come from."""

from __future__ import annotations

from .hooks import (
    hf_hooks_contextmanager,
    make_abl_mat,
    make_activs_hook_hf,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)

__all__ = [
    "hf_hooks_contextmanager",
    "make_abl_mat",
    "make_activs_hook_hf",
    "make_steering_hook_hf",
    "make_steering_hook_tflens",
]
