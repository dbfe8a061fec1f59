"""What the modules of a client share: the client as they see it, and where a call runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from .errors import APIError, AuthenticationError, MechanexError, ValidationError
from .remote.answers import UnexpectedAnswer, say_more

if TYPE_CHECKING:
    from torch import nn

    from .engine.models.resolve import LoadedModel
    from .engine.vector_store import VectorStore
    from .remote.transport import Transport

__all__ = ["Client"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_OR_LOAD = "Or load a model, with load('mx-tiny') or load('<Hugging Face name>'): the call runs here then."
_OR_HERE = "Or load a model and call set_execution_mode('local')."


class Client(Protocol):
    """A client, as its modules use one; ``Mechanex`` is the one there is."""

    transport: Transport

    @property
    def execution_mode(self) -> str: ...
    @property
    def local_model(self) -> nn.Module | None: ...
    @property
    def vectors(self) -> VectorStore: ...
    @property
    def is_remote(self) -> bool: ...
    def has_vector(self, vector_id: str) -> bool: ...
    def require_local(self, caller: str, only_local: str | None = None) -> LoadedModel: ...
    def require_remote(self, caller: str, otherwise: str = "") -> None: ...


class _BaseModule:
    """A base class for API modules: holds the client, whose server, model and stored vectors they use.

    Args:
        client: the main client instance.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def _run(
        self,
        caller: str,
        remote: Callable[[], T],
        local: Callable[[LoadedModel], T],
        *,
        only_local: str | None = None,
        falls_back: bool = True,
    ) -> T:
        """Runs a call on the server or here, as the execution mode says; every documented call goes through this.

        In ``auto`` mode the server comes first where there are credentials. When it can't be reached, refuses
        them or fails (5xx), and a model is loaded, one warning tells why and the call runs here. Whatever else
        the server says is raised, an answer that isn't what was asked for included.

        Args:
            caller: the call's documented name, for messages.
            remote: makes the call on the server.
            local: makes it on the loaded model.
            only_local: why this call can't be sent to a server, if it can't.
            falls_back: whether the call means the same here: False for one about what only the server has.

        Raises:
            MechanexError: there is neither a server to ask nor a model; names the ways out.
            ValidationError: the mode is ``remote`` and the call can't be sent.
        """
        client = self._client
        mode = client.execution_mode
        if mode == "remote" and only_local is not None:
            raise ValidationError(
                f"{caller} can't run on the server: {only_local}. Load a model here and call "
                "set_execution_mode('auto') or ('local')."
            )
        if mode == "local" or only_local is not None:
            return local(client.require_local(caller, only_local))
        if mode == "remote":
            client.require_remote(caller, _OR_HERE)
            return remote()
        if not client.is_remote and (client.local_model is not None or not client.transport.address.chosen):
            return local(client.require_local(caller))
        try:
            return remote()
        except (AuthenticationError, APIError) as error:
            if not falls_back or not _may_run_elsewhere(error):
                raise
            if client.local_model is None:
                say_more(error, _OR_LOAD)
                raise
            reason = str(error)
        _logger.warning("%s runs on the local model: the server did not do it (%s)", caller, reason)
        return local(client.require_local(caller))


def _may_run_elsewhere(error: MechanexError) -> bool:
    if isinstance(error, (AuthenticationError, UnexpectedAnswer)):
        return isinstance(error, AuthenticationError)
    return error.status_code is None or error.status_code >= 500
