"""``mechanex activations`` and ``mechanex orthogonalize``: the stream as arrays, a model without a direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .once import once
from .options import device_option, dtype_option, json_option, model_argument

__all__ = ["activations", "orthogonalize"]


@click.command(short_help="Write a model's residual stream at the tokens of texts to files.")
@model_argument
@click.argument("texts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    show_default="all",
    help="Layer to read, negatives from the end; may be repeated.",
)
@click.option(
    "--tokens",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Which tokens of each text.",
)
@device_option
@dtype_option
@json_option
def activations(model: str, texts: Path, out: Path, **options: Any) -> None:
    """Write the residual stream at the tokens of texts to files.

    TEXTS is a file with one text a line, empty ones left out, OUT a folder: shards of safetensors with tensors layer_3
    and so on, and index.json, which says how many rows are each text's. Made again after it was stopped, the call
    goes on.

    \b
      mechanex activations mx-tiny prompts.txt activations --layer 3
    """
    import sys

    from ..engine.activations import activations as read
    from ..engine.models.resolve import load
    from .console import echo_json
    from .text_files import lines_in

    lines = lines_in(texts)
    if not lines:
        raise click.UsageError(f"{texts} holds no text.")
    loaded = load(model, backend="transformers", device=options["device"], dtype=options["dtype"])
    found = read(
        loaded.model,
        list(lines.values()),
        list(options["layers"]) or None,
        loaded.tokenizer,
        tokens=options["tokens"],
        out=out,
        progress=sys.stderr.isatty(),
    )
    n = sum(found.lengths)
    empty = [number for number in range(1, max(lines) + 1) if number not in lines]
    if options["as_json"]:
        report = {"out": str(out), "layers": list(found), "texts": len(lines), "tokens": n}
        echo_json({**report, "empty_lines": empty})
        return
    click.echo(f"Written to {out}: layers {', '.join(map(str, found))}; {n} tokens of {len(lines)} texts.")
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        click.echo(f"Empty lines have no rows: {shown}.")


@click.command(short_help="Write a model without a direction in its weights.")
@model_argument
@click.argument("vector")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--layer", type=int, help="The vector's layer whose direction is taken out, where it has several."
)
@device_option
@dtype_option
def orthogonalize(
    model: str, vector: str, out: Path, layer: int | None, device: str | None, dtype: str | None
) -> None:
    """Take a vector's direction out of all weights that write to the residual stream, and write the model to OUT.

    The model does without steering what it does while the direction is ablated everywhere.

    \b
      mechanex orthogonalize mx-tiny refusal.safetensors mx-tiny-without
    """
    from ..engine.models.resolve import load
    from ..engine.orthogonalize import orthogonalize as take_out
    from .vectors import find_vector

    if once(lambda: out.exists() and any(out.iterdir())):
        raise click.UsageError(f"{out} is not empty: name a new folder.")
    found = find_vector(vector)
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    take_out(loaded.model, found if layer is None else found.restricted([layer]))
    written: Any = loaded.model

    def write() -> None:
        written.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)

    once(write)
    click.echo(f"Written to {out}.")
