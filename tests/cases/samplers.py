"""One sampler a registered name, and the Gaussian that their order is measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffinv.priors.analytic import GaussianPrior
from diffinv.samplers.base import Sampler
from diffinv.samplers.churn import ChurnedHeun
from diffinv.samplers.corrected import Corrected
from diffinv.samplers.daps import Daps
from diffinv.samplers.daps_matched import DapsMatched
from diffinv.samplers.ddrm import Ddrm
from diffinv.samplers.dps import Dps
from diffinv.samplers.half_step import HalfStep
from diffinv.samplers.langevin import PnpUla, SkRock
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.red_diff import RedDiff
from diffinv.samplers.renoise import Renoise
from diffinv.samplers.sde import Ancestral, StochasticMultistep
from diffinv.samplers.smc import TwistedSmc
from diffinv.samplers.split_gibbs import SplitGibbs
from tests.cases.operators import draw

SHAPE = (1, 4, 4)
SIZE = 16

CASES: dict[str, Callable[[], Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "multistep": Multistep,
    "ancestral": Ancestral,
    "multistep_sde": StochasticMultistep,
    "twisted_smc": lambda: TwistedSmc(particles=1),
    "diffpir": lambda: Renoise(zeta=0.3),
    "dps": lambda: Dps(zeta=0.1),
    "ddrm": Ddrm,
    "red_diff": lambda: RedDiff(lam=1.0, lr=0.1, spread=0.5),
    "split_gibbs": lambda: SplitGibbs(half_step=HalfStep(iterations=60, tol=1e-13)),
    "daps": lambda: Daps(half_step=HalfStep(iterations=60, tol=1e-13)),
    "daps_matched": DapsMatched,
    "pnp_ula": PnpUla,
    "skrock": SkRock,
    "corrected": Corrected,
    "churned_heun": lambda: ChurnedHeun(s_churn=1.0),
}

VARIANTS: dict[str, Callable[[], Sampler]] = {"ancestral, η = ½": lambda: Ancestral(eta=0.5)}


def gaussian() -> GaussianPrior:
    """N(m, C), eigenvalues of C from 0.05 to 1 (evenly in their logarithm) in random directions; m of size 1."""
    vectors = torch.linalg.qr(draw(SIZE, SIZE, seed=7))[0]
    values = torch.linspace(-3, 0, SIZE, dtype=torch.float64).exp()
    covariance = (vectors * values) @ vectors.T
    return GaussianPrior(torch.cos(torch.arange(SIZE, dtype=torch.float64)).reshape(1, *SHAPE), (covariance + covariance.T) / 2)
