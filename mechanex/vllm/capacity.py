"""How much steering an engine has room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..engine.whole import as_whole
from ..errors import ValidationError

__all__ = ["Capacity"]

_FIELD = "mechanex"


@dataclass(frozen=True)
class Capacity:
    """Sizes of the tables of edits, fixed when the engine starts. Every one of them is a part of compiled code.

    Args:
        slots: different vectors that requests which run or wait to run may have between them; further requests wait.
            The strengths of a vector don't count.
        per_token: most vectors of one request; a SteeringVector that clamps counts twice.
        rank: largest rank of an edit: 0 for vectors that are added, 1 for ablating and clamping.
        gates: whether edits may have gates.
        behaviors: whether compiled code asks at every layer for tokens that are watched; what isn't compiled does
            anyway.
    """

    slots: int = 64
    per_token: int = 4
    rank: int = 1
    gates: bool = False
    behaviors: bool = False

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("per_token", 1), ("rank", 0)):
            number = as_whole(getattr(self, name))
            if number is None or number < least:
                raise ValidationError(
                    f"steering_{name} is a number from {least}; got {getattr(self, name)!r}."
                )
        for name in ("gates", "behaviors"):
            if not isinstance(getattr(self, name), bool):
                raise ValidationError(f"steering_{name} is True or False; got {getattr(self, name)!r}.")
        if self.slots < self.per_token:
            raise ValidationError(
                f"steering_slots={self.slots} has no room for a request with steering_per_token={self.per_token} "
                "vectors: raise it."
            )

    def config(self) -> dict[str, Any]:
        """What stands in vLLM's ``additional_config``, and so in the key of its cache of compiled code."""
        return {_FIELD: {"version": __version__, **dataclasses.asdict(self)}}

    @classmethod
    def of(cls, additional_config: object) -> Capacity:
        """The capacity that vLLM's ``additional_config`` states.

        Raises:
            ValidationError: it states none, or another version's.
        """
        stated = additional_config.get(_FIELD) if isinstance(additional_config, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ValidationError(
                f"mechanex's worker and scheduler need their sizes in vLLM's additional_config, such as "
                f"{cls().config()}: without it, vLLM would take code that it compiled without steering."
            )
        sizes = dict(stated)
        version = sizes.pop("version", None)
        if version != __version__:
            raise ValidationError(
                f"vLLM's additional_config is for mechanex {version}, and this is {__version__}: state its version."
            )
        try:
            return cls(**sizes)
        except TypeError as error:
            raise ValidationError(f"additional_config[{_FIELD!r}] has no such size: {error}.") from error
