"""The one table of op cases; tests and benchmarks both read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mechanex.ops.edits import StackedEdits
from mechanex.ops.encoder import FeatureEncoder
from mechanex.ops.gate import KINDS, Gate
from mechanex.ops.head import Head

Args = tuple[Tensor, "Tensor | None", Tensor, "Tensor | None", "Tensor | None"]
ManyArgs = tuple[
    Tensor,
    "Tensor | None",
    "Tensor | None",
    Tensor,
    "Tensor | None",
    "Tensor | None",
    "Gate | None",
]
LogprobArgs = tuple[Tensor, Tensor, Tensor, "Tensor | None", float, "float | None", float]


def with_head(args: LogprobArgs) -> tuple[Tensor, Head, Tensor]:
    """The arguments of ``completion_logprob`` as backends take them."""
    hidden, weight, target, *rest = args
    return hidden, Head(weight, *rest), target


def with_edits(args: ManyArgs) -> tuple[Tensor, Tensor | None, Tensor | None, StackedEdits]:
    """The arguments of ``steer_many`` as backends take them."""
    hidden, rows, strength, *edits = args
    return hidden, rows, strength, StackedEdits(*edits)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pairs(cases: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Each case with each of the others, as parameters of a test.

    Under Triton's interpreter, which is slow, each case and each of the others is there; a case of a kind that was
    there before is marked ``long``.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return [(case, other) for case in cases for other in others]
    in_turn = [(case, others[i % len(others)]) for i, case in enumerate(cases)]
    kinds = [case.kind for case in cases]
    few = [
        pytest.param(*pair, marks=[pytest.mark.long] if kinds[i] in kinds[:i] else [])
        for i, pair in enumerate(in_turn)
    ]
    return few + [pair for other in others if (pair := (cases[0], other)) not in in_turn]


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

    @property
    def kind(self) -> tuple[Any, ...]:
        """What kernels tell apart: cases that agree in it take the same branches."""
        ranks = sum(self.rank > limit for limit in (0, 1, 4, 16))
        empty, aligned = self.n_rows * self.width == 0, self.width % 16 == 0
        return ranks, self.rows, self.layout, self.table, self.n_edits > 16, self.n_rows == 1, empty, aligned

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
    SteerCase(5, 64, n_edits=4, rank=1, rows="mixed"),
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


@dataclass(frozen=True)
class ManyCase:
    """One call of ``steer`` with several edits a row, strengths or gates.

    Attributes:
        base: T, d, K, r, rows (``"none"``: edit 0 for all), layout and the tables' dtype.
        edits: m, edits of each row.
        strength: whether every edit of a row has one.
        gates: kinds, given to the edits in turn; empty for no gates.
    """

    base: SteerCase
    edits: int = 1
    strength: bool = False
    gates: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.base}-m{self.edits}{'-s' if self.strength else ''}{''.join(f'-{g}' for g in self.gates)}"
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What kernels tell apart."""
        return self.base.kind, self.edits, self.strength, self.gates

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> ManyArgs:
        """Arguments of the op ``steer_many``, drawn from ``seed``; rows and strengths are ``[T, m]``."""
        hidden, rows, bias, left, right = self.base.make(dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        shape, n_edits, table = (self.base.n_rows, self.edits), self.base.n_edits, bias.dtype
        if self.base.rows == "mixed":
            rows = torch.randint(-1, n_edits, shape, generator=generator, dtype=torch.int32).to(device)
        elif rows is not None:
            rows = rows[:, None].expand(shape).contiguous()
        strength = gate = None
        if self.strength:
            strength = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, table)
        if self.gates:
            weight = torch.randn(bias.shape, generator=generator, dtype=torch.float64)
            offset = torch.randn(n_edits, generator=generator, dtype=torch.float64)
            kinds = [KINDS.index(self.gates[k % len(self.gates)]) for k in range(n_edits)]
            gate = Gate(
                torch.tensor(kinds, dtype=torch.int32, device=device),
                (weight / max(self.base.width, 1) ** 0.5).to(device, table),
                offset.to(device, table),
            )
        return hidden, rows, strength, bias, left, right, gate


