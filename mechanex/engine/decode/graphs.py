"""CUDA graphs of decoding steps, the latest ones, and what of a model they are true of."""

from __future__ import annotations

import gc
import logging
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import KEY, own_class

__all__ = ["Graphs", "Key", "autocast_on", "state_of"]

Key = tuple[int, int, frozenset[int], Hashable]
"""Of what a step is captured: how many rows, of how many columns, the layers at which they may be edited, and what is
noted for onlookers, which the key keeps alive as long as the step that reads it."""

_log = logging.getLogger(__name__)
_MOST = 32
_FEW_ROWS = 8  # up to so many rows a step takes about as long as with one
_PATIENCE = 64  # steps of other sizes than those captured
_PLAIN = (bool, int, float, str, bytes, type(None))
_TENSORS = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What torch keeps on every module and says nothing of what it computes, or is looked at otherwise.
_UNREAD = frozenset((KEY, *_TENSORS, *_HOOKS, *vars(nn.Module()), "warnings_issued")) - {"training"}


class Graphs:
    """Captured steps by what they are of. All share one memory pool: they run one after another.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: OrderedDict[Key, tuple[torch.cuda.CUDAGraph, Any]] = OrderedDict()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._missed: dict[Key, int] = {}
        self.captures = 0
        """How many steps were captured so far."""
        self.failure: str | None = None
        """Why this model's steps can't be captured, once that was tried in vain."""
        self._in_vain: set[Hashable] = set()

    @property
    def supported(self) -> bool:
        """Whether steps on this device can be captured at all."""
        return self._device.type == "cuda"

    def takes(self, key: Key) -> bool:
        """Whether such a step can be captured, as far as is known."""
        return self.supported and self.failure is None and key[3] not in self._in_vain

    def serving(self, key: Key) -> Key | None:
        """The captured step that serves for this one, or None where it has to be captured.

        More layers at which edits change nothing, and somewhat more rows and columns, cost less than a capture, unless
        the step is wanted again and again.
        """
        if key in self._kept:
            return key
        rows, columns, layers, wanted = key
        known = [
            one
            for one in self._kept
            if rows <= one[0] <= max(2 * rows, _FEW_ROWS)
            and columns <= one[1] <= 2 * columns
            and layers <= one[2]
            and wanted == one[3]
        ]
        if not known:
            return None
        best = min(known, key=lambda one: (one[0] * one[1], len(one[2])))
        if best[:2] != key[:2]:
            self._missed[key] = self._missed.get(key, 0) + 1
            if self._missed[key] > _PATIENCE:
                del self._missed[key]
                return None
        return best

    def replay(self, key: Key) -> Any:
        """Runs a captured step; its result stands in the same tensors every time, until any step runs again."""
        self._kept.move_to_end(key)
        graph, result = self._kept[key]
        graph.replay()
        return result

    def capture(self, key: Key, step: Callable[[], Any], undo: Callable[[], object]) -> bool:
        """Captures a step without having run it, to be replayed; whether that could be.

        Args:
            key: what it is of.
            step: works on tensors that stay, and gives the result.
            undo: takes back what running the step has changed.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        here = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), _uncollected():
                step()  # what is set up or compiled at a first run can't be captured
                undo()
                # torch.cuda.graph would empty the allocator's cache too, which costs more than the capture.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = step()
                finally:
                    graph.capture_end()
            here.wait_stream(self._stream)
        except Exception as error:  # a model's own code may do anything, and raise anything
            torch.cuda.synchronize(self._device)
            self.note_failure(key, error)
            return False
        self.captures += 1
        self._kept[key] = graph, result
        while len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return True

    def note_failure(self, key: Key, error: Exception) -> None:
        """Takes note that such a step can't be captured; one with onlookers says nothing of those without."""
        text, watched = f"{type(error).__name__}: {error}", bool(key[3])
        if watched:
            self._in_vain.add(key[3])
        else:
            self.failure = text
        _log.warning(
            "decoding steps%s are not captured as CUDA graphs, each is run by the host: %s",
            " in which these behaviors are watched" if watched else "",
            text,
        )

    def clear(self) -> None:
        """Forgets all of them."""
        self._in_vain.clear()
        self._kept.clear()
        self._pool = None  # a pool ends with the last graph of it
        self._missed.clear()
        self.failure = None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Runs a block in which Python collects no garbage: what that might free on the device can't be captured."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def autocast_on(device: torch.device) -> torch.dtype | None:
    """What torch's autocast computes in on this device, if it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def state_of(model: nn.Module) -> Hashable:
    """What of a model a captured step depends on: where its weights lie, and every plain setting of it and its modules.

    Numbers that are written into the weights count for nothing: a captured step reads them anew each time.
    """
    found: list[Hashable] = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        found += [id(module), _Same(own_class(module))]
        state = module.__dict__
        for name in _TENSORS:
            found += [0 if t is None else t.data_ptr() for t in state[name].values()]
        for name, value in state.items():
            if name in _UNREAD:
                continue
            kind = type(value)
            if kind in _PLAIN:
                found.append(value)
            elif kind in (list, tuple, set, dict):
                found.append(repr(value))
            elif isinstance(value, Tensor):
                found.append(value.data_ptr())
            elif name == "config" and hasattr(value, "__dict__"):
                configs[id(value)] = value
            elif callable(value) and not isinstance(value, nn.Module):
                found.append(_Same(value))  # the thing itself: its id may come to be another's
    found += [repr(sorted(vars(config).items(), key=_name)) for config in configs.values()]
    return tuple(found)


def _name(item: tuple[str, object]) -> str:
    return item[0]


class _Same:
    """A function or the like that is equal to itself alone, as long as it is there. It is not kept alive."""

    def __init__(self, thing: Any) -> None:
        parts = (thing.__func__, thing.__self__) if isinstance(thing, types.MethodType) else (thing,)
        self._parts = [_reference(part) for part in parts]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or len(self._parts) != len(other._parts):
            return False
        mine, theirs = [part() for part in self._parts], [part() for part in other._parts]
        return all(a is not None and a is b for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return 0


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:  # built-in functions are there for good
        return lambda: thing
