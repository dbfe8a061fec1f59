"""Times completion_logprob on the GPU: every backend, whole logits, other libraries if there. Run by ``run.sh``.

A row is one case, forward alone or with the gradient for hidden, on the backend that ``auto`` takes; its share is that
of the products that are needed (one, with a gradient two), timed alone in the same run. Candidates for what ``auto``'s
tables hold follow, the best named: tiles of the forward kernel, blocks of the walk that makes a gradient.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from clock import Call, call_seconds, synchronize
from optable import LogprobCase
from record import Record, arguments, has_device

from mechanex import backends
from mechanex.backends import chunked, triton
from mechanex.ops.head import Head
from mechanex.ops.logprob import completion_logprob

# The usual case is tens to hundreds of scored tokens; the vocabulary and width are those of an 8-billion model, then
# of a small one.
LARGE = [LogprobCase(n, 4096, 128256) for n in (1, 16, 64, 256, 1024, 4096)]
SMALL = [LogprobCase(n, 768, 50257) for n in (16, 256, 4096)]
CASES = [
    *((case, torch.bfloat16) for case in (*LARGE, *SMALL)),
    (LogprobCase(64, 2304, 256000, softcap=30.0), torch.bfloat16),
    *((LogprobCase(n, 2048, 32000), torch.float32) for n in (16, 256)),
]
TILES = [case for case in LARGE if case.n_rows >= 256]
TINY_TILES = [LogprobCase(4, 64, 500)]
TINY = [(LogprobCase(4, 64, 500), torch.float32)]
# Rows and tokens at a time in the walk that makes a gradient, beside those that its bound of memory gives; the
# last four take more memory than that, and tell what it costs.
BLOCKS = [
    chunked.Blocks(*sizes)
    for sizes in (
        (256, 2048),
        (256, 4096),
        (384, 6400),
        (512, 1920),
        (512, 2560),
        (512, 8192),
        (1024, 4096),
        (1024, 8192),
        (1024, 16384),
    )
]
NEAR_FASTEST, MOST_MIB = 1.05, 16
# The gradient of few rows needs one walk over the unembedding, where the two products make two.
ONE_WALK_ROWS, ONE_WALK = 64, 1.2


def share_goal(case: LogprobCase, gradient: bool) -> float | None:
    """Least share of the products alone; None where no goal is set."""
    if case not in LARGE:
        return None
    if not gradient:
        return 0.92
    return ONE_WALK if case.n_rows <= ONE_WALK_ROWS else 0.90


def time_case(record: Record, device: str, case: LogprobCase, dtype: torch.dtype, gradient: bool) -> None:
    """All ways of one case."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hidden, weight = draw(case.n_rows, case.width), draw(case.n_vocab, case.width).mul_(3 / case.width**0.5)
    target = torch.randint(0, case.n_vocab, (case.n_rows,), generator=generator, device=device)
    args = (hidden.requires_grad_(gradient), weight, target, None, case.scale, case.softcap, case.coldness)
    ways: dict[str, Call] = {"product": lambda: _product(hidden, weight, gradient)}
    names = _names(device)
    scorers = {"whole logits": _whole, **{name: _backend(name) for name in names}, "auto": _backend("auto")}
    others = _others(gradient) if case.softcap is None else {}
    for name, score in (scorers | others).items():
        ways[name] = lambda score=score: _call(score, args, gradient)
    failed = {}
    for name, call in list(ways.items()):
        try:
            call()
        except Exception as error:  # another library's limits end its own row, not the run
            if name in ("product", "auto", *names):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del ways[name]
    found = call_seconds(ways)
    what = f"{case} {str(dtype).removeprefix('torch.')}{' with gradient' if gradient else ''}"
    flops = 2 * case.n_rows * case.width * case.n_vocab * (2 if gradient else 1)
    times = {name: round(seconds * 1e6, 1) for name, seconds in found.items()}
    note = ", ".join(f"{name} {time}" for name, time in times.items())
    record.add(
        f"{what}: share of product, auto",
        found["product"] / found["auto"],
        least=share_goal(case, gradient),
        note=f"µs: {note}; {flops / found['auto'] / 1e12:.0f} TFLOP/s",
        microseconds=times,
        failed=failed,
    )
    record.add(
        f"{what}: auto, times the fastest",
        found["auto"] / min(found[name] for name in names),
        most=NEAR_FASTEST,
    )
    if gradient and "whole logits" in found:
        record.add(f"{what}: times as fast as whole logits", found["whole logits"] / found["auto"], least=1)
    for name in others:
        if name in found:
            record.add(f"{what}: times as fast as {name}", found[name] / found["auto"], least=1)
    if gradient and case == SMALL[0]:
        record.add(f"{what}: auto", found["auto"] * 1e3, "ms", most=0.35)
    if device == "cuda":
        results = case.n_rows * 4 + (hidden.nbytes if gradient else 0)
        extra = (_extra_bytes(ways["auto"]) - results) / 2**20
        record.add(f"{what}: memory beside arguments and results", extra, "MiB", most=MOST_MIB)


