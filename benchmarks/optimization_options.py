"""What each option of vector optimization changes on the bundled model: a table, and the plot of docs/optimization.md.

One datapoint promotes a completion; its probability is then measured on held-out prompts, with the norm of the vector
and the steps and CPU time that it took. Every row changes the options that it names, and those that they need to count.

    python benchmarks/optimization_options.py --plot docs/optimization.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
COLORS = ("#2e86ab", "#c0392b", "#3d8b5f", "#b07a00", "#7d5ba6", "#5d5f71")
CONSTRAINED = {"do_output_constr": True, "max_output_constr_iters": 100}
# What one panel of the plot compares: options that answer one question.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "how it steps": {
        "another seed": {"seed": 1},
        "coldness 0.7": {"coldness": 0.7},
        "lr 0.02": {"lr": 0.02},
        "lr_schedule cosine, 300 steps": {"lr_schedule": "cosine", "target_loss": None, "max_iters": 300},
        "grad_clip 0.1": {"grad_clip": 0.1},
    },
    "when it stops": {
        "eps 0.01": {"eps": 0.01},
        "max_iters 100": {"max_iters": 100},
        "target_loss 2": {"target_loss": 2.0},
        "target_loss_target_iters 20": {"target_loss_target_iters": 20},
        "plateau 0.02": {"plateau": 0.02, "target_loss": None},
        "do_target_loss_sum False": {"do_target_loss_sum": False},
        "satisfice, target_loss 2": {"satisfice": True, "target_loss": 2.0, "max_iters": 300},
        "normalize_token_length, target 0.07": {"normalize_token_length": True, "target_loss": 0.07},
    },
    "where it acts": {
        "layer [2, 3]": {"layer": [2, 3]},
        "token slice(-3, None)": {"token": slice(-3, None)},
        "only_hook_prompt": {"only_hook_prompt": True},
    },
    "what form it has": {
        "starting_norm 30": {"starting_norm": 30.0},
        "max_norm 60": {"max_norm": 60.0},
        "vector_clamp 5": {"vector_clamp": 5.0},
        "affine_rank 2": {"affine_rank": 2},
        "affine_rank 2, max_affine_norm 0.5": {"affine_rank": 2, "max_affine_norm": 0.5},
    },
    "noise of 5": {
        "noise_scale 5": {"noise_scale": 5.0},
        "any direction": {"noise_scale": 5.0, "do_tangent_space_noise": False},
        "do_noise_abl_relu": {"noise_scale": 5.0, "do_noise_abl_relu": True},
        "noise_iters 4": {"noise_scale": 5.0, "noise_iters": 4},
        "do_antipgd": {"noise_scale": 5.0, "do_antipgd": True},
    },
    "a second phase": {
        "do_output_constr": CONSTRAINED,
        "do_output_constr, MELBO": CONSTRAINED | MELBO,
    },
}


@dataclass(frozen=True)
class Row:
    """What one variant gave.

    Args:
        group: the panel; "" for the base, which is in all of them.
        name: of the variant.
        logprob: of the target, mean over the held-out prompts [nats].
        written: share of them after which the target is what greedy decoding writes.
        norm: of the vector.
        steps: that were taken, of both phases.
        seconds: of CPU time.
    """

    group: str
    name: str
    logprob: float
    written: float
    norm: float
    steps: int
    seconds: float


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

    unsteered, _ = held_out({})
    print(f"unsteered: log p {unsteered:.2f}")
    rows = []
    for group, variants in {"": {"base": {}}, **GROUPS}.items():
        for name, changes in variants.items():
            options = BASE | changes
            layers = options.pop("layer", [LAYER])
            token = options.pop("token", None)
            point = TrainingDatapoint(
                datapoint.prompt, dst_completions=datapoint.dst_completions, token=token
            )
            start = time.process_time()
            vector, *_, info = optimize_vector(model, [point], layers, tokenizer=tokenizer, **options)
            seconds = time.process_time() - start
            edits = {layer: edit_of(options, vector, info) for layer in layers}
            figures = held_out(edits, token, options.get("only_hook_prompt", False))
            steps = info["iters"] + info.get("output_constr_iters", 0)
            row = Row(group, name, *figures, info["norm"], steps, seconds)
            rows.append(row)
            print(
                f"{name:38s} log p {row.logprob:7.2f}  written {row.written:4.0%}  norm {row.norm:6.1f}  "
                f"steps {steps:4d}  {seconds:5.1f} s",
                flush=True,
            )
    if plot is not None:
        draw(rows, unsteered, plot)


def draw(rows: Sequence[Row], unsteered: float, path: Path) -> None:
    """A panel for each group: what its options do to the held-out log-probability, against the CPU time they take."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    base, others = rows[0], rows[1:]
    low, high = unsteered - 0.3, max(row.logprob for row in rows) + 0.3
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), sharex=True, sharey=True, layout="constrained")
    for panel, (group, color) in zip(axes.flat, zip(GROUPS, COLORS, strict=True), strict=True):
        panel.scatter(
            [r.seconds for r in others], [r.logprob for r in others], s=14, color="#dddddd", zorder=1
        )
        panel.axhline(unsteered, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
        panel.scatter([base.seconds], [base.logprob], s=90, marker="*", color="black", zorder=3)
        own = [row for row in rows if row.group == group]
        panel.scatter([r.seconds for r in own], [r.logprob for r in own], s=40, color=color, zorder=2)
        panel.set(xscale="log", ylim=(low, high))
        panel.set_title(group, fontsize=11, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        at = 1.1
        for row in sorted(own, key=lambda row: (-row.logprob, -row.seconds)):
            # Beside its point, or below the name before.
            at = min((row.logprob - low) / (high - low), at - 0.07)
            panel.annotate(
                f"{row.name} · ‖v‖ {row.norm:.0f}",
                (row.seconds, row.logprob),
                xytext=(1.04, at),
                textcoords="axes fraction",
                fontsize=7.5,
                va="center",
                color=color,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6},
            )
    first = axes[0, 0]
    first.annotate("unsteered", (base.seconds, unsteered), fontsize=8, color="#777777", va="bottom")
    first.annotate(
        f"★ the base\n‖v‖ {base.norm:.0f}", (0.05, 0.7), xycoords="axes fraction", fontsize=8, va="center"
    )
    figure.supxlabel("CPU seconds of the optimization", fontsize=10)
    figure.supylabel("log p of the target on held-out prompts", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
