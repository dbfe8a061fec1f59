"""Training a sparse autoencoder of a model's activations: the run, its checkpoints, and what it comes to."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..._version import __version__
from ...errors import ValidationError
from ...home import atomic_path
from ..caa import default_layer
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..pack import Pair
from ..ranks import current_ranks
from . import saelens
from .activations import Round, Rounds, as_pairs
from .autoencoder import SparseAutoencoder
from .hook_points import HookPoint, hook_point
from .quality import measured
from .train_step import CALIBRATED_ON, TrainedWeights, TrainingSettings, folded, step

__all__ = ["Trained", "train_sae"]

FORMAT = "mechanex autoencoder 1"
SECONDS_BETWEEN = 30.0
HELD_OUT = 20  # one text in so many is kept for the report
MOST_HELD_OUT = 400


@dataclass(frozen=True)
class Trained:
    """An autoencoder and what it is worth.

    Args:
        sae: the autoencoder.
        report: ``variance_explained``, ``l0``, ``dead`` (share of features silent on held-out texts), ``loss``,
            ``loss_spliced``, ``loss_zeroed`` and ``loss_recovered`` on texts that training has not seen, and how it was
            trained.
    """

    sae: SparseAutoencoder
    report: dict[str, Any]


@dataclass
class _State:
    """Where a run stands between two steps.

    Args:
        weights: the autoencoder so far.
        factor: what activations are multiplied by, so that their norm is √d on average.
        variance: of activations times the factor.
        cursor: where the present round begins.
        used: batches of it that are done.
        mean: [d] of the round, by which a resumed run knows that model and texts are the same.
    """

    weights: TrainedWeights
    factor: float
    variance: float
    cursor: int
    used: int
    mean: Tensor


def train_sae(
    model: nn.Module | ModelAdapter,
    texts: Sequence[str],
    *,
    settings: TrainingSettings | None = None,
    point: str | HookPoint | None = None,
    tokenizer: Any = None,
    out: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
    progress: bool = False,
    callback: Callable[[int, dict[str, float]], object] | None = None,
) -> Trained:
    """Trains a sparse autoencoder on a model's activations of texts.

    Args:
        model: a Hugging Face or TransformerLens model.
        texts: what to read; one in 20, 400 at most, is kept for the report. The others are read again where the steps
            need more.
        settings: how to train; None for the defaults.
        point: where; None: the residual stream two thirds of the way up.
        tokenizer: needed where the model carries none.
        out: folder to write the autoencoder to, in SAELens' format, with ``report.json``.
        checkpoint: a file from which a run that was stopped goes on exactly; removed at the end.
        dtype: of the weights in ``out``.
        batch_tokens: most tokens of one pass; None for what suits the device.
        progress: show a progress bar.
        callback: told the number of a step that was done and its ``unexplained``, ``l0`` and ``dead``; True stops.

    Returns:
        The autoencoder, as it is read from ``out``, and its report.

    Raises:
        ValidationError: too few texts, settings that don't fit, another run's checkpoint, or activations that aren't
            finite.
    """
    adapter = adapter_for(model)
    settings = settings if settings is not None else TrainingSettings()
    place = _place(adapter, point)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    pairs = as_pairs(tokenizer, texts, settings.context)
    n_held = min(MOST_HELD_OUT, max(1, len(pairs) // HELD_OUT))
    if len(pairs) < 2:
        raise ValidationError(
            "an autoencoder needs at least two texts of two tokens: one is kept for its report."
        )
    held, used = pairs[-n_held:], pairs[:-n_held]
    ranks = current_ranks(adapter)
    rounds = Rounds(adapter, used, place, settings.buffer, settings.seed, batch_tokens)
    path = None if checkpoint is None else Path(checkpoint)
    told = _fingerprint(adapter, used, place, settings)
    with ranks.together():
        kept = None if path is None or not path.exists() else _read(path, told)
    ranks.check_begin(None if kept is None else kept.weights.steps)
    state, data, following = _begin(kept, path, rounds, settings)
    begun = written = time.monotonic()
    bar = tqdm(
        total=settings.steps,
        initial=state.weights.steps,
        desc="SAE",
        disable=not (progress and ranks.first),
    )
    with bar:
        while state.weights.steps < settings.steps:
            if state.used == settings.buffer // settings.batch:
                state.cursor, state.used = following, 0
                data, following = rounds.at(state.cursor)
                state.mean = _mean(data)
            first = state.used * settings.batch
            batch = data.part(first, first + settings.batch) * state.factor
            news = step(state.weights, batch, state.variance, settings, ranks)
            state.used += 1
            bar.update()
            bar.set_postfix({name: f"{value:.3g}" for name, value in news.items()}, refresh=False)
            stop = callback is not None and callback(state.weights.steps, news) is True
            if ranks.size > 1 and callback is not None:
                stop = any(ranks.told(stop))
            if path is not None and ranks.first and (stop or time.monotonic() - written >= SECONDS_BETWEEN):
                _write(path, told, state)
                written = time.monotonic()
            if stop:
                break
    sae = folded(
        state.weights,
        data.whole(CALIBRATED_ON) if settings.rule == "batchtopk" else None,
        state.factor,
        settings,
        point=place,
        model=adapter.model_id,
    )
    how = {
        "settings": asdict(settings),
        "steps": state.weights.steps,
        "activations": state.weights.steps * settings.batch,
        "seconds": round(time.monotonic() - begun, 1),
        "texts": len(used),
        "held_out_texts": len(held),
        "library_version": __version__,
    }
    # Rounded to what is written before it is measured, so that the report is of the file.
    sae = sae.to(dtype).to(torch.float32)
    report = {**measured(adapter, sae, held, batch_tokens=batch_tokens), **how}
    with ranks.together():
        if out is not None and ranks.first:
            _write_result(Path(out), sae, report, dtype)
        if path is not None and ranks.first and state.weights.steps == settings.steps:
            path.unlink(missing_ok=True)
    return Trained(sae, report)


def _place(adapter: ModelAdapter, point: str | HookPoint | None) -> HookPoint:
    if point is None:
        return HookPoint("resid", default_layer(adapter.n_layers))
    found = point if isinstance(point, HookPoint) else hook_point(point)
    last = adapter.n_layers if found.kind == "resid" else adapter.n_layers - 1
    if found.layer > last:
        raise ValidationError(
            f"{found} is not there: {adapter.model_id} has {adapter.n_layers} blocks, so that the last is "
            f"{found.kind}.{last}."
        )
    return found


def _mean(data: Round) -> Tensor:
    """[width] of all processes' activations."""
    return data.ranks.total(data.x.sum(0)) / data.ranks.total(data.x.new_tensor(float(len(data.x))))


