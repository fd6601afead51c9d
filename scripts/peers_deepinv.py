"""DeepInverse's posterior samplers on the exact Gaussian problems of scripts/bench_peers; needs the peers' environment.

Chains run as one batch: `DiffusionSampler` would run them one after the other. Units: samplers that clamp or start in an
image range ([0, 1] inside DeepInverse, [−1, 1] inside DiffPIR) get the problem in a unit where ±3 standard deviations of the
prior span [0, 1]; the SDE samplers can be told not to rescale or clip (`minus_one_one=False`, `clip=None`) and get it as it
is, which is kinder: ΠGDM's r² = σ²/(1 + σ²) holds for a prior of unit variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import deepinv
import torch
from deepinv import sampling
from deepinv.physics import DecomposablePhysics, GaussianNoise, LinearPhysics
from exact_gaussian import Problem
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Settings:
    """What the benchmark varies. span: the part of x that [0, 1] holds where a sampler wants images in [0, 1]."""

    steps: int
    cg: int = 20
    tol: float = 1e-4
    solver: str = "euler"
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    span: float = 6.0


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


def _diffusion(fidelity: object, problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Probability flow (or DDPM) of the variance-exploding SDE on a geometric grid, in the problem's own unit."""
    sde = sampling.VarianceExplodingDiffusion(
        sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, alpha=0.0, minus_one_one=False
    )
    model = sampling.PosteriorDiffusion(
        data_fidelity=fidelity,
        denoiser=_Denoiser(problem.network),
        sde=sde,
        solver=_solver(settings, generator),
        minus_one_one=False,
    )
    physics = _linear(problem)
    return model(problem.y, physics, x_init=(problem.y.shape[0], *problem.operator.in_shape))


def prior(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Draws of the prior: no data."""
    return _diffusion(None, problem, settings, generator)


def moment_matching(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    fidelity = sampling.MomentMatchingDataFidelity(cg_max_iter=settings.cg, cg_tol=settings.tol)
    return _diffusion(fidelity, problem, settings, generator)


def pigdm(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    fidelity = sampling.PiGDMDataFidelity(cg_max_iter=settings.cg, cg_tol=settings.tol)
    return _diffusion(fidelity, problem, settings, generator)


def _dps(problem: Problem, settings: Settings, generator: torch.Generator, guidance: str) -> Tensor:
    model = sampling.DPS(
        _Denoiser(problem.network), num_steps=settings.steps, guidance=guidance, rng=generator, minus_one_one=False
    )
    model.data_fidelity.clip = None  # the default, [−1, 1], would cut a prior of unit variance
    return model(problem.y, _linear(problem), x_init=(problem.y.shape[0], *problem.operator.in_shape))


def dps(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """As in the paper: the gradient of the residual's norm, VP schedule, DDPM steps."""
    return _dps(problem, settings, generator, "norm")


def dps_annealed(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """The Gaussian likelihood of variance σ_y² + σ²."""
    return _dps(problem, settings, generator, "annealed")


def _in_span(problem: Problem, settings: Settings, run: Callable[[Problem], Tensor]) -> Tensor:
    """`run` in the unit where [0, 1] spans `settings.span` of x, back in the unit of x."""
    centre = float(problem.network.mean.mean())
    return centre + settings.span * (run(problem.rescaled(settings.span)) - 0.5)


def _diffpir(problem: Problem, settings: Settings, options: dict[str, float]) -> Tensor:
    def run(unit: Problem) -> Tensor:
        model = sampling.DiffPIR(
            _Denoiser(unit.network), deepinv.optim.data_fidelity.L2(), sigma=unit.sigma_y, max_iter=settings.steps, **options
        )
        physics = _decomposed(unit)
        return model(unit.y, physics, x_init=physics.A_adjoint(unit.y))

    return _in_span(problem, settings, run)


def diffpir(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    return _diffpir(problem, settings, {})


def diffpir_1_1(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """λ = ζ = 1."""
    return _diffpir(problem, settings, {"lambda_": 1.0, "zeta": 1.0})


def ddrm(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Default levels: 100 of them, linear from 1 to 0."""
    return _in_span(problem, settings, lambda u: sampling.DDRM(_Denoiser(u.network))(u.y, _decomposed(u)))


METHODS: dict[str, Callable[[Problem, Settings, torch.Generator], Tensor]] = {
    f"deepinv.{f.__name__}": f for f in (prior, moment_matching, pigdm, dps, dps_annealed, diffpir, diffpir_1_1, ddrm)
}
