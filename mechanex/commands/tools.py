"""The commands that look at what there is: models, stored vectors, and the state of the installation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import complete_model, json_option

__all__ = ["doctor", "models", "vectors"]


@click.command()
@click.option("--local", is_flag=True, help="Ask no server.")
@json_option
@click.pass_obj
def models(obj: Any, *, local: bool, as_json: bool) -> None:
    """List the bundled models and the server's.

    A server is asked where one was chosen (MECHANEX_BASE_URL) or there are credentials for one.
    """
    from .models import run_models

    run_models(obj, local, as_json)


_site_option = click.option(
    "--site",
    type=click.Choice(["input", "output"]),
    help="What the layer numbers of another tool's file mean, where it doesn't say so: the block that the stream "
    "enters, or the block whose output it is.",
)


@click.group()
def vectors() -> None:
    """List, show, export, import and delete stored vectors."""


@vectors.command("list")
@json_option
def list_vectors(*, as_json: bool) -> None:
    """List the stored vectors, the newest first."""
    from .vectors import run_list

    run_list(as_json)


@vectors.command()
@click.argument("vector", type=click.Path())
@_site_option
@json_option
def show(vector: str, *, site: Any, as_json: bool) -> None:
    """Show a vector's origin, layers and norms. VECTOR is an id or a file."""
    from .vectors import run_show

    run_show(vector, as_json, site)


@vectors.command("export")
@click.argument("vector", type=click.Path())
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@_site_option
def export_vector(vector: str, path: Path, *, force: bool, site: Any) -> None:
    """Write VECTOR, an id or a file, to PATH.

    The suffix of PATH chooses the format: .safetensors, .json or .gguf.
    """
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already: pass --force to replace it.")
    from .vectors import run_export

    run_export(vector, path, site)


@vectors.command()
@click.argument("vector", type=click.Path())
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--model", required=True, help="The model that the vector is for.", shell_complete=complete_model
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="A text file of prompts that are to be steered, a line each.",
)
@click.option(
    "--others",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="A text file of prompts that are to be left alone.",
)
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="A candidate for the layer where prompts are looked at, negatives from the end; may be repeated. All by "
    "default.",
)
@click.option(
    "--false-positives",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.02,
    show_default=True,
    help="Share of other prompts that may be steered.",
)
@json_option
def condition(vector: str, path: Path, **options: Any) -> None:
    """Write VECTOR, an id or a file, to PATH with a condition on prompts.

    The vector then steers texts whose prompts are of one kind, and leaves others exactly as they are.
    """
    from .vectors import run_condition

    run_condition(vector, path, **options)


@vectors.command("delete")
@click.argument("vector_ids", metavar="VECTOR...", nargs=-1, required=True)
def delete_vectors(vector_ids: tuple[str, ...]) -> None:
    """Delete the stored vectors with these ids."""
    from .vectors import run_delete

    run_delete(vector_ids)


@vectors.command("import")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@_site_option
@json_option
def import_vector(path: Path, *, site: Any, as_json: bool) -> None:
    """Store the vector in PATH, and print its new id."""
    from .vectors import run_import

    run_import(path, as_json, site)


@click.command()
@click.option("--offline", is_flag=True, help="Ask no server.")
@json_option
@click.pass_obj
def doctor(obj: Any, *, offline: bool, as_json: bool) -> None:
    """Report installation, credentials and server.

    Versions, which backends run here and why the others don't, which credentials there are (by name), and
    whether the server answers. What doesn't work is part of the report: the exit code is 0.
    """
    from .doctor import run_doctor

    run_doctor(obj, offline, as_json)
