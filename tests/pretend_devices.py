"""Devices that this machine lacks: tensors that say they are there, compute on the CPU, and refuse what devices refuse.

As on real devices, an operation takes tensors of one device, beside zero-dimensional ones on the CPU and indices from
there; and Apple's GPUs know no float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")
_ANYWHERE = META  # of a tensor that torch's own code makes to go with others
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::copy")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


@dataclass
class _Place:
    """Where a tensor is; shared by those that may share its memory while it is anywhere."""

    device: torch.device


class PretendTensor(Tensor):
    """A tensor whose values are ``held`` on the CPU while it says that it is on another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, place: _Place | None = None, requires_grad: bool = False) -> PretendTensor:
        if place is None:  # accelerate makes a parameter anew as what it was
            return torch.nn.Parameter(held, requires_grad)  # type: ignore[return-value]
        # To torch's own code it is without storage, which is what keeps that from reading it.
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )

    def __init__(self, held: Tensor, place: _Place | None = None, requires_grad: bool = False) -> None:
        if place is not None:
            self.held, self.place = held, place

    @property
    def device(self) -> torch.device:
        return self.place.device

    is_cpu = is_meta = property(lambda _: False)

    def get_device(self) -> int:
        return self.device.index or 0

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        return PretendTensor(self.held.clone(), self.place)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchDispatchMode):
    """Sees what is made of nothing, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Tells devices that are named in Python, which are meant, from those that torch's own code takes over."""

    meta_is_meant = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__setitem__ and isinstance(args[0], PretendTensor):
            index, value = _held(args[1:], [])
            args[0].held[index] = value
            return None
        data = func in (torch.tensor, torch.as_tensor)  # made on the CPU: torch would look for the device
        if func is Tensor.to and len(args) > 1:
            to = args[1]
            if isinstance(to, str):
                args = (args[0], torch.device(to), *args[2:])
            elif isinstance(to, Tensor):
                args = (args[0], to.device, to.dtype, *args[2:])
        args = tuple(_numbered(a) if isinstance(a, torch.device) else a for a in args)
        if func is Tensor.to and isinstance(args[0], PretendTensor) and args[1:] == (args[0].device,):
            return args[0].clone() if kwargs.get("copy") else args[0]
        if func is Tensor.to and isinstance(args[0], PretendTensor) and META in args[1:]:
            return torch.empty_like(args[0].held, device=META)  # where torch's own code believes that it is
        device = None if kwargs.get("device") is None else _numbered(torch.device(kwargs["device"]))
        if device is not None:
            kwargs["device"] = CPU if data else device
        before, _Names.meta_is_meant = _Names.meta_is_meant, META in (device, *args[1:2])
        try:
            made = func(*args, **kwargs)
        finally:
            _Names.meta_is_meant = before
        return made.to(device) if data and device is not None else made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []
    args_held, kwargs_held = _held(args, given), _held(kwargs, given)
    name, asked = func._schema.name, kwargs.get("device")
    weightless = any(type(t) is not PretendTensor and t.device == META for t in given)
    if weightless or (asked == META and _Names.meta_is_meant):
        return func(*args_held, **kwargs_held)
    if asked is not None:
        kwargs_held["device"] = CPU
    if asked is None:
        device = args[0].device if name in _COPIES else _common_device(name, args, given)
    else:
        device = _numbered(torch.device(asked))
    adrift = [t for t in given if isinstance(t, PretendTensor) and t.device == _ANYWHERE]
    if device == _ANYWHERE and asked is None:
        device = next((t.device for t in given if t.device != _ANYWHERE), device)
    for tensor in adrift:
        tensor.place.device = device  # and with it all that share its memory
    wrappers = {id(t.held): t for t in given if isinstance(t, PretendTensor)}
    place = adrift[0].place if adrift else _Place(device)

    def wrapped(out: Any) -> Any:
        if not isinstance(out, Tensor) or device == CPU:
            return out
        if device.type == "mps" and out.dtype is torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64: the MPS framework doesn't support float64."
            )
        return wrappers[id(out)] if id(out) in wrappers else PretendTensor(out, place)

    out = func(*args_held, **kwargs_held)
    return type(out)(map(wrapped, out)) if isinstance(out, list | tuple) else wrapped(out)


def _held(value: Any, seen: list[Tensor]) -> Any:
    """The value with what is held in place of what pretends; its tensors are added to ``seen``."""
    if isinstance(value, Tensor):
        seen.append(value)
        return value.held if isinstance(value, PretendTensor) else value
    if isinstance(value, list | tuple):
        return type(value)(_held(one, seen) for one in value)
    if isinstance(value, dict):
        return {name: _held(one, seen) for name, one in value.items()}
    return value


def _numbered(device: torch.device) -> torch.device:
    return device if device.type in ("cpu", "meta") else torch.device(device.type, device.index or 0)


def _common_device(name: str, args: Any, given: list[Tensor]) -> torch.device:
    """The device of an operation's tensors.

    Raises:
        RuntimeError: they are on several.
    """
    if name in _INDEXING and args[0].device != CPU:
        given = [t for t in given if t.device != CPU]
    devices = {t.device for t in given if t.dim() or t.device != CPU}
    if len(devices) > 1:
        devices -= {_ANYWHERE}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(map(str, devices))} in {name}"
        )
    return devices.pop() if devices else CPU


@contextmanager
def pretend_devices() -> Iterator[None]:
    """Inside, ``device="xpu"`` or ``"mps"`` gives tensors that pretend."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = CPU) -> torch.Generator:  # type: ignore[misc]
            return real(CPU)

    class Event:
        """Of a device that is always done."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        record = synchronize = wait = lambda *_: None

        def query(self) -> bool:
            return True

    def run(thread: threading.Thread) -> None:
        with _Names(), _Made():
            run_plainly(thread)

    real, run_plainly = torch.Generator, threading.Thread.run
    with pytest.MonkeyPatch.context() as patch, _Names(), _Made():
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "Event", Event)
        patch.setattr(threading.Thread, "run", run)
        yield