def _begin(
    state: _State | None, path: Path | None, rounds: Rounds, settings: TrainingSettings
) -> tuple[_State, Round, int]:
    """The run at its start or where its checkpoint left it, the present round, and where the next one begins."""
    data, following = rounds.at(0 if state is None else state.cursor)
    x, mean = data.x, _mean(data)
    if state is None:
        n, norms, squares = data.ranks.total(
            torch.stack([x.new_tensor(float(len(x))), x.norm(dim=1).sum(), (x - mean).square().sum()])
        ).tolist()
        factor = x.shape[1] ** 0.5 * n / norms
        variance = squares / n * factor**2
        if variance == 0:
            raise ValidationError("the activations are all the same: check the texts and the place.")
        weights = TrainedWeights.begin(settings, mean * factor)
        return _State(weights, factor, variance, 0, 0, mean), data, following
    if not torch.allclose(mean.cpu(), state.mean, rtol=1e-2, atol=1e-3 * float(state.mean.abs().max())):
        raise ValidationError(
            f"the activations are not those that {path} was made from: the model or its weights differ. Remove the "
            "file to start anew."
        )
    device = x.device
    state.weights.parameters = {name: t.to(device) for name, t in state.weights.parameters.items()}
    state.weights.moments = {n: (a.to(device), b.to(device)) for n, (a, b) in state.weights.moments.items()}
    state.weights.silent = state.weights.silent.to(device)
    state.mean = mean
    return state, data, following


def _write(path: Path, told: str, state: _State) -> None:
    weights = state.weights
    tensors = {f"p.{name}": value for name, value in weights.parameters.items()}
    for name, (first, second) in weights.moments.items():
        tensors |= {f"m.{name}": first, f"v.{name}": second}
    tensors |= {"silent": weights.silent, "mean": state.mean}
    numbers = {
        "factor": state.factor,
        "variance": state.variance,
        "cursor": state.cursor,
        "used": state.used,
        "steps": weights.steps,
    }
    content = {"format": FORMAT, "fingerprint": told, **numbers}
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, {"mechanex": json.dumps(content)})


def _read(path: Path, told: str) -> _State:
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get("mechanex", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValidationError(
            f"{path} is not a readable checkpoint: {error} Remove it to start anew."
        ) from error
    if content.get("format") != FORMAT:
        raise ValidationError(f"{path} is not a checkpoint of an autoencoder; name another file.")
    if content["fingerprint"] != told:
        raise ValidationError(
            f"{path} is the checkpoint of another run: its model, texts, place or settings differ. Give the same ones "
            "to go on, or remove the file to start anew."
        )
    names = [name.removeprefix("p.") for name in tensors if name.startswith("p.")]
    weights = TrainedWeights(
        {name: tensors[f"p.{name}"] for name in names},
        {name: (tensors[f"m.{name}"], tensors[f"v.{name}"]) for name in names},
        tensors["silent"],
        content["steps"],
    )
    numbers = {name: content[name] for name in ("factor", "variance", "cursor", "used")}
    return _State(weights, **numbers, mean=tensors["mean"])


def _fingerprint(
    adapter: ModelAdapter, pairs: Sequence[Pair], point: HookPoint, settings: TrainingSettings
) -> str:
    texts = hashlib.sha256(repr([[*a, *b] for a, b in pairs]).encode()).hexdigest()
    model = adapter.model_id, adapter.d_model, adapter.n_layers, str(adapter.dtype)
    return hashlib.sha256(repr((model, texts, str(point), asdict(settings))).encode()).hexdigest()


def _write_result(folder: Path, sae: SparseAutoencoder, report: dict[str, Any], dtype: torch.dtype) -> None:
    shown = {name: value for name, value in report.items() if name != "settings"}
    saelens.write(sae, folder, dtype=dtype, notes={"report": shown})
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
