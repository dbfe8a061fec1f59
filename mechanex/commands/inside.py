"""The commands that look inside a model: what it is made of, and which of it an answer hangs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import device_option, dtype_option, json_option, model_argument

__all__ = ["attribute", "model"]

_figure = click.Path(path_type=Path, dir_okay=False)


@click.group()
def model() -> None:
    """Show what a model is made of."""


@model.command()
@model_argument
@click.option("--depth", type=click.IntRange(min=1), show_default="all", help="How many levels of modules.")
@click.option("--out", type=_figure, help="Draw the residual stream to this .png, .svg or .pdf.")
@device_option
@dtype_option
@json_option
def graph(model: str, *, depth: int | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Show a model's modules as a tree: types, parameters, shapes, and who reads and writes the residual stream.

    \b
      mechanex model graph mx-tiny --depth 4 --out stream.svg
    """
    from .structure import run_graph

    run_graph(model, depth, out, options, as_json)


@model.command()
@model_argument
@device_option
@dtype_option
@json_option
def paths(model: str, *, as_json: bool, **options: Any) -> None:
    """List the modules that `mechanex attribute --path` takes."""
    from .structure import run_paths

    run_paths(model, options, as_json)


@click.command()
@model_argument
@click.option("--clean", required=True, help="The prompt with the answer of interest.")
@click.option("--corrupted", required=True, help="The same with what matters changed, of as many tokens.")
@click.option(
    "--path",
    "target_module_paths",
    multiple=True,
    show_default="what writes to the residual stream",
    help="A module to score, from `mechanex model paths`; may be repeated.",
)
@click.option(
    "--method",
    type=click.Choice(["gradient", "exact"]),
    default="gradient",
    show_default=True,
    help="Attribution patching, or a run for each score.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Gradients that are averaged on the way between both prompts.",
)
@click.option(
    "--answer",
    "metric",
    nargs=2,
    show_default="the two runs' top tokens",
    help="The clean prompt's answer and the other one.",
)
@click.option("--align", is_flag=True, help="Take prompts of different lengths: the same tokens correspond.")
@click.option(
    "--recompute-attention",
    is_flag=True,
    help="Run attentions again for what is patched inside them, such as queries and keys.",
)
@click.option(
    "--drop-layers",
    is_flag=True,
    help="Mean absolute scores of gradients that leave out one layer each: sees effects that cancel.",
)
@click.option("--edges", is_flag=True, help="Score edges between modules instead.")
@click.option(
    "--circuit", type=click.IntRange(min=1), help="Keep this many edges, and say how faithful they are."
)
@click.option(
    "--top", type=click.IntRange(min=1), default=12, show_default=True, help="How many scores to show."
)
@click.option("--plot", type=_figure, help="Draw the scores to this .png, .svg or .pdf.")
@device_option
@dtype_option
@json_option
def attribute(model: str, *, edges: bool, circuit: int | None, align: bool, **options: Any) -> None:
    """Score what an answer hangs on: modules, attention heads and positions, or edges.

    A score is what the corrupted prompt's run would gain by the clean run's activations, in the difference between the
    log-probabilities of the two answers.

    \b
      mechanex attribute mx-tiny --clean "The gym was full of calm. She" --corrupted "The gym was full of anger. She"
    """
    options["align"] = "tokens" if align else None
    options["target_module_paths"] = list(options["target_module_paths"]) or None
    if not (edges or circuit):
        from .attribute import run_scores

        run_scores(model, **options)
        return
    if options.pop("target_module_paths") is not None:
        raise click.UsageError("--path names modules to score: leave it out with --edges and --circuit.")
    if any([options.pop("recompute_attention"), options.pop("drop_layers")]):
        raise click.UsageError(
            "--recompute-attention and --drop-layers are for modules: leave out --edges and --circuit."
        )
    from .attribute import run_edges

    run_edges(model, circuit, **options)