def time_tiles(record: Record, device: str, case: LogprobCase) -> None:
    """Tiles of Triton's forward kernel beside the table's, and torch's products by chunks."""
    if "triton" not in _names(device):
        return
    kernels = triton._kernel("logprob")
    hidden = torch.randn(case.n_rows, case.width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(case.n_vocab, case.width, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, case.n_vocab, (case.n_rows,), device=device)
    head = Head(weight.mul_(3 / case.width**0.5), None, 1.0, None, 1.0)
    own = kernels.tile_for(case.n_rows, torch.bfloat16)
    ways: dict[str, Call] = {"product": lambda: _product(hidden, weight, False)}
    ways["by chunks"] = partial(triton.LOGPROB.run, hidden, head, target)
    failed = {}
    for tile in (own, *kernels.CANDIDATES):
        call = partial(kernels.logprob, hidden, head, target, tile=tile)
        try:
            call()
        except Exception as error:  # a tile that asks for more than the chip has ends its own row
            failed[_named(tile)] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            ways[_named(tile)] = call
    found = call_seconds(ways, 5)
    times = {name: round(seconds * 1e6, 1) for name, seconds in found.items()}
    best = min((name for name in found if name != "product"), key=lambda name: found[name])
    record.add(
        f"{case} bfloat16, tiles: share of product, the table's",
        found["product"] / found[_named(own)],
        note=f"best {best}: {found['product'] / found[best]:.3f}; µs: "
        + ", ".join(f"{name} {time}" for name, time in times.items()),
        microseconds=times,
        failed=failed,
    )


def time_blocks(record: Record, device: str, case: LogprobCase) -> None:
    """Blocks of the walk that makes a gradient beside those it takes, each with its memory, the gradient apart."""
    if "triton" not in _names(device):
        return
    hidden = torch.randn(case.n_rows, case.width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(case.n_vocab, case.width, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, case.n_vocab, (case.n_rows,), device=device)
    head = Head(weight.mul_(3 / case.width**0.5), None, 1.0, None, 1.0)
    ways: dict[str, Call] = {"product": lambda: _product(hidden, weight, True)}
    walk = triton.LOGPROB.with_slope
    ways["its own"] = lambda: walk(hidden, head, target)
    for blocks in BLOCKS:
        if blocks.rows <= case.n_rows:
            ways[f"{blocks.rows} x {blocks.columns}"] = partial(walk, hidden, head, target, blocks)
    found = call_seconds(ways, 5)
    times = {name: round(seconds * 1e6, 1) for name, seconds in found.items()}
    best = min((name for name in found if name != "product"), key=lambda name: found[name])
    taken = {}
    if device == "cuda":
        results = hidden.nbytes + 12 * case.n_rows
        taken = {name: round((_extra_bytes(call) - results) / 2**20, 1) for name, call in ways.items()}
    record.add(
        f"{case} bfloat16, blocks of the gradient: share of both products, its own",
        found["product"] / found["its own"],
        note=f"best {best}: {found['product'] / found[best]:.3f}; µs: "
        + ", ".join(f"{name} {time}" for name, time in times.items())
        + "".join(f"; {name} {size} MiB" for name, size in taken.items()),
        microseconds=times,
        mebibytes=taken,
    )


def _named(tile: Any) -> str:
    kinds = [name for name in ("persistent", "described") if getattr(tile, name)]
    return f"{tile.rows}x{tile.columns}x{tile.width}, {' '.join([f'{tile.warps} warps, {tile.stages} stages', *kinds])}"


def _names(device: str) -> list[str]:
    return [
        b.name
        for b in backends.backends()
        if b.name != "reference" and "completion_logprob" in b.ops and b.lacks(device) is None
    ]


Score = Callable[..., Tensor]


def _call(score: Score, args: Sequence[object], gradient: bool) -> None:
    with torch.set_grad_enabled(gradient):
        out = score(*args)
    if gradient:
        torch.autograd.grad(out.sum(), args[0])  # type: ignore[call-overload]


def _backend(name: str) -> Score:
    return lambda *args: completion_logprob(*args, backend=name)


def _product(hidden: Tensor, weight: Tensor, gradient: bool) -> None:
    """The product, and with a gradient the one back: what no way can do without."""
    with torch.no_grad():
        logits = hidden @ weight.T
        if gradient:
            _ = logits @ weight


def _whole(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
) -> Tensor:
    """As a plain script writes it."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)


def _others(gradient: bool) -> dict[str, Score]:
    """Fused cross-entropies of other libraries, where they are installed."""
    found: dict[str, Score] = {}
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda hidden, weight, target, *_: (
            -linear_cross_entropy(hidden, weight, target, reduction="none")
        )
    # It computes the gradient in the forward pass: a row without one would mislead.
    if gradient and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda hidden, weight, target, *_: -loss(weight, hidden, target)
    return found


def _extra_bytes(call: Call) -> int:
    """The most memory that one call takes beside its arguments."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    options: argparse.Namespace = arguments(__doc__).parse_args()
    if not has_device(options):
        return 0
    record = Record("logprob", options)
    for case, dtype in TINY if options.tiny else CASES:
        for gradient in (False, True):
            time_case(record, options.device, case, dtype, gradient)
    for case in TINY_TILES if options.tiny else TILES:
        time_tiles(record, options.device, case)
        time_blocks(record, options.device, case)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
