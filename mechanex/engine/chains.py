"""Which chains of edits meet on tokens: edits that reach the same token run there one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy

__all__ = ["numbered"]

_Edit = TypeVar("_Edit")


def numbered(edits: Sequence[_Edit], reached: Any, numbers: dict[tuple[_Edit, ...], int]) -> Any:
    """The number of each token's chain, int32 [n_tokens]; -1 for a token that no edit reaches.

    Args:
        edits: in the order in which they run.
        reached: bool array [n_tokens, n_edits], which edits reach a token.
        numbers: chains that have a number already; new ones are added.
    """
    # Neighbours mostly have the same edits; each kind of token is looked up once.
    kinds, kind = numpy.unique(reached, axis=0, return_inverse=True)
    chains = [tuple(edit for edit, on in zip(edits, one, strict=True) if on) for one in kinds]
    found = [numbers.setdefault(chain, len(numbers)) if chain else -1 for chain in chains]
    return numpy.array(found, dtype=numpy.int32)[kind.reshape(-1)]
