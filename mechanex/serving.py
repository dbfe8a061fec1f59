"""Turning a model into a server, with OpenAI's API under /v1 and the Axionic API beside it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MechanexError, ValidationError
from .extras import install_line
from .launched import global_rank

if TYPE_CHECKING:
    from .engine.models.resolve import LoadedModel
    from .engine.vector_store import VectorStore
    from .server.serve import RunningServer

__all__ = ["check_no_loop", "serve"]


def serve(
    loaded: LoadedModel,
    *,
    host: str = "0.0.0.0",
    port: int = 8000,
    corrected_behaviors: Sequence[str] | None = None,
    vectors: str | os.PathLike[str] | None = None,
    behaviors: Sequence[str | os.PathLike[str]] = (),
    stored: VectorStore | None = None,
    block: bool = True,
    **settings: Any,
) -> RunningServer | None:
    """Serves a loaded model until SIGINT or SIGTERM, or from a thread.

    Where the model is split over the processes of a job (``load(…, tp="auto")``), all of them call this: the first one
    listens, and the others follow its steps until it ends.

    Args:
        loaded: the model, as ``mechanex.engine.models.resolve.load`` gives it.
        host, port, corrected_behaviors, vectors, behaviors, block, settings: as ``Mechanex.serve`` takes
            them.
        stored: the operator's vectors by id; by default those under ``MECHANEX_HOME``.

    Raises:
        ValidationError: a setting out of its range or unknown, behaviors that aren't known, or several processes and a
            model that isn't split over them.
        NotFoundError: a file that isn't there.
        MechanexError: the ``serve`` extra is missing, the address is taken, or an event loop runs that ``block=True``
            would hold up; or another process of a split model is gone.
    """
    check_no_loop(block)
    split = global_rank() is not None
    if split:
        _check_split(loaded, block)
    try:
        from .server.serve import serve_loaded
        from .server.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("mechanex"):
            raise
        raise MechanexError(
            f"serving needs {error.name}, which isn't installed: {install_line('serve')}."
        ) from error
    for name, given in (("corrected_behaviors", corrected_behaviors), ("behaviors", behaviors)):
        if isinstance(given, str):
            raise ValidationError(f"{name} is a list of texts; got the text {given!r}.")
    try:
        found = ServerSettings(
            host=host,
            port=port,
            corrected_behaviors=tuple(corrected_behaviors or ()),
            vectors=None if vectors is None else Path(vectors),
            behaviors=tuple(Path(source) for source in behaviors),
            **settings,
        )
    except TypeError as error:
        raise ValidationError(f"a server has no such setting: {error}.") from error
    if not split:
        return serve_loaded(found, loaded, stored, block=block)
    from .engine.models import adapter_for
    from .engine.ranks import current_ranks
    from .server.model.follower import follow
    from .server.model.wire import Lead, Led

    adapter = adapter_for(loaded.model)
    own = {"tokenizer": loaded.tokenizer if loaded.tokenizer is not None else adapter.tokenizer}
    if current_ranks(adapter).first:
        return serve_loaded(found, loaded, stored, lead=Lead(own))
    follow(adapter, Led(own))
    return None


def _check_split(loaded: LoadedModel, block: bool) -> None:
    """Raises a ValidationError where several processes can't be one server."""
    from .engine.sharded import is_split

    if not is_split(loaded.model):
        raise ValidationError(
            "a server is one process, and several were started by torchrun or the like: start it by itself, or split "
            "the model over them with --tp (load(…, tp='auto'))."
        )
    if not block:
        raise ValidationError(
            "a model that is split over processes is served by all of them until the first one ends: leave "
            "block=False out."
        )


def check_no_loop(block: bool) -> None:
    """Raises a MechanexError where ``block=True`` would hold up this thread's event loop."""
    if not block:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise MechanexError(
        "serve blocks until it is stopped, and this thread runs an event loop (as notebooks do), which would stand "
        "still: serve(…, block=False) serves from a thread and returns a handle with url and stop()."
    )
