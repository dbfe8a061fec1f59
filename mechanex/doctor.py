"""What this installation is: versions, which backends run here, and why the others don't."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .backends import Backend

__all__ = ["BackendReport", "Report", "examine"]

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformer-lens",
    "triton",
    "gguf",
    "fastapi",
    "matplotlib",
)
_VARIABLES = ("MECHANEX_BACKEND", "MECHANEX_CPU_ISA", "MECHANEX_HOME")


@dataclass(frozen=True)
class BackendReport:
    """One backend here.

    Attributes:
        name: as ``MECHANEX_BACKEND`` calls it.
        runs: whether it can be chosen.
        detail: what it is when it runs; otherwise what is missing and how to get it.
    """

    name: str
    runs: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The state of this installation; ``str`` of it is what ``python -m mechanex`` prints.

    Attributes:
        versions: name to version, or ``"not installed"``.
        devices: the devices that torch can use, in words.
        choice: the backend choice in force, or what is wrong with it.
        backends: every registered backend.
        variables: the environment variables of the library that are set.
    """

    versions: dict[str, str]
    devices: str
    choice: str
    backends: tuple[BackendReport, ...]
    variables: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.versions))
        lines = [f"{name:<{width}}  {version}" for name, version in self.versions.items()]
        lines += [f"{'devices':<{width}}  {self.devices}", "", f"backend: {self.choice}"]
        lines += [f"  {b.name:<10} {'runs' if b.runs else 'does not run'}: {b.detail}" for b in self.backends]
        lines += [f"{name}={value}" for name, value in self.variables.items()]
        return "\n".join(lines)


def examine() -> Report:
    """Look at this installation. Imports torch; raises nothing that a broken installation could cause."""
    versions = {
        "mechanex": __version__,
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    try:
        import torch

        from . import backends
    except ImportError as error:
        return Report(versions, f"torch did not load: {error}", "none", (), variables)
    devices = f"cpu ({torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        devices += "".join(f", {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        devices += ", mps"
    try:
        choice = backends.active()
    except ValueError as error:
        choice = f"unusable: {error}"
    return Report(versions, devices, choice, tuple(_backend(b) for b in backends.backends()), variables)


def _backend(backend: Backend) -> BackendReport:
    try:
        reason = backend.missing()
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        return BackendReport(backend.name, False, reason)
    where = ", ".join(backend.devices) or "any device"
    detail = f"{backend.summary} ({where})"
    return BackendReport(
        backend.name, True, f"{detail}; {backend.describe()}" if backend.describe else detail
    )
