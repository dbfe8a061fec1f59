"""The commands of ``mechanex sae``. What they do is in a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .decoding import decoding_of, decoding_options
from .options import device_option, dtype_option, json_option, model_argument, seed_option

__all__ = ["sae"]

_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_picture = click.Path(dir_okay=False, path_type=Path)
_html = click.option("--html", type=_picture, help="Also write a picture as a web page.")
_png = click.option("--png", type=_picture, help="Also write a picture as PNG, drawn by matplotlib.")


def _pictures(**paths: Path | None) -> list[Path]:
    """The paths that were given, each with the suffix of its kind."""
    for kind, path in paths.items():
        if path is not None and path.suffix.lower() != f".{kind}":
            raise click.BadParameter(f"its name ends in .{kind}; got {path}.", param_hint=f"--{kind}")
    return [path for path in paths.values() if path is not None]


@click.group()
def sae() -> None:
    """Train sparse autoencoders; list, show, explain and trace behaviors."""


@sae.command("list")
@json_option
def list_saes(*, as_json: bool) -> None:
    """List the sparse autoencoders that are known by name, and the behaviors kept here."""
    from .sae import run_list

    run_list(as_json)


@sae.command()
@click.argument("name")
@click.option("--feature", type=click.IntRange(min=0), help="Show this feature, in the texts of --data.")
@click.option(
    "--data", type=_file, multiple=True, help="Texts to look in: plain text or JSON lines; may be repeated."
)
@click.option("--model", show_default="the one it was made for", help="Model to look into.")
@click.option(
    "--contexts", type=click.IntRange(min=1), default=10, show_default=True, help="How many passages."
)
@_html
@_png
@device_option
@dtype_option
@json_option
def show(
    name: str,
    *,
    feature: int | None,
    data: tuple[Path, ...],
    model: str | None,
    contexts: int,
    html: Path | None,
    png: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show a behavior with its figures, an autoencoder, or one of its features.

    NAME is a behavior's, an autoencoder's, a folder, or a folder on the Hub. A feature is shown by where it says most,
    how often it says how much, and the tokens whose logits it raises and lowers.
    """
    pictures = _pictures(html=html, png=png)
    if feature is None:
        if data or pictures:
            raise click.UsageError("--data, --html and --png go with --feature.")
        from .sae import run_show

        run_show(name, as_json)
        return
    if not data:
        raise click.UsageError("--feature looks for passages in texts: give --data.")
    from .sae import run_feature

    run_feature(name, feature, model, data, contexts, options, pictures, as_json)


@sae.command()
@model_argument
@click.argument("behavior")
@click.option("--data", type=_file, required=True, help="Texts to look in: plain text or JSON lines.")
@click.option(
    "--features", type=click.IntRange(min=1), default=5, show_default=True, help="How many features."
)
@click.option(
    "--contexts", type=click.IntRange(min=1), default=5, show_default=True, help="How many contexts of each."
)
@device_option
@dtype_option
@json_option
def explain(
    model: str, behavior: str, *, data: Path, features: int, contexts: int, as_json: bool, **options: Any
) -> None:
    """Show the features that count most in a behavior, where each says most."""
    from .sae import run_explain

    run_explain(model, behavior, data, features, contexts, options, as_json)


@sae.command()
@model_argument
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; may be repeated.")
@click.option(
    "--behavior",
    "behaviors",
    multiple=True,
    show_default="all kept here",
    help="What to watch; may be repeated.",
)
@click.option(
    "--action",
    type=click.Choice(["correct", "abort", "report"]),
    default="correct",
    show_default=True,
    help="What is done where a behavior shows.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=50, show_default=True, help="Most tokens to write."
)
@decoding_options
@seed_option
@_html
@_png
@device_option
@dtype_option
@json_option
def trace(
    model: str,
    *,
    prompts: tuple[str, ...],
    behaviors: tuple[str, ...],
    action: str,
    max_tokens: int,
    seed: int,
    html: Path | None,
    png: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate while behaviors are watched, and show what was seen in every token.

    Detected tokens are red and bold, corrected ones underlined; --json has the scores.
    """
    pictures = _pictures(html=html, png=png)
    from .sae import run_trace

    decoding = decoding_of(options) | {"max_tokens": max_tokens, "seed": seed}
    run_trace(model, prompts, behaviors, action, decoding, options, pictures, as_json)


@sae.command()
@model_argument
@click.option(
    "--data",
    type=_file,
    multiple=True,
    required=True,
    help="Texts to train on: plain text, paragraph by paragraph, or JSON lines; may be repeated.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to."
)
@click.option(
    "--point", show_default="the stream at two thirds", help="Where to read, such as resid.4 or mlp_out.3."
)
@click.option(
    "--rule",
    type=click.Choice(["topk", "batchtopk", "jumprelu"]),
    default="topk",
    show_default=True,
    help="Which features a token has.",
)
@click.option(
    "--features", type=click.IntRange(min=1), default=4096, show_default=True, help="How many features."
)
@click.option("--k", type=click.IntRange(min=1), default=32, show_default=True, help="Features of a token.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=4000, show_default=True, help="How many batches."
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=2048, show_default=True, help="Activations of a batch."
)
@click.option(
    "--buffer",
    type=click.IntRange(min=1),
    default=65536,
    show_default=True,
    help="Activations that are shuffled.",
)
@click.option("--lr", type=float, show_default="by the number of features", help="Adam's rate.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Tokens of a text at most.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File from which a stopped run goes on.",
)
@seed_option
@device_option
@dtype_option
@json_option
def train(
    model: str,
    *,
    data: tuple[Path, ...],
    out: Path,
    point: str | None,
    rule: str,
    features: int,
    k: int,
    steps: int,
    batch: int,
    buffer: int,
    lr: float | None,
    context: int,
    checkpoint: Path | None,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a sparse autoencoder on a model's activations, and report what it is worth.

    It is written in SAELens' format, and becomes the model's default. The report is of texts that training has not
    seen: how much of the variance is explained, features a token, and how much of the loss is recovered when
    reconstructions take the activations' place.
    """
    settings = {
        "rule": rule,
        "n_features": features,
        "k": k,
        "steps": steps,
        "batch": batch,
        "buffer": buffer,
        "lr": lr,
        "context": context,
        "seed": seed,
    }
    from .sae import run_train

    run_train(model, data, out, point, checkpoint, settings, options, as_json)
