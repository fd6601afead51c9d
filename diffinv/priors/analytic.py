"""Priors whose denoiser, score and density are closed forms: the yardsticks that samplers and guidance are measured with.

Gaussian N(m, C): D(x, σ) = m + C (C + σ²)⁻¹ (x − m), and log p(x; σ) = log N(x; m, C + σ²).
Mixture Σ w_k N(m_k, C): the same for each component, weighted with its responsibility for x.
Invariant: D(x, σ) = x + σ² ∇ log p(x; σ), and σ² ∂D/∂x is the covariance of x₀ given x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, check_shape
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser

LOG_2PI = math.log(2 * math.pi)


def _eigen(owner: str, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n) of a covariance; rounding below zero is set to zero."""
    if not torch.allclose(covariance, covariance.mT):
        raise DiffinvError(f"{owner}: the covariance is not symmetric; give (C + Cᵀ)/2.")
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-5 * values[-1]:
        raise DiffinvError(
            f"{owner}: the covariance has the eigenvalue {values[0].item():.3g}; it must be positive semidefinite."
        )
    return values.clamp_min(0), vectors


@register("prior", "gaussian")
class GaussianPrior(Denoiser):
    """N(m, C) with a dense covariance: D = m + Q [λ/(λ + σ²)] Qᵀ (x − m), C = Q λ Qᵀ.

    Arguments:
        mean: (1, *image), in the image's unit. covariance: (n, n) symmetric PSD, n = numel of an image, in its square.
    Raises: DiffinvError if the covariance is not a symmetric PSD (n, n) matrix.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        size = mean[0].numel()
        if mean.shape[0] != 1 or covariance.shape != (size, size):
            raise DiffinvError(
                f"GaussianPrior: mean {tuple(mean.shape)} needs a covariance of ({size}, {size}) and a leading axis of 1; "
                f"got {tuple(covariance.shape)}."
            )
        values, vectors = _eigen("GaussianPrior", covariance)
        self.register_buffer("mean", mean)
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)

    @property
    def covariance(self) -> Tensor:
        """C, (n, n)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.mT

    def _coordinates(self, x: Image) -> Tensor:
        check_shape("GaussianPrior", x, self.mean.shape[1:])
        return (x - self.mean).flatten(1) @ self.eigenvectors

    def _image(self, u: Tensor) -> Image:
        return self.mean + (u @ self.eigenvectors.mT).reshape(-1, *self.mean.shape[1:])

    def forward(self, x: Image, sigma: Sigma) -> Image:
        variance = sigma.to(x.dtype)[:, None] ** 2
        return self._image(self._coordinates(x) * self.eigenvalues / (self.eigenvalues + variance))

    def log_prob(self, x: Image, sigma: Sigma) -> Tensor:
        """log N(x; m, C + σ²): (B, *image), (B,) → (B,), float64."""
        variance = self.eigenvalues + sigma.to(x.dtype)[:, None] ** 2
        terms = self._coordinates(x) ** 2 / variance + variance.log() + LOG_2PI
        return -terms.double().sum(1) / 2

    def sample(self, like: Image, rng: Rng) -> Image:
        """Draws of the prior itself (σ = 0), the shape and dtype of `like` (B, *image)."""
        z = rng.normal(like).flatten(1)
        return self._image(z * self.eigenvalues.sqrt())

    def posterior(self, matrix: Tensor, y: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Exact posterior of y = A x + n, n ~ N(0, diag v), by dense algebra.

        Arguments: matrix: A (m, n). y: (B, m) data. variance: v, () or (m,), in the data's unit squared.
        Returns: mean (B, *image) and covariance (n, n).
        """
        gain_of = self.covariance @ matrix.mT
        noise = torch.diag(variance.to(matrix.dtype).expand(matrix.shape[0]))
        gain = torch.linalg.solve(matrix @ gain_of + noise, gain_of, left=False)
        residual = y - (matrix @ self.mean.flatten())[None]
        mean = self.mean + (residual @ gain.mT).reshape(-1, *self.mean.shape[1:])
        covariance = self.covariance - gain @ gain_of.mT
        return mean, (covariance + covariance.mT) / 2


@register("prior", "gaussian_fourier")
class FourierGaussianPrior(Denoiser):
    """Stationary Gaussian on a periodic grid: D = m + F⁻¹ [S/(S + σ²)] F (x − m), F the orthonormal 2-D FFT.

    Arguments:
        mean: (1, C, H, W), in the image's unit. spectrum: S (1, C, H, W), E|F(x − m)|² a frequency, in its square; ≥ 0
            and even, S(k) = S(−k). Channels are independent.
    Raises: DiffinvError if the spectrum is negative or not even.
    """

    def __init__(self, mean: Tensor, spectrum: Tensor) -> None:
        super().__init__()
        check_shape("FourierGaussianPrior: spectrum", spectrum, mean.shape[1:])
        if not bool((spectrum >= 0).all()):
            raise DiffinvError(f"FourierGaussianPrior: spectrum must be >= 0, got {spectrum.min().item():.3g}.")
        if not torch.allclose(spectrum, spectrum.flip(-2, -1).roll((1, 1), (-2, -1)), rtol=1e-3):
            raise DiffinvError("FourierGaussianPrior: spectrum must be even, S(k) = S(-k); average it with its mirror image.")
        self.register_buffer("mean", mean)
        self.register_buffer("spectrum", spectrum)

    def _filtered(self, x: Image, factor: Tensor) -> Image:
        return torch.fft.ifft2(factor * torch.fft.fft2(x, norm="ortho"), norm="ortho").real

    def forward(self, x: Image, sigma: Sigma) -> Image:
        check_shape("FourierGaussianPrior", x, self.mean.shape[1:])
        variance = expand(sigma, x) ** 2
        return self.mean + self._filtered(x - self.mean, self.spectrum / (self.spectrum + variance))

    def log_prob(self, x: Image, sigma: Sigma) -> Tensor:
        """log N(x; m, C + σ²): (B, *image), (B,) → (B,), float64."""
        variance = self.spectrum + expand(sigma, x) ** 2
        power = torch.fft.fft2(x - self.mean, norm="ortho").abs() ** 2
        return -(power / variance + variance.log() + LOG_2PI).double().flatten(1).sum(1) / 2

    def sample(self, like: Image, rng: Rng) -> Image:
        """Draws of the prior itself (σ = 0), the shape and dtype of `like` (B, C, H, W)."""
        return self.mean + self._filtered(rng.normal(like), self.spectrum.sqrt())


@register("prior", "gaussian_low_rank")
class LowRankGaussianPrior(Denoiser):
    """N(m, W Wᵀ + ψ I): D = m + g (x − m) + Q [(λ + ψ)/(λ + ψ + σ²) − g] Qᵀ (x − m), g = ψ/(ψ + σ²), W Wᵀ = Q λ Qᵀ.

    Arguments: mean: (1, *image), in the image's unit. factor: W (n, r), r ≤ n = numel of an image. rest: ψ > 0, (), in the
    square of the image's unit.
    Raises: DiffinvError for shapes that do not fit, or ψ that is not positive.
    """

    def __init__(self, mean: Tensor, factor: Tensor, rest: Tensor) -> None:
        super().__init__()
        size = mean[0].numel()
        if mean.shape[0] != 1 or factor.ndim != 2 or factor.shape[0] != size or factor.shape[1] > size:
            raise DiffinvError(
                f"LowRankGaussianPrior: mean {tuple(mean.shape)} needs a factor of ({size}, r ≤ {size}) and a leading axis of 1; "
                f"got {tuple(factor.shape)}."
            )
        if rest.ndim or not bool(rest > 0):
            raise DiffinvError(f"LowRankGaussianPrior: the rest must be one variance > 0, got {rest.tolist()}.")
        vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
        self.register_buffer("mean", mean)
        self.register_buffer("eigenvectors", vectors)
        self.register_buffer("eigenvalues", values**2)
        self.register_buffer("rest", rest)

    @property
    def covariance(self) -> Tensor:
        """W Wᵀ + ψ I, (n, n)."""
        dense = (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.mT
        return dense + self.rest * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)

    def forward(self, x: Image, sigma: Sigma) -> Image:
        check_shape("LowRankGaussianPrior", x, self.mean.shape[1:])
        variance, gap = sigma.to(x.dtype)[:, None] ** 2, (x - self.mean).flatten(1)
        isotropic, along = self.rest / (self.rest + variance), self.eigenvalues + self.rest
        u = (gap @ self.eigenvectors) * (along / (along + variance) - isotropic)
        return self.mean + (isotropic * gap + u @ self.eigenvectors.mT).reshape(x.shape)

    def log_prob(self, x: Image, sigma: Sigma) -> Tensor:
        """log N(x; m, W Wᵀ + ψ + σ²): (B, *image), (B,) → (B,), float64."""
        gap = (x - self.mean).flatten(1).double()
        floor = self.rest.double() + sigma.double()[:, None] ** 2
        u, along = gap @ self.eigenvectors.double(), self.eigenvalues.double() + floor
        squares = (gap**2).sum(1) / floor[:, 0] - (u**2 * (1 / floor - 1 / along)).sum(1)
        others = gap.shape[1] - u.shape[1]
        return -(squares + along.log().sum(1) + others * floor[:, 0].log() + gap.shape[1] * LOG_2PI) / 2

    def sample(self, like: Image, rng: Rng) -> Image:
        """Draws of the prior itself (σ = 0), the shape and dtype of `like` (B, *image)."""
        z = rng.normal(like).flatten(1)
        u = (z @ self.eigenvectors) * ((self.eigenvalues + self.rest).sqrt() - self.rest.sqrt())
        return self.mean + (self.rest.sqrt() * z + u @ self.eigenvectors.mT).reshape(like.shape)


@register("prior", "mixture")
class MixturePrior(Denoiser):
    """Σ_k w_k N(m_k, C), one covariance for all: D = C (C + σ²)⁻¹ x + σ² (C + σ²)⁻¹ Σ_k r_k(x) m_k.

    r_k ∝ w_k N(x; m_k, C + σ²) is the component's responsibility.
    Arguments:
        means: (K, *image), in the image's unit. weights: (K,) > 0; they are normalised to one.
        covariance: () a variance a pixel, or (n, n) symmetric PSD, in the image's unit squared.
    Raises: DiffinvError for weights that are not positive, or a covariance that is not PSD.
    """

    def __init__(self, means: Tensor, weights: Tensor, covariance: Tensor) -> None:
        super().__init__()
        size = means[0].numel()
        if weights.shape != means.shape[:1] or not bool((weights > 0).all()):
            raise DiffinvError(
                f"MixturePrior: needs {means.shape[0]} weights > 0, got {weights.tolist()}; drop empty components."
            )
        if covariance.shape not in [(), (size, size)]:
            raise DiffinvError(f"MixturePrior: covariance must be () or ({size}, {size}), got {tuple(covariance.shape)}.")
        values, vectors = _eigen("MixturePrior", covariance) if covariance.ndim else (covariance.reshape(1).clone(), None)
        self.register_buffer("means", means)
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)

    def _rotate(self, v: Tensor) -> Tensor:
        return v if self.eigenvectors is None else v @ self.eigenvectors

    def _rotate_back(self, u: Tensor) -> Tensor:
        return u if self.eigenvectors is None else u @ self.eigenvectors.mT

    def _evidence(self, u: Tensor, variance: Tensor) -> Tensor:
        """log w_k N(x; m_k, C + σ²) at x in eigen-coordinates, up to what all components share: (B, n), (B, n|1) → (B, K).
        Squares are expanded: products of matrices instead of a (B, K, n) array, in float64 because they cancel."""
        means, precision = self._rotate(self.means.flatten(1)).double(), 1 / variance.double()
        squares = means**2 if precision.shape[1] > 1 else (means**2).sum(1, keepdim=True)
        return self.weights.double().log() + (u.double() * precision) @ means.mT - precision @ squares.mT / 2

    def _coordinates(self, x: Image, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """x in eigen-coordinates and λ + σ²: (B, n) and (B, n), or (B, 1) where all λ are one."""
        check_shape("MixturePrior", x, self.means.shape[1:])
        return self._rotate(x.flatten(1)), self.eigenvalues + sigma.to(x.dtype)[:, None] ** 2

    def forward(self, x: Image, sigma: Sigma) -> Image:
        u, variance = self._coordinates(x, sigma)
        means, gain = self._rotate(self.means.flatten(1)), self.eigenvalues / variance
        responsibility = torch.softmax(self._evidence(u, variance), 1).to(means.dtype)
        centre = gain * u + (1 - gain) * (responsibility @ means)
        return self._rotate_back(centre).reshape(x.shape)

    def log_prob(self, x: Image, sigma: Sigma) -> Tensor:
        """log Σ w_k N(x; m_k, C + σ²): (B, *image), (B,) → (B,), float64."""
        u, variance = self._coordinates(x, sigma)
        shared = (u.double() ** 2 / variance + variance.double().log() + LOG_2PI).sum(1) / 2
        return torch.logsumexp(self._evidence(u, variance), 1) - shared

    def sample(self, like: Image, rng: Rng) -> Image:
        """Draws of the prior itself (σ = 0), the shape and dtype of `like` (B, *image)."""
        u = rng.uniform(like.new_empty(like.shape[0], 1))
        last = self.weights.shape[0] - 1
        component = torch.searchsorted(self.weights.cumsum(0).to(like.dtype), u[:, 0]).clamp_max(last)
        spread = self._rotate_back(rng.normal(like).flatten(1) * self.eigenvalues.sqrt())
        return self.means[component] + spread.reshape(like.shape)
