"""UNSURE: Stein's estimate for noise of unknown level, as a game between the network and multipliers.

    min_f max_η  ‖A f − y‖² + 2 Σ_k η_k tr(Φ_k ∂(A f)/∂y)

Among the f whose divergences along the Φ_k vanish on average, the one nearest to the data. The multipliers are parameters of
the trainer, in an optimiser group that climbs (`Loss.multipliers`); the loss only reads them. At the optimum for one white
multiplier, `η* = d/E‖∇log p_y‖² = σ²/(1 − MMSE/σ²)`: an upper bound on σ², not an estimate of it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss, MeasuredBatch, mean_good
from diffinv.losses.derivative import FiniteDifference, Slope
from diffinv.losses.sure import Sure


class Covariance(abc.ABC):
    """A linear family of noise covariances, Σ(η) = Σ_k η_k Φ_k(y)."""

    @abc.abstractmethod
    def __call__(self, eta: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """Σ(η) v, (B, *data), differentiable in η."""

    @abc.abstractmethod
    def start(self, variance: float) -> nn.Parameter:
        """Multipliers of white noise of this variance, in the square of the data's unit."""


@register("covariance", "white")
@dataclass(frozen=True)
class White(Covariance):
    """Σ = η I: η (1,), in the square of the data's unit."""

    def __call__(self, eta: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return eta.to(v) * v

    def start(self, variance: float) -> nn.Parameter:
        return nn.Parameter(torch.tensor([variance], dtype=torch.float64))


@register("covariance", "lags")
@dataclass(frozen=True)
class Lags(Covariance):
    """Stationary noise, one multiplier a lag: (Σ v)(p) = Σ_δ η(|δ|) v(p − δ), lags up to `reach` pixels a way, on images.

    η (2 reach + 1)² // 2 + 1: the lags of a half plane, zero lag first; Σ is symmetric. Light outside the image is zero.
    """

    reach: int

    def __call__(self, eta: Tensor, v: Tensor, y: Tensor) -> Tensor:
        if v.ndim != 4:
            raise ShapeError(f"Lags: the data must be images (B, C, H, W), got {tuple(v.shape)}; use White for other data.")
        side = 2 * self.reach + 1
        half = eta[1:].to(v)
        kernel = torch.cat([half.flip(0), eta[:1].to(v), half]).reshape(1, 1, side, side)
        channels = v.shape[1]
        padded = pad(v, [self.reach] * 4)
        return conv2d(padded, kernel.expand(channels, 1, side, side), groups=channels)

    def start(self, variance: float) -> nn.Parameter:
        eta = torch.zeros((2 * self.reach + 1) ** 2 // 2 + 1, dtype=torch.float64)
        eta[0] = variance
        return nn.Parameter(eta)


@register("covariance", "signal_dependent")
@dataclass(frozen=True)
class SignalDependent(Covariance):
    """Σ = diag(η₁ y + η₂): Poisson–Gaussian noise of unknown gain (η₁ = 1/g) and read noise (η₂), to first order.

    η (2,): in the data's unit, and in its square.
    """

    def __call__(self, eta: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return (eta[0].to(v) * y + eta[1].to(v)) * v

    def start(self, variance: float) -> nn.Parameter:
        return nn.Parameter(torch.tensor([0.0, variance], dtype=torch.float64))


@register("loss", "unsure")
@dataclass(frozen=True, eq=False)
class Unsure(Loss):
    """`‖A f − y‖² + 2 tr(Σ(η) ∂(A f)/∂y)` a datum, minimised over f and maximised over η.

    At the η of the true covariance its gradient is that of the oracle `‖A (f − x)‖²` a datum. With η free it is biased: its
    minimiser differs from SURE's by the factor that makes the mean divergence vanish.

    Arguments: eta: the multipliers, `covariance.start(variance)`. covariance: the family. slope: how derivatives are taken.
    References: Tachella, Davies & Jacques, *UNSURE: self-supervised learning with Unknown Noise level and Stein's Unbiased
    Risk Estimate*, 2025, arXiv:2409.01985.
    """

    eta: nn.Parameter
    covariance: Covariance
    slope: Slope = FiniteDifference(0.05)

    @property
    def differences(self) -> bool:
        return isinstance(self.slope, FiniteDifference)

    @property
    def multipliers(self) -> tuple[nn.Parameter, ...]:
        return (self.eta,)

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, good = batch.data, batch.good
        b = rng.rademacher(data.y).where(good, 0.0)
        u, along = self.slope(model, data, b, robust_spread(data.y, good))
        return mean_good((u - data.y) ** 2 + 2 * self.covariance(self.eta, b, data.y) * along, good)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return Sure().oracle(model, batch, rng)


def robust_spread(y: Tensor, good: Tensor) -> Tensor:
    """Robust spread of a row's good data, 1.48 times the median of |y − median|, (B,): sources on an empty sky do not move it."""
    flat = torch.where(good, y.detach(), torch.nan).flatten(1)
    return (1.4826 * (flat - flat.nanmedian(1, keepdim=True).values).abs().nanmedian(1).values).nan_to_num(0.0)
