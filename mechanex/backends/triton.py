"""The place of the Triton kernels; none is built in this version."""

from __future__ import annotations

__all__ = ["missing"]


def missing() -> str | None:
    """Why the backend can't run: this version has no Triton kernels."""
    return (
        "the Triton kernels are not built yet in this version; choose auto or eager (plain torch, on any GPU)"
    )
