"""The structure of a client's model.

The module is also the default client's door: ``mechanex.model.get_graph()`` calls it there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .remote.answers import listed

if TYPE_CHECKING:
    from .engine.activations import Activations
    from .engine.models.resolve import LoadedModel
    from .engine.text import Prompt

__all__ = ["ModelModule"]

_HERE = "it looks into the model"


class ModelModule(_BaseModule):
    """Module for inspecting the model structure."""

    def activations(
        self,
        texts: Sequence[Prompt],
        layers: Sequence[int] | None = None,
        tokens: str | int | slice = "last",
        *,
        out: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Activations:
        """The residual stream entering layers at chosen tokens of texts; runs locally.

        Args:
            texts: text, token ids or chat messages.
            layers: negatives from the end, n for what leaves the last of n; None for all, n included.
            tokens: ``"last"``, ``"all"``, a place or a slice in each text, negatives from its end.
            out: a folder for the arrays, which then stay in their files: for more than memory holds. A call that was
                stopped goes on there.
            progress: show a progress bar.

        Returns:
            ``{layer: array [n, d_model]}``, the chosen tokens of all texts one after another; ``lengths`` says how many
            are each text's, ``by_text(layer)`` takes them apart.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: no texts, a layer that doesn't exist, or a text without the chosen tokens.
        """
        from .engine.activations import activations

        loaded = self._client.require_local("model.activations", _HERE)
        return activations(
            loaded.model, texts, layers, loaded.tokenizer, tokens=tokens, out=out, progress=progress
        )

    def logit_lens(
        self, texts: Sequence[Prompt], layers: Sequence[int] | None = None, *, top: int = 5
    ) -> dict[int, list[list[tuple[str, float]]]]:
        """What each layer's stream would predict after a text, through the final norm and unembedding; runs locally.

        Args:
            texts: text, token ids or chat messages; their last tokens are looked at.
            layers: as in ``activations``; None for all.
            top: how many of the likeliest tokens.

        Returns:
            ``{layer: for each text [(token, probability), …]}``, likeliest first; layer n of n is what the model says.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: as in ``activations``, or a model without a language head or known final norm.
        """
        from .engine.logit_lens import logit_lens

        loaded = self._client.require_local("model.logit_lens", _HERE)
        return logit_lens(loaded.model, texts, layers, loaded.tokenizer, top=top)

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
    activations = _door.activations
    logit_lens = _door.logit_lens
    get_graph = _door.get_graph
    get_paths = _door.get_paths
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("model", name)

    def __dir__() -> list[str]:
        return _default.names("model")
