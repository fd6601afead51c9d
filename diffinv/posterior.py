"""A posterior is a denoiser: prior × likelihood through a guidance, so that any sampler samples it."""

from __future__ import annotations

from diffinv.core.types import Image, Sigma
from diffinv.guidance.base import Guidance
from diffinv.likelihood import Likelihood
from diffinv.priors.base import Denoiser


class Posterior(Denoiser):
    """E[x₀ | x_σ, y].

    Arguments: prior: E[x₀ | x_σ]. likelihood: p(y | x₀), of the batch that is sampled. guidance: how they meet.
    """

    def __init__(self, prior: Denoiser, likelihood: Likelihood, guidance: Guidance) -> None:
        super().__init__()
        self.prior, self.likelihood, self.guidance = prior, likelihood, guidance

    def forward(self, x: Image, sigma: Sigma) -> Image:
        return self.guidance(self.prior, self.likelihood, x, sigma)
