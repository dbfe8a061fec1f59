"""One step of training a sparse autoencoder: its parameters, what features are under each rule, and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import ValidationError
from ..given import as_finite
from ..ranks import SINGLE, Ranks
from ..whole import as_whole
from .autoencoder import SparseAutoencoder

__all__ = ["CALIBRATED_ON", "Rule", "TrainedWeights", "TrainingSettings", "folded", "step"]

Rule = Literal["topk", "batchtopk", "jumprelu"]

_BETAS, _EPS = (0.9, 0.999), 1e-8
# How much the reconstruction of the rest by dead features counts (Gao et al. 2024, appendix A.2).
_REVIVING = 1 / 32
# Activations on which batch-top-k's one threshold is found in the end.
CALIBRATED_ON = 8192
# JumpReLU: where thresholds begin, and how far from one an activation still moves it; activations have norm √d.
_FIRST_THRESHOLD, _BANDWIDTH = 0.3, 0.3
# Thresholds go as far as activations are large, other parameters as far as unit directions are.
_THRESHOLD_PACE = 5.0


@dataclass(frozen=True)
class TrainingSettings:
    """How an autoencoder is trained.

    Args:
        rule: which features a token has: ``"topk"``: its ``k`` largest; ``"batchtopk"``: the ``k`` largest a token of a
            whole batch, by one threshold once it is trained; ``"jumprelu"``: those above thresholds of their own, which
            are trained towards ``k`` a token.
        n_features: how many features.
        k: how many a token has, on average but for top-k.
        steps: how many batches.
        batch: activations of a batch.
        buffer: activations that are shuffled together; a multiple of ``batch``.
        lr: Adam's rate; None: ``min(2e-3, 2e-4·√(2¹⁴/n_features))``.
        context: tokens after which a text is cut.
        dead_after: activations in which a feature said nothing, after which it is revived.
        seed: of the weights and the order of texts.

    Raises:
        ValidationError: a number out of its range.
    """

    rule: Rule = "topk"
    n_features: int = 4096
    k: int = 32
    steps: int = 4000
    batch: int = 2048
    buffer: int = 1 << 16
    lr: float | None = None
    context: int = 128
    dead_after: int = 400_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("topk", "batchtopk", "jumprelu"):
            raise ValidationError(f"rule is topk, batchtopk or jumprelu; got {self.rule!r}.")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("rule", "lr"):
                continue
            least, found = 0 if one.name == "seed" else 1, as_whole(value)
            if found is None or found < least:
                raise ValidationError(f"{one.name} is a whole number from {least} up; got {value!r}.")
            object.__setattr__(self, one.name, found)
        if self.k > self.n_features:
            raise ValidationError(f"k is at most the number of features, {self.n_features}; got {self.k}.")
        if self.buffer % self.batch:
            raise ValidationError(
                f"buffer is a multiple of batch, {self.batch}, so that no activation is left over; got {self.buffer}."
            )
        if self.lr is not None:
            lr = as_finite(self.lr)
            if lr is None or lr <= 0:
                raise ValidationError(f"lr is a finite number above 0; got {self.lr!r}.")
            object.__setattr__(self, "lr", lr)

    @property
    def rate(self) -> float:
        """Adam's rate at its highest."""
        return self.lr if self.lr is not None else min(2e-3, 2e-4 * math.sqrt(2**14 / self.n_features))

    def rate_at(self, step: int) -> float:
        """The rate of a step: up over the first twentieth, down to 0 over the last fifth."""
        warm, cool = max(1, self.steps // 20), max(1, self.steps // 5)
        return self.rate * min(1.0, (step + 1) / warm, (self.steps - step) / cool)


@dataclass
class TrainedWeights:
    """What training changes, in one place, so that it can be kept and gone on from.

    Args:
        parameters: ``encoder`` [n, d], ``bias`` [n], ``decoder`` [n, d], ``decoder_bias`` [d] and, of JumpReLU,
            ``threshold`` [n].
        moments: Adam's two, by parameter.
        silent: activations since each feature last said something, [n] int64.
        steps: steps done.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    silent: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    steps: int = 0

    @classmethod
    def begin(cls, settings: TrainingSettings, mean: Tensor) -> TrainedWeights:
        """Random directions, the encoder as the decoder transposed, around the activations' mean [d]."""
        generator = torch.Generator().manual_seed(settings.seed)
        directions = normalize(torch.randn(settings.n_features, len(mean), generator=generator), dim=1)
        parameters = {
            "encoder": directions.clone(),
            "bias": torch.zeros(settings.n_features),
            "decoder": directions,
            "decoder_bias": mean.cpu().clone(),
        }
        if settings.rule == "jumprelu":
            parameters["threshold"] = torch.full((settings.n_features,), _FIRST_THRESHOLD)
        parameters = {name: value.to(mean.device) for name, value in parameters.items()}
        moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()
        }
        silent = torch.zeros(settings.n_features, dtype=torch.int64, device=mean.device)
        return cls(parameters, moments, silent)


