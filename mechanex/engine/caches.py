"""A model's cache, known by what it can do: libraries rename the argument that it comes as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

__all__ = ["cached_tokens", "find_cache", "is_cache", "returned_caches"]

_OTHER_KINDS = (Tensor, nn.Module, Mapping, Set, str, bytes, type)


def is_cache(value: object) -> bool:
    """Whether this object keeps what a model made of earlier tokens: it tells its length, or changes its tensors."""
    if value is None or isinstance(value, _OTHER_KINDS):
        return False
    if callable(getattr(value, "get_seq_length", None)):
        return True
    changes = any(callable(getattr(value, ability, None)) for ability in ("update", "reset"))
    return changes and next(_tensors(_parts(value)), None) is not None


def find_cache(values: Iterable[object]) -> Any:
    """The first cache among the arguments of a call, or None."""
    return next((value for value in values if is_cache(value)), None)


def returned_caches(out: Any) -> dict[str, Any]:
    """The caches of a model's output by the name under which the next call takes them.

    Raises:
        TypeError: there is none.
    """
    found = {name: value for name, value in _fields(out) if is_cache(value)}
    if not found:
        raise TypeError(f"{type(out).__name__} holds no cache")
    return found


def _fields(out: Any) -> Iterator[tuple[str, Any]]:
    yield from out.items() if isinstance(out, Mapping) else vars(out).items()


def cached_tokens(cache: Any) -> int | None:
    """How many tokens a cache holds, padding included; None where it doesn't tell, as recurrent states don't."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        pass
    started = getattr(cache, "has_previous_state", None)
    if callable(started):
        started = started()
    return 0 if started is False or (started is None and _blank(cache)) else None


def _blank(cache: Any) -> bool:
    """Whether a cache holds nothing but zeros, as states do before a first token."""
    tensors = list(_tensors(_parts(cache)))
    return bool(tensors) and not any(bool(tensor.any()) for tensor in tensors)


def _parts(value: object) -> Iterable[Any]:
    return getattr(value, "__dict__", {}).values()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _tensors(value.values() if isinstance(value, dict) else value)
