"""The Gaussian-mixture inverse problems of MCGDiff, their exact posterior, and the distance that draws are judged by.

25 Gaussians of unit covariance with means (−8i, −8j) repeated d/2 times, i, j ∈ {−2 … 2}; weights g²/Σg², g ~ N(0, 1);
A = U diag(s) V_{1:m}ᵀ with U, V random orthogonal and s sorted U[0, 1]; y = A x + n, x from the prior, σ_y = U[0, 1]·max s.
References: Cardoso, Janati el Idrissi, Le Corff & Moulines, *Monte Carlo guided Denoising Diffusion models for Bayesian linear
inverse problems*, 2023, arXiv:2308.07983, section 5 (the weights there are χ², which g² is).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.adapters import LinearCallable
from diffinv.priors.analytic import MixturePrior

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """prior; matrix A (m, d); y (m,); sigma_y; and the number that its random streams are keyed by."""

    prior: MixturePrior
    matrix: Tensor
    y: Tensor
    sigma_y: float
    number: int

    @property
    def size(self) -> int:
        """d."""
        return self.matrix.shape[1]

    @property
    def likelihood(self) -> Observation:
        """The data as a likelihood of images (1, 1, d)."""
        rows, size = self.matrix.shape
        operator = LinearCallable(
            lambda x: (x.flatten(1) @ self.matrix.to(x.dtype).mT).reshape(-1, 1, 1, rows), (1, 1, size), (1, 1, rows)
        )
        return Observation(self.y.reshape(1, 1, 1, rows), operator, Gaussian(torch.tensor([self.sigma_y], dtype=F64)))

    def exact(self) -> tuple[MixturePrior, Tensor]:
        """The posterior, a mixture with the prior's components moved and reweighted by their evidence; its weights (25,)."""
        means = self.prior.means.flatten(1)
        gram = self.matrix @ self.matrix.mT + self.sigma_y**2 * torch.eye(len(self.y), dtype=F64)
        residual = self.y - means @ self.matrix.mT
        solved = torch.linalg.solve(gram, residual.mT).mT
        log_weight = self.prior.weights.log() - (residual * solved).sum(1) / 2
        moved = means + solved @ self.matrix
        covariance = torch.eye(self.size, dtype=F64) - self.matrix.mT @ torch.linalg.solve(gram, self.matrix)
        weights = log_weight.softmax(0).clamp_min(1e-300)
        return MixturePrior(moved.reshape(-1, 1, 1, self.size), weights, (covariance + covariance.mT) / 2), weights


def make_problem(size: int, rows: int, number: int, *, sigma_y: float | None = None, uniform: bool = False) -> Problem:
    """Problem `number` of a cell. sigma_y: instead of the drawn one. uniform: equal prior weights."""
    rng = np.random.default_rng([size, rows, number])
    grid = np.array([(-8.0 * i, -8.0 * j) for i, j in itertools.product(range(-2, 3), repeat=2)])
    means = torch.from_numpy(np.tile(grid, (1, size // 2))).reshape(25, 1, 1, size)
    drawn = rng.normal(size=25) ** 2
    weights = torch.from_numpy(np.full(25, 1 / 25) if uniform else drawn / drawn.sum())
    left = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    right = np.linalg.qr(rng.normal(size=(size, rows)))[0]
    values = np.sort(rng.uniform(size=rows))
    level = rng.uniform() * values.max() if sigma_y is None else sigma_y
    prior = MixturePrior(means, weights, torch.tensor(1.0, dtype=F64))
    matrix = torch.from_numpy(left @ np.diag(values) @ right.T)
    truth = prior.sample(torch.zeros(1, 1, 1, size, dtype=F64), Rng.for_draws(number, [size * 10 + rows], 1))[0].flatten()
    y = matrix @ truth + level * torch.from_numpy(rng.normal(size=rows))
    return Problem(prior, matrix, y, float(level), number)


def sliced_wasserstein(a: Tensor, b: Tensor, *, directions: int = 500) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projections: (N, d), (N, d); the same ones every time."""
    u = torch.from_numpy(np.random.default_rng(0).normal(size=(a.shape[1], directions)))
    u = u / u.norm(dim=0, keepdim=True)
    return float(((a @ u).sort(0)[0] - (b @ u).sort(0)[0]).abs().mean())
