"""A second opinion: the posterior under a Gaussian prior that knows nothing of shapes, fitted to the same object.

The prior is N(0, C) with C diagonal in Fourier space, its spectrum S(|ν|) of a band the mean power of the posterior's draws in
rings of frequency: as much light on every scale as the first answer has, in any place. With the Fisher information F of the data
and their score s at 0,

    x̄' = (C⁻¹ + F)⁻¹ s,        R = (C⁻¹ + F)⁻¹ F,        null part of x = x − R x.

R is the resolution matrix: what the data, and not the prior, say of an image. For a convolution on the torus with white noise it
is the Wiener gain of `diffinv.uncertainty.hallucination`. The likelihood must be quadratic; F and s are taken at 0 otherwise.
Invariant: both solves call the operator and no network.
References: Backus & Gilbert, *The Resolving Power of Gross Earth Data*, 1968 (the resolution matrix); Bhadra, Kelkar, Brooks &
Anastasio, *On Hallucinations in Tomographic Image Reconstruction*, 2021, arXiv:2012.00646.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.linalg import information_solve
from diffinv.core.types import Image
from diffinv.likelihood import Likelihood

# At S/N 1000 a residual of 1e-3 still leaves frequencies that the data see wrong by many σ; 1e-6 leaves 0.01 σ.
ITERATIONS, TOLERANCE = 500, 1e-6


def ring_spectrum(samples: Tensor) -> Tensor:
    """Mean |F x|² over images and rings of |ν|, F orthonormal, linear between rings: (M, …, H, W) → (…, H, W).

    Empty rings cannot be: a ring is as wide as one frequency step of the longer side.
    """
    height, width = samples.shape[-2:]
    power = torch.fft.fft2(samples.double(), norm="ortho").abs().pow(2).mean(0)
    frequency = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64)
    ).to(power.device)
    place = frequency * max(height, width)
    ring = place.round().long()
    total = power.new_zeros(*power.shape[:-2], int(ring.max()) + 1)
    mean = total.index_add(-1, ring.flatten(), power.flatten(-2)) / torch.bincount(ring.flatten()).clamp_min(1)
    low = place.floor().long()
    found = torch.lerp(mean[..., low], mean[..., (low + 1).clamp_max(mean.shape[-1] - 1)], place - low)
    return found.clamp_min(1e-12 * found.amax((-2, -1), keepdim=True))


@dataclass(frozen=True, eq=False)
class SecondPrior:
    """The Gaussian prior of one object and its data. likelihood: of one image. spectrum: S (C, H, W), image's unit squared."""

    likelihood: Likelihood
    spectrum: Tensor

    @classmethod
    def fitted(cls, likelihood: Likelihood, samples: Tensor) -> SecondPrior:
        """With the spectrum of draws (M, C, H, W) of the first posterior."""
        return cls(likelihood, ring_spectrum(samples))

    def _covariance(self, x: Image) -> Image:
        return torch.fft.ifft2(self.spectrum.to(x) * torch.fft.fft2(x)).real

    def _solve(self, right: Image) -> Image:
        fisher = self.likelihood.fisher(torch.zeros_like(right))
        return information_solve(self._covariance, fisher, right, iterations=ITERATIONS, tol=TOLERANCE).solution

    def mean(self) -> Image:
        """x̄', the posterior mean under this prior: (1, C, H, W), in the image's unit."""
        start = torch.zeros(1, *self.likelihood.image_shape, device=self.spectrum.device)
        return self._solve(self.likelihood.score(start))

    def null_part(self, image: Image) -> Image:
        """x − R x, the part of an image that the data do not tell: (1, C, H, W)."""
        return image - self._solve(self.likelihood.fisher(torch.zeros_like(image))(image))