class _JumpReLU(torch.autograd.Function):
    """``z`` above its threshold; gradients reach thresholds within half a bandwidth (Rajamanoharan et al. 2024)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < _BANDWIDTH / 2).to(grad.dtype)
        return grad * (z > threshold), -(grad * near * threshold / _BANDWIDTH).sum(0)


class _Count(torch.autograd.Function):
    """How many are above their thresholds, with gradients for these alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).to(z.dtype).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < _BANDWIDTH / 2).to(grad.dtype)
        return None, -(grad[:, None] * near / _BANDWIDTH).sum(0)


def step(
    weights: TrainedWeights,
    x: Tensor,
    variance: float,
    settings: TrainingSettings,
    ranks: Ranks = SINGLE,
) -> dict[str, float]:
    """Trains on one batch, in place.

    Args:
        weights: the autoencoder so far, the same in all processes.
        x: [batch, d] activations of norm √d on average; of several processes each has some of the rows.
        variance: mean squared distance of activations to their mean.
        settings: how.
        ranks: the processes; gradients are added up.

    Returns:
        ``unexplained``: the share of the variance that is not reconstructed; ``l0``: features a token; ``dead``: how
        many were silent for long.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.parameters.items()}
    z = (x - leaves["decoder_bias"]) @ leaves["encoder"].T + leaves["bias"]
    extra: Tensor | float = 0.0
    if settings.rule == "jumprelu":
        features = _JumpReLU.apply(z.relu(), leaves["threshold"])  # type: ignore[no-untyped-call]
        count = _Count.apply(z, leaves["threshold"]).sum() / settings.batch  # type: ignore[no-untyped-call]
        # The gradient of (count of all processes / k - 1)², of which this process's count is one summand.
        off = float(ranks.total(count.detach())) / settings.k - 1
        extra = _pull(weights.steps, settings) * 2 * off * count / settings.k
    else:
        features = _largest(z, settings, ranks)
    rest = x - features @ leaves["decoder"] - leaves["decoder_bias"]
    unexplained = rest.square().sum() / settings.batch / variance
    fired = ranks.total((features > 0).sum(0).double())
    weights.silent = torch.where(fired > 0, 0, weights.silent + settings.batch)
    dead = weights.silent > settings.dead_after
    n_dead = int(dead.sum())
    loss = unexplained + extra
    if n_dead:
        loss = loss + _REVIVING * _rest_by_dead(z, rest.detach(), dead, n_dead, leaves["decoder"], ranks)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    ranks.added(gradients)
    _adam(weights, dict(zip(leaves, gradients, strict=True)), settings.rate_at(weights.steps))
    parameters = weights.parameters
    parameters["decoder"] = normalize(parameters["decoder"], dim=1)
    if "threshold" in parameters:
        parameters["threshold"].clamp_(min=0)
    weights.steps += 1
    l0 = float(fired.sum()) / settings.batch
    return {"unexplained": float(ranks.total(unexplained.detach())), "l0": l0, "dead": float(n_dead)}


def _pull(step: int, settings: TrainingSettings) -> float:
    """How much the number of features a token counts: little at first, while features find their directions."""
    return min(1.0, (step + 1) / max(1, settings.steps // 5))


def _largest(z: Tensor, settings: TrainingSettings, ranks: Ranks) -> Tensor:
    if settings.rule == "topk":
        values, places = z.topk(settings.k, dim=1)
        return torch.zeros_like(z).scatter(1, places, values.relu())
    wanted = settings.k * settings.batch
    values, places = z.flatten().topk(min(wanted, z.numel()))
    if ranks.sharing > 1:
        of_all = torch.cat(ranks.gathered(values.detach().cpu())).topk(wanted).values
        kept = values >= of_all[-1].to(values.device)
        values, places = values[kept], places[kept]
    return torch.zeros_like(z).flatten().scatter(0, places, values.relu()).view_as(z)


def _rest_by_dead(
    z: Tensor, rest: Tensor, dead: Tensor, n_dead: int, decoder: Tensor, ranks: Ranks
) -> Tensor:
    """How much of what is missing the dead features leave, when the largest of them are let speak."""
    k = min(n_dead, max(1, decoder.shape[1] // 2))
    values, places = z.masked_fill(~dead, -torch.inf).topk(k, dim=1)
    said = torch.zeros_like(z).scatter(1, places, values.relu()) @ decoder
    missing = ranks.total(rest.square().sum()).clamp_min(1e-12)
    share: Tensor = (rest - said).square().sum() / missing
    return share.nan_to_num(0.0)


def _adam(weights: TrainedWeights, gradients: dict[str, Tensor], rate: float) -> None:
    done = weights.steps + 1
    for name, gradient in gradients.items():
        first, second = weights.moments[name]
        first.mul_(_BETAS[0]).add_(gradient, alpha=1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        size = (second / (1 - _BETAS[1] ** done)).sqrt_().add_(_EPS)
        pace = rate * (_THRESHOLD_PACE if name == "threshold" else 1.0)
        moved = weights.parameters[name] - pace / (1 - _BETAS[0] ** done) * first / size
        weights.parameters[name] = moved


def folded(
    weights: TrainedWeights, x: Tensor | None, factor: float, settings: TrainingSettings, **facts: Any
) -> SparseAutoencoder:
    """The autoencoder of a model's own activations, of one that was trained on ``factor`` times them.

    Args:
        weights: the autoencoder that was trained.
        x: [n, d] some activations, on which batch-top-k's threshold is the one that keeps ``k`` a token; None for
            another rule.
        factor: what activations were multiplied by.
        settings: how it was trained.
        facts: more that it is to say of itself.
    """
    p = {name: value.detach().cpu() for name, value in weights.parameters.items()}
    rule = settings.rule
    threshold = p.get("threshold")
    if rule == "batchtopk":
        assert x is not None
        some = x[:CALIBRATED_ON].cpu() * factor
        z = (some - p["decoder_bias"]) @ p["encoder"].T + p["bias"]
        smallest = z.flatten().topk(settings.k * len(some)).values[-1].clamp(min=0)
        threshold = smallest.expand(settings.n_features).clone()
    return SparseAutoencoder(
        encoder=p["encoder"] * factor,
        bias=p["bias"],
        decoder=p["decoder"] / factor,
        decoder_bias=p["decoder_bias"] / factor,
        activation="topk" if rule == "topk" else "jumprelu",
        threshold=threshold,
        k=settings.k if rule == "topk" else None,
        subtract_decoder_bias=True,
        architecture="topk" if rule == "topk" else "jumprelu",
        **facts,
    )
