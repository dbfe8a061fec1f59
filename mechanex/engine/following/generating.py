"""A model's ``generate``, watched: the length and number of its prompts, which single calls of the model don't tell."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import cached_tokens, find_cache
from .calls import Followed, Prompts
from .facts import flat

__all__ = ["watch_generate"]


def watch_generate(modules: Iterable[nn.Module], followed: Followed, width: int) -> list[_Watched]:
    """Tells ``followed`` of the prompts of every ``generate`` of these modules, until the handles are removed.

    Args:
        modules: those without a ``generate`` are left out.
        followed: who follows the model.
        width: d_model.
    """
    found = {id(m): m for m in modules if callable(getattr(type(m), "generate", m.__dict__.get("generate")))}
    return [_Watched(module, followed, width) for module in found.values()]


class _Watched:
    """Stands in for a module's ``generate`` while it is followed."""

    def __init__(self, module: nn.Module, followed: Followed, width: int) -> None:
        self._module, self._followed, self._width = weakref.ref(module), followed, width
        self._before: Callable[..., Any] | None = module.__dict__.get("generate")
        self.__doc__ = self._original().__doc__
        object.__setattr__(module, "generate", self)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original())

    def _original(self) -> Callable[..., Any]:
        if self._before is not None:
            return self._before
        module: Any = self._module()
        method: Callable[..., Any] = types.MethodType(type(module).generate, module)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._followed.generating(read_prompts(args, kwargs, self._width)):
            return self._original()(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model generates by itself.
        copied: Any = memo.get(id(self._module()))
        return self if copied is None else types.MethodType(type(copied).generate, copied)

    def remove(self) -> None:
        """Puts the module's own ``generate`` back."""
        module = self._module()
        if module is None or module.__dict__.get("generate") is not self:
            return
        if self._before is None:
            object.__delattr__(module, "generate")
        else:
            object.__setattr__(module, "generate", self._before)


def read_prompts(args: tuple[Any, ...], kwargs: dict[str, Any], width: int) -> Prompts:
    """The prompts of a ``generate`` by its arguments: the widest token ids, mask or embeddings, or texts."""
    values = flat(args, kwargs.values())
    rows = [v for v in values if isinstance(v, Tensor) and _is_rows(v, width)]
    if not rows:
        texts = next((v for v in args if isinstance(v, str | list)), None)
        count = None if texts is None else 1 if isinstance(texts, str) else len(texts)
        return Prompts(None, count)
    widest = max(rows, key=lambda v: v.shape[1])
    columns, cache = widest.shape[1], find_cache(values)
    held = None if cache is None else cached_tokens(cache)
    # Beside a filled cache generate takes the whole text or what is new of it.
    return Prompts(columns + held if held and columns <= held else columns, widest.shape[0])


def _is_rows(value: Tensor, width: int) -> bool:
    if value.ndim == 3:
        return value.is_floating_point() and value.shape[2] == width
    return value.ndim == 2 and (value.dtype == torch.bool or not value.dtype.is_floating_point)
