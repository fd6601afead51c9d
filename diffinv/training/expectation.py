"""E-steps: an image that could have been behind each measurement, drawn with the present prior.

Invariant: the draw of a row depends on its measurement, the prior and its stream alone.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import Guidance
from diffinv.likelihood import Observation
from diffinv.losses.ambient import white_level
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.topping import direct
from diffinv.noise.gaussian import Gaussian
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, sample
from diffinv.schedules import Schedule

_TINY = 1e-30
_UNSEEN = 1e-5  # of the best-known pixel's information: less is a pixel that no datum looks at


class EStep(abc.ABC):
    """A draw of p(x | y) under a prior."""

    @property
    @abc.abstractmethod
    def passes(self) -> float:
        """Forward passes of the network an image, a product with its Jacobian counted as two."""

    @abc.abstractmethod
    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Image:
        """One image a row: (B, *image), in the unit of the prior."""


@dataclass(frozen=True)
class PosteriorMean(EStep):
    """D(y, σ_n): the first lap after a prior that knows the levels above the noise alone and must not be sampled below.

    No draw but its mean, so that a lap trained on it is too smooth; the next one repairs that. White noise, A = I.
    """

    passes = 1.0

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Image:
        data = direct("PosteriorMean", MeasuredBatch(data))
        with torch.no_grad():
            return prior(data.y, white_level("PosteriorMean", data).to(data.y))


@dataclass(frozen=True)
class PositiveFit(EStep):
    """A positive image that fits each measurement to within its noise, whatever the prior: a first lap where positivity tells
    more than a Gaussian, as of sources on an empty sky.

        x ← x · Aᵀ W (y + c)₊ / Aᵀ W (A x + c),   W = 1/σ² of good data,   c = offset · σ

    from a flat image, until χ² is the number of good data, at most `most` times. Each step raises the likelihood among positive
    images where A has no negative entries; what the data do not show stays flat. With a large c steps are small and smooth, and
    the sky is reached last: that, and the stop, are all that regularises. It is one image and no draw: too smooth in detail,
    with a little of the noise's flux on the sky, which the next laps repair; those from a Gaussian lose its noise only as 1/lap.

    Arguments: offset. most: iterations.
    References: Daube-Witherspoon & Muehllehner, *An iterative image space reconstruction algorithm suitable for volume ECT*,
    1986, doi:10.1109/TMI.1986.4307748.
    """

    offset: float = 50.0
    most: int = 1000

    passes = 0.0

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Image:
        return self.fit(data)

    def fit(self, data: Observation) -> Image:
        """The images: (B, *image). Raises: UnsupportedError for noise that is not independent and Gaussian."""
        if not isinstance(data.noise, Gaussian):
            raise UnsupportedError(f"PositiveFit: {type(data.noise).__name__}; it is for white or per-pixel Gaussian noise.")
        operator, variance = data.operator, data.noise.variance(torch.zeros_like(data.y)).expand(data.y.shape)
        good = variance.isfinite()
        y, std = data.y.where(good, 0.0), variance.sqrt().where(good, 1.0)
        weight, offset = std.square().reciprocal().where(good, 0.0), self.offset * std
        total = lambda t: t.flatten(1).sum(1)
        flat = y.new_ones(len(y), *data.image_shape)
        seen = operator(flat)
        level = total(weight * (y.clamp_min(0) + std) * seen) / total(weight * seen.square()).clamp_min(_TINY)
        x = flat * expand(level, flat)
        gain, wanted = operator.adjoint(weight * (y + offset).clamp_min(0)).clamp_min(0), total(good)
        reached = operator.adjoint(weight)  # where no datum looks it is 0, or the rounding of a Fourier transform
        known = reached > _UNSEEN * reached.flatten(1).amax(1).reshape(-1, *[1] * (reached.ndim - 1))
        for _ in range(self.most):
            mean = operator(x)
            short = total(weight * (y - mean).square()) > wanted
            if not bool(short.any()):
                break
            step = gain / operator.adjoint(weight * (mean + offset)).clamp_min(_TINY)
            x = torch.where(expand(short, x).bool() & known, x * step, x)
        return x


@dataclass(frozen=True)
class _StartedAt(Sampler):
    """A sampler that starts from given images, which are x_σ at the first level of each row."""

    sampler: Sampler
    x: Image

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> State:
        return State(self.x)

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        return self.sampler.step(target, state, sigma, sigma_next, rng)


@dataclass(frozen=True)
class ReverseFromData(EStep):
    """The reverse process of the prior started at x_{σ_n} = y: exact for A = I and white noise, without any likelihood.

    y = x + n is a draw of x_σ at σ = σ_n, so that the rest of the reverse process draws p(x | y), whatever the prior. What is
    left is the error of the steps, of which the first ones matter most: for a Gaussian prior about as wide as σ_n, the whitened
    χ² of draws is 0.938, 0.981 and 0.986 at 12, 24 and 48 levels of `StochasticMultistep`; 0.70, 0.83 and 0.91 of `Ancestral`.

    Arguments: sampler: stochastic. steps: levels, uniform in ln σ from σ_n of each row to sigma_min, then 0. sigma_min: in the
    unit of the image; rows with less noise are images as they are.
    """

    sampler: Sampler
    steps: int
    sigma_min: float

    @property
    def passes(self) -> float:
        return float(self.steps)

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Image:
        data = direct("ReverseFromData", MeasuredBatch(data))
        top = white_level("ReverseFromData", data)
        noisy = top > self.sigma_min
        fraction = torch.linspace(0, 1, self.steps, dtype=torch.float64, device=top.device)
        first = torch.where(noisy, top, 2 * self.sigma_min)[:, None]
        levels = torch.cat([first * (self.sigma_min / first) ** fraction, torch.zeros_like(first)], 1)
        x = sample(_StartedAt(self.sampler, data.y), prior, levels, data.y, rng).x
        return torch.where(expand(noisy, x).bool(), x, data.y)


@dataclass(frozen=True)
class GuidedDraw(EStep):
    """A draw of the posterior by a guided sampler: any linear operator and Gaussian noise.

    Arguments: sampler, guidance. schedule, steps: its grid. products: of the guidance's solver with the Jacobian, a step.
    """

    sampler: Sampler
    guidance: Guidance
    schedule: Schedule
    steps: int
    products: int

    @property
    def passes(self) -> float:
        return self.steps * (1.0 + 2.0 * self.products)

    def draw(self, prior: Denoiser, data: Observation, rng: Rng) -> Image:
        like = data.y.new_zeros(data.y.shape[0], *data.image_shape)
        posterior = Posterior(prior, data, self.guidance)
        return sample(self.sampler, posterior, self.schedule.grid(self.steps), like, rng).x
