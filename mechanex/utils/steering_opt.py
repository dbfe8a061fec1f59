"""The documented functions of steering and vector optimization, under one name; see the modules they come from."""

from __future__ import annotations

from .beam_search import sample_most_likely_completions_hf
from .completions import get_completion_logprob, get_completion_logprob_hf
from .hooks import (
    hf_hooks_contextmanager,
    make_abl_mat,
    make_activs_hook_hf,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)
from .optimization import TrainingDatapoint, make_melbo_loss_funcs, optimize_vector
from .optimize_many import optimize_vector_minibatch_hf, optimize_vectors

__all__ = [
    "TrainingDatapoint",
    "get_completion_logprob",
    "get_completion_logprob_hf",
    "hf_hooks_contextmanager",
    "make_abl_mat",
    "make_activs_hook_hf",
    "make_melbo_loss_funcs",
    "make_steering_hook_hf",
    "make_steering_hook_tflens",
    "optimize_vector",
    "optimize_vector_minibatch_hf",
    "optimize_vectors",
    "sample_most_likely_completions_hf",
]
