"""One tiny guidance a registered name with a Gaussian prior for which it is exact, and linear Gaussian data for two images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.guidance.base import ConjugateGradients, Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.proximal import Proximal
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.guidance.tmpd import Tmpd
from diffinv.likelihood import Joint, Likelihood, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.base import LinearOperator
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.sampling import SumPool
from diffinv.priors.analytic import GaussianPrior
from tests.cases.operators import draw, positive

SHAPE = (1, 4, 4)
SIZE = 16
STD = 1.5  # of the white prior


@dataclass(frozen=True)
class GuidanceCase:
    """guidance, converged; prior: Gaussian, one for which the guidance is exact; tolerance of that, from its inner solve."""

    guidance: Guidance
    prior: GaussianPrior
    tolerance: float = 1e-8


@dataclass(frozen=True)
class DataCase:
    """Independent linear data sets of two images: operators, standard deviations (2,) each, and the data."""

    operators: tuple[LinearOperator, ...]
    stds: tuple[Tensor, ...]
    data: tuple[Tensor, ...]

    @property
    def likelihood(self) -> Likelihood:
        """The data as one likelihood."""
        sets = zip(self.data, self.operators, self.stds, strict=True)
        parts = tuple(Observation(y, operator, Gaussian(std)) for y, operator, std in sets)
        return parts[0] if len(parts) == 1 else Joint(parts)

    def information(self, row: int) -> tuple[Tensor, Tensor]:
        """Σ AᵀA/σ_y² (n, n) and Σ Aᵀy/σ_y² (n,) of one image, from the columns of `apply` alone: no adjoint is trusted."""
        precision, pull = torch.zeros(SIZE, SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
        for y, operator, std in zip(self.data, self.operators, self.stds, strict=True):
            matrix = dense(operator.select([row]).apply, torch.zeros(1, *SHAPE, dtype=torch.float64))
            precision = precision + matrix.T @ matrix / std[row] ** 2
            pull = pull + matrix.T @ y[row].flatten() / std[row] ** 2
        return precision, pull


def mean() -> Tensor:
    return 0.5 + 0.3 * torch.sin(torch.arange(SIZE, dtype=torch.float64)).reshape(1, *SHAPE)


def smooth_prior() -> GaussianPrior:
    """Covariance exp(−r²/2·1.2²) on 4×4 pixels plus 2 % white power."""
    axis = torch.arange(4, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    covariance = torch.exp(-(torch.cdist(points, points) ** 2) / (2 * 1.2**2)) + 0.02 * torch.eye(SIZE, dtype=torch.float64)
    return GaussianPrior(mean(), covariance)


def white_prior() -> GaussianPrior:
    return GaussianPrior(mean(), STD**2 * torch.eye(SIZE, dtype=torch.float64))


def diagonal_prior() -> GaussianPrior:
    """Independent pixels of variances from 0.2 to 3."""
    return GaussianPrior(mean(), torch.linspace(0.2, 3, SIZE, dtype=torch.float64).diag())


def wide_prior() -> GaussianPrior:
    """White with a variance of 1e13, 1e10 times that of the highest level of the contracts: ∂D/∂x = 1 to 1e-10."""
    return GaussianPrior(mean(), 1e13 * torch.eye(SIZE, dtype=torch.float64))


def kernels() -> Tensor:
    """Two point-spread functions without any symmetry, (2, 1, 3, 3)."""
    kernel = positive(2, 1, 3, 3, seed=4) ** 3
    return kernel / kernel.sum((-2, -1), keepdim=True)


def blur(kernel: Tensor) -> Convolution:
    return Convolution(kernel, 1, SHAPE[1:], ZeroBorder())


def observe(*operators: LinearOperator) -> DataCase:
    """Data of two images; every data set and image has its own noise level."""
    truth = smooth_prior().sample(torch.zeros(2, *SHAPE, dtype=torch.float64), Rng.for_draws(8, [0, 1], 1))
    stds = tuple(torch.tensor([0.1, 0.3], dtype=torch.float64) * (k + 1) for k in range(len(operators)))
    data = []
    for k, (operator, std) in enumerate(zip(operators, stds, strict=True)):
        clean = operator(truth)
        data.append(clean + std.reshape(2, 1, 1, 1) * draw(*clean.shape, seed=20 + k))
    return DataCase(operators, stds, tuple(data))


CASES: dict[str, Callable[[], GuidanceCase]] = {
    "moment_matching": lambda: GuidanceCase(MomentMatching(ConjugateGradients(60, 1e-13)), smooth_prior()),
    "pseudo_inverse": lambda: GuidanceCase(PseudoInverse(STD, iterations=60, tol=1e-13), white_prior()),
    "tmpd": lambda: GuidanceCase(Tmpd(iterations=60, tol=1e-13), diagonal_prior()),
    "proximal": lambda: GuidanceCase(Proximal(1.0, iterations=60, tol=1e-13), wide_prior()),
}

VARIANTS: dict[str, Callable[[], GuidanceCase]] = {
    "moment_matching, gmres": lambda: GuidanceCase(MomentMatching(Gmres(SIZE, 1e-13)), smooth_prior()),
    "moment_matching, preconditioned": lambda: GuidanceCase(MomentMatching(Gmres(SIZE, 1e-13, inner=4)), smooth_prior()),
}

DATA: dict[str, Callable[[], DataCase]] = {
    "blur": lambda: observe(blur(kernels())),
    "joint": lambda: observe(blur(kernels()), SumPool(SHAPE, 2)),
}
