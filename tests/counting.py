"""How many operations of torch a call runs, by name: what a GPU is asked to launch, views aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["counted_ops", "kernels"]

# What only looks at memory in another way, or asks for some.
_VIEWS = (
    " alias as_strided detach empty empty_like empty_strided expand lift_fresh new_empty permute select slice split "
    "split_with_sizes squeeze squeeze_ t transpose unbind unsqueeze view _unsafe_view "
)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def counted_ops(run: Callable[[], object]) -> Counter[str]:
    """Operations by name, on whatever device."""
    with _Counting() as counting:
        run()
    return counting.counts


def kernels(counts: Counter[str]) -> int:
    """Those that launch something."""
    return sum(n for name, n in counts.items() if f" {name} " not in _VIEWS)
