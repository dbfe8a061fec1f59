"""The structure of a client's model.

The module is also the default client's door: ``mechanex.model.get_graph()`` calls it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .remote.answers import listed

__all__ = ["ModelModule"]


class ModelModule(_BaseModule):
    """Module for inspecting the model structure, on a server: the local engine of this module is not there yet."""

    def get_graph(self) -> list[dict[str, Any]]:
        """Retrieves the model's computation graph. Corresponds to the /graph endpoint.

        Returns:
            The graph's nodes, as the server describes them.

        Raises:
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        transport = self._client.transport
        return self._run(
            "model.get_graph", lambda: listed(transport.get("/graph"), "model.get_graph", "graph"), None
        )

    def get_paths(self) -> list[str]:
        """Retrieves all available layer paths in the model. Corresponds to the /paths endpoint.

        Returns:
            Names as ``attribution.compute_scores`` takes them.

        Raises:
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        transport = self._client.transport
        return self._run(
            "model.get_paths", lambda: listed(transport.get("/paths"), "model.get_paths", "paths"), None
        )


if TYPE_CHECKING:
    _door: ModelModule = _default.client().model
    get_graph = _door.get_graph
    get_paths = _door.get_paths
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("model", name)
