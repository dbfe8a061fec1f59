"""Checkpoints: the state between two steps as a safetensors file, from which a run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._version import __version__
from ...errors import ValidationError
from ...home import atomic_path
from ..ranks import current_ranks
from .objective import Counters
from .parameters import AdamState
from .problem import Epoch, OptimizationJob
from .state import Best, ConstrainState, Outcome, Run, State

__all__ = ["Checkpoint", "begin"]

_log = logging.getLogger(__name__)

FORMAT = "mechanex optimization 1"
SECONDS_BETWEEN = 10.0
# Numbers of each parameter that tell models apart.
SAMPLE = 64

# Options that a resumed run may change.
_FREE = [
    "max_iters",
    "max_output_constr_iters",
    "return_info",
    "debug",
    "batch_tokens",
    "callback",
    "checkpoint",
    "keep_on_interrupt",
    "patience",
    "plateau",
    "generator",
    "seed",
    "eval_datapoints",  # told as token ids
]
_BY_CONTENT = (
    "starting_vec",
    "custom_output_constr_loss_func",
    "custom_output_constr_pre_loss_func",
    "lr_schedule",
)


class Checkpoint:
    """Writes a run's state to its job's ``checkpoint``; does nothing where there is none."""

    def __init__(self, run: Run) -> None:
        path = run.job.settings.checkpoint
        writes = path is not None and current_ranks(None).first
        self._run, self._path = run, Path(path) if path is not None and writes else None
        self._written = time.monotonic()
        self._fingerprint = ""

    def write_sometimes(self) -> None:
        """Writes, unless that was done a few seconds ago."""
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            self.write()

    def write(self, *, first: bool = False) -> None:
        """Writes the state as of the last whole step; a failure is logged, since what was found is worth more.

        Raises:
            ValidationError: it can't be written, the ``first`` time: then it is known before the work is done.
        """
        if self._path is None:
            return
        try:
            self._write(self._path)
        except OSError as error:
            if first:
                raise ValidationError(f"The checkpoint {self._path} can't be written: {error}") from error
            _log.warning("The checkpoint %s can't be written now: %s", self._path, error)

    def _write(self, path: Path) -> None:
        run = self._run
        self._fingerprint = self._fingerprint or _fingerprint(run.job)
        tensors: dict[str, Tensor] = {}
        content = {
            "format": FORMAT,
            "version": __version__,
            "fingerprint": self._fingerprint,
            "seed": run.job.seed,
            "state": _state_out(run.state, tensors),
            "start": run.start,
            "shown": run.shown,
            "evals": run.evals,
        }
        if run.vectors:
            tensors["vectors"] = torch.stack(run.vectors)
        kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(kept, temporary, {"mechanex": json.dumps(content)})
        self._written = time.monotonic()


def begin(job: OptimizationJob) -> Run:
    """A run at its start, or where its checkpoint left it.

    Raises:
        ValidationError: the checkpoint is of another optimization, or not readable.
    """
    path = job.settings.checkpoint
    if path is None or not Path(path).exists():
        return Run(job, State(AdamState.start(job.start())))
    if Path(path).is_dir():
        raise ValidationError(f"The checkpoint {path} is a folder; name a file in it.")
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get("mechanex", "{}"))
            # Copied: a file's tensors lie anywhere in memory, and sums round by where their numbers lie.
            tensors = {
                name: file.get_tensor(name).to(job.adapter.device, copy=True)
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ValidationError(
            f"{path} is not a readable checkpoint: {error} Remove it to start anew."
        ) from error
    if content.get("format") != FORMAT:
        raise ValidationError(f"{path} is not a checkpoint of an optimization; name another file.")
    if content["fingerprint"] != _fingerprint(job) or job.settings.seed not in (None, content["seed"]):
        raise ValidationError(
            f"{path} is the checkpoint of another optimization: its model, datapoints, layers, seed or options "
            "differ. "
            "Give the same ones to go on, or remove the file to start anew."
        )
    job = job.with_seed(content["seed"])
    state = _continued(_state_in(content["state"], tensors), job)
    run = Run(job, state, start=content["start"], shown=content["shown"])
    run.evals = content["evals"]
    run.vectors = list(tensors["vectors"]) if "vectors" in tensors else []
    return run


def _continued(state: State, job: OptimizationJob) -> State:
    """The state, without its second phase where the first one now has more steps to go."""
    if state.constrained is None:
        return state
    outcome = state.constrained.outcome
    short = outcome.stopped in ("max_iters", "limit") and outcome.steps < job.settings.step_limit
    return replace(state, constrained=None) if short else state


def _fingerprint(job: OptimizationJob) -> str:
    """Equal for jobs that would compute the same."""
    settings: dict[str, Any] = {}
    for option in fields(job.settings):
        value = getattr(job.settings, option.name)
        if option.name in _BY_CONTENT:
            value = value if value is None or isinstance(value, str) else _content(value)
        if option.name not in _FREE:
            settings[option.name] = value
    if isinstance(job.settings.lr_schedule, str):
        settings["max_iters"] = job.settings.max_iters
    adapter, size = job.adapter, job.minibatch_size
    model = (adapter.model_id, adapter.d_model, str(job.dtype), _weights(adapter.model))
    told = (model, job.layers, size, job.completions, job.eval_completions, settings)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _weights(model: nn.Module) -> str:
    """A hash of some numbers of every parameter: sees another training or a merged adapter, and reads little."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLE)].cpu().double()
            found.update(sample.numpy().tobytes())
    return found.hexdigest()


