"""How noisy are data whose noise level nobody wrote down? Robust estimates from the data alone, before any training.

Both are estimates of the standard deviation σ of white noise. The first takes the finest structure of an image for noise and
is biased high where the image has such structure itself; the second needs two exposures and is not.
Check them against the multiplier of UNSURE, which is an upper bound on σ².
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError

_NORMAL_MAD = 0.6744897501960817  # median |z| of a standard normal


def wavelet_mad(y: Tensor) -> Tensor:
    """σ̂ = median |d| / 0.6745, d the diagonal Haar details (a − b − c + d)/2 of 2 × 2 cells: (B, C, H, W) → (B, C).

    Raises: ShapeError for images of less than 2 × 2 pixels. NaN (masked pixels) are left out.
    References: Donoho & Johnstone, *Ideal spatial adaptation by wavelet shrinkage*, 1994, Biometrika 81, 425.
    """
    if y.ndim != 4 or min(y.shape[-2:]) < 2:
        raise ShapeError(f"wavelet_mad: images (B, C, H, W) of at least 2 × 2 pixels are needed, got {tuple(y.shape)}.")
    height, width = (n - n % 2 for n in y.shape[-2:])
    y = y[..., :height, :width]
    detail = (y[..., ::2, ::2] - y[..., ::2, 1::2] - y[..., 1::2, ::2] + y[..., 1::2, 1::2]) / 2
    return _median(detail.flatten(2).abs()) / _NORMAL_MAD


def exposure_difference(first: Tensor, second: Tensor) -> Tensor:
    """σ̂ of one exposure, from the median |y₁ − y₂| / (0.6745 √2) of two of the same scene and noise: (B, …) → (B,)."""
    if first.shape != second.shape:
        raise ShapeError(f"exposure_difference: exposures of {tuple(first.shape)} and {tuple(second.shape)}; align them first.")
    return _median((first - second).flatten(1).abs()) / (_NORMAL_MAD * torch.tensor(2.0).sqrt().to(first))


def _median(values: Tensor) -> Tensor:
    """Over the last axis, NaN left out; the mean of the two middle values of an even number."""
    return (values.nanmedian(-1).values - (-values).nanmedian(-1).values) / 2
