"""The structure of a client's model.

The module is also the default client's door: ``mechanex.model.get_graph()`` calls it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .remote.answers import listed

if TYPE_CHECKING:
    from .engine.models.resolve import LoadedModel

__all__ = ["ModelModule"]


class ModelModule(_BaseModule):
    """Module for inspecting the model structure."""

    def get_graph(self) -> list[dict[str, Any]]:
        """Retrieves the model's computation graph. Corresponds to the /graph endpoint.

        Returns:
            The model's modules, parents before their children, each a dict with its ``path``, ``type``, ``parameters``,
            ``input_shape``, ``output_shape``, ``children`` and ``layer``; those that write to the residual stream also
            have a ``role`` (``"embedding"``, ``"attention"``, ``"mlp"``, …), the paths whose writes they ``reads``,
            their number of ``heads``, and whether they run ``parallel`` to another part of their layer.

        Raises:
            MechanexError: there is neither a model nor a server to ask, and whatever ``transport.call`` raises.
        """

        def local(loaded: LoadedModel) -> list[dict[str, Any]]:
            from .engine.models import adapter_for
            from .engine.structure.graph import model_graph

            return model_graph(adapter_for(loaded.model))

        call, transport = "model.get_graph", self._client.transport
        return self._run(call, lambda: listed(transport.get("/graph"), call, "graph"), local)

    def get_paths(self) -> list[str]:
        """Retrieves all available layer paths in the model. Corresponds to the /paths endpoint.

        Returns:
            Names as ``attribution.compute_scores`` takes them: modules whose output for each token can be patched.

        Raises:
            MechanexError: there is neither a model nor a server to ask, and whatever ``transport.call`` raises.
        """

        def local(loaded: LoadedModel) -> list[str]:
            from .engine.models import adapter_for
            from .engine.structure.graph import model_paths

            return model_paths(adapter_for(loaded.model))

        call, transport = "model.get_paths", self._client.transport
        return self._run(call, lambda: listed(transport.get("/paths"), call, "paths"), local)


if TYPE_CHECKING:
    _door: ModelModule = _default.client().model
    get_graph = _door.get_graph
    get_paths = _door.get_paths
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("model", name)
