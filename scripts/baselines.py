"""Classical deconvolution, batched over objects: the rows that a posterior mean has to beat.

All methods see the same data y = A x + n, n ~ N(0, var), through the same operator, and every constant that a user would tune
is an argument without a default. Images are flux per pixel, B objects at once, each with its own PSF and noise.

* bicubic: interpolation of the data, no deconvolution.
* Wiener: posterior mean of a stationary Gaussian field with a power-law spectrum.
* Richardson–Lucy: EM for Poisson data; a constant sky is added to data and model so that mean and variance agree.
* TV, starlet: ½ Σ (y − A x)²/var + R(x) under x ≥ 0, by one primal-dual splitting.

Invariant: an object's result does not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffinv.core.linalg import cg, expand
from diffinv.core.types import LinearMap
from diffinv.operators.base import LinearOperator
from diffinv.unmixing import starlet as starlet_transform
from diffinv.unmixing.starlet import Extension, torus


def bicubic(data: Tensor, factor: int) -> Tensor:
    """Data (B, 1, h, w), flux per large pixel, interpolated to pixels `factor` times smaller, flux per small pixel.

    Keys' kernel with a = −½, exact for quadratics: torch takes it when `antialias` is asked for, which does nothing else here.
    """
    return interpolate(data, scale_factor=factor, mode="bicubic", align_corners=False, antialias=True) / factor**2


@dataclass(frozen=True)
class PowerLaw:
    """P(ν) = s² N (1 + (ν/ν₀)²)^(−γ) |Ĝ(ν)|²: spectrum of the images, one amplitude an object.

    corner: ν₀, cycles a pixel. slope: γ. fwhm: of the Gaussian PSF of the images, pixels. floor: smallest P over the largest.
    """

    corner: float
    slope: float
    fwhm: float
    floor: float = 1e-10

    def spectrum(self, shape: tuple[int, int]) -> Tensor:
        """P on the rfft2 grid of an image of this shape, mean 1 over frequencies (unit variance a pixel)."""
        rows, columns = torch.fft.fftfreq(shape[0], dtype=torch.float64), torch.fft.fftfreq(shape[1], dtype=torch.float64)
        square = rows[:, None] ** 2 + columns[None] ** 2
        gauss = torch.exp(-4 * (torch.pi * self.fwhm / 2.3548200450309493) ** 2 * square)
        power = (1 + square / self.corner**2) ** -self.slope * gauss
        power = power.clamp_min(self.floor * power.max())
        return (power / power.mean())[:, : shape[1] // 2 + 1]


def wiener(
    data: Tensor,
    operator: LinearOperator,
    variance: Tensor,
    scale: Tensor,
    prior: PowerLaw,
    *,
    iterations: int = 300,
    tol: float = 1e-5,
) -> Tensor:
    """x̂ = C Aᵀ(A C Aᵀ + Σ)⁻¹ y with C = s² F⁻¹ P F, by CG in data space.

    Arguments: data: (B, 1, h, w). variance: the same shape. scale: (B,) rms of the images. prior: shape of the spectrum.
    """
    shape = tuple(operator.in_shape[-2:])
    power = prior.spectrum(shape).to(data)
    square = expand(scale**2, data)
    covariance = lambda x: square * torch.fft.irfft2(power * torch.fft.rfft2(x), s=shape)
    system = lambda v: operator.apply(covariance(operator.adjoint(v))) + variance * v
    dual = cg(system, data, iterations=iterations, tol=tol, preconditioner=lambda v: v / variance).solution
    return covariance(operator.adjoint(dual))


def richardson_lucy(
    data: Tensor,
    operator: LinearOperator,
    sky: Tensor,
    *,
    iterations: int,
    start: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """x ← x · Aᵀ((y + b)/(A x + b)) / Aᵀ1 with y + b ≥ 0: maximum likelihood of y + b ~ g · Poisson((A x + b)/g), stopped early.

    Arguments: data: (B, 1, h, w). sky: b, broadcastable to the data: sky variance over g, the flux of one photo-electron, so
        that the variance of y + b is g times its mean. iterations: the only regularisation. start: positive, broadcastable to
        the images; None: flat, with the flux of data in the unit of the image. callback: called with (k, x).
    References: Richardson 1972; Lucy 1974; Snyder, Hammoud & White 1993 (offset for Gaussian noise).
    """
    ones = operator.adjoint(torch.ones_like(data))
    weight = ones.clamp_min(1e-3 * ones.amax((1, 2, 3), keepdim=True))
    counts = (data + sky).clamp_min(0.0)
    if start is None:
        start = data.mean((1, 2, 3), keepdim=True).clamp_min(1e-3) * data[0].numel() / ones[0].numel()
    x = start.expand_as(ones).clone()
    for k in range(iterations):
        model = (operator.apply(x) + sky).clamp_min(1e-6)
        x = (x * operator.adjoint(counts / model) / weight).clamp_min(0.0)
        if callback is not None:
            callback(k + 1, x)
    return x


def spectral_norm(operator: LinearMap, adjoint: LinearMap, like: Tensor, *, iterations: int = 40) -> Tensor:
    """‖K‖ an object by the power method on KᵀK, from a smooth positive start: (B,)."""
    v = torch.ones_like(like) + 0.1 * torch.cos(torch.arange(like[0].numel(), dtype=like.dtype)).reshape(like[:1].shape)
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        v = adjoint(operator(v))
    return v.flatten(1).norm(dim=1).sqrt()


@dataclass(frozen=True)
class Analysis:
    """A penalty ‖w ∘ Φ x‖ of analysis coefficients: Φ, Φᵀ, ‖Φ‖ and the projection of dual variables onto |u| ≤ w."""

    forward: LinearMap
    adjoint: LinearMap
    norm: float
    project: Callable[[Tensor, Tensor], Tensor]


def primal_dual(
    data: Tensor,
    operator: LinearOperator,
    variance: Tensor,
    penalty: Analysis,
    weight: Tensor,
    *,
    start: Tensor,
    iterations: int,
    relaxation: float = 1.9,
) -> Tensor:
    """argmin over x ≥ 0 of ½ Σ (y − A x)²/var + ‖weight ∘ Φ x‖ by Condat's and Vũ's splitting, over-relaxed.

        x' = [x − τ (Aᵀ(A x − y)/var + Φᵀu)]₊,   u' = P(u + ς Φ(2x' − x)),   1/τ − ς‖Φ‖² ≥ L/2, L = ‖A/√var‖².

    Arguments: weight: broadcastable to Φ x, in 1/flux. start: first x.
    References: Condat 2013, *A Primal-Dual Splitting Method for Convex Optimization*; Vũ 2013.
    """
    lipschitz = (
        spectral_norm(lambda v: operator.apply(v) / variance.sqrt(), lambda r: operator.adjoint(r / variance.sqrt()), start) ** 2
    )
    balance = expand(lipschitz, start) / penalty.norm**2
    tau = 1 / (expand(lipschitz, start) / 2 + balance * penalty.norm**2)
    x, u = start, torch.zeros_like(penalty.forward(start))
    dual_step = balance.reshape(-1, *[1] * (u.ndim - 1))
    for _ in range(iterations):
        gradient = operator.adjoint((operator.apply(x) - data) / variance)
        x_next = (x - tau * (gradient + penalty.adjoint(u))).clamp_min(0.0)
        u_next = penalty.project(u + dual_step * penalty.forward(2 * x_next - x), weight)
        x, u = x + relaxation * (x_next - x), u + relaxation * (u_next - u)
    return x_next


def _gradient(x: Tensor) -> Tensor:
    """Forward differences, zero at the far edge: (B, 1, H, W) → (B, 2, H, W)."""
    return torch.cat([pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1)), pad(x[..., 1:] - x[..., :-1], (0, 1))], 1)


def _divergence(u: Tensor) -> Tensor:
    """Adjoint of `_gradient`."""
    rows, columns = u[:, :1, :-1], u[:, 1:, :, :-1]
    return pad(rows, (0, 0, 1, 0)) - pad(rows, (0, 0, 0, 1)) + pad(columns, (1, 0)) - pad(columns, (0, 1))


def _shrink_length(u: Tensor, weight: Tensor) -> Tensor:
    return u / (u.norm(dim=1, keepdim=True) / weight).clamp_min(1.0)


TOTAL_VARIATION = Analysis(_gradient, _divergence, 8**0.5, _shrink_length)


@dataclass(frozen=True)
class Starlet(starlet_transform.Starlet):
    """Starlets on the torus, as a penalty."""

    extend: Extension = torus

    @property
    def penalty(self) -> Analysis:
        """Σ w|Φ x|; ‖Φ‖ ≤ 1 without the coarse part for non-negative filters (|1 − ĥ| ≤ 1 and the product telescopes)."""
        return Analysis(
            self.forward, self.adjoint, 2**0.5 if self.coarse else 1.0, lambda u, w: torch.maximum(torch.minimum(u, w), -w)
        )


def total_variation(
    data: Tensor, operator: LinearOperator, variance: Tensor, *, strength: float, start: Tensor, iterations: int
) -> Tensor:
    """Least squares with isotropic total variation and positivity. strength: λ, in 1/flux."""
    weight = torch.full_like(start[:, :1, :1, :1], strength)
    return primal_dual(data, operator, variance, TOTAL_VARIATION, weight, start=start, iterations=iterations)


def starlet(
    data: Tensor,
    operator: LinearOperator,
    variance: Tensor,
    *,
    strength: Sequence[float],
    reweightings: int,
    knee: float,
    start: Tensor,
    iterations: int,
) -> Tensor:
    """Least squares with a starlet ℓ₁ penalty and positivity, reweighted towards ℓ₀.

    Arguments: strength: λ_j a scale, finest first, in 1/flux. reweightings: rounds after the first, each with
        w = λ_j/(1 + |Φ x|/(knee/λ_j)): a coefficient much larger than knee/λ_j is hardly penalised any more. knee: dimensionless.
    References: Candès, Wakin & Boyd, *Enhancing Sparsity by Reweighted ℓ₁ Minimization*, 2008.
    """
    transform = Starlet(len(strength))
    base = torch.tensor(strength, dtype=start.dtype, device=start.device).reshape(1, -1, 1, 1)
    x, weight = start, base
    for round_number in range(reweightings + 1):
        if round_number:
            weight = base / (1 + transform.forward(x).abs() * base / knee)
        x = primal_dual(data, operator, variance, transform.penalty, weight, start=x, iterations=iterations)
    return x
