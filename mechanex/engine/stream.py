"""The residual stream among what a decoder layer is called with, whatever the layer calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor

from ..errors import ValidationError
from .sharded import is_sharded

__all__ = ["Stream", "by_token", "given_out", "others", "residual", "with_given_out", "with_residual"]

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """The one residual stream of a model, without the model: hooks hold it.

    Args:
        width: d_model.
        model_id: the model's name, for messages.
    """

    width: int
    model_id: str

    def fits(self, hidden: object) -> TypeGuard[Tensor]:
        """Whether this is one residual stream [B, T, d_model]."""
        return isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[-1] == self.width

    def check(self, hidden: object) -> None:
        """Refuses what blocks pass on if it isn't one residual stream [B, T, d_model].

        Raises:
            ValidationError: several streams side by side, or another width.
        """
        if not self.fits(hidden):
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValidationError(
                f"The blocks of {self.model_id} pass on {got}, and steering needs one residual stream "
                f"[batch, tokens, {self.width}]. A model that keeps several streams side by side (AltUp, "
                "hyper-connections) can be run and scored, but not read or edited at its layers."
            )
        if is_sharded(hidden):
            raise ValidationError(
                f"The residual stream of {self.model_id} is split over processes (sequence parallelism): an edit "
                "needs it whole in each. Load the model without it, such as by tp='auto'."
            )


def residual(args: _Args, kwargs: _Kwargs) -> Any:
    """The residual stream that a layer is called with: its first argument, or the only [B, T, d] given by name."""
    return args[0] if args else kwargs[_name(kwargs)]


def with_residual(new: Tensor, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
    """The arguments with another residual stream."""
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, _name(kwargs): new})


def others(args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
    """All arguments but the residual stream."""
    if args:
        return args[1:], kwargs
    name = _name(kwargs)
    return (), {key: value for key, value in kwargs.items() if key != name}


def _name(kwargs: _Kwargs) -> str:
    found = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3]
    if len(found) != 1:
        raise ValidationError(
            "A decoder layer is called with nothing but names, and the residual stream can't be told among "
            f"{', '.join(found or kwargs) or 'nothing'}: it is the only floating-point tensor [batch, tokens, width], "
            "or the first argument."
        )
    return found[0]


def given_out(output: Any) -> Any:
    """What a module gives out first: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


def with_given_out(new: Any, output: Any) -> Any:
    """The output with another first value."""
    return (new, *output[1:]) if isinstance(output, tuple) else new


def by_token(value: Any, rows: int, tokens: int) -> Tensor | None:
    """What a module gave as [rows, tokens, …], also where it works on tokens in one line; None where it isn't that."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if value.shape[:2] == (rows, tokens):
        return value
    return value.reshape(rows, tokens, *value.shape[1:]) if value.shape[0] == rows * tokens else None
