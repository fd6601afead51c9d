"""The best affine reconstruction: what a supervised method without a network can reach, told the images' mean and covariance.

    x̂ = μ + C Aᵀ (A C Aᵀ + Σ̄)⁻¹ (y − A μ),   Σ̄ the noise covariance averaged over the images

(Gauss & Markov; Wiener). No affine estimate has a smaller mean squared error if μ, C and Σ̄ are those of the images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.linalg import dense
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.reconstructors.observed import clean_data, good_data

TRUTHS = 1024  # that Σ̄ is averaged over


class AffineEstimate:
    """Fitted to the true training images (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        flat = images.double().flatten(1)
        self.mean = flat.mean(0)
        self.covariance = (flat - self.mean).mT @ (flat - self.mean) / len(flat)

    def __call__(self, batch: MeasuredBatch) -> Tensor:
        """Estimates of the rows of a batch: (B, C, H, W)."""
        data = batch.observation
        if not data.operator.tensors() or data.operator.batch == 1:
            return self._estimate(data)
        return torch.cat([self._estimate(data.select([row])) for row in range(data.batch)])

    def _estimate(self, data: Observation) -> Tensor:
        y, good, shape = clean_data(data).double().flatten(1), good_data(data).flatten(1)[0], data.image_shape
        a = dense(lambda x: data.operator(x.float()).double(), torch.zeros(1, *shape, dtype=torch.float64))[good]
        seen = a @ self.covariance
        weights = torch.cholesky_solve(seen, torch.linalg.cholesky(seen @ a.mT + self._noise(data, good)))
        return (self.mean + (y[:, good] - a @ self.mean) @ weights).float().unflatten(1, shape)

    def _noise(self, data: Observation, good: Tensor) -> Tensor:
        """Σ̄ of the good data: (m, m)."""
        mean = data.operator(self.images[:TRUTHS].float())
        if isinstance(data.noise, CorrelatedGaussian):
            return torch.linalg.inv(dense(data.noise.precision(mean[:1]), mean[:1]).double())[good][:, good]
        return data.noise.variance(mean).expand(mean.shape).double().mean(0).flatten()[good].diag()
