"""The one door for hooks on a model's modules: torch's compiled code notices them, and they can be found again.

Code that torch compiled doesn't look at empty tables of hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``), and
would go on without a hook that came later. It does check whether a ``forward`` lies on the module itself and which one,
so while hooks of ours are attached, one does that calls the module's own. Code without them waits meanwhile, and serves
again when they are gone; other models' code is not touched.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._private import torch as private

__all__ = ["OURS", "Attached", "after", "before", "detach_all", "hooks_of_others", "own_forward"]

_KEY = "_mechanex_hooks"
"""On a module: ids of our hooks, and the kind of each. A copy of the module has it too, as it has the hooks."""

_PLACED = "_mechanex_placed"
"""On a module while a ``forward`` of ours lies on it: the one that lay there before (accelerate's, say), or None."""

OURS = (_KEY, _PLACED)
"""Names of what the library keeps on modules that it hooks."""

_Hook = Callable[..., Any]


class Attached:
    """A hook on a module, until it is removed."""

    def __init__(self, module: nn.Module, handle: Any, kind: str) -> None:
        self._handle, self._module = handle, weakref.ref(module)
        module.__dict__.setdefault(_KEY, {})[handle.id] = kind
        _notice(module)

    def remove(self) -> None:
        """Takes the hook away; nothing happens where it is gone already."""
        self._handle.remove()
        module = self._module()
        if module is not None and module.__dict__.get(_KEY, {}).pop(self._handle.id, None) is not None:
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
    for module in model.modules():
        for hook_id in module.__dict__.pop(_KEY, {}):
            private.remove_hook(module, hook_id)
            n += 1
        _notice(module)
    return n


def own_forward(module: nn.Module) -> Any:
    """The ``forward`` that lies on the module itself, as others put it there, or None: ours is none of its own."""
    state = module.__dict__
    placed = _PLACED in state and getattr(state.get("forward"), "__func__", None) in _FORWARDS
    return state[_PLACED] if placed else state.get("forward")


def hooks_of_others(module: nn.Module) -> tuple[int, ...]:
    """Ids of the hooks on a module that aren't ours."""
    ours = vars(module).get(_KEY, {})
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
    """Puts in place the ``forward`` that tells compiled code which kinds of our hooks the module has."""
    state = module.__dict__
    if _PLACED in state:
        if getattr(state.get("forward"), "__func__", None) not in _FORWARDS:
            return  # someone has put another around it since, which calls it
        own = state.pop(_PLACED)
        del state["forward"]
        if own is not None:
            state["forward"] = own
    kinds = frozenset(state.get(_KEY, {}).values())
    function = getattr(type(module), "forward", None)
    if kinds and isinstance(function, types.FunctionType):
        state[_PLACED] = state.get("forward")
        state["forward"] = types.MethodType(_forwards(function)[kinds], module)


_FORWARDS: set[Any] = set()


@functools.cache
def _forwards(function: types.FunctionType) -> dict[frozenset[str], _Hook]:
    """For each set of kinds of hooks, a function that does what a class's ``forward`` does.

    They are told apart by their code, which is what compiled code looks at.
    """

    @functools.wraps(function)
    def forward_after_hooks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_PLACED)
        return function(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    @functools.wraps(function)
    def forward_before_hooks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_PLACED)
        return function(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    @functools.wraps(function)
    def forward_between_hooks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_PLACED)
        return function(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    made: dict[frozenset[str], _Hook] = {
        frozenset({"before"}): forward_after_hooks,
        frozenset({"after"}): forward_before_hooks,
        frozenset({"before", "after"}): forward_between_hooks,
    }
    _FORWARDS.update(made.values())
    return made