# One, two and three edits a row, with holes; strengths; each gate alone and all together; every rank that a kernel
# treats differently; one edit a row where rows and edits can be read 16 bytes at a time; nothing at all; rows that lie
# apart.
_MIXED = SteerCase(9, 47, n_edits=6, rank=1, rows="mixed")
MANY_CASES = (
    *(
        ManyCase(SteerCase(7, 123, n_edits=5, rank=rank, rows="mixed"), edits, strength, gates)
        for rank in (0, 1, 4, 6)
        for edits, strength, gates in ((1, True, ()), (2, False, ()), (3, True, KINDS))
    ),
    *(
        ManyCase(SteerCase(9, 64, n_edits=3, rank=rank, rows="mixed", table=table), 1, True)
        for rank in (0, 1, 2)
        for table in (None, torch.float32)
    ),
    ManyCase(SteerCase(3, 4096, n_edits=2, rank=3, rows="mixed"), 1, True),
    *(ManyCase(_MIXED, 2, True, (kind,)) for kind in KINDS),
    *(ManyCase(SteerCase(5, 64, rank=rank), 1, True, ("relu",)) for rank in (0, 2)),
    ManyCase(SteerCase(5, 64, rank=1), 1, False, ("norm",)),
    ManyCase(SteerCase(1, 256, n_edits=2, rank=4, rows="mixed"), 3, True, ("sigmoid", "none")),
    ManyCase(SteerCase(0, 64, n_edits=2, rank=2, rows="mixed"), 2, True, KINDS),
    ManyCase(SteerCase(3, 0, n_edits=2, rank=1, rows="mixed"), 2, True, KINDS),
    ManyCase(SteerCase(6, 47, n_edits=2, rank=2, rows="off"), 3, True, KINDS),
    ManyCase(SteerCase(12, 256, n_edits=40, rank=2, rows="mixed"), 2, True, KINDS),
    ManyCase(SteerCase(4, 64, n_edits=2, rank=64, rows="mixed"), 2, True, KINDS),
    *(
        ManyCase(SteerCase(6, 47, n_edits=3, rank=3, rows="mixed", layout=layout), 2, True, KINDS)
        for layout in ("sliced", "skipping", "offset", "transposed")
    ),
    ManyCase(SteerCase(6, 64, n_edits=5, rank=1, rows="mixed", table=torch.float32), 2, True, KINDS),
    ManyCase(SteerCase(6, 31, n_edits=5, rank=2, rows="mixed", table=torch.float64), 2, True, KINDS),
)

# Small enough for finite differences.
MANY_GRADIENT_CASES = (
    ManyCase(SteerCase(4, 3), 1, True, ("sigmoid",)),
    ManyCase(SteerCase(3, 4, n_edits=2, rank=1, rows="mixed"), 2),
    ManyCase(SteerCase(3, 4, n_edits=5, rank=2, rows="mixed"), 3, True, KINDS),
)


