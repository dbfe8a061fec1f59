"""The vectors that a sender may steer with, with what there is to say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ...engine.models.adapter import ModelAdapter
from ...engine.vector_store import VectorStore
from ...engine.vectors import SteeringVector
from ...errors import MechanexError
from .folder import SharedVectors
from .records import Library

__all__ = ["MOST_LISTED", "ListedVector", "listed_vectors", "server_vectors"]

MOST_LISTED = 100
"""Vectors of an account, and of the operator, that a list reads: the latest ones."""


@dataclass(frozen=True)
class ListedVector:
    """A vector by the id that requests name it by.

    Attributes:
        vector_id: its id.
        owner: the server (every client may use it), the sender's account, or the operator, who has it on this machine.
        names: the behaviors whose vector it is.
        vector: itself.
    """

    vector_id: str
    owner: Literal["server", "account", "operator"]
    names: tuple[str, ...]
    vector: SteeringVector


def listed_vectors(
    adapter: ModelAdapter,
    account_id: str | None,
    *,
    shared: SharedVectors,
    behaviors: Mapping[str, SteeringVector],
    library: Library | None,
    kept: VectorStore,
) -> list[ListedVector]:
    """The server's, the account's and for the operator the stored ones, each kind's latest last; blocks.

    Those of another model, and those whose file is damaged, are left out.
    """
    found = {one.vector_id: one for one in server_vectors(adapter, shared, behaviors)}

    def add(one: ListedVector) -> None:
        if one.vector_id not in found and _fits(adapter, one.vector):
            found[one.vector_id] = one

    if library is not None:
        for row in library.vectors(account_id)[-MOST_LISTED:]:
            for vector in _readable(library.vector, account_id, row.steering_vector_id):
                add(ListedVector(row.steering_vector_id, "account", row.behavior_names, vector))
    if account_id is None:
        for vector_id in kept.ids()[-MOST_LISTED:]:
            for vector in _readable(kept.get, vector_id):
                add(ListedVector(vector_id, "operator", (), vector))
    return list(found.values())


def server_vectors(
    adapter: ModelAdapter, shared: SharedVectors, behaviors: Mapping[str, SteeringVector]
) -> list[ListedVector]:
    """Those that a server has for every sender, without those of another model."""
    named = [ListedVector(name, "server", (), vector) for name, vector in shared]
    taken = {one.vector_id for one in named}
    named += [
        ListedVector(name, "server", (name,), vector)
        for name, vector in behaviors.items()
        if name not in taken
    ]
    return [one for one in named if _fits(adapter, one.vector)]


def _readable(read: Callable[..., SteeringVector | None], *key: str | None) -> Iterator[SteeringVector]:
    try:
        vector = read(*key)
    except (MechanexError, OSError):  # told to whoever asks for this one
        return
    if vector is not None:
        yield vector


def _fits(adapter: ModelAdapter, vector: SteeringVector) -> bool:
    try:
        vector.plan(adapter)
    except MechanexError:
        return False
    return True
