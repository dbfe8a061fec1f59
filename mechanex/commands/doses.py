"""``mechanex measure`` and ``mechanex sweep``: what steering does, at what price, and which dose to take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import (
    complete_dataset,
    device_option,
    dtype_option,
    json_option,
    model_argument,
    seed_option,
    split_option,
)

__all__ = ["measure", "sweep"]

_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_words = click.option(
    "--words",
    type=_file,
    help="Judge by a list, one word a line: the share of an answer's words that are on it.",
)
_against = click.option("--against", type=_file, help="A list of the opposite, whose share is taken off.")


def _max_tokens(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option(
        "--max-tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Of an answer."
    )
    return option(command)


@click.command()
@model_argument
@click.option("--vector", type=click.Path(), required=True, help="A vector file, or a stored vector's id.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the vector.")
@click.option(
    "--data",
    shell_complete=complete_dataset,
    help="Contrastive examples: their prompts are answered, and naive Bayes on their answers judges.",
)
@split_option
@click.option("--prompts", type=_file, help="A JSONL file of prompts to answer, in place of those of --data.")
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Answer no more prompts than these.",
)
@_words
@_against
@click.option(
    "--questions",
    type=_file,
    help="A JSONL file of question, choices and answer: what ability is lost.",
)
@_max_tokens
@seed_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.json, report.html and report.png.",
)
@device_option
@dtype_option
@json_option
def measure(**options: Any) -> None:
    """Measure what a vector does and costs, each figure with its interval.

    Effect, perplexity under the plain model, KL per token, repetition, and the effect where prompts are worded
    otherwise.

    \b
      mechanex measure mx-tiny --vector tuned.safetensors --data calm_angry --split heldout --out report
    """
    if options["data"] is None and (options["prompts"] is None or options["words"] is None):
        raise click.UsageError("Give --data, or --prompts with --words.")
    if options["split"] and options["data"] is None:
        raise click.UsageError("--split goes with --data.")
    _check_words(options)
    from .run_doses import run_measure

    run_measure(**options)


@click.command()
@model_argument
@click.option(
    "--data",
    shell_complete=complete_dataset,
    required=True,
    help="Contrastive examples: a JSONL file, or a set such as calm_angry.",
)
@split_option
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    show_default="all but the first",
    help="Layer to try, negatives from the end; may be repeated.",
)
@click.option(
    "--strength",
    "strengths",
    type=float,
    multiple=True,
    show_default="0.25 to 3",
    help="Multiple of the vector to try; may be repeated.",
)
@click.option(
    "--edit",
    "edits",
    multiple=True,
    show_default="all",
    help="How to edit: add, clamp, norm or rotate; may be repeated.",
)
@click.option(
    "--tokens",
    multiple=True,
    show_default="each",
    help="Which tokens: all, generated or prompt; may be repeated.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    show_default="caa",
    help="How vectors are made: caa, pca, probe or few-shot; may be repeated.",
)
@click.option(
    "--width",
    "widths",
    type=click.IntRange(min=1),
    multiple=True,
    show_default="1, and a quarter of the model's layers",
    help="Over how many layers in a row a strength is shared; may be repeated.",
)
@_words
@_against
@click.option("--validation", type=_file, help="A JSONL file of prompts to choose on.")
@click.option("--test", type=_file, help="A JSONL file of prompts that are read once, at the end.")
@click.option(
    "--most-perplexity",
    type=click.FloatRange(min=1, min_open=True),
    default=1.5,
    show_default=True,
    help="What the dose may cost, as a multiple of plain.",
)
@click.option(
    "--finalists",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="How many kinds of dose write texts.",
)
@_max_tokens
@seed_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/sweep"),
    show_default=True,
    help="Folder for the tuned vector, the results, the picture and the checkpoint.",
)
@click.option("--resume", is_flag=True, help="Go on with the sweep in --out.")
@click.option("--force", is_flag=True, help="Start anew where --out holds a sweep.")
@device_option
@dtype_option
@json_option
def sweep(**options: Any) -> None:
    """Find layer, edit, tokens and strength: effect against price, a recommendation, a tuned vector.

    Settings are tried on few examples first and compared at one KL, the best on more, the last few by texts that cost
    what is allowed. Strength 1 of the vector in --out is the dose that was chosen.

    \b
      mechanex sweep mx-tiny --data calm_angry --split train --layer 3 --layer 4
    """
    if options["resume"] and options["force"]:
        raise click.UsageError("--resume goes on and --force starts anew: give one of them.")
    _check_words(options)
    from .run_doses import run_sweep

    run_sweep(**options)


def _check_words(options: dict[str, Any]) -> None:
    if options["against"] is not None and options["words"] is None:
        raise click.UsageError("--against goes with --words.")
