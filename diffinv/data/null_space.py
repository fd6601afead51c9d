"""Hallucination maps of a product whose truth is known: which part of its error the data could have corrected, and which not.

The instrument is taken from the product itself: PSF, size and noise of the pixels of every exposure, the power of its draws. The
split is soft, by the Wiener gain; beyond the Nyquist frequency of an exposure nothing counts as seen by it.
Invariant: the two parts add to the error.
References: Bhadra, Kelkar, Brooks & Anastasio, *On Hallucinations in Tomographic Image Reconstruction*, 2021, arXiv:2012.00646.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffinv.data.grids import SkyGrid
from diffinv.data.products import Exposure, Product
from diffinv.data.psf import FWHM_TO_SIGMA
from diffinv.uncertainty.hallucination import range_part, wiener_gain
from diffinv.uncertainty.second_prior import ring_spectrum


def error_maps(product: Product, b: int, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Range and null part of mean − truth of one band, each (H, W) in the product's unit; None without a PSF or noise level.

    Arguments: truth: (H, W), on the product's grid and in its unit.
    """
    gain = soft_gain(product, b)
    if gain is None:
        return None
    error = torch.from_numpy(np.asarray(product.mean[b], np.float64) - np.asarray(truth, np.float64))
    seen = range_part(error, gain)
    return seen.numpy(), (error - seen).numpy()


def soft_gain(product: Product, b: int) -> Tensor | None:
    """Wiener gain G S/(G S + 1), G = Σ |w ĥ|²/σ² over the exposures that see band b; None without a PSF or noise level.

    ĥ is the transfer of an exposure's PSF over that of the target's, 0 beyond the Nyquist frequency of its data; w the weight of
    the band in it; S the mean power of the draws (or of the mean) in rings; σ² = σ_data²/r², r the ratio of pixel sizes, the
    noise a pixel of this grid would have.
    """
    known = float(product.catalog["noise_std"][b]) if "noise_std" in product.catalog else math.nan
    grid, target = product.grid, product.provenance.target_fwhm * FWHM_TO_SIGMA
    precision, found = np.zeros(grid.shape), False
    for exposure in product.exposures_of(b):
        noise = exposure.noise_std if exposure.noise_std > 0 else known
        if noise > 0:
            weight = exposure.weights[b] if exposure.weights else 1.0
            scaled = weight * exposure.grid.pixel_scale / (noise * grid.pixel_scale)
            precision += np.abs(scaled * _transfer(exposure, grid, target)) ** 2
            found = True
    if not found:
        return None
    images = product.mean[b][None] if product.samples is None else product.samples[:, b]
    spectrum = ring_spectrum(torch.from_numpy(np.asarray(images, np.float64)))
    return wiener_gain(torch.from_numpy(np.sqrt(precision)), spectrum, torch.ones((), dtype=torch.float64))


def _transfer(exposure: Exposure, grid: SkyGrid, target: float) -> np.ndarray:
    """ĥ of one exposure on the plane of fft2 of `grid`; target: σ of the target's PSF, arcsec."""
    rows, columns = (np.fft.fftfreq(n) / grid.pixel_scale for n in grid.shape)
    phases = [
        np.exp(-2j * np.pi * np.outer(f, (np.arange(s) - (s - 1) / 2) * exposure.psf_scale))
        for f, s in zip((rows, columns), exposure.psf.shape, strict=True)
    ]
    transfer = phases[0] @ exposure.psf.astype(np.float64) @ phases[1].T
    gauss = np.exp(-2 * (np.pi * target) ** 2 * (rows[:, None] ** 2 + columns**2))
    nyquist = 0.5 / exposure.grid.pixel_scale
    seen = (np.abs(rows)[:, None] <= nyquist) & (np.abs(columns) <= nyquist)
    return np.where(seen, transfer / np.maximum(gauss, 1e-6), 0.0)
