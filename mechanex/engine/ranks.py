"""Processes that share one job, as torchrun starts them: packs are dealt to them, and all of them get the whole result.

Nothing is to be configured: where ``torchrun`` or ``accelerate launch`` has started several processes, each calls the
same functions with the same arguments. In one process nothing of torch.distributed is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._private.torch import default_store, join_job
from ..errors import MechanexError, ValidationError
from ..launched import global_rank
from .pack import Pack
from .pauses import pause
from .sharded import is_split

if TYPE_CHECKING:
    from .models.adapter import ModelAdapter

__all__ = ["SINGLE", "Ranks", "alone", "by_stretch", "current_ranks", "dealt"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, and which of them this one is.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        split: the model lies in them piece by piece, so that each pass needs them all: nothing is dealt, and every
            process computes everything.
    """

    rank: int = 0
    size: int = 1
    split: bool = False

    @property
    def sharing(self) -> int:
        """How many processes work is dealt to."""
        return 1 if self.split else self.size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of some pieces of work are this process's, in order: the same deal in every process.

        Args:
            sizes: of each piece, such as its tokens; the largest are dealt first, to whoever has least.
        """
        if self.sharing == 1:
            return list(range(len(sizes)))
        loads, found = [0] * self.size, []
        for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            to = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[to] += sizes[piece]
            if to == self.rank:
                found.append(piece)
        return sorted(found)

    def stretches(self, n: int, at_once: int) -> list[range]:
        """This process's of the stretches that n rows fall into, which are dealt in turn.

        Args:
            n: rows.
            at_once: most rows of a stretch.
        """
        size = max(1, min(at_once, math.ceil(n / self.sharing)))
        every = [range(start, min(n, start + size)) for start in range(0, n, size)]
        return every if self.sharing == 1 else every[self.rank :: self.size]

    def each(
        self, mine: Sequence[_T], n: int, desc: str, *, unit: str = "batch", progress: bool = False
    ) -> Iterator[_T]:
        """This process's pieces of work, with a pause for others before each; ends where another process has failed.

        Args:
            mine: the pieces.
            n: pieces of all processes, whose progress one bar shows: they come along alike.
            desc, unit: what it says.
            progress: show it, in the first process.
        """
        with tqdm(total=n, desc=desc, unit=unit, disable=not (progress and self.first)) as bar:
            for done, piece in enumerate(mine, 1):
                pause()
                self._heed()
                yield piece
                bar.update(n * done // len(mine) - bar.n)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the parts of all processes that share the work, of one shape, the same bits in all of them.

        Sums are in float64 and in the order of the ranks.
        """
        if self.sharing == 1:
            return tensor
        import torch.distributed as dist

        mine = tensor.detach().to("cpu", torch.float64).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with _reaching():
            dist.all_gather(parts, mine)
        return torch.stack(parts).sum(0).to(tensor)

    def added(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors that are too large for :meth:`total`, in place and in their dtype; same bits everywhere."""
        if self.sharing == 1:
            return
        import torch.distributed as dist

        # NCCL refuses processes that share a GPU.
        n_local, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        with _reaching():
            for tensor in tensors:
                if tensor.is_cuda and n_local > n_gpus:
                    sums = tensor.cpu()
                    dist.all_reduce(sums)
                    tensor.copy_(sums)
                else:
                    dist.all_reduce(tensor)

    def gathered(self, given: _T) -> list[_T]:
        """What every process that shares the work found, by rank; anything that can be pickled."""
        return [given] if self.sharing == 1 else self.told(given)

    def told(self, given: _T) -> list[_T]:
        """What every process says, by rank, whether they share the work or not."""
        if self.size == 1:
            return [given]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _reaching():
            dist.all_gather_object(found, given)
        return found

    def check_begin(self, steps: object) -> None:
        """Refuses to go on from checkpoints that differ.

        Args:
            steps: how many steps this process has made already; anything that can be pickled and compared.

        Raises:
            ValidationError: another process has made other ones.
        """
        found = self.told(steps)
        if any(one != found[0] for one in found):
            raise ValidationError(
                f"the processes begin at other steps, {found}: put the checkpoint where all of them find the same file."
            )

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What the first process makes, in all of them; the others make nothing, unless making it needs them."""
        if self.size == 1:
            return make()
        with self.together():
            made = make() if self.first or self.split else None
        import torch.distributed as dist

        box = [made]
        with _reaching():
            dist.broadcast_object_list(box, src=0)
        found: Any = box[0]
        return found  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block that fails in all processes where it fails in one, so that none waits for it in vain.

        Raises:
            MechanexError: it failed in another process; says which, and how.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except _FailedElsewhere:
            pass
        except Exception as error:
            failure = error
            default_store().set(_failed(), b"1")
        try:
            told = self.told(None if failure is None else f"{type(failure).__name__}: {failure}")
        except MechanexError:
            if failure is None:
                raise
            raise failure from None
        if any(text is not None for text in told):
            _failures.append(told)
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text is not None:
                raise MechanexError(
                    f"process {rank} of {self.size} failed, and this one stops with it: {text}"
                )

    def _heed(self) -> None:
        """Leaves the block of :meth:`together` where another process has left it with an error."""
        if self.size > 1 and default_store().check([_failed()]):
            raise _FailedElsewhere


class _FailedElsewhere(Exception):
    """Another process has failed; ends in :meth:`Ranks.together`, which tells how."""


_failures: list[Any] = []  # that all processes know of


def _failed() -> str:
    """The name by which a process says that it has failed, once for every time that all went on."""
    return f"mechanex/failed/{len(_failures)}"


@contextmanager
def _reaching() -> Iterator[None]:
    """Runs a block in which processes meet.

    Raises:
        MechanexError: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:  # what torch raises has no narrower type on every backend
        raise MechanexError(
            "another process of this job can't be reached: it was ended, or its machine is gone. What was finished by "
            f"then is kept; start the job again to go on from there. ({str(error).splitlines()[0][:200]})"
        ) from error


SINGLE = Ranks()
_alone: ContextVar[bool] = ContextVar("mechanex_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Runs a block in this process by itself, whatever others there are: for what only some of them do."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def current_ranks(adapter: ModelAdapter | None) -> Ranks:
    """The processes that a call made now is shared by; the first call joins them.

    Args:
        adapter: the model that the work is done on; None for what no model takes part in.

    Raises:
        ValidationError: the model lies in several processes, and this one works alone.
    """
    if global_rank() is None:
        return SINGLE
    split = adapter is not None and is_split(adapter.hf_model)
    if _alone.get():
        if split:
            assert adapter is not None
            raise ValidationError(
                f"{adapter.model_id} is split over the processes of the job, and runs only where all of them call it: "
                "not inside mechanex.distributed.alone()."
            )
        return SINGLE
    import torch.distributed as dist

    join_job()
    return Ranks(dist.get_rank(), dist.get_world_size(), split)


def dealt(packs: Sequence[Pack], ranks: Ranks, desc: str, *, progress: bool = False) -> Iterator[Pack]:
    """This process's packs, with a pause for others before each.

    Args:
        packs: of all processes.
        ranks: the processes.
        desc: what the progress bar says.
        progress: show one, in the first process.
    """
    mine = [packs[i] for i in ranks.share([pack.input_ids.numel() for pack in packs])]
    return ranks.each(mine, len(packs), desc, progress=progress)


def by_stretch(ranks: Ranks, n: int, at_once: int, run: Callable[[range], Sequence[_T]]) -> list[_T]:
    """What ``run`` gives for each of n rows, in order, which processes share in stretches.

    Args:
        ranks: the processes.
        n: rows.
        at_once: most rows of a stretch.
        run: from a stretch to one result for each of its rows; in this process for its stretches alone.
    """
    with ranks.together():
        mine = [run(stretch) for stretch in ranks.each(ranks.stretches(n, at_once), n, "Rows")]
    return list(chain.from_iterable(chain.from_iterable(zip_longest(*ranks.gathered(mine), fillvalue=()))))
