"""azula's posterior samplers on the exact Gaussian problems of scripts/bench_peers; needs the peers' environment.

Rows are flattened images, as azula's linear solvers work along the last axis. Schedule: azula's default, `VPSchedule()`, or
`VESchedule` where the settings say so. All work in the unit where the prior's rms standard deviation is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from azula import guidance
from azula.denoise import Denoiser, DiracPosterior
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import Schedule, VESchedule, VPSchedule
from azula.sample import DDIMSampler, DDPMSampler, Sampler, xEABSampler
from exact_gaussian import Problem
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What the benchmark varies; what has a default has azula's own, where it has one.

    steps. sampler, schedule: by azula's names. solver, iterations: of the inner linear system. zeta: of DPS. lambda_: of
    DiffPIR. sigma_min, sigma_max: of the variance-exploding schedule.
    """

    steps: int = 64
    sampler: str = "ddim"
    schedule: str = "vp"
    solver: str = "gmres"
    iterations: int = 1
    zeta: float = 1.0
    lambda_: float = 10.0
    sigma_min: float = 0.001
    sigma_max: float = 100.0


class _Exact(Denoiser):
    """x_t = α x₀ + σ z → D(x_t/α, σ/α)."""

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        alpha, sigma = self.schedule(t)
        return DiracPosterior(mean=self.network(x_t / alpha, sigma / alpha))


def _exact(problem: Problem, settings: Settings) -> _Exact:
    schedules = {"vp": VPSchedule(), "ve": VESchedule(settings.sigma_min, settings.sigma_max)}
    return _Exact(problem.network, schedules[settings.schedule])


def _forward(problem: Problem) -> Callable[[Tensor], Tensor]:
    return lambda x: problem.operator.A(x).flatten(1)


def _run(sampler: Sampler, problem: Problem) -> Tensor:
    start = sampler.init((problem.y.shape[0], math.prod(problem.operator.in_shape)), mean=problem.network.mean)
    return sampler(start).reshape(-1, *problem.operator.in_shape)


def _sample(denoiser: Denoiser, problem: Problem, settings: Settings) -> Tensor:
    samplers = {"ddim": DDIMSampler, "ddpm": DDPMSampler, "xeab": xEABSampler}
    return _run(samplers[settings.sampler](denoiser, steps=settings.steps, silent=True), problem)


def prior(problem: Problem, settings: Settings) -> Tensor:
    """Draws of the prior: no data."""
    return _sample(_exact(problem, settings), problem, settings)


def mmps(problem: Problem, settings: Settings) -> Tensor:
    denoiser = guidance.MMPSDenoiser(
        _exact(problem, settings),
        problem.y.flatten(1),
        _forward(problem),
        IsotropicCovariance(torch.tensor(problem.sigma_y**2)),
        solver=settings.solver,
        iterations=settings.iterations,
    )
    return _sample(denoiser, problem, settings)


def tmpd(problem: Problem, settings: Settings) -> Tensor:
    denoiser = guidance.TMPDenoiser(_exact(problem, settings), problem.y.flatten(1), _forward(problem), problem.sigma_y**2)
    return _sample(denoiser, problem, settings)


def diffpir(problem: Problem, settings: Settings) -> Tensor:
    denoiser = guidance.DiffPIRDenoiser(
        _exact(problem, settings),
        problem.y.flatten(1),
        _forward(problem),
        problem.sigma_y**2,
        lmbda=settings.lambda_,
        solver=settings.solver,
        iterations=settings.iterations,
    )
    return _sample(denoiser, problem, settings)


def pgdm(problem: Problem, settings: Settings) -> Tensor:
    """azula's ΠGDM knows no noise: A⁻¹ is regularised, Aᵀ(A Aᵀ + σ_y²)⁻¹, where a plain one would amplify it."""
    matrix = problem.operator.matrix.double()
    noise = problem.sigma_y**2 * torch.eye(matrix.shape[0], dtype=torch.float64)
    inverse = torch.linalg.solve(matrix @ matrix.mT + noise, matrix).float()
    sampler = guidance.PGDMSampler(
        _exact(problem, settings),
        problem.y.flatten(1),
        _forward(problem),
        lambda y: y @ inverse,
        steps=settings.steps,
        silent=True,
    )
    return _run(sampler, problem)


def dps(problem: Problem, settings: Settings) -> Tensor:
    """azula takes the norm of the residual over the whole batch; √B makes ζ a chain's, that of an average chain."""
    sampler = guidance.DPSSampler(
        _exact(problem, settings),
        problem.y.flatten(1),
        _forward(problem),
        zeta=settings.zeta * math.sqrt(problem.y.shape[0]),
        steps=settings.steps,
        silent=True,
    )
    return _run(sampler, problem)


def _standardised(method: Callable[[Problem, Settings], Tensor]) -> Callable[[Problem, Settings], Tensor]:
    """The method where the prior's rms standard deviation is 1."""
    return lambda problem, settings: problem.solved_in(problem.spread, 0.0, lambda unit: method(unit, settings))


METHODS: dict[str, Callable[[Problem, Settings], Tensor]] = {
    f"azula.{f.__name__}": _standardised(f) for f in (prior, mmps, tmpd, diffpir, pgdm, dps)
}