@dataclass(frozen=True)
class LogprobCase:
    """Shapes, numbers and layout of one call of ``completion_logprob``.

    Attributes:
        n_rows, width, n_vocab: N, d and V.
        bias: whether there is one.
        scale, softcap, coldness: the op's arguments.
        layout: ``"plain"``; hidden may be part of a wider tensor (``"sliced"``) or every other row
            (``"skipping"``), the weight's columns adjacent (``"transposed"``), or nothing contiguous (``"strided"``).
    """

    n_rows: int
    width: int
    n_vocab: int
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    coldness: float = 1.0
    layout: str = "plain"

    def __str__(self) -> str:
        numbers = [f"s{self.scale}", f"cap{self.softcap}", f"c{self.coldness}"]
        plain = ["s1.0", "capNone", "c1.0"]
        parts = [f"{self.n_rows}x{self.width}x{self.n_vocab}", *(n for n in numbers if n not in plain)]
        return "-".join([*parts, *(["bias"] if self.bias else []), self.layout])

    @property
    def kind(self) -> tuple[Any, ...]:
        """What kernels tell apart."""
        numbers = (self.scale != 1.0, self.softcap is None, self.coldness != 1.0, self.coldness > 0)
        return self.n_rows, self.width, self.n_vocab, self.bias, *numbers, self.layout

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LogprobArgs:
        """Arguments of ``completion_logprob`` for this case, drawn from ``seed``; products have a deviation of 3."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden = draw(self.n_rows, self.width).to(device, dtype)
        weight = (3 * draw(self.n_vocab, self.width) / max(self.width, 1) ** 0.5).to(device, dtype)
        bias = draw(self.n_vocab).to(device, dtype) if self.bias else None
        target = torch.randint(0, max(self.n_vocab, 1), (self.n_rows,), generator=generator).to(device)
        if self.layout in ("sliced", "skipping"):
            hidden = SteerCase(self.n_rows, self.width, layout=self.layout)._lay_out(hidden)
        if self.layout in ("transposed", "strided"):
            weight = weight.T.contiguous().T
        if self.layout == "strided":
            hidden = hidden.T.contiguous().T
            bias = None if bias is None else torch.stack([bias, bias * torch.nan], 1)[:, 0]
            target = torch.stack([target, target - 1000], 1)[:, 0]
        return hidden, weight, target, bias, self.scale, self.softcap, self.coldness


# Nothing, one row, odd shapes, one token, a chunk's end and a block's; every number that changes the curve.
LOGPROB_CASES = (
    *(LogprobCase(n, d, v) for n in (0, 1, 4, 47) for d, v in ((31, 47), (123, 1000), (64, 64), (64, 1))),
    *(
        LogprobCase(4, 31, 1000, bias, scale, softcap, coldness)
        for bias in (False, True)
        for scale, softcap, coldness in (
            (0.25, None, 1.0),
            (1.0, 5.0, 1.0),
            (1.0, None, 3.0),
            (2.0, 4.0, 2.5),
            (-1.5, 30.0, -0.5),
            (1.0, None, -1.0),
        )
    ),
    LogprobCase(4, 31, 47, bias=True),
    LogprobCase(4, 31, 47, bias=True, softcap=5.0, coldness=0.0),
    LogprobCase(4, 31, 47, coldness=0.0),
    LogprobCase(2, 31, 8193, bias=True),
    LogprobCase(3, 64, 50257, softcap=30.0),
    LogprobCase(1030, 5, 47, bias=True),
    LogprobCase(3, 0, 5, bias=True),
    *(
        LogprobCase(6, 47, 123, True, 1.0, 5.0, layout=layout)
        for layout in ("sliced", "skipping", "transposed", "strided")
    ),
)

# Small enough for finite differences.
LOGPROB_GRADIENT_CASES = (
    LogprobCase(3, 4, 7),
    LogprobCase(3, 4, 150, bias=True),
    LogprobCase(5, 3, 150, True, 0.5, 4.0, 2.0),
    LogprobCase(2, 4, 7, softcap=2.0, coldness=-1.5),
    LogprobCase(2, 3, 1),
)

# Tens to thousands of scored tokens, a small vocabulary and a large one.
LOGPROB_BENCHMARK_CASES = tuple(
    LogprobCase(n_rows, 512, n_vocab) for n_vocab in (1 << 14, 1 << 17) for n_rows in (16, 64, 256, 1024)
)


SaeArgs = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
TopArgs = tuple[Tensor, Tensor, Tensor, int, "Tensor | None", "Tensor | None", bool]

ENCODERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


@dataclass(frozen=True)
class SaeCase:
    """Shapes of one call of ``sae_features`` or ``sae_top_features``.

    Attributes:
        n_rows, width, n_features: T, d and F.
        kind: ``"relu"``, ``"jumprelu"`` or ``"gated"``, of the first op.
        k: of the second.
        norms, signed: of the second.
        layout: as for :class:`SteerCase`, of the rows.
    """

    n_rows: int
    width: int
    n_features: int
    kind: str = "relu"
    k: int = 1
    norms: bool = False
    signed: bool = False
    layout: str = "plain"

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("norms", "signed") if getattr(self, name))
        return f"{self.n_rows}x{self.width}x{self.n_features}-{self.kind}-k{self.k}{flags}-{self.layout}"

    def _drawn(self, dtype: torch.dtype, encoder: torch.dtype, device: str) -> dict[str, Any]:
        from mechanex.ops.sae import quantized

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        wide = torch.float64 if torch.float64 in (dtype, encoder) else torch.float32
        rows = draw(self.n_rows, self.width).to(device, dtype)
        weight = draw(self.n_features, self.width) / max(self.width, 1) ** 0.5
        stored, scale = quantized(weight) if encoder is torch.int8 else (weight.to(encoder), None)
        found = {
            "hidden": SteerCase(self.n_rows, self.width, layout=self.layout)._lay_out(rows),
            "encoder": stored.to(device),
            "scale": None if scale is None else scale.to(device),
        }
        for name in ("bias", "threshold", "gain", "offset", "norms"):
            found[name] = (draw(self.n_features) / 2).to(device, wide)
        found["threshold"], found["norms"] = found["threshold"].abs(), found["norms"].abs() + 0.1
        return found

    def encoder(
        self, dtype: torch.dtype, encoder: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, FeatureEncoder]:
        """Rows and encoder as backends take them."""
        hidden, weight, bias, threshold, gain, offset, scale = self.make(dtype, encoder, device)
        norms = self.make_top(dtype, encoder, device)[4]
        return hidden, FeatureEncoder(weight, bias, scale, threshold, gain, offset, norms)

    def make(self, dtype: torch.dtype, encoder: torch.dtype, device: str = "cpu") -> SaeArgs:
        """Arguments of ``sae_features``."""
        a = self._drawn(dtype, encoder, device)
        threshold = a["threshold"] if self.kind == "jumprelu" else None
        gain, offset = (a["gain"], a["offset"]) if self.kind == "gated" else (None, None)
        return a["hidden"], a["encoder"], a["bias"], threshold, gain, offset, a["scale"]

    def make_top(self, dtype: torch.dtype, encoder: torch.dtype, device: str = "cpu") -> TopArgs:
        """Arguments of ``sae_top_features``."""
        a = self._drawn(dtype, encoder, device)
        norms = a["norms"] if self.norms else None
        return a["hidden"], a["encoder"], a["bias"], self.k, norms, a["scale"], self.signed


SAE_CASES = (
    SaeCase(0, 31, 5),
    SaeCase(1, 1, 1),
    SaeCase(1, 123, 47, "jumprelu"),
    SaeCase(4, 64, 64, "gated"),
    SaeCase(5, 47, 130, "jumprelu", layout="sliced"),
    SaeCase(7, 31, 9, "gated", layout="transposed"),
    SaeCase(18, 40, 33, "jumprelu", layout="skipping"),
    SaeCase(2, 0, 3),
)

TOP_CASES = (
    SaeCase(0, 31, 5),
    SaeCase(1, 1, 1),
    SaeCase(1, 123, 47, k=47),
    SaeCase(4, 64, 64, k=5, norms=True),
    SaeCase(5, 47, 130, k=16, signed=True, layout="sliced"),
    SaeCase(7, 31, 9, k=3, norms=True, signed=True, layout="transposed"),
    SaeCase(3, 64, 3000, k=40),
    SaeCase(18, 40, 33, k=2, layout="skipping"),
)
