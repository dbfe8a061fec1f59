"""The ``mechanex`` command. What a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from ._version import __version__
from .errors import MechanexError

__all__ = ["main"]


class _Group(click.Group):
    """Turns the library's errors, and those of files, into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(
                stream, io.TextIOWrapper
            ):  # text that the terminal's encoding lacks is no reason to fail
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except MechanexError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mechanex")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Mechanex: change what a language model does by editing its residual stream."""


@main.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; may be repeated.")
@click.option("--data", help="Contrastive examples: a JSONL file, or a bundled set such as calm_angry.")
@click.option("--split", help="Use only the lines of --data whose split is this, such as train.")
@click.option("--vector", type=click.Path(path_type=Path), help="A vector file, in place of --data.")
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="Layer to steer, negatives from the end; may be repeated.  [default: at two thirds]",
)
@click.option("--method", type=click.Choice(["caa"]), default="caa", show_default=True)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the vector.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Keep the vector: .safetensors, .json or .gguf."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=40, show_default=True)
@click.option(
    "--sampling-method", default="top-k", show_default=True, help="Or greedy, top-p, min-p, typical."
)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", help="Such as cpu or cuda:0.  [default: a GPU where there is one]")
@click.option("--dtype", help="Such as bfloat16 or float32.  [default: the checkpoint's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def steer(**options: Any) -> None:
    """Generate with and without a steering vector, side by side.

    MODEL is mx-tiny (bundled), a Hugging Face name or a folder. The vector is computed from --data, or read
    from --vector:

    \b
      mechanex steer mx-tiny --data calm_angry --layer 4 --strength -2 \\
        --prompt "Anna went to the market on Friday."
    """
    if (options["data"] is None) == (options["vector"] is None):
        raise click.UsageError("Give either --data, to compute a vector, or --vector, to read one.")
    if options["vector"] is not None and (options["layers"] or options["split"]):
        raise click.UsageError("--layer and --split go with --data; a vector file names its own layers.")
    from .commands.steer import run_steer

    run_steer(**options)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Folder for the plot and the figures.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """Steer the bundled model three ways and measure what it does."""
    from .demo import run_demo

    run_demo(out, seed=seed)


if __name__ == "__main__":
    sys.exit(main())
