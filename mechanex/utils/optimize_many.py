"""Several vectors by gradient descent at once, and one on minibatches of many prompts: the documented functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..engine.models.adapter import ModelAdapter
from ..engine.optimize.datapoints import TrainingDatapoint
from ..engine.optimize.loop import Result, run_jobs
from ..engine.optimize.problem import OptimizationJob
from ..engine.optimize.settings import settings_of
from ..engine.text import Prompt
from ..errors import ValidationError

__all__ = ["optimize_vector_minibatch_hf", "optimize_vectors"]


def optimize_vectors(
    model: nn.Module | ModelAdapter,
    jobs: Sequence[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    progress: bool = False,
) -> list[Result]:
    """Optimizes several vectors of one model at once: other layers, seeds, starting vectors, targets or options.

    Jobs on the same datapoints share each pass, every one joining at its own layer; jobs on others do where all of it
    fits into one pass. Each result is what :func:`.optimize_vector` alone gives, to rounding. A ``batch_tokens`` that
    several jobs give counts as the least of them.

    Args:
        model: a Hugging Face or TransformerLens model.
        jobs: keyword arguments of :func:`.optimize_vector`: ``datapoints``, ``layer``, and any option.
        tokenizer: needed for text when the model carries none.
        progress: show a progress bar.

    Returns:
        What :func:`.optimize_vector` returns, for each job.

    Raises:
        ValueError: as there, or one checkpoint for several jobs; names the job.
        TypeError: an option that doesn't exist; names the job.
    """
    made = []
    for i, given in enumerate(jobs):
        if not isinstance(given, Mapping):
            raise ValidationError(
                f"Job {i} is a {type(given).__name__}; give a dict of optimize_vector's arguments."
            )
        try:
            made.append(_job(model, dict(given), tokenizer))
        except ValidationError as error:
            raise ValidationError(f"Job {i}: {error.message}") from error
        except TypeError as error:
            raise TypeError(f"Job {i}: {error}") from error
    return run_jobs(made, progress=progress)


def optimize_vector_minibatch_hf(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    layer: int | Sequence[int],
    src_completions: Sequence[str] | None = None,
    dst_completions: Sequence[str] | None = None,
    minibatch_size: int = 5,
    eps: float = 1e-6,
    lr: float = 0.01,
    max_iters: int | None = None,
    coldness: float = 0.7,
    target_loss: float | None = None,
    target_loss_target_iters: int = 1,
    satisfice: bool = False,
    starting_norm: float = 1,
    max_norm: float | None = None,
    affine_rank: int | None = None,
    max_affine_norm: float | None = None,
    debug: bool = False,
    return_info: bool = True,
    vector_clamp: float | None = None,
    *,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Optimizes a steering vector on minibatches of prompts, each with all completions.

    The same loop as :func:`.optimize_vector`. A step minimises the sum of its minibatch's losses; the loss that is
    reported, and compared with targets, is the mean per (prompt, completion), and stopping is tested once per epoch
    on the epoch's mean. Prompts come in the given order in the first epoch, then shuffled from the seed; a minibatch
    that an epoch doesn't fill goes on with the next one's.

    Args:
        model: a Hugging Face or TransformerLens model.
        tokenizer: needed for text when the model carries none.
        prompts: text, token ids or chat messages.
        layer: as in :func:`.optimize_vector`, as all that isn't named here.
        src_completions: completions to suppress, after every prompt.
        dst_completions: completions to promote, after every prompt.
        minibatch_size: prompts of a step; any size.
        eps, lr, max_iters, coldness, target_loss, target_loss_target_iters: as in :func:`.optimize_vector`.
        satisfice, starting_norm, max_norm, affine_rank, max_affine_norm: likewise.
        debug, return_info, vector_clamp: likewise.
        progress: show a progress bar.
        options: any other option of :func:`.optimize_vector`, such as ``seed`` or ``do_one_minus``.

    Returns:
        (vector, matrix with ``affine_rank``, info with ``return_info``); ``info["loss"]`` is the mean over all prompts.

    Raises:
        ValueError: as :func:`.optimize_vector`; no prompts, or no completions.
        TypeError: an option that doesn't exist.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValidationError(f"prompts is a list of prompts; got {type(prompts).__name__}.")
    if not prompts:
        raise ValidationError("There are no prompts to optimize on; give at least one.")
    for name, given in (("src_completions", src_completions), ("dst_completions", dst_completions)):
        if isinstance(given, str):
            raise ValidationError(f"{name} is a list of completions; got {given!r}: write [{given!r}].")
    src, dst = list(src_completions or []), list(dst_completions or [])
    datapoints = [TrainingDatapoint(prompt, src, dst) for prompt in prompts]
    settings = settings_of(
        eps=eps,
        lr=lr,
        max_iters=max_iters,
        coldness=coldness,
        target_loss=target_loss,
        target_loss_target_iters=target_loss_target_iters,
        satisfice=satisfice,
        starting_norm=starting_norm,
        max_norm=max_norm,
        affine_rank=affine_rank,
        max_affine_norm=max_affine_norm,
        debug=debug,
        return_info=return_info,
        vector_clamp=vector_clamp,
        **options,
    )
    job = OptimizationJob(model, datapoints, layer, settings, tokenizer, minibatch_size=minibatch_size)
    return run_jobs([job], progress=progress)[0]


def _job(model: nn.Module | ModelAdapter, given: dict[str, Any], tokenizer: Any) -> OptimizationJob:
    """A job of the keyword arguments of :func:`.optimize_vector`."""
    missing = [name for name in ("datapoints", "layer") if name not in given]
    if missing:
        raise ValidationError(f"it has no {' and no '.join(missing)}; give what optimize_vector takes.")
    datapoints, layer = given.pop("datapoints"), given.pop("layer")
    own = given.pop("tokenizer", None)
    given.pop("use_transformer_lens", None)
    return OptimizationJob(
        model, datapoints, layer, settings_of(**given), own if own is not None else tokenizer
    )
