"""What senders may have watched: behaviors with detectors, those of the server, of accounts, and of the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.sae.behavior import Behavior
from ...engine.sae.store import BEHAVIOR_FILE, BehaviorStore, read_behavior
from ...engine.sae.watching import Action, Watch
from ...errors import NotFoundError
from .threads import look_up

if TYPE_CHECKING:
    from .records import Library

__all__ = ["WatchedBehaviors", "Watching"]


@dataclass(frozen=True)
class Watching:
    """What a request has watched in each of its answers, and what is done where it shows.

    Args:
        behaviors: those that the request names.
        action: what is done where they show.
        floor: those that the server corrects in every answer: a request adds to them, and takes none away.
    """

    behaviors: tuple[Behavior, ...] = ()
    action: Action = "correct"
    floor: tuple[Behavior, ...] = ()

    def onlooker(self) -> Watch | None:
        """One for one answer."""
        named = {behavior.name for behavior in self.behaviors}
        watched = (*self.behaviors, *(one for one in self.floor if one.name not in named))
        if not watched:
            return None
        ending = named if self.action == "abort" else set()
        return Watch(watched, self.action, frozenset(one.name for one in self.floor) - ending)


class WatchedBehaviors:
    """Behaviors that can be watched, by name; for the event loop's thread.

    Args:
        model_id: the model's.
        check: raises a ValidationError for a behavior of another model.
        sources: the server's own: files of behaviors; of other files nothing is looked at.
        library: those of accounts, or None.
        kept: the operator's, kept on this machine.

    Raises:
        NotFoundError: a file that isn't there.
        ValidationError: a file that is no behavior's, or one of another model's.
    """

    def __init__(
        self,
        model_id: str,
        check: Callable[[Behavior], None],
        sources: Sequence[Path],
        library: Library | None,
        kept: BehaviorStore,
    ) -> None:
        self._model_id, self._check, self._library, self._kept = model_id, check, library, kept
        self._read: dict[Path, tuple[tuple[int, int], Behavior]] = {}
        self.own: dict[str, Behavior] = {}
        for path in sources:
            if path.suffix == BEHAVIOR_FILE:
                if not path.is_file():
                    raise NotFoundError(f"there is no file {path}: --behaviors names files of behaviors.")
                self.own[path.stem] = self._fitting(replace(read_behavior(path), name=path.stem))

    async def named(self, account_id: str | None, names: Sequence[str]) -> tuple[Behavior, ...]:
        """The behaviors of these names that this sender may have watched, each once.

        Raises:
            NotFoundError: the sender has none of a name.
            ValidationError: one that is a vector alone, or another model's.
        """
        found = []
        for name in dict.fromkeys(names):
            behavior = await self.find(account_id, name)
            if behavior is None:
                raise NotFoundError(
                    f"no behavior that can be watched is called {name!r} here: make one with POST /behaviors/create, "
                    "of four examples or more, or use one that the server was started with."
                )
            found.append(behavior)
        return tuple(found)

    async def find(self, account_id: str | None, name: str) -> Behavior | None:
        """The behavior of this name, or None where the sender has none, or one that is a vector alone.

        Raises:
            ValidationError: it is another model's.
        """
        own = self.own.get(name)
        return own if own is not None else await look_up(self.look_up, account_id, name)

    async def every(self, account_id: str | None) -> tuple[Behavior, ...]:
        """All that the sender made for this model, by name the one that ``find`` gives."""
        found = await look_up(self._every, account_id)
        return tuple(self.own.get(one.name, one) for one in found)

    async def watchable(self, account_id: str | None) -> tuple[Behavior, ...]:
        """Those of the server and all that the sender made for this model; of one name, the one that ``find`` gives."""
        theirs = [one for one in await self.every(account_id) if one.name not in self.own]
        return (*self.own.values(), *theirs)

    def look_up(self, account_id: str | None, name: str) -> Behavior | None:
        """As ``find``, without the server's own; blocks."""
        found = None if self._library is None else self._library.watched(account_id, name)
        if found is not None:
            return self._fitting(found)
        taken = self._library is not None and self._library.behavior_vector_id(account_id, name) is not None
        if taken or account_id is not None or name not in self._kept.names():
            return None
        kept = self._of_operator(name)
        return None if kept is None else self._fitting(kept)

    def _of_operator(self, name: str) -> Behavior | None:
        """A behavior that is kept on this machine; read again only where its file has changed, for rows to share.

        None where it was deleted just now.
        """
        path = self._kept.folder / f"{name}{BEHAVIOR_FILE}"
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        state = (status.st_mtime_ns, status.st_ino)
        known = self._read.get(path)
        if known is None or known[0] != state:
            known = self._read[path] = (state, self._kept.get(name))
        return known[1]

    def _every(self, account_id: str | None) -> list[Behavior]:
        model, library = self._model_id, self._library
        rows = [] if library is None else library.behaviors(account_id)
        fitting = [row.id for row in rows if (row.watched or {}).get("model") == model]
        found = [None if library is None else library.detector(one) for one in fitting]
        if account_id is None:
            taken = {row.behavior_name for row in rows}
            operators = [self._of_operator(name) for name in self._kept.names() if name not in taken]
            found += [one for one in operators if one is not None and one.model == model]
        return [self._fitting(one) for one in found if one is not None]  # else it was deleted just now

    def _fitting(self, behavior: Behavior) -> Behavior:
        self._check(behavior)
        return behavior
