"""Behaviors in the user's folder: one safetensors file each, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._version import __version__
from ...errors import MechanexError, NotFoundError, ValidationError
from ...home import atomic_path, behaviors_folder
from . import registry
from .autoencoder import SparseAutoencoder
from .behavior import Behavior
from .corrections import Correction
from .detectors import FeatureDetector, ProbeDetector
from .hook_points import hook_point

__all__ = ["BEHAVIOR_FILE", "BehaviorStore", "check_name", "read_behavior", "write_behavior"]

BEHAVIOR_FILE = ".safetensors"
"""Suffix of the files of behaviors."""

FORMAT = "mechanex behavior 1"
_NAME = re.compile(r"[\w][\w .-]{0,63}")
_PARTS = ("encoder", "bias", "decoder", "decoder_bias", "threshold", "gain", "offset")
_SETTINGS = ("activation", "k", "by_decoder_norm", "subtract_decoder_bias", "normalization", "architecture")


def check_name(name: object) -> str:
    """A behavior's name: up to 64 letters, digits, spaces, ``.``, ``-`` and ``_``; a ValidationError for others."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name != name.strip():
        raise ValidationError(
            f"a behavior's name has up to 64 letters, digits, spaces, '.', '-' and '_', a letter or digit first; got "
            f"{name!r:.80}."
        )
    return name


class BehaviorStore:
    """Behaviors by name.

    Args:
        folder: where the files are; by default ``behaviors`` under ``MECHANEX_HOME``, looked up at each call.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._saes: dict[str, SparseAutoencoder] = {}

    @property
    def folder(self) -> Path:
        """Where the files are; it need not be there."""
        return self._folder or behaviors_folder()

    def names(self) -> list[str]:
        """The names of all, in order."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def put(self, behavior: Behavior) -> None:
        """Keeps a behavior, in place of one of its name; errors as ``write_behavior``."""
        write_behavior(behavior, self._path(behavior.name))

    def get(self, name: str) -> Behavior:
        """The behavior of this name.

        Raises:
            NotFoundError: there is none, or its top-k autoencoder isn't there any more.
            ValidationError: its file is damaged, or its autoencoder is another one now.
        """
        path = self._path(check_name(name))
        if not path.exists():
            known = ", ".join(self.names()) or "none"
            raise NotFoundError(
                f"no behavior is called {name!r}; there is: {known}. create_behavior makes one."
            )
        return read_behavior(path, self._saes)

    def delete(self, name: str) -> None:
        """Deletes a behavior.

        Raises:
            NotFoundError: there is none of this name.
        """
        path = self._path(check_name(name))
        if not path.exists():
            raise NotFoundError(
                f"no behavior is called {name!r}; there is: {', '.join(self.names()) or 'none'}."
            )
        path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def write_behavior(behavior: Behavior, path: Path) -> None:
    """Writes a behavior's file, whole or not at all.

    Raises:
        ValidationError: its autoencoder is needed whole, and it isn't known where that comes from.
        OSError: it can't be written.
    """
    tensors: dict[str, Tensor] = {
        "probe.direction": behavior.probe.direction,
        "correction.direction": behavior.correction.direction,
    }
    told: dict[str, Any] = {
        "format": FORMAT,
        "library_version": __version__,
        **{name: getattr(behavior, name) for name in ("name", "description", "model", "family", "width")},
        "point": str(behavior.point),
        "detector": behavior.detector,
        "sae": behavior.sae,
        "threshold": behavior.threshold,
        "steering_vector_id": behavior.steering_vector_id,
        "probe": [behavior.probe.low, behavior.probe.high],
        "correction": {
            name: getattr(behavior.correction, name) for name in ("way", "low", "high", "strength")
        },
        "figures": behavior.figures,
    }
    found = behavior.features
    if found is not None:
        told["features"] = {"low": found.low, "high": found.high, **_kept(found.sae)}
        tensors |= {
            "features.features": found.features,
            "features.weights": found.weights,
            "features.levels": found.levels,
            "features.numbers": torch.tensor(found.names),
        }
        if found.sae.elementwise:
            parts = {name: getattr(found.sae, name) for name in _PARTS}
            tensors |= {f"sae.{name}": t for name, t in parts.items() if t is not None}
        elif behavior.sae is None:
            raise ValidationError(
                "this behavior's autoencoder is top-k, so that all of it is needed each time, and it isn't known "
                "where it comes from: give its folder or name."
            )
    stored = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    told["checksum"] = _checksum(stored, told)
    with atomic_path(path) as temporary:
        save_file(stored, temporary, {"mechanex": json.dumps(told)})


