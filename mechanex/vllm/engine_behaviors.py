"""What an engine's users have watched in answers, and what of it the workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from ..engine.sae.behavior import Behavior
from ..engine.sae.watching import ACTIONS, Action, check_sizes
from ..errors import ValidationError
from .asked import Carried
from .held import HeldUnits
from .supported import why_unwatched
from .units import key_of, packed_behavior
from .watched import WATCH_FIELD, AskedWatch

__all__ = ["EngineBehaviors", "WatchBy"]


@dataclass(frozen=True)
class WatchBy:
    """What is watched in one answer.

    Args:
        behaviors: names that ``register_behavior`` gave.
        action: what is done where one shows: ``"correct"``: it is corrected from that token to the answer's end;
            ``"abort"``: the answer ends with that token; ``"report"``: nothing.
    """

    behaviors: str | Sequence[str]
    action: Action = "correct"


class EngineBehaviors:
    """Behaviors on their way to the workers of one engine.

    Args:
        config: vLLM's ``VllmConfig``.
        held: what the workers hold for this process.
    """

    def __init__(self, config: Any, held: HeldUnits) -> None:
        self._config, self._held = config, held
        self._unwatched = why_unwatched(config)
        self._keys: WeakKeyDictionary[Behavior, str] = WeakKeyDictionary()

    def check(self, behavior: Behavior) -> None:
        """Raises a ValidationError for a behavior of another model, or one that isn't read in the residual stream."""
        model = self._config.model_config
        family = getattr(model.hf_text_config, "model_type", None)
        n_layers, width = model.get_total_num_hidden_layers(), model.get_hidden_size()
        check_sizes(behavior, model.model, family, n_layers, width)
        if behavior.point.kind != "resid":
            raise ValidationError(
                f"the behavior {behavior.name!r} is read at {behavior.point}, and in vLLM the residual stream alone is "
                "watched: make it of an autoencoder of the stream, or serve it with mechanex serve."
            )

    def asked(self, behaviors: Sequence[Behavior], action: Action, *, told: bool) -> tuple[Carried, str]:
        """What a request whose answer is so watched carries, and the name by which its scores are asked for.

        Args:
            behaviors: that ``check`` has let through.
            action: what is done where one shows.
            told: whether the scores are going to be asked for.

        Raises:
            ValidationError: this engine doesn't watch, or an action that there isn't.
        """
        if self._unwatched is not None:
            raise ValidationError(self._unwatched)
        if action not in ACTIONS:
            raise ValidationError(f"action is correct, abort or report; got {action!r}.")
        keys: list[str] = []
        missing: dict[str, bytes] = {}
        for behavior in behaviors:
            key = self._keys.get(behavior)
            if key is None or key not in self._held:
                data = packed_behavior(behavior)
                key = self._keys[behavior] = key_of(data)
                missing[key] = data
            keys.append(key)
        watch = AskedWatch(uuid4().hex, tuple(keys), action, told=told)
        return Carried({WATCH_FIELD: watch.as_text()}, tuple(keys), missing), watch.name
