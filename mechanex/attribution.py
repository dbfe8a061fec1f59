"""Attribution patching of a client: which parts of the model an answer hangs on.

The module is also the default client's door: ``mechanex.attribution.compute_scores(...)`` calls it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .errors import ValidationError
from .remote.answers import object_of
from .remote.bodies import list_of

__all__ = ["AttributionModule"]


class AttributionModule(_BaseModule):
    """Module for attribution patching APIs, on a server: the local engine of this module is not there yet."""

    def compute_scores(
        self,
        clean_prompt: str,
        corrupted_prompt: str,
        target_module_paths: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Computes attribution scores by patching the model.

        Corresponds to the /attribution-patching/scores endpoint.

        Args:
            clean_prompt: the prompt with the answer of interest.
            corrupted_prompt: the same with what matters changed.
            target_module_paths: names from ``model.get_paths``; None for the server's choice.

        Returns:
            The scores, as the server gives them.

        Raises:
            ValidationError: a prompt that isn't text, or a list of paths that isn't one.
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        for name, prompt in (("clean_prompt", clean_prompt), ("corrupted_prompt", corrupted_prompt)):
            if not isinstance(prompt, str):
                raise ValidationError(f"{name} is a text; got {type(prompt).__name__}.")
        paths = target_module_paths
        if paths is not None:
            paths = list_of("target_module_paths", paths, "names")
        body = {
            "clean_prompt": clean_prompt,
            "corrupted_prompt": corrupted_prompt,
            "target_module_paths": paths,
        }
        call, transport = "attribution.compute_scores", self._client.transport
        return self._run(
            call, lambda: object_of(transport.post("/attribution-patching/scores", body), call), None
        )


if TYPE_CHECKING:
    _door: AttributionModule = _default.client().attribution
    compute_scores = _door.compute_scores
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("attribution", name)
