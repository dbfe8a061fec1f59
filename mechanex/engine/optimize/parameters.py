"""What is optimized: a vector, and for affine steering the two factors of a matrix, as one flat tensor θ; and Adam.

θ is at least float32 whatever the model's dtype. :meth:`Parameters.table` makes the edits of a pass of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ValidationError
from ..given import as_vector

__all__ = ["AdamState", "Parameters", "Table", "adam_step", "clipped"]

BETAS = (0.9, 0.999)
TINY = 1e-8

Table = tuple[Tensor, ...]
"""(bias [K, d],) or (bias, left [K, r, d], right [K, r, d]): what the steer op takes."""


@dataclass(frozen=True)
class Parameters:
    """The shape and meaning of θ.

    Args:
        width: d_model.
        rank: of the affine steering matrix M = LᵀR; 0 for none.
        clamp: what the component along v is set to, in units of ‖v‖; None for plain addition. Excludes ``rank``.
    """

    width: int
    rank: int = 0
    clamp: float | None = None

    @property
    def size(self) -> int:
        """Length of θ."""
        return self.width * (1 + 2 * self.rank)

    def vector(self, theta: Tensor) -> Tensor:
        """[..., d] v."""
        return theta[..., : self.width]

    def factors(self, theta: Tensor) -> tuple[Tensor, Tensor] | None:
        """[..., r, d] L and R, or None."""
        if not self.rank:
            return None
        left, right = theta[..., self.width :].chunk(2, -1)
        shape = (*theta.shape[:-1], self.rank, self.width)
        return left.reshape(shape), right.reshape(shape)

    def join(self, vector: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """θ of its parts."""
        parts = [vector] if factors is None else [vector, *(factor.flatten() for factor in factors)]
        return torch.cat(parts)

    def start(
        self, vector: Tensor | None, norm: float, factor_norm: float, generator: torch.Generator
    ) -> Tensor:
        """θ in float32 on the CPU: the given vector or a random direction, and random rows of the factors.

        Args:
            vector: [d] to start from, or None.
            norm: of a random vector.
            factor_norm: of every row of L and R.
            generator: of the random numbers; what it gives doesn't depend on ``vector``.
        """
        direction = torch.randn(self.width, generator=generator, device=generator.device)
        drawn = norm * direction / direction.norm()
        factors = None
        if self.rank:
            rows = torch.randn(2, self.rank, self.width, generator=generator, device=generator.device)
            left, right = factor_norm * rows / rows.norm(dim=-1, keepdim=True)
            factors = (left, right)
        if vector is not None:
            drawn = vector.to(drawn.device, drawn.dtype if vector.dtype != torch.float64 else vector.dtype)
            factors = None if factors is None else (factors[0].to(drawn), factors[1].to(drawn))
        return self.join(drawn, factors)

    def table(self, theta: Tensor, signs: Tensor, noise: Tensor | None = None) -> Table:
        """The edits of K slots, differentiable in θ.

        Args:
            theta: [n], or [K, n] for a copy of θ to each slot.
            signs: [K, 1], −1 where the edit is of the negated vector: −v, a clamp of −v, or −(v + Mx).
            noise: [K, d], added to v's effect, or None.
        """
        v, factors = self.vector(theta), self.factors(theta)
        if v.dim() == 1:
            v = v[None]
        effect, unit = v, None
        if self.clamp is not None:
            unit = v / v.norm(dim=-1, keepdim=True)
            effect = self.clamp * v
        bias = signs * (effect if noise is None else effect + noise)
        if unit is not None:
            # The same for −v, whose unit vector's square is v's.
            direction = unit.expand_as(bias)[:, None]
            return bias, -direction, direction
        if factors is None:
            return (bias,)
        left, right = (factor if factor.dim() == 3 else factor[None] for factor in factors)
        return bias, signs[:, :, None] * left, right.expand(len(signs), -1, -1)

    def project(self, theta: Tensor, max_norm: float | None, max_factor_norm: float | None) -> Tensor:
        """θ with v rescaled to ``max_norm`` and rows of L and R to ``max_factor_norm`` where they are longer."""
        if max_norm is None and (max_factor_norm is None or not self.rank):
            return theta
        vector, factors = self.vector(theta), self.factors(theta)
        if max_norm is not None:
            vector = _shortened(vector, max_norm)
        if factors is not None and max_factor_norm is not None:
            factors = (_shortened(factors[0], max_factor_norm), _shortened(factors[1], max_factor_norm))
        return self.join(vector, factors)

    def norm(self, theta: Tensor) -> Tensor:
        """‖v‖, 0-d."""
        length: Tensor = self.vector(theta).norm()
        return length

    def size_of_effect(self, theta: Tensor) -> Tensor:
        """‖v‖ + ‖LᵀR‖_F, 0-d: what the output-constrained phase minimises."""
        factors = self.factors(theta)
        if factors is None:
            return self.norm(theta)
        left, right = factors
        # ‖LᵀR‖² = Σ (LLᵀ)∘(RRᵀ): of rank r, never d by d.
        square = ((left @ left.T) * (right @ right.T)).sum()
        return self.norm(theta) + square.clamp_min(1e-30).sqrt()

    def matrix(self, theta: Tensor) -> Tensor | None:
        """[d, d] M = LᵀR, or None without a rank."""
        factors = self.factors(theta)
        return None if factors is None else factors[0].T @ factors[1]

    def check(self, vector: object) -> Tensor:
        """A given starting vector as a tensor [d].

        Raises:
            ValidationError: not numbers, another width, NaN or infinite, or zero where a direction is needed.
        """
        whole = isinstance(vector, Tensor) and not vector.is_floating_point()
        found = as_vector("starting_vec", vector.float() if whole else vector).detach()  # type: ignore[attr-defined]
        if tuple(found.shape) != (self.width,):
            raise ValidationError(
                f"starting_vec has shape {list(found.shape)}, but the model's residual stream is {self.width} wide; "
                f"give one vector of shape [{self.width}]."
            )
        if not bool(torch.isfinite(found.float().norm())):
            raise ValidationError(
                "starting_vec holds NaN or infinite numbers, or its norm is infinite; check how it was made."
            )
        if self.clamp is not None and not bool(found.any()):
            raise ValidationError("Clamp steering needs a direction, but starting_vec is zero.")
        return found


def _shortened(rows: Tensor, longest: float) -> Tensor:
    """Rows [..., d] rescaled to norm ``longest`` where they are longer."""
    norms = rows.norm(dim=-1, keepdim=True)
    # A row that is short enough stays bit for bit.
    return torch.where(norms > longest, rows * (longest / norms), rows)


@dataclass(frozen=True, eq=False)
class AdamState:
    """θ [n], the running means of its gradient and of the gradient's square, and the steps taken."""

    theta: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0

    @classmethod
    def start(cls, theta: Tensor) -> AdamState:
        """Before the first step."""
        return cls(theta, torch.zeros_like(theta), torch.zeros_like(theta))


def adam_step(state: AdamState, gradient: Tensor, lr: float) -> AdamState:
    """The state after one step of Adam (arXiv:1412.6980); the given one stays as it is, if an interrupt falls here."""
    step = state.step + 1
    mean = state.mean.lerp(gradient, 1 - BETAS[0])
    square = state.square * BETAS[1] + (1 - BETAS[1]) * gradient * gradient
    size = (square.sqrt() / (1 - BETAS[1] ** step) ** 0.5).add_(TINY)
    factor = min(lr / (1 - BETAS[0] ** step), torch.finfo(state.theta.dtype).max)
    theta = state.theta.addcdiv(mean, size, value=-factor)
    return AdamState(theta, mean, square, step)


def clipped(gradient: Tensor, longest: float | None) -> Tensor:
    """The gradient, rescaled to norm ``longest`` where it is longer."""
    if longest is None:
        return gradient
    norm = gradient.norm()
    return torch.where(norm > longest, gradient * (longest / norm), gradient)
