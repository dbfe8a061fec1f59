"""How much memory there is, so that what is kept between passes can be bounded in bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["free_bytes", "tensor_bytes", "total_bytes"]

_UNKNOWN = 4 * 2**30  # where a system tells nothing of its memory


def total_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of the machine for any other device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return _UNKNOWN


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device: on a GPU with what torch's allocator holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return total_bytes(device) // 2


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold, memory that several of them share counted once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
