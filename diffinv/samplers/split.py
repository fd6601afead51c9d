"""What split samplers share: they read prior and likelihood apart, and walk the prior alone down from a noise level.

Invariant: the guidance of the target is never called; the data enter where the sampler says so.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State, parts_of
from diffinv.schedules import Karras


@dataclass(frozen=True)
class Descent:
    """From x at noise σ down to 0 with the prior alone: a draw of p(x₀ | x_σ), or the end of the probability-flow ODE.

    The levels are σ times a Karras grid from 1 to 1/depth (arXiv:2206.00364, eq. 5), then 0: the last image is a mean given
    the level σ/depth, so that what is lost is at most σ²/depth² of variance, 1e-4 of the level's own. Being relative, it
    needs no σ_min in the image's unit. Cost: as many denoiser calls as the sampler makes in `levels` steps.

    Arguments: sampler: guided, of independent rows. levels: positive ones. depth: > 1.
    Raises: UnsupportedError for a sampler that is split itself or needs clouds; DiffinvError for depth ≤ 1.
    """

    sampler: Sampler
    levels: int
    depth: float = 100.0

    def __post_init__(self) -> None:
        if not self.sampler.guided or self.sampler.cloud != 1:
            raise UnsupportedError(
                f"Descent: {type(self.sampler).__name__} cannot sample the prior alone, row by row; "
                "give Euler or StochasticMultistep."
            )
        Karras(1 / self.depth, 1.0).grid(self.levels)

    def __call__(self, prior: Denoiser, x: Image, sigma: Sigma, rng: Rng) -> Image:
        """x₀ from x (B, *image) at σ (B,)."""
        ratios = Karras(1 / self.depth, 1.0).grid(self.levels).tolist()
        state = State(x)
        for k, (ratio, following) in enumerate(zip(ratios[:-1], ratios[1:], strict=True)):
            state = self.sampler.step(prior, state, ratio * sigma, following * sigma, rng.spawn(k))
        return state.x


class Split(Sampler, abc.ABC):
    """A sampler that calls the prior and the likelihood of a `Posterior`, never its guidance."""

    order = None
    guided = False

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> State:
        """As for every sampler, with the prior's denoiser. Raises: UnsupportedError unless the target is a Posterior."""
        return super().init(parts_of(type(self).__name__, target)[0], like, sigma, rng)
