"""The one door for hooks on a model's modules: torch's compiled code notices them, and they can be found again.

Code that torch compiled doesn't look at empty tables of hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``), and
would go on without a hook that came later. It does check the class of every module, so a module with hooks of ours is
of a class that differs from its own in nothing else; torch's parametrizations and sharding give modules such ones too.
The ``forward`` is left to others who wrap it: offloading, casts, compilers. Code without hooks waits meanwhile, and
serves again when they are gone; other models' code is not touched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._private import torch as private
from ..errors import ValidationError

__all__ = [
    "KEY",
    "Attached",
    "after",
    "before",
    "changes",
    "detach_all",
    "hooks_of_others",
    "hooks_on",
    "hooks_on_all",
    "own_class",
]

KEY = "_mechanex_hooks"
"""On a module: ids of our hooks, and the kind of each. A copy of the module has it too, as it has the hooks."""

_Hook = Callable[..., Any]

_n_changes = 0


class Attached:
    """A hook on a module, until it is removed."""

    def __init__(self, module: nn.Module, handle: Any, kind: str) -> None:
        self._handle, self._module = handle, weakref.ref(module)
        _count()
        module.__dict__.setdefault(KEY, {})[handle.id] = kind
        try:
            _notice(module)
        except TypeError as error:
            self.remove()
            raise ValidationError(
                f"A {type(module).__name__} can't be hooked: its class can't be exchanged for one of the same kind "
                f"({error}), and code that torch compiled would go on without the hook. Wrap it in a module of an "
                "ordinary class."
            ) from error

    def remove(self) -> None:
        """Takes the hook away; nothing happens where it is gone already."""
        self._handle.remove()
        _count()
        module = self._module()
        if module is not None and module.__dict__.get(KEY, {}).pop(self._handle.id, None) is not None:
            _notice(module)


def before(
    module: nn.Module, hook: _Hook, *, kwargs: bool = True, first: bool = False, traced: bool = False
) -> Attached:
    """Calls a hook before every call of a module.

    Args:
        module: a part of a model.
        hook: as ``register_forward_pre_hook`` takes it.
        kwargs: whether it takes keyword arguments too.
        first: put it in front of the hooks that are there.
        traced: let compilers look into it: a function of tensors, without effects of its own. Other hooks run between
            two pieces of compiled code.
    """
    called = hook if kwargs else _with_kwargs(hook)
    called = called if traced else _uncompiled(called)
    return Attached(
        module, module.register_forward_pre_hook(called, with_kwargs=True, prepend=first), "before"
    )


def after(
    module: nn.Module, hook: _Hook, *, kwargs: bool = False, always: bool = False, traced: bool = False
) -> Attached:
    """Calls a hook after every call of a module.

    Args:
        module: a part of a model.
        hook: as ``register_forward_hook`` takes it.
        kwargs: whether it takes keyword arguments too.
        always: also when the call ends with an exception.
        traced: as for :func:`before`.
    """
    called = hook if traced else _uncompiled(hook)
    handle = module.register_forward_hook(called, with_kwargs=kwargs, always_call=always)
    return Attached(module, handle, "after")


def detach_all(model: nn.Module) -> int:
    """Removes every hook of ours from a model, whoever holds the handles; returns how many there were."""
    n = 0
    _count()
    for module in model.modules():
        for hook_id in module.__dict__.pop(KEY, {}):
            private.remove_hook(module, hook_id)
            n += 1
        _notice(module)
    return n


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what hooks of ours make of it."""
    return _own.get(type(module), type(module))


def changes() -> int:
    """A count that changes whenever a hook of ours comes or goes, on whatever model."""
    return _n_changes


def _count() -> None:
    global _n_changes
    _n_changes += 1


def hooks_on(model: nn.Module) -> frozenset[int]:
    """Ids of the hooks on a model and its parts, whoever's they are.

    But for transformers' own: they stay on every model that was asked for hidden states once, and do nothing until the
    next time.
    """
    from .._private.transformers import CAPTURING

    return frozenset(
        i
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for i, hook in hooks.items()
        if getattr(hook, "__module__", None) != CAPTURING
    )


def hooks_on_all() -> frozenset[int]:
    """Ids of the hooks that torch calls with every module of the process."""
    return frozenset(private.global_hooks())


def hooks_of_others(module: nn.Module) -> tuple[int, ...]:
    """Ids of the hooks on a module that aren't ours."""
    ours = vars(module).get(KEY, {})
    return tuple(
        i for hooks in (module._forward_pre_hooks, module._forward_hooks) for i in hooks if i not in ours
    )


def _with_kwargs(hook: _Hook) -> _Hook:
    """A pre-hook without keyword arguments as one that leaves them be: all of ours are of one form."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = hook(module, args)
        return None if new is None else (new if isinstance(new, tuple) else (new,), kwargs)

    return called


def _uncompiled(hook: _Hook) -> _Hook:
    outside = _outside()

    def called(*args: Any) -> Any:
        return outside(hook, *args) if torch.compiler.is_compiling() else hook(*args)

    return called


@functools.cache
def _outside() -> _Hook:
    """Calls a function uncompiled. There is one for all hooks, so that compiled code fits whichever hook is there."""

    def outside(function: _Hook, *args: Any) -> Any:
        return function(*args)

    disabled: _Hook = torch.compiler.disable(outside)  # type: ignore[no-untyped-call]
    return disabled


def _notice(module: nn.Module) -> None:
    """Gives a module the class that tells compiled code which kinds of our hooks it has."""
    own: Any = own_class(module)
    kinds = frozenset(module.__dict__.get(KEY, {}).values())
    wanted = _hooked(own, kinds) if kinds else own
    if wanted is not type(module):
        object.__setattr__(module, "__class__", wanted)


_own: dict[type[Any], type[nn.Module]] = {}
"""From our classes to those that they stand for."""


class _Quiet:
    """Keeps classes from noticing that one is derived from them: they may ask for arguments, or keep lists."""

    def __init_subclass__(cls) -> None:
        pass


@functools.cache
def _hooked(own: type[Any], kinds: frozenset[str]) -> type[nn.Module]:
    """A class like ``own`` for modules with hooks of these kinds."""
    same = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(own)
    made: type[nn.Module] = kind(own.__name__, (_Quiet, own), same)
    _own[made] = own
    return made
