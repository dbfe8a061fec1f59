"""Models that come with the package: their names, and where their files are."""

from __future__ import annotations

from pathlib import Path

from ...bundled import model_names, model_path

__all__ = ["bundled_names", "bundled_path"]


def bundled_names() -> list[str]:
    """Names that load without a network, such as ``mx-tiny``."""
    return model_names()


def bundled_path(name: str) -> Path | None:
    """The folder of a bundled model, or None when no model of that name comes with the package."""
    return model_path(name) if name in model_names() else None