def read_behavior(path: Path, saes: MutableMapping[str, SparseAutoencoder] | None = None) -> Behavior:
    """Reads a behavior's file.

    Args:
        path: the file, which is there.
        saes: whole autoencoders that were read before, by their source; one that is read is added.

    Raises:
        NotFoundError: its top-k autoencoder isn't there any more.
        ValidationError: it is damaged, or its autoencoder is another one now.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["mechanex"])
            tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
        found = told.pop("checksum")
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r:.40}, and this version reads {FORMAT!r}")
        if found != _checksum(tensors, told):
            raise ValueError("its checksum is not that of its content")
        return _behavior(told, tensors, {} if saes is None else saes)
    except MechanexError:
        raise
    # A damaged file may fail in any way; each of them means the same to the caller.
    except Exception as error:
        raise ValidationError(
            f"{path} is not a sound behavior file ({type(error).__name__}: {error}): make it again."
        ) from error


def _behavior(
    told: dict[str, Any], tensors: dict[str, Tensor], saes: MutableMapping[str, SparseAutoencoder]
) -> Behavior:
    probe = ProbeDetector(tensors["probe.direction"], *told["probe"])
    features = None
    if "features" in told:
        kept = told["features"]
        sae = _autoencoder(told, tensors, saes)
        features = FeatureDetector(
            sae,
            tensors["features.features"],
            tensors["features.weights"],
            kept["low"],
            kept["high"],
            tensors["features.levels"],
            tensors["features.numbers"],
        )
    correction = Correction(
        direction=tensors["correction.direction"], detector=features, **told["correction"]
    )
    names = ("name", "description", "model", "family", "width", "detector", "sae", "threshold")
    return Behavior(
        **{name: told[name] for name in names},
        point=hook_point(told["point"]),
        probe=probe,
        features=features,
        correction=correction,
        steering_vector_id=told["steering_vector_id"],
        figures=told["figures"],
    )


def _autoencoder(
    told: dict[str, Any], tensors: dict[str, Tensor], saes: MutableMapping[str, SparseAutoencoder]
) -> SparseAutoencoder:
    kept = told["features"]
    parts = {name: tensors.get(f"sae.{name}") for name in _PARTS}
    if parts["encoder"] is not None:
        settings = {name: kept["settings"][name] for name in _SETTINGS}
        return SparseAutoencoder(**parts, **settings, point=hook_point(told["point"]))  # type: ignore[arg-type]
    source = told["sae"]
    if source not in saes:
        saes[source] = registry.load(source)
    sae = saes[source]
    if _digest(sae) != kept["digest"]:
        raise ValidationError(
            f"the autoencoder {source} is not the one that the behavior {told['name']!r} was made with: make the "
            "behavior again."
        )
    return sae


def _kept(sae: SparseAutoencoder) -> dict[str, Any]:
    return {"settings": {name: getattr(sae, name) for name in _SETTINGS}, "digest": _digest(sae)}


def _digest(sae: SparseAutoencoder) -> str:
    """Some numbers of an autoencoder, by which another is told from it."""
    flat = sae.encoder.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 4096)].cpu().float()
    digest = hashlib.sha256(f"{sae.architecture} {list(sae.encoder.shape)}".encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor], told: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        stored = tensors[name].contiguous()
        digest.update(f"{name}:{stored.dtype}:{list(stored.shape)};".encode())
        digest.update(stored.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
