"""Times completion_logprob on the GPU: every backend, the plain way that stores the logits, other libraries if there.

A row is one way on one case, forward alone or with the gradient for hidden. Its rate is that of the products that are
needed (one, with a gradient two), beside the rate of the product alone in the same run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from clock import Call, Row, call_seconds
from optable import LogprobCase
from torch import Tensor

from mechanex import backends
from mechanex.ops.logprob import completion_logprob

# The usual case is tens to hundreds of scored tokens; the vocabulary and width are those of an 8-billion model, then
# of a small one.
CASES = [
    *((LogprobCase(n, 4096, 128256), torch.bfloat16) for n in (1, 16, 64, 256, 1024, 4096)),
    *((LogprobCase(n, 768, 50257), torch.bfloat16) for n in (16, 256, 4096)),
    (LogprobCase(64, 2304, 256000, softcap=30.0), torch.bfloat16),
    *((LogprobCase(n, 2048, 32000), torch.float32) for n in (16, 256)),
]
# How much slower than the fastest the automatic choice may be.
NEAR_FASTEST = 1.15


def rows() -> list[Row]:
    """Every case, forward and with the gradient."""
    return [
        row for case, dtype in CASES for gradient in (False, True) for row in _rows(case, dtype, gradient)
    ]


def _rows(case: LogprobCase, dtype: torch.dtype, gradient: bool) -> list[Row]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    hidden, weight = draw(case.n_rows, case.width), draw(case.n_vocab, case.width).mul_(3 / case.width**0.5)
    target = torch.randint(0, case.n_vocab, (case.n_rows,), generator=generator, device="cuda")
    args = (hidden.requires_grad_(gradient), weight, target, None, case.scale, case.softcap, case.coldness)
    ways: dict[str, Call] = {"product": lambda: _product(hidden, weight, gradient)}
    scorers = {
        "whole logits": _whole,
        **{name: _backend(name) for name in _names()},
        "auto": _backend("auto"),
    }
    if case.softcap is None:
        scorers |= _others(gradient)
    for name, score in scorers.items():
        ways[name] = lambda score=score: _call(score, args, gradient)
    failed = {}
    for name, call in list(ways.items()):
        try:
            call()
        except Exception as error:  # another library's limits end its own row, not the run
            if name in ("product", "auto", *_names()):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del ways[name]
    found = call_seconds(ways)
    flops = 2 * case.n_rows * case.width * case.n_vocab * (2 if gradient else 1)
    return [
        {
            "op": "completion_logprob",
            "backend": name,
            "case": str(case),
            "dtype": str(dtype).removeprefix("torch."),
            "gradient": gradient,
            "microseconds": round(seconds * 1e6, 1),
            "tflop_per_s": round(flops / seconds / 1e12, 2),
            "share_of_product": round(found["product"] / seconds, 3),
            "extra_mib": round(_extra_bytes(ways[name]) / 2**20, 1),
        }
        for name, seconds in found.items()
    ] + [
        {"op": "completion_logprob", "backend": name, "case": str(case), "gradient": gradient, "failed": why}
        for name, why in failed.items()
    ]


def _names() -> list[str]:
    return [
        b.name
        for b in backends.backends()
        if b.name != "reference" and "completion_logprob" in b.ops and b.lacks("cuda") is None
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
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def goals(results: Sequence[Row]) -> dict[str, object]:
    """For each case the fastest backend, that of them which auto took, and whether it is near enough."""
    found: dict[str, object] = {}
    for case, dtype, gradient in dict.fromkeys((r["case"], r.get("dtype"), r["gradient"]) for r in results):
        times = {
            str(r["backend"]): float(str(r["microseconds"]))
            for r in results
            if (r["case"], r.get("dtype"), r["gradient"]) == (case, dtype, gradient) and "failed" not in r
        }
        names = [name for name in _names() if name in times]
        if "auto" not in times or not names:
            continue
        fastest = min(names, key=times.__getitem__)
        ratio = times["auto"] / times[fastest]
        what = f"{case} {dtype}{' with gradient' if gradient else ''}: auto, times {fastest}"
        found[what] = [round(ratio, 2), ratio <= NEAR_FASTEST]
    return found


def table(results: Sequence[Row]) -> str:
    """The rows for people."""
    lines = []
    for r in results:
        what = "both" if r["gradient"] else "forward"
        head = f"{r['case']!s:<28} {r.get('dtype', '')!s:<9} {what:<8}{r['backend']!s:<18}"
        if "failed" in r:
            lines.append(f"{head} {r['failed']}")
            continue
        lines.append(
            f"{head} {r['microseconds']:>10} µs {r['tflop_per_s']:>7} TFLOP/s {r['share_of_product']:>6} of the "
            f"product {r['extra_mib']:>8} MiB"
        )
    return "\n".join([*lines, ""])
