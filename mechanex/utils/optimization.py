"""A vector by gradient descent: the documented function; the work is in ``mechanex.engine.optimize``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.models.adapter import ModelAdapter
from ..engine.optimize.costs import make_melbo_loss_funcs
from ..engine.optimize.datapoints import TrainingDatapoint
from ..engine.optimize.loop import Result, run_jobs
from ..engine.optimize.problem import OptimizationJob
from ..engine.optimize.settings import OptimizeSettings

__all__ = [
    "TrainingDatapoint",
    "make_melbo_loss_funcs",
    "optimize_vector",
]


def optimize_vector(
    model: nn.Module | ModelAdapter,
    datapoints: Sequence[TrainingDatapoint],
    layer: int | Sequence[int],
    eps: float = 1e-6,
    lr: float = 0.01,
    max_iters: int | None = None,
    coldness: float = 0.7,
    normalize_token_length: bool = False,
    only_hook_prompt: bool = False,
    use_transformer_lens: bool = False,
    tokenizer: Any = None,
    target_loss: float | None = None,
    return_info: bool = True,
    do_target_loss_sum: bool = True,
    return_loss_history: bool = False,
    return_vec_history: bool = False,
    target_loss_target_iters: int = 1,
    satisfice: bool = False,
    do_one_minus: bool = True,
    max_norm: float | None = None,
    starting_norm: float = 1,
    starting_vec: Any = None,
    vector_clamp: float | None = None,
    affine_rank: int | None = None,
    max_affine_norm: float | None = 2,
    starting_affine_norm: float = 1,
    noise_scale: float | None = None,
    do_tangent_space_noise: bool = True,
    do_noise_abl_relu: bool = False,
    noise_iters: int = 1,
    do_antipgd: bool = False,
    do_output_constr: bool = False,
    custom_output_constr_loss_func: Callable[..., Any] | None = None,
    custom_output_constr_pre_loss_func: Callable[..., Any] | None = None,
    output_constr_norm_initial_scale: float = 1,
    output_constr_lr: float | None = None,
    max_output_constr_iters: int | None = None,
    debug: bool = False,
    *,
    normalize_completion_length: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
    callback: Callable[[int, float, Tensor], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    lr_schedule: str | Callable[[int], float] | None = None,
    grad_clip: float | None = None,
    eval_datapoints: Sequence[TrainingDatapoint] | None = None,
    patience: int | None = None,
    plateau: float | None = None,
    keep_on_interrupt: bool = False,
) -> Result:
    """Optimizes a steering vector on a set of datapoints, by Adam on the log-probabilities of their completions.

    The loss of a completion to promote (dst) is −Σ log(p + eps) over its tokens; of one to suppress (src)
    −Σ log(1 − p + eps). What is minimised is the sum over all completions of all datapoints. Logs are natural. J.
    Dunefsky and A. Cohan, *One-shot Optimized Steering Vectors*, arXiv:2502.18862; clamp and affine steering:
    arXiv:2411.09003.

    The layers below the lowest steered one run once, prompts are shared by their completions, and the model's weights
    get no gradients. The model comes back as it was: weights, flags, mode and hooks, also after an error or Ctrl-C.

    Args:
        model: a Hugging Face or TransformerLens model.
        datapoints: what to optimize on.
        layer: the layer the vector is added at, or a list of them: the same vector at each. Layer L is the residual
            stream entering block L; negatives count from the end.
        eps: is added to probabilities; 0 is exact. Also the tolerance of the convergence test.
        lr: Adam's learning rate.
        max_iters: ends after exactly this many steps. Without it, 10,000 are the most.
        coldness: inverse temperature, multiplies the logits.
        normalize_token_length: divide the loss of a completion by its number of tokens.
        only_hook_prompt: steer the tokens of the prompt only.
        use_transformer_lens: accepted and not needed: the kind of model is recognised.
        tokenizer: needed for text when the model carries none.
        target_loss: stop once the loss is at or below this.
        return_info: also return ``info``.
        do_target_loss_sum: compare the sum of the losses with ``target_loss``; else each completion's own. Also
            decides what ``info`` holds as the loss: the sum, or ``[[src…], [dst…]]`` of each datapoint. Where
            datapoints give target losses, it is also enough that every completion by itself is at or below its own, or
            below ``target_loss`` where it has none.
        return_loss_history: put ``loss_history``, the loss after each step, in ``info``.
        return_vec_history: put ``vec_history``, the vector after each step, in ``info``.
        target_loss_target_iters: how many evaluations in a row must meet the target, or differ from the last one by
            less than eps·max(1, |loss|), for optimization to stop.
        satisfice: minimise Σ (loss − target)² over the completions.
        do_one_minus: the loss of suppression by 1 − p; else +Σ log(p + eps).
        max_norm: a longer vector is rescaled to this norm after each step.
        starting_norm: norm of the random starting vector.
        starting_vec: [d_model] to start from instead; copied.
        vector_clamp: clamp steering: the component of the activations along v is replaced by ``vector_clamp``·v.
        affine_rank: affine steering: x + Mx + v, with M = LᵀR of this rank.
        max_affine_norm: longer rows of L and R are rescaled to this norm after each step; None for any length.
        starting_affine_norm: norm of the random starting rows of L and R.
        noise_scale: standard deviation of Gaussian noise on the vector's effect, drawn per step and completion.
            Losses that are reported and tested are without noise.
        do_tangent_space_noise: take the noise's part along the gradient of the completion's loss away.
        do_noise_abl_relu: take it away only where it points along the negative gradient.
        noise_iters: draws per step; their gradients are averaged.
        do_antipgd: use differences of successive draws (A. Orvieto et al., ICML 2022).
        do_output_constr: afterwards minimise ‖v‖ (and ‖M‖) such that no completion's loss rises above what was reached.
        custom_output_constr_loss_func: ``(model, datapoints, layer, vector, matrix_left, matrix_right,
            only_hook_prompt, **kwargs)`` to minimise instead; returns a scalar tensor, or a number after having
            called backward itself. The norm then may not grow past ``output_constr_norm_initial_scale`` times its
            start. Any model kind.
        custom_output_constr_pre_loss_func: called once before, with the same positional arguments; returns the kwargs.
        output_constr_norm_initial_scale: see there.
        output_constr_lr: learning rate of that phase; None for ``lr``.
        max_output_constr_iters: most steps of that phase. It also ends when the norm has not improved by 0.1 % for 20
            steps. Where it finds no better vector it starts again with a quarter of the rate, a few times.
        debug: print loss and norm at each step.
        normalize_completion_length: another name for ``normalize_token_length``.
        seed: of the starting vector, the noise and shuffles; recorded in ``info``.
        generator: where the seed is drawn from; None for torch's default one.
        batch_tokens: most tokens in one pass; gradients of more are accumulated. None for what suits the device.
        progress: show a progress bar.
        callback: called as ``(step, loss, vector)`` at the start and after each step; a true result stops.
        checkpoint: a file that the state is written to every few seconds and at the end, however it ends. Where it
            exists, optimization goes on from it, exactly as if it had not been interrupted.
        lr_schedule: "linear" or "cosine" (to 0 at ``max_iters``), or a function from the step to a factor of ``lr``.
        grad_clip: longer gradients are rescaled to this norm.
        eval_datapoints: their loss is watched: ``eval_loss_history`` in ``info``, at the start and after each step.
        patience: stop when that loss hasn't improved for this many evaluations; the vector with the lowest is returned.
        plateau: stop when the loss has fallen by less than this share of its whole fall in three evaluations running.
        keep_on_interrupt: return the best vector so far on Ctrl-C, instead of raising KeyboardInterrupt.

    Returns:
        (vector [d_model], matrix [d_model, d_model] with ``affine_rank``, info with ``return_info``), detached, float32
        (float64 for float64 models), on the model's device. ``info``: ``iters`` (steps taken), ``loss`` of the returned
        vector, ``norm``, ``starting_loss``, ``stopped`` ("target_loss", "converged", "max_iters", "limit", "callback",
        "patience", "plateau", "interrupted", "not finite"), ``seed``, and where asked for ``loss_history``,
        ``vec_history``, ``eval_loss_history``, ``matrix_left`` and ``matrix_right`` ([rank, d_model]),
        ``output_constr_iters`` and ``output_constr_stopped``.

    Raises:
        ValueError: bad datapoints (named), layers or options; a starting vector that holds NaN, is of another width, or
            gives a loss that is not finite; a checkpoint of another optimization.
    """
    settings = OptimizeSettings(
        eps=eps,
        lr=lr,
        max_iters=max_iters,
        coldness=coldness,
        normalize_token_length=bool(normalize_token_length or normalize_completion_length),
        only_hook_prompt=only_hook_prompt,
        target_loss=target_loss,
        do_target_loss_sum=do_target_loss_sum,
        return_info=return_info,
        return_loss_history=return_loss_history,
        return_vec_history=return_vec_history,
        target_loss_target_iters=target_loss_target_iters,
        satisfice=satisfice,
        do_one_minus=do_one_minus,
        max_norm=max_norm,
        starting_norm=starting_norm,
        starting_vec=starting_vec,
        vector_clamp=vector_clamp,
        affine_rank=affine_rank,
        max_affine_norm=max_affine_norm,
        starting_affine_norm=starting_affine_norm,
        noise_scale=noise_scale,
        do_tangent_space_noise=do_tangent_space_noise,
        do_noise_abl_relu=do_noise_abl_relu,
        noise_iters=noise_iters,
        do_antipgd=do_antipgd,
        do_output_constr=do_output_constr,
        custom_output_constr_loss_func=custom_output_constr_loss_func,
        custom_output_constr_pre_loss_func=custom_output_constr_pre_loss_func,
        output_constr_norm_initial_scale=output_constr_norm_initial_scale,
        output_constr_lr=output_constr_lr,
        max_output_constr_iters=max_output_constr_iters,
        debug=debug,
        seed=seed,
        generator=generator,
        batch_tokens=batch_tokens,
        callback=callback,
        checkpoint=checkpoint,
        lr_schedule=lr_schedule,
        grad_clip=grad_clip,
        eval_datapoints=eval_datapoints,
        patience=patience,
        plateau=plateau,
        keep_on_interrupt=keep_on_interrupt,
    )
    job = OptimizationJob(model, datapoints, layer, settings, tokenizer)
    return run_jobs([job], progress=progress)[0]
