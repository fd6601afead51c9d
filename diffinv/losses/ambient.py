"""Denoising score matching without clean images, for noise alone: y = x + n, n ~ N(0, Σ) of known Σ, a row its own.

At levels σ above the noise, x_σ = y + (σ² − Σ)^½ z is a noisy image like any other, and the risk ‖D(x_σ, σ) − x‖² is known up
to a constant in two ways: by a recorrupted target (`Ambient`) or by Stein's identity (`AmbientSure`). A row of little noise
trains more levels than one of much noise, and a clean row, whose noise is its rounding, all of them: mixtures of good and
bad data need nothing else. Below the noise of a row these losses say nothing, and a network that is sampled there without
having seen better rows is worse than none: `Consistency` ties these levels to those above, and expectation maximisation
learns them (`BelowNoise`).
Invariant: at each level the expected gradient is that of denoising score matching on clean images.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, truth
from diffinv.losses.denoising import edm_weight
from diffinv.losses.derivative import FiniteDifference, Slope
from diffinv.losses.sure import probe
from diffinv.losses.topping import Topped, direct, floor, top_up
from diffinv.operators.algebra import Identity
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.base import Reconstructor
from diffinv.schedules import Schedule


class NoiseOnly(Loss, abc.ABC):
    """What the losses share: levels above the noise of a row, and images topped up to them."""

    schedule: Schedule
    sigma_data: float
    unbiased: ClassVar[bool] = True

    def check(self, batch: MeasuredBatch) -> None:
        owner = type(self).__name__
        data = direct(owner, batch)
        lowest = floor(data.noise, data.y)
        share = self.schedule.above(lowest)
        if not bool((share > 0).all()):
            raise UnsupportedError(
                f"{owner}: a row has noise of {float(lowest[share <= 0][0]):.3g}, above every level of the schedule; raise "
                "sigma_max, or leave the row out."
            )

    def _level(self, batch: MeasuredBatch, rng: Rng) -> tuple[Observation, Sigma, Topped, Tensor]:
        """The data, their levels σ, x_σ and t, and the weight of each row: w(σ) and what `_draw` adds to it."""
        data = direct(type(self).__name__, batch)
        sigma, share = self._draw(rng, floor(data.noise, data.y))
        topped = top_up(data.noise, data.y, sigma, rng)
        return data, sigma, topped, share * edm_weight(sigma, self.sigma_data)

    def _draw(self, rng: Rng, lowest: Sigma) -> tuple[Sigma, Tensor]:
        """A level a row, above the lowest that it may train, and a weight: the share of levels that lie there."""
        return self.schedule.draw_above(rng, lowest)


@register("loss", "ambient")
@dataclass(frozen=True)
class Ambient(NoiseOnly):
    """`w(σ) ‖c^(p/2) [D(x_σ, σ) − t]‖² / d`, t = y − Σ (σ² − Σ)^(−½) z, c = 1 − Σ/σ², for levels σ above the noise.

    With white noise and p = 2 the loss of ambient Tweedie, with p = 0 recorrupted-to-recorrupted at every level. c is a
    pixel's own for noise independent between pixels, and that of the largest eigenvalue for correlated noise.
    Oracle: `w(σ) ‖c^(p/2) [D(x_σ, σ) − x]‖² / d`.

    Arguments: schedule: of all levels; a row draws those above its noise. sigma_data: σ_d, in the unit of x. power: p, 0, 1
    or 2. t has the variance Σ/c: with p = 0 a gradient has no finite variance at σ → σ_n, with p = 2 levels near the noise
    hardly count (4 dB behind the truth's own loss there); `AmbientSure` has neither flaw, at twice the cost.
    Raises: UnsupportedError for an operator other than the identity, masks, and noise that is not Gaussian.
    References: Daras, Dimakis & Daskalakis, *Consistent Diffusion Meets Tweedie*, 2024, arXiv:2404.10177, theorem 4.1; Pang
    et al., *Recorrupted-to-Recorrupted*, CVPR 2021; levels by quality: Daras et al., *Ambient Diffusion Omni*, 2025,
    arXiv:2506.10038.
    """

    schedule: Schedule
    sigma_data: float
    power: int = 2

    def __post_init__(self) -> None:
        if self.power not in (0, 1, 2):
            raise DiffinvError(f"Ambient: power is {self.power}; give 0, 1 or 2.")

    def __call__(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        _, sigma, topped, weight = self._level(batch, rng)
        return self._mean(model(topped.x, sigma.to(topped.x)) - topped.target, topped, weight)

    def oracle(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        _, sigma, topped, weight = self._level(batch, rng)
        return self._mean(model(topped.x, sigma.to(topped.x)) - truth(batch, "Ambient"), topped, weight)

    def _mean(self, error: Tensor, topped: Topped, weight: Tensor) -> Tensor:
        return weight.to(error) * (topped.c**self.power * error**2).flatten(1).mean(1)


class AtLevel(Reconstructor):
    """A denoiser at a level a row as a reconstructor of x_σ, each row once or several times in a row, so that slopes of
    reconstructions are slopes of it."""

    def __init__(self, denoiser: nn.Module, sigma: Sigma) -> None:
        super().__init__()
        self.denoiser, self.sigma = denoiser, sigma

    def forward(self, observation: Observation) -> Image:
        return self.denoiser(observation.y, self.sigma.repeat_interleave(len(observation.y) // len(self.sigma)))


@register("loss", "ambient_sure")
@dataclass(frozen=True)
class AmbientSure(NoiseOnly):
    """`w(σ) [‖D(x_σ, σ) − y‖² − tr Σ + 2 tr(Σ ∂D/∂x_σ)] / d` for levels σ from the noise up: Stein's identity at every level.

    x_σ and y share the noise n, and only that: `E[nᵀD(x_σ)] = E tr(Σ ∂D/∂x_σ)`. Bounded at σ = σ_n, where it is plain SURE:
    levels drawn below the noise of a row count there, times min(1, σ_d²/σ_n²), so that a row of hopeless noise does not drown the
    others. The level of the data is the edge of what is learnt, and all that is below starts from it: without them a network
    was 0.7 dB worse at σ_n, and as good from 1.3 σ_n on.
    Its value is the risk of the denoiser on these levels, constants included, so that it validates a training without truth.
    Oracle: `w(σ) ‖D(x_σ, σ) − x‖² / d`.

    Arguments: schedule, sigma_data: as in `Ambient`. slope: how derivatives are taken.
    Raises: UnsupportedError for an operator other than the identity, masks, and noise that is not Gaussian.
    References: Kawar et al., *GSURE-Based Diffusion Model Training with Corrupted Data*, 2023, arXiv:2305.13128; Stein 1981.
    """

    schedule: Schedule
    sigma_data: float
    slope: Slope = FiniteDifference(0.05)

    @property
    def differences(self) -> bool:
        return isinstance(self.slope, FiniteDifference)

    def _draw(self, rng: Rng, lowest: Sigma) -> tuple[Sigma, Tensor]:
        sigma, lifted = self.schedule.draw_lifted(rng, lowest)
        return sigma, torch.where(lifted, (self.sigma_data / lowest.clamp_min(self.sigma_data)) ** 2, 1.0)

    def __call__(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, sigma, topped, weight = self._level(batch, rng)
        variance = data.noise.variance(torch.zeros_like(data.y))
        omega = probe(data.noise, data.y, rng)
        seen = Observation(topped.x, Identity(data.image_shape), data.noise)
        typical = variance.flatten(1).mean(1).sqrt()
        u, along = self.slope(AtLevel(model, sigma.to(topped.x)), seen, omega, typical)
        return weight.to(u) * ((u - data.y) ** 2 - variance + 2 * omega * along).flatten(1).mean(1)

    def oracle(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        _, sigma, topped, weight = self._level(batch, rng)
        error = model(topped.x, sigma.to(topped.x)) - truth(batch, "AmbientSure")
        return weight.to(error) * error.square().flatten(1).mean(1)


@register("loss", "below_noise")
@dataclass(frozen=True)
class BelowNoise(Loss):
    """`w(σ) ‖D(x + σ z, σ) − x‖² / d` for levels σ below the noise of a row: denoising score matching where its data say nothing.

    x is the image of the batch, in expectation maximisation a draw of p(x | y). Beside `AmbientSure` on the same rows a draw
    has no say in what the data themselves teach, and the prior cannot drift from them lap after lap.
    With the true images unbiased on these levels; with draws as good as their prior.

    Arguments: schedule: of all levels; a row draws those below its noise. sigma_data: σ_d, in the unit of x.
    Raises: UnsupportedError as `AmbientSure`, and for a batch without images.
    References: levels by quality: Daras et al., *Ambient Diffusion Omni*, 2025, arXiv:2506.10038.
    """

    schedule: Schedule
    sigma_data: float

    def check(self, batch: MeasuredBatch) -> None:
        data = direct("BelowNoise", batch)
        floor(data.noise, data.y)
        truth(batch, "BelowNoise")

    def __call__(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data, x = direct("BelowNoise", batch), truth(batch, "BelowNoise")
        sigma, share = self.schedule.draw_below(rng, floor(data.noise, data.y))
        noisy = x + expand(sigma.to(x), x) * rng.normal(x)
        weight = (share * edm_weight(sigma, self.sigma_data)).to(x)
        return weight * (model(noisy, sigma.to(x)) - x).square().flatten(1).mean(1)


@register("loss", "consistency")
@dataclass(frozen=True)
class Consistency(Loss):
    """`w(s) ⟨D(x_s¹, s) − D(x_t, t), D(x_s², s) − D(x_t, t)⟩ / d`, s < t ≤ σ_n: below the noise D is a martingale.

    `D(x_t, t) = E[D(x_s, s) | x_t]` for x_s drawn from the reverse process. x_t is drawn from y, which is x_σ at σ = σ_n, by
    `steps` reverse steps of the model, and x_s¹, x_s² by one more each; two independent draws make the product an unbiased
    estimate of ‖E[D(x_s, s) | x_t] − D(x_t, t)‖². No gradient flows through draws.
    Biased: any martingale that agrees with the data above σ_n is a minimiser, and the reverse steps are those of the model
    and of finite size. It is to be added to `Ambient` or `AmbientSure`; expectation maximisation needs no such term.

    Arguments: schedule: s is drawn from its levels below σ_n. sigma_data: σ_d. ratio: t/s, > 1, at most σ_n/s. steps: from y
    to x_t.
    Raises: UnsupportedError for an operator other than the identity, masks, and noise that is not white.
    References: Daras, Dimakis & Daskalakis, *Consistent Diffusion Meets Tweedie*, 2024, arXiv:2404.10177, section 4.2; Daras,
    Dagan, Dimakis & Daskalakis, *Consistent Diffusion Models*, 2023, arXiv:2302.09057.
    """

    schedule: Schedule
    sigma_data: float
    ratio: float = 1.5
    steps: int = 4

    def check(self, batch: MeasuredBatch) -> None:
        white_level("Consistency", direct("Consistency", batch))

    def __call__(self, model: Denoiser, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data = direct("Consistency", batch)
        top = white_level("Consistency", data)
        s, share = self.schedule.draw_below(rng, top)
        t = torch.minimum(s * self.ratio, top)
        with torch.no_grad():
            x_t = self._descend(model, data.y, top, t, rng)
            first, second = (_reverse(model, x_t, t, s, rng) for _ in range(2))
        here = model(x_t, t.to(x_t))
        product = (model(first, s.to(x_t)) - here) * (model(second, s.to(x_t)) - here)
        return (share * edm_weight(s, self.sigma_data)).to(product) * product.flatten(1).mean(1)

    def _descend(self, model: Denoiser, y: Image, top: Sigma, t: Sigma, rng: Rng) -> Image:
        """From y at σ_n to x_t, in steps of equal ratio."""
        x, ratio = y, (t / top) ** (1 / self.steps)
        for k in range(self.steps):
            x = _reverse(model, x, top * ratio**k, top * ratio ** (k + 1), rng)
        return x


def _reverse(model: Denoiser, x: Image, t: Sigma, s: Sigma, rng: Rng) -> Image:
    """A draw of p(x_s | x_t, x₀ = D): D + (s/t)² (x − D) + s √(1 − (s/t)²) z."""
    mean, ratio = model(x, t.to(x)), (s / t) ** 2
    return mean + expand(ratio, x) * (x - mean) + expand(s * (1 - ratio).clamp_min(0).sqrt(), x) * rng.normal(x)


def white_level(owner: str, data: Observation) -> Sigma:
    """σ_n (B,) float64 of white noise. Raises UnsupportedError for any other: y is then no x_σ of any level."""
    level = floor(data.noise, data.y)
    variance = data.noise.variance(torch.zeros_like(data.y)).double()
    even = torch.allclose(variance.sqrt(), expand(level, variance).expand(variance.shape), rtol=1e-5, atol=0)
    if not even:
        raise UnsupportedError(
            f"{owner}: the noise is not white, so that the data are no noisy image of any single level; use moment matching."
        )
    return level
