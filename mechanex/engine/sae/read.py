"""From a folder, a Hub name or a model's name to a sparse autoencoder: which format it is, and where its files are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import MechanexError, NotFoundError, ValidationError
from . import published, saelens
from .autoencoder import SparseAutoencoder
from .hook_points import HookPoint, hook_point

__all__ = ["FORMATS", "Format", "format_of", "read_sae"]

_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.\-]+)*)")


@dataclass(frozen=True)
class Format:
    """One way in which autoencoders are kept.

    Args:
        name: what people call it.
        files: those of a folder, the ones that tell it first.
        read: makes an autoencoder of a folder.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], SparseAutoencoder]


# The first whose weights are in a folder is the folder's.
FORMATS = (
    Format("SAELens", (saelens.WEIGHTS, saelens.CONFIG), saelens.read),
    Format("Gemma Scope", ("params.npz",), published.read_gemma_scope),
    Format("Gemma Scope 2", ("params.safetensors", "config.json"), published.read_gemma_scope_2),
    Format("Llama Scope", ("checkpoints/final.safetensors", "hyperparams.json"), published.read_llama_scope),
    Format("sparsify", ("sae.safetensors", "cfg.json"), published.read_sparsify),
    Format("dictionary_learning", ("ae.pt", "config.json"), published.read_dictionary_learning),
)


def format_of(folder: Path) -> Format | None:
    """The format whose weights a folder holds, or None."""
    return next((one for one in FORMATS if (folder / one.files[0]).exists()), None)


def read_sae(
    source: str | os.PathLike[str] | Any,
    *,
    point: str | HookPoint | None = None,
    revision: str | None = None,
) -> SparseAutoencoder:
    """Reads a sparse autoencoder; its weights are float32.

    Args:
        source: a folder in one of ``FORMATS``; a Hub name with the path of such a folder in it, as in
            ``"google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"``; or an object of ``sae_lens.SAE``.
        point: where its activations are read, in place of what its files say.
        revision: of a Hub name.

    Raises:
        NotFoundError: there is no such folder, here or on the Hub.
        ValidationError: the files are of no known format, damaged or don't fit together.
    """
    if isinstance(source, SparseAutoencoder):
        found = source
    elif not isinstance(source, str | os.PathLike):
        found = saelens.from_object(source)
    else:
        found = _read_folder(_folder(os.fspath(source), revision))
    if point is None:
        return found
    return replace(found, point=point if isinstance(point, HookPoint) else hook_point(point))


def _read_folder(folder: Path) -> SparseAutoencoder:
    chosen = format_of(folder)
    if chosen is None:
        names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        kinds = "; ".join(f"{one.name}: {', '.join(one.files)}" for one in FORMATS)
        raise ValidationError(
            f"{folder} holds no autoencoder ({', '.join(names) or 'nothing is in it'}). Known are {kinds}."
        )
    try:
        return chosen.read(folder)
    except MechanexError as error:
        if str(folder) not in str(error):
            raise type(error)(f"the {chosen.name} autoencoder in {folder} can't be used: {error}") from error
        raise


def _folder(source: str, revision: str | None) -> Path:
    if not source:
        raise ValidationError("a folder or a Hub name is expected; got ''.")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValidationError(f"{path} is a file; an autoencoder is read from its folder.")
    found = _HUB.fullmatch(source)
    if found is None:
        raise NotFoundError(
            f"there is no folder {path.absolute()}, and {source!r} is no Hub name ('organisation/name/folder')."
        )
    return _fetched(found[1], found[2].strip("/"), revision)


def _fetched(name: str, inside: str, revision: str | None) -> Path:
    """The local copy of a folder of the Hub, with the files that formats have."""
    from huggingface_hub import snapshot_download

    from ..models.sources import unreachable

    prefix = f"{inside}/" if inside else ""
    wanted = [prefix + file for one in FORMATS for file in one.files]
    if inside:
        wanted.append(
            f"{inside.rpartition('/')[0]}/config.json".lstrip("/")
        )  # sparsify's, beside its folders
    offline = unreachable()
    try:
        root = snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
    except Exception as error:  # the Hub's library has many
        how = (
            "the Hub could not be reached" if offline else f"{type(error).__name__}: {error}".splitlines()[0]
        )
        raise NotFoundError(
            f"no autoencoder {name}/{inside}: there is no such folder here, nothing of it in the Hub's cache, and "
            f"{how}. Check the name, or give a folder.",
            details=str(error),
        ) from error
    folder = Path(root) / inside
    if format_of(folder) is None:
        raise NotFoundError(
            f"{name} on the Hub has no autoencoder in {inside or 'its root'}: name the folder that holds "
            f"{', '.join(one.files[0] for one in FORMATS)}."
        )
    return folder
