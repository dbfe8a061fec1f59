"""The one table of steer cases; tests and benchmarks both read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Args = tuple[Tensor, "Tensor | None", Tensor, "Tensor | None", "Tensor | None"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SteerCase:
    """Shapes and layout of one call of ``steer``.

    Attributes:
        n_rows, width, n_edits, rank: T, d, K and r; rank 0 has no left and right.
        rows: ``"none"`` (edit 0 for all), ``"mixed"`` (some rows without an edit) or ``"off"`` (none has).
        layout: ``"plain"``, ``"sliced"`` (rows of a wider tensor), ``"skipping"`` (every other row),
            ``"offset"`` (starts one element into its memory) or ``"transposed"`` (columns are not adjacent).
        table: dtype of the edits; None for hidden's.
    """

    n_rows: int
    width: int
    n_edits: int = 1
    rank: int = 0
    rows: str = "none"
    layout: str = "plain"
    table: torch.dtype | None = None

    def __str__(self) -> str:
        table = "" if self.table is None else f"-{str(self.table).removeprefix('torch.')}"
        return f"{self.n_rows}x{self.width}-K{self.n_edits}-r{self.rank}-{self.rows}-{self.layout}{table}"

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
        """Arguments of ``steer`` for this case, drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        table = self.table or dtype
        hidden = self._lay_out(draw(self.n_rows, self.width).to(device, dtype))
        bias = draw(self.n_edits, self.width).to(device, table)
        left = right = None
        if self.rank:
            left = (draw(self.n_edits, self.rank, self.width) / self.width**0.5).to(device, table)
            right = draw(self.n_edits, self.rank, self.width).to(device, table)
        rows = None
        if self.rows == "mixed":
            rows = torch.randint(-1, self.n_edits, (self.n_rows,), generator=generator, dtype=torch.int32).to(
                device
            )
        elif self.rows == "off":
            rows = torch.full((self.n_rows,), -1, dtype=torch.int32, device=device)
        return hidden, rows, bias, left, right

    def _lay_out(self, hidden: Tensor) -> Tensor:
        n, d = hidden.shape
        if self.layout == "sliced":
            return hidden.new_full((n, d + 5), float("nan")).index_copy_(1, _span(hidden, 2, d), hidden)[
                :, 2 : d + 2
            ]
        if self.layout == "skipping":
            return hidden.new_full((2 * n, d), float("nan")).index_copy_(0, _span(hidden, 0, n) * 2, hidden)[
                ::2
            ]
        if self.layout == "offset":
            return torch.cat([hidden.new_zeros(1), hidden.reshape(-1)])[1:].view(n, d)
        if self.layout == "transposed":
            return hidden.T.contiguous().T
        return hidden


def _span(hidden: Tensor, start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, device=hidden.device)


# Aligned and odd widths, one token, nothing at all, many edits; every rank that a kernel treats differently.
CASES = (
    *(SteerCase(7, width, rank=rank) for width in (4, 31, 47, 64, 123, 256) for rank in (0, 1, 4)),
    *(SteerCase(5, 123, n_edits=3, rank=rank, rows="mixed") for rank in (0, 1, 2, 3, 5, 9)),
    SteerCase(1, 64),
    SteerCase(1, 64, rank=1),
    SteerCase(1, 47, n_edits=2, rank=4, rows="mixed"),
    SteerCase(0, 64),
    SteerCase(0, 64, n_edits=2, rank=2, rows="mixed"),
    SteerCase(3, 0, rank=1),
    SteerCase(6, 47, n_edits=2, rank=2, rows="off"),
    SteerCase(65, 31, n_edits=40, rank=2, rows="mixed"),
    SteerCase(40, 1024, n_edits=4, rank=1, rows="mixed"),
    SteerCase(9, 64, rank=64),
    *(
        SteerCase(6, 47, n_edits=2, rank=rank, rows="mixed", layout=layout)
        for layout in ("sliced", "skipping", "offset", "transposed")
        for rank in (0, 3)
    ),
    SteerCase(6, 47, rank=1, layout="sliced"),
    SteerCase(6, 64, n_edits=2, rank=1, rows="mixed", table=torch.float32),
    SteerCase(6, 64, table=torch.float32),
    SteerCase(6, 31, n_edits=2, rank=2, rows="mixed", table=torch.float64),
)

# Small enough for finite differences.
GRADIENT_CASES = (
    SteerCase(3, 4),
    SteerCase(3, 5, rank=2),
    SteerCase(4, 5, n_edits=3, rows="mixed"),
    SteerCase(5, 4, n_edits=2, rank=2, rows="mixed"),
    SteerCase(40, 3, n_edits=34, rank=1, rows="mixed"),
)

# A decode step, a mixed decode batch, a prompt.
BENCHMARK_CASES = (
    SteerCase(1, 2048),
    SteerCase(1, 2048, rank=1),
    SteerCase(64, 2048, rank=1),
    SteerCase(64, 2048, n_edits=16, rank=1, rows="mixed"),
    SteerCase(2048, 2048),
    SteerCase(2048, 2048, rank=1),
    SteerCase(2048, 2048, rank=4),
    SteerCase(2048, 2048, n_edits=16, rank=1, rows="mixed"),
)
