"""Stein's unbiased risk estimate and its relatives: the risk of an estimate of the noiseless data, without these.

With m = A x and u = A f(y, A): `‖u − m‖² = ‖u‖² − 2 mᵀu + ‖m‖²`, where the cross term follows from the noise alone:
Gaussian: `E[mᵀu] = E[yᵀu − tr(Σ ∂u/∂y)]` (Stein); Poisson, Poisson–Gaussian, Gamma: from u at shifted data.
Masked data count nowhere. All are means over the good data of a row, in the square of the data's unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, mean_good, truth
from diffinv.losses.derivative import FiniteDifference, ForwardMode, Slope
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.independent import over
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson


@singledispatch
def probe(noise: Noise, like: Tensor, rng: Rng) -> Tensor:
    """ω (B, *data) with mean zero and E[ωωᵀ] = Σ, of Gaussian noise with covariance Σ.

    Raises: UnsupportedError for noise that is not Gaussian of a known covariance.
    """
    raise UnsupportedError(
        f"SURE: {type(noise).__name__} is not Gaussian noise of known covariance; use Recorrupted where the noise splits, "
        "or ShiftedSure or FirstOrderSure for Poisson, PoissonGaussian and Gamma."
    )


@probe.register
def _(noise: Gaussian, like: Tensor, rng: Rng) -> Tensor:
    return noise.at(noise.std, like) * rng.rademacher(like)


@probe.register
def _(noise: CorrelatedGaussian, like: Tensor, rng: Rng) -> Tensor:
    return noise.sample(torch.zeros_like(like), rng)


@register("loss", "sure")
@dataclass(frozen=True, eq=False)
class Sure(Loss):
    """`‖A f − y‖² − tr Σ + 2 tr(Σ ∂(A f)/∂y)` a datum: Gaussian noise, white, per pixel or correlated, of known covariance.

    Oracle: `‖A (f − x)‖²` a datum. The trace is estimated from one random direction. With a weight w, both are
    `Σ_good w (…)²` over all d data of a row: w = 1/(probability that a datum is good) is ENSURE, whose mean over random
    samplings is the risk of the full one if the error of f does not depend on the sampling, and less if f fits what it sees.

    Arguments: slope: how derivatives are taken. weight: (1|B, *data), dimensionless, or None for 1.
    Raises: UnsupportedError for noise that is not Gaussian.
    References: Stein, *Estimation of the Mean of a Multivariate Normal Distribution*, 1981, Ann. Statist. 9, 1135; Ramani,
    Blu & Unser, *Monte-Carlo SURE*, 2008, IEEE TIP 17, 1540; Aggarwal, Pramanik, John & Jacob, *ENSURE*, 2022,
    arXiv:2010.10631.
    """

    slope: Slope = FiniteDifference(0.05)
    weight: Tensor | None = None
    unbiased = True

    @property
    def differences(self) -> bool:
        return isinstance(self.slope, FiniteDifference)

    def check(self, batch: MeasuredBatch) -> None:
        data = batch.data
        probe(data.noise, data.y, Rng.for_draws(0, range(data.y.shape[0]), 1))

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, good = batch.data, batch.good
        omega = probe(data.noise, data.y, rng).where(good, 0.0)
        variance = data.noise.variance(torch.zeros_like(data.y)).where(good, 0.0)
        u, along = self.slope(model, data, omega, mean_good(variance, good).sqrt())
        return self._mean((u - data.y) ** 2 - variance + 2 * omega * along, good)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, good = batch.data, batch.good
        error = data.operator(model(data)) - data.operator(truth(batch, "Sure"))
        return self._mean(error**2, good)

    def _mean(self, values: Tensor, good: Tensor) -> Tensor:
        if self.weight is None:
            return mean_good(values, good)
        return (self.weight.to(values).expand(good.shape).where(good, 0.0) * values.where(good, 0.0)).flatten(1).mean(1)


@dataclass(frozen=True)
class Shift:
    """What a noise's identity says: `E[mᵢ uᵢ(y)] = E[weight uᵢ(y′) − slope ∂ᵢuᵢ(y′) − offset uᵢ(y)]`, y′ = y but for pixel i.

    moved: y′ᵢ. All (B, *data) or broadcastable to it.
    """

    moved: Tensor
    weight: Tensor
    slope: Tensor
    offset: Tensor


@singledispatch
def shift(noise: Noise, y: Tensor, rng: Rng) -> Shift:
    """The identity of one pixel, for every pixel. Raises UnsupportedError for noise without one; DiffinvError for other data."""
    raise UnsupportedError(
        f"ShiftedSure: no exact identity for {type(noise).__name__}; use Sure for Gaussian noise of known covariance, "
        "or PoissonGaussian in place of its Gaussian approximation."
    )


@shift.register
def _(noise: Poisson, y: Tensor, rng: Rng) -> Shift:
    noise.whole_counts(y)  # else "one count less" means nothing
    gain, background = noise.at(noise.gain, y), noise.at(noise.background, y)
    seen = y + background > 0.5 / gain  # at no counts the weight is 0, and one less would be no data
    return Shift(torch.where(seen, y - 1 / gain, y), y + background, torch.zeros_like(y), background)


@shift.register
def _(noise: PoissonGaussian, y: Tensor, rng: Rng) -> Shift:
    gain, sky = noise.at(noise.gain, y), noise.at(noise.sky, y)
    return Shift(y - 1 / gain, y + sky, (noise.at(noise.read_noise, y) / gain) ** 2 * torch.ones_like(y), sky)


@shift.register
def _(noise: Gamma, y: Tensor, rng: Rng) -> Shift:
    y, looks = noise.intensities(y), over(noise.looks, y).expand(y.shape)
    return Shift(y * rng.uniform(y) ** (1 / looks), y, torch.zeros_like(y), torch.zeros_like(y))


@singledispatch
def variance_estimate(noise: Noise, y: Tensor) -> Tensor:
    """Unbiased estimate of Var[yᵢ | mᵢ] from yᵢ alone: (B, *data). Raises UnsupportedError for noise without one."""
    raise UnsupportedError(
        f"FirstOrderSure: no variance estimate from the data for {type(noise).__name__}; use Sure for Gaussian noise."
    )


@variance_estimate.register
def _(noise: Poisson, y: Tensor) -> Tensor:
    return (y + noise.at(noise.background, y)) / noise.at(noise.gain, y)


@variance_estimate.register
def _(noise: PoissonGaussian, y: Tensor) -> Tensor:
    gain = noise.at(noise.gain, y)
    return (y + noise.at(noise.sky, y)) / gain + (noise.at(noise.read_noise, y) / gain) ** 2


@variance_estimate.register
def _(noise: Gamma, y: Tensor) -> Tensor:
    return noise.intensities(y) ** 2 / (over(noise.looks, y) + 1)


@register("loss", "shifted_sure")
@dataclass(frozen=True)
class ShiftedSure(Loss):
    """`‖u‖² − 2 Σᵢ cᵢ + ‖y‖² − Σ var(y)` a datum, E[cᵢ] = E[mᵢ uᵢ], exact for Poisson, Poisson–Gaussian and Gamma noise.

    Poisson y = k/g − b: `E[(mᵢ + b) uᵢ(y)] = E[(yᵢ + b) uᵢ(y − eᵢ/g)]`; with Gaussian read noise of variance τ² on top
    `− τ² ∂ᵢuᵢ(y − eᵢ/g)`; Gamma of L looks: `E[mᵢ uᵢ(y)] = E[yᵢ uᵢ(y, yᵢ → t yᵢ)]`, t ~ Beta(L, 1).
    Each pixel costs a pass, so that `pixels` random ones a row are taken, times d/pixels: unbiased, of a variance that falls
    with their number. Recorrupted is cheaper and quieter where the noise splits. Oracle: `‖A (f − x)‖²` a datum.

    Arguments: pixels: evaluated a row, ≤ the number of data.
    Raises: UnsupportedError for other noise.
    References: Hudson, *A Natural Identity for Exponential Families*, 1978, Ann. Statist. 6, 473; Le Montagner, Angelini &
    Olivo-Marin, *An Unbiased Risk Estimator for Image Denoising in the Presence of Mixed Poisson–Gaussian Noise*, 2014,
    IEEE TIP 23, 1255.
    """

    pixels: int
    unbiased = True

    def check(self, batch: MeasuredBatch) -> None:
        data = batch.data
        shift(data.noise, data.y, Rng.for_draws(0, range(data.y.shape[0]), 1))
        if not 1 <= self.pixels <= data.y[0].numel():
            raise UnsupportedError(
                f"ShiftedSure: pixels must lie between 1 and the {data.y[0].numel()} data of a row, got {self.pixels}."
            )

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, good = batch.data, batch.good
        u, count = data.operator(model(data)), data.y[0].numel()
        move = shift(data.noise, data.y, rng)
        chosen = rng.uniform(data.y).flatten(1).argsort(1)[:, : self.pixels]
        moved, slope = self._at(model, data, move, chosen)
        terms = torch.gather(move.weight.expand(u.shape).flatten(1), 1, chosen) * moved
        terms = terms - torch.gather(move.slope.flatten(1), 1, chosen) * slope
        terms = terms * torch.gather(good.flatten(1).to(u), 1, chosen)
        cross = (count / self.pixels) * terms.sum(1) / good.flatten(1).sum(1).clamp_min(1)
        rest = u**2 + 2 * move.offset * u + data.y**2 - variance_estimate(data.noise, data.y)
        return mean_good(rest, good) - 2 * cross

    def _at(self, model: nn.Module, data: Observation, move: Shift, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """uᵢ and ∂ᵢuᵢ at y′ of each chosen pixel: two (B, pixels)."""
        flat = data.y.flatten(1)
        rows = flat.repeat_interleave(self.pixels, 0)
        index = chosen.reshape(-1, 1)
        values = torch.gather(move.moved.expand(data.y.shape).flatten(1), 1, chosen).reshape(-1, 1)
        shifted = data.repeat(self.pixels) if data.y.shape[0] > 1 else data
        shifted = replace(shifted, y=rows.scatter(1, index, values).reshape(-1, *data.y.shape[1:]))
        unit = torch.zeros_like(rows).scatter(1, index, 1.0).reshape(shifted.y.shape)
        if bool(move.slope.any()):
            u, along = ForwardMode()(model, shifted, unit, unit)
        else:
            u = shifted.operator(model(shifted))
            along = torch.zeros_like(u)
        take = lambda v: torch.gather(v.flatten(1), 1, index).reshape(chosen.shape)
        return take(u), take(along)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return Sure().oracle(model, batch, rng)


@register("loss", "first_order_sure")
@dataclass(frozen=True)
class FirstOrderSure(Loss):
    """`‖A f − y‖² − Σ var(y) + 2 Σᵢ var(yᵢ) ∂ᵢ(A f)ᵢ` a datum: `ShiftedSure` to first order in the shift, at one product.

    Exact where u is affine in each of its own data; otherwise biased by the curvature over one count (Poisson: 7 % of the
    cross term of u = y² at one count of 0.7 and a mean of 2). Its minimiser is therefore not the posterior mean.

    Arguments: slope: how derivatives are taken. Raises: UnsupportedError for noise other than Poisson, PoissonGaussian, Gamma.
    References: as `ShiftedSure`; Luisier, Blu & Unser, *Image Denoising in Mixed Poisson–Gaussian Noise*, 2011, IEEE TIP 20, 696.
    """

    slope: Slope = FiniteDifference(0.05)

    @property
    def differences(self) -> bool:
        return isinstance(self.slope, FiniteDifference)

    def check(self, batch: MeasuredBatch) -> None:
        variance_estimate(batch.observation.noise, batch.observation.y)

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, good = batch.data, batch.good
        variance = variance_estimate(data.noise, data.y)
        b = rng.rademacher(data.y).where(good, 0.0)
        u, along = self.slope(model, data, b, mean_good(variance, good).clamp_min(0).sqrt())
        return mean_good((u - data.y) ** 2 - variance + 2 * variance * b * along, good)

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return Sure().oracle(model, batch, rng)
