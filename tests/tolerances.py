"""How far a result may be from the truth: the one place for it.

The truth is the reference backend in float64. A result of the same inputs may miss it by half a unit in the
last place of its own dtype (the one rounding at the end), plus what summing in the dtype of the arithmetic
can lose: a sum of ``width`` terms loses about ``sqrt(width)`` units of the sum of their magnitudes, which
``scale`` holds (the same op on absolute values).
"""

from __future__ import annotations

import optable
import torch
from torch import Tensor

from mechanex.backends import reference
from mechanex.ops.edits import StackedEdits
from mechanex.ops.gate import KINDS

# What a float32 model's logits may differ by when only the order of the sums differs.
LOGITS = 1e-4


def bound(truth: Tensor, scale: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Largest allowed distance from ``truth``, element by element.

    Args:
        truth: the result, float64.
        scale: the same op on absolute values, float64.
        dtype: of the result that is judged.
        width: terms in a sum.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    last = torch.finfo(dtype)
    rounding = 0.505 * last.eps * truth.abs() + last.smallest_normal * last.eps
    return rounding + torch.finfo(wide).eps * (2 + width**0.5) * scale


def assert_within(actual: Tensor, truth: Tensor, scale: Tensor, width: int) -> None:
    """Fail unless every element of ``actual`` is within :func:`bound` of ``truth``; NaN never is."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = (actual.double() - truth).abs()
    allowed = bound(truth, scale, actual.dtype, width)
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed).nan_to_num(nan=float("inf")).max().item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off, the worst {worst:.3g} times the bound"
        )


def many_truth(args: optable.ManyArgs) -> tuple[Tensor, Tensor]:
    """The op ``steer_many`` in float64, and the magnitudes of what its sums add up, both ``[T, d]``.

    The truth is the reference's. Along the same steps the magnitudes grow as the errors do: an edit multiplies them by
    its own absolute values, a gate adds what its argument is unsure of, a kept norm scales them.
    """
    hidden, rows, strength, bias, left, right, gate = args
    wide = [None if t is None else t.double() for t in (hidden, strength, bias, left, right)]
    gates = None if gate is None else gate.to(hidden.device, torch.float64)
    x, s, b, low, high = wide
    truth = reference.steer_many(x, rows, s, StackedEdits(b, low, high, gates))
    scale = []
    for t in range(hidden.shape[0]):
        now, size = x[t], x[t].abs()
        edits = [0] if rows is None else rows[t].tolist()
        for i, k in enumerate(edits):
            if k == -1:
                continue
            change, grown = b[k], b[k].abs()
            if low is not None and high is not None:
                change = change + low[k].T @ (high[k] @ now)
                grown = grown + low[k].abs().T @ (high[k].abs() @ size)
            amount = 1.0 if s is None else float(s[t, i])
            unsure = abs(amount)
            kind = "none" if gates is None else KINDS[int(gates.kinds[k])]
            if gates is not None and kind not in ("none", "norm"):
                q = gates.weight[k] @ now + gates.offset[k]
                opening = {"step": (q > 0).double(), "sigmoid": q.sigmoid(), "relu": q.relu()}[kind]
                of_q = float(gates.weight[k].abs() @ size + gates.offset[k].abs())
                unsure = abs(amount) * (float(opening) + (0.0 if kind == "step" else of_q))
                amount = amount * float(opening)
            after = now + amount * change
            size = size + unsure * grown
            if kind == "norm" and after.norm() > 0:
                ratio = now.norm() / after.norm()
                size = ratio * (size + after.abs() * (size.norm() / after.norm()))
                size = size + after.abs() * ratio
                after = after * ratio
            now = after
        scale.append(size * max(1, len(edits)))
    return truth, torch.stack(scale) if scale else torch.zeros_like(truth)


def logprob_bounds(
    args: optable.LogprobArgs,
    truth: Tensor,
    gradient: Tensor | None = None,
    cotangent: Tensor | None = None,
    *,
    multiplies_halves: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Largest allowed distances of ``completion_logprob`` and of its gradient from the truth.

    A product of float32 sums loses about ``sqrt(d)`` units of the sum of magnitudes; one that a processor returns in
    bfloat16 loses half a unit of that type more. An error e of the logits moves log p by 2e and every other token's
    share of the gradient by the factor exp(2e). Where a device multiplies half types as they are, the shares are
    rounded to them before the product that makes the gradient: a unit of each.

    Args:
        args: the op's arguments, hidden in the dtype that is judged.
        truth: log-probabilities, float64.
        gradient: the gradient for hidden, float64, for ``cotangent``.
        multiplies_halves: whether float16 is multiplied as it is; None: on a GPU.
    """
    hidden, weight, target, bias, scale, _, coldness = args
    dtype = hidden.dtype
    h, w = hidden.double(), weight.double()
    size = h.abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    size = (size.amax(1) if size.numel() else truth * 0) * abs(scale * coldness)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    loss = eps * (8 + hidden.shape[1] ** 0.5) * (1 + size)
    if dtype == torch.bfloat16:
        largest = (h @ w.T).abs()
        loss = loss + 2**-8 * (largest.amax(1) if size.numel() else truth * 0) * abs(scale * coldness)
    allowed = 2 * loss + eps * truth.abs()
    if gradient is None or cotangent is None:
        return allowed, None
    z, bend = logits(args)
    p = torch.softmax(z, 1)
    magnitude = (p * bend) @ w.abs() + w.abs()[target] * (1 - truth.exp()).unsqueeze(1)
    magnitude = magnitude * cotangent.double().abs().unsqueeze(1) * abs(scale * coldness)
    if multiplies_halves is None:
        multiplies_halves = hidden.is_cuda
    halves = dtype == torch.bfloat16 or (dtype == torch.float16 and multiplies_halves)
    unit = torch.finfo(dtype).eps if halves else 0.0
    # The derivative of a cap is 1 − tanh², which is right to a unit of 1, not of itself.
    unit_of_one = 8 * eps * (p @ w.abs() + w.abs()[target]) * abs(scale * coldness)
    rounding = 0.505 * torch.finfo(
        dtype
    ).eps * gradient.abs() + unit_of_one * cotangent.double().abs().unsqueeze(1)
    # Below the smallest normal number a product is right to a step, and so is the result in its own dtype.
    worked_in = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = rounding + _step(dtype) + (4 + len(weight)) * _step(worked_in)
    return allowed, rounding + magnitude * (torch.expm1(2 * loss) + unit).unsqueeze(1)


def _step(dtype: torch.dtype) -> float:
    """The distance between the smallest numbers of a dtype."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def logits(args: optable.LogprobArgs) -> tuple[Tensor, Tensor]:
    """The compared logits in float64, and the derivative that the softcap adds."""
    hidden, weight, _, bias, scale, softcap, coldness = args
    z = hidden.double() @ weight.double().T
    z = scale * (z if bias is None else z + bias.double())
    if softcap is None:
        return coldness * z, torch.ones_like(z)
    bounded = torch.tanh(z / softcap)
    return coldness * softcap * bounded, 1 - bounded**2
