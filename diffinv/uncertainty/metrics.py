"""How good an image is where the truth is known: fidelity, photometry, shape, sharpness, and the honesty of draws.

Fidelity: PSNR against the peak of the truth and SSIM against its range. Photometry: flux in a circular aperture. Shape: adaptive
moments, the elliptical Gaussian that is its own best weight. Sharpness: cross-correlation with the truth in a ring of spatial
frequencies,

    r = Re Σ X̂ Ŷ* / √(Σ|X̂|² Σ|Ŷ|²).

Honesty: how often central intervals hold the truth, the spread of draws over the error of their mean, and the CRPS.
Invariant: one value an image, (B, …) → (B,), never reduced over images; nothing but CRPS depends on the order of pixels' values.
References: Wang, Bovik, Sheikh & Simoncelli, *Image Quality Assessment: From Error Visibility to Structural Similarity*, 2004;
Hirata & Seljak, *Shear Calibration Biases in Weak Lensing Surveys*, 2003, arXiv:astro-ph/0301054 (adaptive moments);
Gneiting & Raftery, *Strictly Proper Scoring Rules, Prediction, and Estimation*, 2007 (CRPS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from diffinv.core.checks import ShapeError
from diffinv.core.types import Image
from diffinv.uncertainty.quantiles import quantile

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_APERTURE_SUBPIXELS = 10


def psnr(image: Image, truth: Image) -> Tensor:
    """10 log₁₀(max(truth)²/mean (image − truth)²) in dB: (B, …, H, W) → (B,)."""
    error = (image.double() - truth.double()).flatten(1).pow(2).mean(1)
    return 10 * torch.log10(truth.double().flatten(1).amax(1) ** 2 / error)


def ssim(image: Image, truth: Image) -> Tensor:
    """Structural similarity with the range of the truth, Gaussian window of σ = 1.5 pixels and 11 × 11 pixels.

    Mean over the pixels whose window lies inside the image; K₁ = 0.01, K₂ = 0.03, population covariance.
    Arguments: image, truth: (B, C, H, W), H and W at least 11.
    Returns: (B,).
    """
    x, y = image.double(), truth.double()
    span = y.flatten(1).amax(1) - y.flatten(1).amin(1)
    c1, c2 = ((k * span).square().reshape(-1, 1, 1, 1) for k in (0.01, 0.03))
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _window(image: Tensor) -> Tensor:
    """Gaussian-weighted local mean where the whole window fits."""
    offset = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=image.dtype, device=image.device)
    line = torch.exp(-0.5 * (offset / _SSIM_SIGMA) ** 2)
    line = line / line.sum()
    flat = image.reshape(-1, 1, *image.shape[-2:])
    smooth = conv2d(conv2d(flat, line.reshape(1, 1, -1, 1)), line.reshape(1, 1, 1, -1))
    return smooth.reshape(*image.shape[:-2], *smooth.shape[-2:])


def aperture_flux(image: Image, radius: float) -> Tensor:
    """Flux inside a circle about the centre of the field, pixels on its rim counted by their share inside.

    Arguments: image: (…, H, W), flux per pixel. radius: in pixels.
    Returns: (…,), float64.
    """
    axes = [
        (torch.arange(n * _APERTURE_SUBPIXELS, dtype=torch.float64) + 0.5) / _APERTURE_SUBPIXELS - n / 2 for n in image.shape[-2:]
    ]
    inside = (axes[0][:, None] ** 2 + axes[1][None] ** 2 <= radius**2).double()
    share = torch.nn.functional.avg_pool2d(inside[None, None], _APERTURE_SUBPIXELS)[0, 0]
    return (image.double() * share.to(image.device)).sum((-2, -1))


def ring_correlation(image: Image, truth: Image, low: float, high: float) -> Tensor:
    """Fourier cross-correlation over the frequencies low ≤ |ν| < high.

    Arguments: image, truth: (B, …, H, W). low, high: cycles a pixel.
    Returns: (B,); NaN where one of the images has no power in the ring.
    """
    height, width = truth.shape[-2:]
    frequency = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64)
    )
    ring = ((frequency >= low) & (frequency < high)).to(truth.device)
    x, y = (torch.fft.fft2(v.double())[..., ring].flatten(1) for v in (image, truth))
    return (x * y.conj()).real.sum(1) / (x.abs().pow(2).sum(1) * y.abs().pow(2).sum(1)).sqrt()


@dataclass(frozen=True)
class Moments:
    """Adaptive moments of images.

    row, column: (N,) centroid in pixels. size: (N,) det(M)^¼ in pixels, σ of the matched Gaussian. e1, e2: (N,) distortion
    (M_xx − M_yy, 2 M_xy)/(M_xx + M_yy), x along columns. converged: (N,) bool; the others are NaN.
    """

    row: Tensor
    column: Tensor
    size: Tensor
    e1: Tensor
    e2: Tensor
    converged: Tensor


def adaptive_moments(image: Tensor, *, start_sigma: float = 3.0, iterations: int = 400, tol: float = 1e-5) -> Moments:
    """Centroid and second moments with the matched elliptical Gaussian as weight.

    Fixed point of `M = 2 Σ w I δδᵀ/Σ w I` and `Σ w I δ = 0` with w = exp(−½ δᵀM⁻¹δ), δ the offset from the centroid: for a
    Gaussian image M is its covariance. The iteration starts from a round Gaussian at the centre of the field.

    Arguments: image: (N, H, W), no sky. start_sigma: of the first weight, in pixels. iterations: at most. tol: largest
        relative change of M, and change of the centroid in pixels, at which an image is done.
    Returns: one `Moments` of N images; not converged where light is missing or the weight outgrows or leaves the field.
    """
    if image.ndim != 3:
        raise ShapeError(f"adaptive_moments expects (N, H, W); got {tuple(image.shape)}.")
    flux = image.double()
    fit = _Fit.start(flux, start_sigma)
    done = torch.zeros(len(flux), dtype=torch.bool, device=flux.device)
    for _ in range(iterations):
        active = (~done & fit.sane(flux.shape[-2:])).nonzero()[:, 0]
        if not len(active):
            break
        before = fit.select(active)
        after = before.improved(flux[active])
        fit = fit.updated(active, after)
        done[active] = after.near(before, tol)
    return fit.moments(done & fit.sane(flux.shape[-2:]))


@dataclass(frozen=True)
class _Fit:
    """Centroid (N, 2) as (row, column) and covariance (N, 3) as (rr, cc, rc) of the weights."""

    centre: Tensor
    covariance: Tensor

    @classmethod
    def start(cls, flux: Tensor, sigma: float) -> _Fit:
        centre = torch.tensor([(n - 1) / 2 for n in flux.shape[-2:]], dtype=flux.dtype, device=flux.device)
        covariance = torch.tensor([sigma**2, sigma**2, 0.0], dtype=flux.dtype, device=flux.device)
        return cls(centre.expand(len(flux), 2).clone(), covariance.expand(len(flux), 3).clone())

    def select(self, index: Tensor) -> _Fit:
        return _Fit(self.centre[index], self.covariance[index])

    def updated(self, index: Tensor, other: _Fit) -> _Fit:
        return _Fit(self.centre.index_copy(0, index, other.centre), self.covariance.index_copy(0, index, other.covariance))

    def improved(self, flux: Tensor) -> _Fit:
        """One step of the fixed-point iteration; the first moments are doubled as the second are, for the same reason."""
        rows, columns = (torch.arange(n, dtype=flux.dtype, device=flux.device) for n in flux.shape[-2:])
        dr, dc = rows[None, :, None] - self.centre[:, 0, None, None], columns[None, None] - self.centre[:, 1, None, None]
        rr, cc, rc = (c[:, None, None] for c in self.covariance.unbind(1))
        distance = (cc * dr**2 + rr * dc**2 - 2 * rc * dr * dc) / (rr * cc - rc**2)
        weighted = flux * torch.exp(-0.5 * distance)
        total = weighted.sum((1, 2))
        total = torch.where(total > 0, total, torch.nan)
        mean = torch.stack([(weighted * d).sum((1, 2)) / total for d in (dr, dc)], 1)
        second = torch.stack([(weighted * d).sum((1, 2)) / total for d in (dr**2, dc**2, dr * dc)], 1)
        return _Fit(self.centre + 2 * mean, 2 * second)

    def sane(self, shape: tuple[int, int]) -> Tensor:
        """Positive definite, σ below a quarter of the field, centred inside it: (N,)."""
        rr, cc, rc = self.covariance.unbind(1)
        finite = self.covariance.isfinite().all(1) & self.centre.isfinite().all(1)
        inside = ((self.centre > 0) & (self.centre < self.centre.new_tensor(shape) - 1)).all(1)
        return finite & inside & (rr * cc > rc**2) & (rr > 0.01) & (cc > 0.01) & (torch.maximum(rr, cc) < (min(shape) / 4) ** 2)

    def near(self, other: _Fit, tol: float) -> Tensor:
        trace = other.covariance[:, :2].sum(1, keepdim=True)
        change = ((self.covariance - other.covariance) / trace).abs().amax(1)
        return (change < tol) & ((self.centre - other.centre).abs().amax(1) < tol)

    def moments(self, converged: Tensor) -> Moments:
        rr, cc, rc = self.covariance.unbind(1)
        values = (*self.centre.unbind(1), (rr * cc - rc**2).clamp_min(0) ** 0.25, (cc - rr) / (cc + rr), 2 * rc / (cc + rr))
        return Moments(*(torch.where(converged, v, torch.nan) for v in values), converged)


def interval_hits(samples: Tensor, truth: Image, level: float) -> Tensor:
    """Whether the truth lies in the central interval of this probability a pixel.

    Arguments: samples: (B, M, …), M ≥ 19 for 90 %. truth: (B, …). level: 0 < level < 1.
    Returns: (B, …) bool.
    """
    low, high = (quantile(samples, p) for p in ((1 - level) / 2, (1 + level) / 2))
    return (truth >= low) & (truth <= high)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pixels of a mask, NaN where it is empty: (B, …), (B, …) bool → (B,)."""
    return torch.where(mask, values.double(), 0.0).flatten(1).sum(1) / mask.flatten(1).sum(1)


