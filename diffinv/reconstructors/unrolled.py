"""Unrolled proximal gradient: a few steps towards the data, each followed by a network in the place of a proximal map.

`x ← N_k(x + t_k ∇ₓ log p(y | x)/λ)`, λ = λ_max of the Fisher information at x, t_k > 0 learned. For Gaussian noise the
gradient is AᵀP(y − Ax) and λ = λ_max(AᵀPA), so that noise levels, correlations and masks enter through P; for other noise and
for non-linear operators it is the likelihood's own score, with the Gauss–Newton curvature. t_k = 1 is the classical step and
t_k < 2 is stable, whatever the unit of the data.
Invariant: data enter through the likelihood alone.

References: Gregor & LeCun, *Learning Fast Approximations of Sparse Coding*, ICML 2010; Adler & Öktem, *Learned Primal-Dual
Reconstruction*, 2018, arXiv:1707.06474; Aggarwal, Mani & Jacob, *MoDL*, 2019, arXiv:1712.02862 (shared weights).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.checks import ConfigError
from diffinv.core.linalg import expand
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.reconstructors.backprojected import BackProjection, LinearInverse, largest_eigenvalue
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import whole


class Unrolled(Reconstructor):
    """K steps x ← N_k(x + t_k score(x)/λ(x)).

    λ is found by the power method for each row: once if the likelihood is quadratic, else at every step. A likelihood whose
    curvature is large in a few pixels (counts near zero) gets short steps everywhere.

    Arguments:
        network: N, image → image, shared by all steps; or an `nn.ModuleList` of one network a step. iterations: K ≥ 1.
        step: t > 0 before training, dimensionless. start: the first x from the data, or None for x = 0. residual: whether
            a step gives z + N(z), so that a network that starts at 0 starts as gradient descent.
    Raises: ConfigError if a number is not positive or the list has another length than K; UnsupportedError, when called, for a
    non-linear operator with a start that is not None.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        iterations: int,
        step: float = 1.0,
        start: LinearInverse | None = BackProjection(),
        residual: bool = False,
    ) -> None:
        super().__init__()
        if iterations < 1 or not step > 0:
            raise ConfigError(f"Unrolled: iterations and step must be > 0, got {iterations} and {step}; step 1 is the classical.")
        if isinstance(network, nn.ModuleList) and len(network) != iterations:
            raise ConfigError(
                f"Unrolled: {len(network)} networks for {iterations} iterations; give one network, or one for each."
            )
        self.network, self.iterations, self.start, self.residual = network, iterations, start, residual
        self.raw_steps = nn.Parameter(torch.full((iterations,), step, dtype=torch.float64).expm1().log().float())

    @property
    def steps(self) -> Tensor:
        """t_k > 0: (K,), dimensionless."""
        return functional.softplus(self.raw_steps)

    def forward(self, observation: Observation) -> Image:
        data = whole(observation)
        x = data.y.new_zeros(data.y.shape[0], *data.image_shape) if self.start is None else self.start(data)
        networks = self.network if isinstance(self.network, nn.ModuleList) else [self.network] * self.iterations
        for k, (step, network) in enumerate(zip(self.steps, networks, strict=True)):
            if k == 0 or not data.quadratic:
                fixed = x.detach()
                curvature = largest_eigenvalue(data.fisher(x), fixed, constant=data.fisher(fixed))
            x = x + step * expand(1 / curvature, x) * data.score(x)
            x = x + network(x) if self.residual else network(x)
        return x