def _content(value: Any) -> str:
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        code = getattr(value, "__code__", None)
        if code is None:
            return name
        plain = [c for c in code.co_consts if isinstance(c, int | float | str)]
        return f"{name} {hashlib.sha256(code.co_code + repr(plain).encode()).hexdigest()}"
    return hashlib.sha256(torch.as_tensor(value).detach().cpu().double().numpy().tobytes()).hexdigest()


# States as JSON, with their tensors aside; of the second phase's what is a number.
_PLAIN = ("stiffness", "began", "mark", "waited", "lr", "earlier", "restarts")


def _state_out(state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "adam": _adam_out("adam", state.adam, tensors),
        "counters": asdict(state.counters),
        "epoch": [state.epoch.number, list(state.epoch.losses.items())],
        "best": _best_out("best", state.best, tensors),
        "best_eval": _best_out("best_eval", state.best_eval, tensors),
        "stale": state.stale,
    }
    second = state.constrained
    if second is not None:
        tensors |= {"outcome": second.outcome.theta, "margins": second.margins, "over": second.over}
        if second.multipliers is not None:
            tensors["multipliers"] = second.multipliers
        outcome = second.outcome
        found["constrained"] = {
            "outcome": [outcome.losses, outcome.steps, outcome.stopped],
            "adam": _adam_out("constrained.adam", second.adam, tensors),
            "best": _best_out("constrained.best", second.best, tensors),
            **{name: getattr(second, name) for name in _PLAIN},
        }
    return found


def _state_in(found: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    number, losses = found["epoch"]
    state = State(
        _adam_in("adam", found["adam"], tensors),
        Counters(**found["counters"]),
        Epoch(number, {int(i): loss for i, loss in losses}),
        _best_in("best", found["best"], tensors),
        _best_in("best_eval", found["best_eval"], tensors),
        found["stale"],
    )
    second = found.get("constrained")
    if second is None:
        return state
    multipliers, best = tensors.get("multipliers"), _best_in("constrained.best", second["best"], tensors)
    assert best is not None
    constrained = ConstrainState(
        Outcome(tensors["outcome"], *second["outcome"]),
        _adam_in("constrained.adam", second["adam"], tensors),
        None if multipliers is None else multipliers.cpu(),
        tensors["margins"].cpu(),
        tensors["over"].cpu(),
        best=best,
        **{name: second[name] for name in _PLAIN},
    )
    return replace(state, constrained=constrained)


def _adam_out(name: str, adam: AdamState, tensors: dict[str, Tensor]) -> int:
    tensors |= {f"{name}.theta": adam.theta, f"{name}.mean": adam.mean, f"{name}.square": adam.square}
    return adam.step


def _adam_in(name: str, step: int, tensors: dict[str, Tensor]) -> AdamState:
    return AdamState(tensors[f"{name}.theta"], tensors[f"{name}.mean"], tensors[f"{name}.square"], step)


def _best_out(name: str, best: Best | None, tensors: dict[str, Tensor]) -> list[Any] | None:
    if best is None:
        return None
    tensors[name] = best.theta
    return [best.score, best.step, best.losses]


def _best_in(name: str, best: list[Any] | None, tensors: dict[str, Tensor]) -> Best | None:
    return None if best is None else Best(best[0], tensors[name], best[1], best[2])
