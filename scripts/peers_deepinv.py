"""DeepInverse's posterior samplers on the exact Gaussian problems of scripts/bench_peers; needs the peers' environment.

Chains run as one batch: `DiffusionSampler` would run them one after the other. Units, of the prior as a whole: ΠGDM and moment
matching work where its rms standard deviation is 1, as ΠGDM's r² = σ²/(1 + σ²) supposes. DPS clips its denoised images to
[−1, 1], and DiffPIR and DDRM start in an image range of [0, 1]: these spans are ±3 standard deviations of its widest pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import deepinv
import numpy as np
import torch
from deepinv import sampling
from deepinv.physics import DecomposablePhysics, GaussianNoise, LinearPhysics
from exact_gaussian import Problem
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Settings:
    """What the benchmark varies; what has a default has DeepInverse's own.

    steps. solver, alpha, sigma_min, sigma_max: of the variance-exploding SDE. cg: iterations of the inner CG. guidance, weight,
    clip: of DPS. lambda_, zeta: of DiffPIR. eta, etab: of DDRM. lowest: the last noise level of DDRM on a geometric grid from 1,
    0 for its own, linear grid to 0.
    """

    steps: int
    solver: str = "euler"
    alpha: float = 0.25
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    cg: int = 3
    guidance: str = "norm"
    weight: float = 1.0
    clip: bool = True
    lambda_: float = 7.0
    zeta: float = 0.1
    eta: float = 0.85
    etab: float = 1.0
    lowest: float = 0.0


class _Denoiser(deepinv.models.Denoiser):
    """The exact denoiser with DeepInverse's signature."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor | float, **kwargs: object) -> Tensor:
        return self.network(x, sigma)


def _linear(problem: Problem) -> LinearPhysics:
    operator = problem.operator
    return LinearPhysics(A=operator.A, A_adjoint=operator.A_adjoint, noise_model=GaussianNoise(sigma=problem.sigma_y))


def _decomposed(problem: Problem) -> DecomposablePhysics:
    """The operator through its singular vectors, whose coordinates have the shape of the image."""
    operator, noise = problem.operator, GaussianNoise(sigma=problem.sigma_y)
    if operator.diagonal is not None:
        return DecomposablePhysics(mask=operator.diagonal.reshape(1, *operator.in_shape), noise_model=noise)
    left, values, right = (t.float() for t in torch.linalg.svd(operator.matrix.double(), full_matrices=True))
    rows, columns = operator.matrix.shape
    missing = (0, columns - rows)  # coordinates that the data do not have
    image = lambda c: c.reshape(-1, *operator.in_shape)
    return DecomposablePhysics(
        U=lambda c: (c.flatten(1)[:, :rows] @ left.mT).reshape(-1, *operator.out_shape),
        U_adjoint=lambda y: image(pad(y.flatten(1) @ left, missing)),
        V=lambda c: image(c.flatten(1) @ right),
        V_adjoint=lambda x: image(x.flatten(1) @ right.mT),
        mask=image(pad(values, missing)),
        noise_model=noise,
    )


def _solver(settings: Settings, generator: torch.Generator) -> sampling.BaseSDESolver:
    times = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64)
    solvers = {
        "euler": sampling.EulerSolver,
        "heun": sampling.HeunSolver,
        "ddim": sampling.DDIMSolver,
        "ddpm": sampling.DDPMSolver,
    }
    return solvers[settings.solver](timesteps=times, rng=generator)


def _diffusion(problem: Problem, settings: Settings, generator: torch.Generator, fidelity: object) -> Tensor:
    """The reverse SDE (`alpha` > 0; "ddim" and "ddpm" ignore it) on a geometric grid, where the prior's rms std is 1."""

    def run(unit: Problem) -> Tensor:
        sde = sampling.VarianceExplodingDiffusion(
            sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, alpha=settings.alpha, minus_one_one=False
        )
        model = sampling.PosteriorDiffusion(
            data_fidelity=fidelity,
            denoiser=_Denoiser(unit.network),
            sde=sde,
            solver=_solver(settings, generator),
            minus_one_one=False,
        )
        return model(unit.y, _linear(unit), x_init=(unit.y.shape[0], *unit.operator.in_shape))

    return problem.solved_in(problem.spread, 0.0, run)


def prior(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Draws of the prior: no data."""
    return _diffusion(problem, settings, generator, None)


def moment_matching(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    return _diffusion(problem, settings, generator, sampling.MomentMatchingDataFidelity(cg_max_iter=settings.cg))


def pigdm(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    return _diffusion(problem, settings, generator, sampling.PiGDMDataFidelity(cg_max_iter=settings.cg))


def dps(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """guidance "norm": the gradient of the residual's norm, as in the paper; "annealed": of variance σ_y² + σ²."""

    def run(unit: Problem) -> Tensor:
        model = sampling.DPS(
            _Denoiser(unit.network),
            num_steps=settings.steps,
            guidance=settings.guidance,
            weight=settings.weight,
            rng=generator,
            minus_one_one=False,  # the exact denoiser works in any unit
        )
        if not settings.clip:
            model.data_fidelity.clip = None
        return model(unit.y, _linear(unit), x_init=(unit.y.shape[0], *unit.operator.in_shape))

    return problem.solved_in(3 * problem.widest, 0.0, run)


def diffpir(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """With the proximal step in closed form."""

    def run(unit: Problem) -> Tensor:
        model = sampling.DiffPIR(
            _Denoiser(unit.network),
            deepinv.optim.data_fidelity.L2(),
            sigma=unit.sigma_y,
            max_iter=settings.steps,
            lambda_=settings.lambda_,
            zeta=settings.zeta,
        )
        physics = _decomposed(unit)
        return model(unit.y, physics, x_init=physics.A_adjoint(unit.y))

    return problem.solved_in(6 * problem.widest, 0.5, run)


def ddrm(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """In the singular vectors of A."""
    grid = np.geomspace(1, settings.lowest, settings.steps) if settings.lowest else np.linspace(1, 0, settings.steps)

    def run(unit: Problem) -> Tensor:
        model = sampling.DDRM(_Denoiser(unit.network), sigmas=grid, eta=settings.eta, etab=settings.etab)
        return model(unit.y, _decomposed(unit))

    return problem.solved_in(6 * problem.widest, 0.5, run)


METHODS: dict[str, Callable[[Problem, Settings, torch.Generator], Tensor]] = {
    f"deepinv.{f.__name__}": f for f in (prior, moment_matching, pigdm, dps, diffpir, ddrm)
}