def spread_and_error(samples: Tensor, truth: Image, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean-square spread and mean-square error over the pixels of a mask, both (B,): equal on average for honest draws.

        spread = mean of (1 + 1/M) Var_m x_m,   error = mean of (x̄ − truth)².

    Arguments: samples: (B, M, …). truth: (B, …). mask: (B, …) bool.
    """
    variance = samples.double().var(1) * (1 + 1 / samples.shape[1])
    return masked_mean(variance, mask), masked_mean((samples.double().mean(1) - truth.double()) ** 2, mask)


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of M draws, unbiased in M: E|x − t| − ½ E|x − x'|; lower is better.

        (1/M) Σ|x_m − t| − Σ_k (2k − M − 1) x_(k)/(M (M − 1)),   x_(k) in ascending order.

    Arguments: samples: (B, M, …), M ≥ 2. truth: (B, …).
    Returns: (B, …), in the unit of the truth.
    """
    draws = samples.shape[1]
    ordered = samples.double().sort(1).values
    weight = (2 * torch.arange(1, draws + 1, dtype=torch.float64, device=samples.device) - draws - 1) / (draws * (draws - 1))
    spread = torch.tensordot(ordered.movedim(1, -1), weight, dims=1)
    return (ordered - truth.double().unsqueeze(1)).abs().mean(1) - spread
