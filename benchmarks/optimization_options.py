"""What each option of vector optimization changes on the bundled model: a table, and the plot of docs/optimization.md.

One datapoint promotes a completion; its probability is then measured on held-out prompts, with the norm of the vector
and the steps that it took. Every row changes the options that it names and nothing else.

    python benchmarks/optimization_options.py --plot docs/optimization.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

from mechanex.bundled import data_path
from mechanex.engine.hooks import Intervention
from mechanex.engine.intervention import Edit
from mechanex.engine.models.resolve import load
from mechanex.engine.optimize.datapoints import read_datapoints
from mechanex.engine.score import completion_logprobs
from mechanex.engine.text import encode_prompt
from mechanex.utils.steering_opt import TrainingDatapoint, make_melbo_loss_funcs, optimize_vector

LAYER = 2
BASE: dict[str, Any] = {"lr": 0.05, "coldness": 1.0, "target_loss": 0.5, "max_iters": 600, "seed": 0}
MELBO = dict(
    zip(
        ("custom_output_constr_pre_loss_func", "custom_output_constr_loss_func"),
        make_melbo_loss_funcs(LAYER + 2),
        strict=True,
    )
)
CONSTRAINED = {"do_output_constr": True, "max_output_constr_iters": 100}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "another seed": {"seed": 1},
    "coldness 0.7": {"coldness": 0.7},
    "eps 0.01": {"eps": 0.01},
    "lr 0.02": {"lr": 0.02},
    "lr_schedule cosine, 300 steps": {"lr_schedule": "cosine", "target_loss": None, "max_iters": 300},
    "grad_clip 0.1": {"grad_clip": 0.1},
    "max_iters 100": {"max_iters": 100},
    "target_loss 2": {"target_loss": 2.0},
    "target_loss_target_iters 20": {"target_loss_target_iters": 20},
    "do_target_loss_sum False": {"do_target_loss_sum": False},
    "satisfice, target_loss 2": {"satisfice": True, "target_loss": 2.0, "max_iters": 300},
    "normalize_token_length, target 0.07": {"normalize_token_length": True, "target_loss": 0.07},
    "layer [2, 3]": {"layer": [2, 3]},
    "token slice(-3, None)": {"token": slice(-3, None)},
    "only_hook_prompt": {"only_hook_prompt": True},
    "starting_norm 30": {"starting_norm": 30.0},
    "max_norm 60": {"max_norm": 60.0},
    "vector_clamp 5": {"vector_clamp": 5.0},
    "affine_rank 2": {"affine_rank": 2},
    "affine_rank 2, max_affine_norm 0.5": {"affine_rank": 2, "max_affine_norm": 0.5},
    "noise_scale 5": {"noise_scale": 5.0},
    "noise_scale 5, any direction": {"noise_scale": 5.0, "do_tangent_space_noise": False},
    "noise_scale 5, do_noise_abl_relu": {"noise_scale": 5.0, "do_noise_abl_relu": True},
    "noise_scale 5, noise_iters 4": {"noise_scale": 5.0, "noise_iters": 4},
    "noise_scale 5, do_antipgd": {"noise_scale": 5.0, "do_antipgd": True},
    "do_output_constr": CONSTRAINED,
    "do_output_constr, MELBO": CONSTRAINED | MELBO,
}


def edit_of(options: dict[str, Any], vector: torch.Tensor, info: dict[str, Any]) -> Edit:
    """The edit that was optimized."""
    if options.get("vector_clamp") is not None:
        return Edit.clamp(vector, options["vector_clamp"])
    if options.get("affine_rank") is not None:
        return Edit.affine(vector, info["matrix_left"], info["matrix_right"])
    return Edit.add(vector)


def main() -> None:
    """Runs every variant, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    plot = parser.parse_args().plot
    loaded = load("mx-tiny", backend="transformers")
    model, tokenizer = loaded.model, loaded.tokenizer
    (datapoint,) = read_datapoints(data_path("rome_delhi"), split="promote")
    heldout = read_datapoints(data_path("rome_delhi"), split="promote-heldout")
    prompts, targets = [d.prompt for d in heldout], [d.dst_completions[0] for d in heldout]

    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]

    def held_out(
        edits: dict[int, Edit], tokens: slice | None = None, prompt_only: bool = False
    ) -> tuple[float, float]:
        logprob = written = 0.0
        for length in sorted(set(lengths)) if prompt_only else [None]:
            chosen = slice(0, length) if prompt_only else tokens
            some = [i for i, n in enumerate(lengths) if length in (None, n)]
            found = completion_logprobs(
                model,
                [prompts[i] for i in some],
                [targets[i] for i in some],
                tokenizer,
                edits=[Intervention(layer, edit, tokens=chosen) for layer, edit in edits.items()],
                greedy=True,
            )
            assert found.greedy is not None
            logprob += float(found.sums.sum()) / len(prompts)
            written += sum(bool(g.all()) for g in found.greedy) / len(prompts)
        return logprob, written

    rows = [("unsteered", *held_out({}), 0.0, 0, 0.0)]
    for name, changes in VARIANTS.items():
        options = BASE | changes
        layers = options.pop("layer", [LAYER])
        token = options.pop("token", None)
        point = TrainingDatapoint(datapoint.prompt, dst_completions=datapoint.dst_completions, token=token)
        start = time.perf_counter()
        vector, *_, info = optimize_vector(model, [point], layers, tokenizer=tokenizer, **options)
        seconds = time.perf_counter() - start
        edits = {layer: edit_of(options, vector, info) for layer in layers}
        figures = held_out(edits, token, options.get("only_hook_prompt", False))
        steps = info["iters"] + info.get("output_constr_iters", 0)
        rows.append((name, *figures, info["norm"], steps, seconds))
        print(
            "{:38s} log p {:7.2f}  written {:4.0%}  norm {:6.1f}  steps {:4d}  {:5.1f} s".format(*rows[-1]),
            flush=True,
        )
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[tuple[str, float, float, float, int, float]], path: Path) -> None:
    """Bars of held-out log-probability, share, norm and steps, one row an option."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, logprobs, shares, norms, steps, _ = zip(*rows[::-1], strict=True)
    panels = (
        ("log p of the target, held out", logprobs, "#2e86ab"),
        ("% of prompts where it is written", [100 * share for share in shares], "#e0a100"),
        ("norm", norms, "#5d5f71"),
        ("steps", steps, "#c0392b"),
    )
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(11, 0.27 * len(rows) + 0.8), sharey=True, layout="constrained"
    )
    for panel, (title, values, color) in zip(axes, panels, strict=True):
        panel.barh(names, values, color=color, height=0.7)
        panel.set_title(title, fontsize=9)
        panel.axvline(values[names.index("base")], color="#999999", linewidth=0.8, linestyle=":")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
