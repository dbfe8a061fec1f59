"""The command ``mechanex demo``."""

from __future__ import annotations

import sys
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
    from tqdm.auto import tqdm

    from .tones import STEPS

    with tqdm(desc="steering", total=STEPS, unit="step", disable=not sys.stderr.isatty()) as bar:
        # Most of what is waited for at first, before anything is computed.
        import torch  # noqa: F401

        bar.update()
        from .run import run_demo

        bar.update()
        finished = run_demo(out, seed=seed, progress=bar.update)
        bar.update(STEPS - bar.n)
    finished.show(as_json=as_json)
