"""The command ``mechanex demo``."""

from __future__ import annotations

from pathlib import Path

import click

from ..commands.options import json_option, seed_option

__all__ = ["demo"]


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Folder for the plot and the figures.",
)
@seed_option
@json_option
def demo(out: Path, *, seed: int, as_json: bool) -> None:
    """Steer the bundled model three ways, and measure it."""
    from .run import run_demo

    run_demo(out, seed=seed, as_json=as_json)
