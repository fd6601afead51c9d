"""One sampler a registered name, and the Gaussian that their order is measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffinv.priors.analytic import GaussianPrior
from diffinv.samplers.base import Sampler
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.sde import Ancestral, StochasticMultistep
from tests.cases.operators import draw

SHAPE = (1, 4, 4)
SIZE = 16

CASES: dict[str, Callable[[], Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "multistep": Multistep,
    "ancestral": Ancestral,
    "multistep_sde": StochasticMultistep,
}

VARIANTS: dict[str, Callable[[], Sampler]] = {"ancestral, η = ½": lambda: Ancestral(eta=0.5)}


def gaussian() -> GaussianPrior:
    """N(m, C), eigenvalues of C from 0.05 to 1 (evenly in their logarithm) in random directions; m of size 1."""
    vectors = torch.linalg.qr(draw(SIZE, SIZE, seed=7))[0]
    values = torch.linspace(-3, 0, SIZE, dtype=torch.float64).exp()
    covariance = (vectors * values) @ vectors.T
    return GaussianPrior(torch.cos(torch.arange(SIZE, dtype=torch.float64)).reshape(1, *SHAPE), (covariance + covariance.T) / 2)
