"""Which chains of edits meet on tokens: edits that reach the same token run there one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy

__all__ = ["numbered"]

_Edit = TypeVar("_Edit")

_BITS = 32  # edits that one number tells apart


def numbered(edits: Sequence[_Edit], reached: Any, numbers: dict[tuple[_Edit, ...], int]) -> Any:
    """The number of each token's chain, int32 [n_tokens]; -1 for a token that no edit reaches.

    Args:
        edits: at least one, in the order in which they run.
        reached: bool array [n_tokens, n_edits], which edits reach a token.
        numbers: chains that have a number already; new ones are added.
    """
    if len(edits) == 1:  # as usual, and found without sorting
        number = numbers.setdefault((edits[0],), len(numbers)) if reached.any() else -1
        return numpy.where(reached[:, 0], numpy.int32(number), numpy.int32(-1))
    # Neighbours mostly have the same edits; each kind of token is looked up once.
    kind = numpy.zeros(len(reached), dtype=numpy.int64)
    for first in range(0, len(edits), _BITS):
        part = reached[:, first : first + _BITS]
        code = part @ (1 << numpy.arange(part.shape[1], dtype=numpy.int64))
        _, example, kind = numpy.unique((kind << _BITS) + code, return_index=True, return_inverse=True)
    chains = [tuple(edit for edit, on in zip(edits, reached[at], strict=True) if on) for at in example]
    found = [numbers.setdefault(chain, len(numbers)) if chain else -1 for chain in chains]
    return numpy.array(found, dtype=numpy.int32)[kind]
