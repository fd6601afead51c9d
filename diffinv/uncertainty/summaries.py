"""Numbers of an image that a calibration is asked about: (B, C, H, W) → (B,), one a function.

A summary need not be a good estimator, only the same function of truth and of draws; NaN (a shape that does not converge) is
ranked below all numbers. Bands are added where a summary is about the sky. Aperture fluxes and adaptive shapes are those of
`diffinv.uncertainty.metrics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.uncertainty.metrics import adaptive_moments
from diffinv.uncertainty.nulls import one_stream


def flux(image: Image) -> Tensor:
    """Σ over bands and pixels, in the image's unit times pixels."""
    return image.double().flatten(1).sum(1)


def pixel(image: Image, channel: int, row: int, column: int) -> Tensor:
    """One pixel, in the image's unit."""
    return image[:, channel, row, column].double()


def half_light_radius(image: Image) -> Tensor:
    """Smallest radius about the centre of the field within which the light reaches half of the total, in pixels.

    NaN where the total is not positive.
    """
    rows, columns = (torch.arange(n, device=image.device) - (n - 1) / 2 for n in image.shape[-2:])
    radius, order = torch.hypot(rows[:, None], columns).flatten().sort(stable=True)
    growth = image.double().sum(1).flatten(1)[:, order].cumsum(1)
    half = growth[:, -1:] / 2
    first = (growth >= half).double().argmax(1)
    return torch.where(half[:, 0] > 0, radius[first].double(), torch.nan)


def ellipticity(image: Image, component: int) -> Tensor:
    """Distortion e₁ (component 0) or e₂ (1) of adaptive moments, NaN where they do not converge."""
    shape = adaptive_moments(image.sum(1))
    return (shape.e1, shape.e2)[component]


def peak_row(image: Image) -> Tensor:
    """Row of the brightest pixel."""
    return image.sum(1).flatten(1).argmax(1).div(image.shape[-1], rounding_mode="floor").double()


def peak_column(image: Image) -> Tensor:
    """Column of the brightest pixel."""
    return image.sum(1).flatten(1).argmax(1).remainder(image.shape[-1]).double()


def band_power(image: Image, low: float, high: float) -> Tensor:
    """Mean |F x|² over the spatial frequencies low ≤ |ν| < high in cycles a pixel, F the orthonormal 2-D FFT."""
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in image.shape[-2:])
    frequency = torch.hypot(rows[:, None], columns)
    ring = ((frequency >= low) & (frequency < high)).to(image.device)
    return torch.fft.fft2(image.double(), norm="ortho")[..., ring].abs().pow(2).flatten(1).mean(1)


def projection(image: Image, direction: Tensor) -> Tensor:
    """⟨direction, x⟩: (B, *image), (*image) → (B,), in the image's unit."""
    return image.double().flatten(1) @ direction.double().flatten()


def random_direction(like: Image, rng: Rng) -> Tensor:
    """A direction of unit length, uniform on the sphere: (*image). `like`: (B, *image). rng: one stream."""
    drawn = one_stream("random_direction", rng).normal(torch.empty_like(like[:1]))[0]
    return drawn / drawn.norm()
