"""Every sampler of the package with the settings that the benchmarks give it, for exact denoisers of known scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.engine.draws import Method
from diffinv.engine.monitor import Counting
from diffinv.guidance.base import ConjugateGradients, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.proximal import Proximal
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.guidance.tmpd import Tmpd
from diffinv.likelihood import Likelihood
from diffinv.posterior import Posterior
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, sample
from diffinv.samplers.churn import ChurnedHeun
from diffinv.samplers.corrected import Corrected
from diffinv.samplers.daps import Daps
from diffinv.samplers.daps_matched import DapsMatched
from diffinv.samplers.ddrm import Ddrm
from diffinv.samplers.dps import Dps
from diffinv.samplers.langevin import PnpUla, SkRock
from diffinv.samplers.ode import Euler, Heun, Multistep
from diffinv.samplers.red_diff import RedDiff
from diffinv.samplers.renoise import Renoise
from diffinv.samplers.sde import Ancestral, StochasticMultistep
from diffinv.samplers.split_gibbs import SplitGibbs
from diffinv.schedules import LogUniform


@dataclass(frozen=True)
class Row:
    """A sampler, a guidance (ignored by split samplers) and a number of noise levels."""

    sampler: Sampler
    guidance: Guidance
    steps: int

    @property
    def calibrated(self) -> bool:
        """What the method itself claims."""
        return self.sampler.calibrated and (self.guidance.calibrated or not self.sampler.guided)

    def draw(self, prior: Denoiser, likelihood: Likelihood, grid: LogUniform, like: Tensor, rng: Rng) -> tuple[Tensor, float]:
        """Draws (B, *image) and network calls (forward and vjp) a draw."""
        counting = Counting(prior)
        x = sample(self.sampler, Posterior(counting, likelihood, self.guidance), grid.grid(self.steps), like, rng).x
        return x, counting.rows / len(x)


def rows(
    *, iterations: int, tol: float, sigma_data: float, zeta: float, renew: float, spread: float, precision: float
) -> dict[str, Row]:
    """Name → row.

    The first is what `diffinv.reconstruct` does by default, but for the number of levels, which belongs to the grid: 24 where it
    spans eleven e-folds or so. The others solve for the guidance to the end.
    Arguments: iterations, tol: of the inner CG, enough to converge. sigma_data: σ_d, spread of the prior an element, for ΠGDM.
    zeta: of DPS, relative. renew: ζ of DiffPIR. spread: of RED-diff's restarts and its step, in the unit of x.
    precision: λ of RED-diff, in x⁻².
    """
    exact = MomentMatching(ConjugateGradients(iterations, tol))
    plain = PseudoInverse(sigma_data)
    return {
        "default: multistep SDE, 8 preconditioned GMRES": Row(Method().sampler, Method().guidance, 24),
        "moment matching, multistep SDE, 24 levels": Row(StochasticMultistep(), exact, 24),
        "moment matching, multistep SDE": Row(StochasticMultistep(), exact, 64),
        "moment matching, multistep": Row(Multistep(), exact, 24),
        "moment matching, Euler": Row(Euler(), exact, 64),
        "moment matching, Heun": Row(Heun(), exact, 32),
        "moment matching, churned Heun": Row(ChurnedHeun(), exact, 32),
        "moment matching, ancestral": Row(Ancestral(), exact, 64),
        "moment matching, multistep SDE + corrector": Row(Corrected(), exact, 32),
        "DAPS, matched": Row(DapsMatched(solver=ConjugateGradients(iterations, tol)), exact, 12),
        "split Gibbs (PnP-DM)": Row(SplitGibbs(), exact, 50),
        "TMPD, multistep SDE": Row(StochasticMultistep(), Tmpd(), 64),
        "ΠGDM, multistep SDE": Row(StochasticMultistep(), plain, 64),
        "DDRM": Row(Ddrm(), exact, 64),
        "DPS": Row(Dps(zeta, relative=True), exact, 200),
        "DiffPIR": Row(Renoise(renew), Proximal(1.0), 100),
        "DAPS": Row(Daps(), exact, 100),
        "RED-diff": Row(RedDiff(lam=precision, lr=spread / 20, spread=spread), exact, 200),
        "PnP-ULA": Row(PnpUla(), exact, 400),
        "SK-ROCK": Row(SkRock(), exact, 40),
    }


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values (N,)."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float(torch.nan)
