"""``mechanex optimize``: a vector by gradient descent, with a report, a loss curve and figures on held-out prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .._version import __version__
from ..bundled import dataset_path
from ..engine.caa import default_layer
from ..engine.models import adapter_for
from ..engine.models.resolve import load
from ..engine.optimize.datapoints import read_datapoints
from ..engine.vectors import SteeringVector
from ..errors import ValidationError
from ..home import atomic_path
from ..utils.optimization import optimize_vector
from .console import console, echo_json, json_text
from .once import once
from .optimize_report import measure, print_report, save_curve, side_by_side

__all__ = ["run_optimize"]


def run_optimize(
    *,
    model: str,
    data: str,
    split: str | None,
    layers: Sequence[int],
    held_out: str | None,
    eval_split: str | None,
    out: Path,
    resume: bool,
    force: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Optimizes a vector and writes it to ``out``, with the report, the loss curve and the checkpoint.

    Args:
        options: passed on to ``optimize_vector``.

    Returns:
        The exit code: 0, or 1 when Ctrl-C ended it early (the best vector so far is written all the same).

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the data or the settings.
    """
    datapoints = read_datapoints(dataset_path(data), split=split)
    held = None if held_out is None else read_datapoints(dataset_path(held_out), split=eval_split)
    checkpoint = out / "checkpoint.safetensors"
    begun = once(checkpoint.exists)
    if resume and not begun:
        raise ValidationError(f"there is nothing to resume: {checkpoint} does not exist; leave --resume out.")
    if begun and not resume and not force:
        raise ValidationError(
            f"{out} holds an optimization: --resume goes on with it, --force starts anew in its place, and another "
            "--out keeps it."
        )
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    adapter = adapter_for(loaded.model)
    chosen = adapter.layer_indices(layers or [default_layer(adapter.n_layers)])
    if force:
        once(lambda: checkpoint.unlink(missing_ok=True))

    start = time.perf_counter()
    with _folder(out), _Live(options["max_iters"]) as live:
        vector, info = optimize_vector(
            loaded.model,
            datapoints,
            chosen,
            tokenizer=loaded.tokenizer,
            callback=live,
            checkpoint=checkpoint,
            keep_on_interrupt=True,
            return_loss_history=True,
            **options,
        )
    seconds = time.perf_counter() - start
    steering = {layer: vector for layer in chosen}
    found = SteeringVector(
        steering,
        model=adapter.model_id,
        model_family=adapter.family,
        method="optimized",
        seed=info["seed"],
    )
    once(lambda: found.save(out / "vector.safetensors"))
    curve = once(lambda: save_curve([info["starting_loss"], *info["loss_history"]], out / "loss.png"))
    figures = None
    if held is not None:
        figures = measure(
            loaded.model, loaded.tokenizer, held, steering, only_prompt=options["only_hook_prompt"]
        )
    interrupted = "interrupted" in (info["stopped"], info.get("output_constr_stopped"))
    texts = []
    if not interrupted:
        texts = side_by_side(
            loaded.model,
            loaded.tokenizer,
            held or datapoints,
            steering,
            only_prompt=options["only_hook_prompt"],
        )
    report = {
        "version": __version__,
        "model": adapter.model_id,
        "data": data,
        "datapoints": len(datapoints),
        "layers": chosen,
        "options": {name: value for name, value in options.items() if value is not None},
        "seconds": seconds,
        **info,
        "held_out": None if figures is None else {"data": held_out, **figures.as_dict()},
        "texts": texts,
    }
    once(lambda: _write(out / "report.json", json_text(report) + "\n"))
    if as_json:
        echo_json(report)
    else:
        print_report(report, figures, out, curve)
    if not interrupted:
        return 0
    steps = info["iters"] + info.get("output_constr_iters", 0)
    click.echo(
        f"interrupted after {steps} steps: the best vector so far was written, and --resume goes on",
        err=True,
    )
    return 1


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes a folder for what the block writes; goes again if the block fails and left nothing in it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


class _Live:
    """Shows step, loss and norm while a vector is optimized, on stderr and only where that is a terminal."""

    def __init__(self, steps: int | None) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4g}  norm {task.fields[norm]:.4g}"),
            TimeElapsedColumn(),
            console=console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task("", total=steps, loss=float("nan"), norm=float("nan"))

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: int, loss: float, vector: Tensor) -> None:
        self._progress.update(self._task, completed=step, loss=loss, norm=float(vector.norm()))
