"""Hallucination maps of a product whose truth is known: which part of its error the data could have corrected, and which not.

The instrument is taken from the product itself: its PSF, the size and noise of its pixels, the power of its draws. The split is
soft, by the Wiener gain; beyond the Nyquist frequency of the data nothing counts as seen.
Invariant: the two parts add to the error.
References: Bhadra, Kelkar, Brooks & Anastasio, *On Hallucinations in Tomographic Image Reconstruction*, 2021, arXiv:2012.00646.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffinv.data.products import Product
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
    """Wiener gain |ĥ|²S/(|ĥ|²S + σ²) on the product's grid; None without a PSF or noise level.

    ĥ is the transfer of the band's PSF over that of the target's, 0 beyond the Nyquist frequency of the data; S the mean power of
    the draws (or of the mean) in rings; σ² = σ_data²/r², r the ratio of pixel sizes, the noise a pixel of this grid would have.
    """
    exposures = product.exposures_of(b)
    if not exposures:
        return None
    exposure = exposures[0]
    known = float(product.catalog["noise_std"][b]) if "noise_std" in product.catalog else math.nan
    noise = exposure.noise_std if exposure.noise_std > 0 else known
    if not noise > 0:
        return None
    scale, data_scale = product.grid.pixel_scale, exposure.grid.pixel_scale
    frequency = [np.fft.fftfreq(n) / scale for n in product.grid.shape]
    phases = [
        np.exp(-2j * np.pi * np.outer(f, (np.arange(s) - (s - 1) / 2) * exposure.psf_scale))
        for f, s in zip(frequency, exposure.psf.shape, strict=True)
    ]
    transfer = phases[0] @ exposure.psf.astype(np.float64) @ phases[1].T
    square = frequency[0][:, None] ** 2 + frequency[1][None] ** 2
    gauss = np.exp(-2 * (np.pi * product.provenance.target_fwhm * FWHM_TO_SIGMA) ** 2 * square)
    seen = (np.abs(frequency[0])[:, None] <= 0.5 / data_scale) & (np.abs(frequency[1])[None] <= 0.5 / data_scale)
    images = product.mean[b][None] if product.samples is None else product.samples[:, b]
    ratio = torch.from_numpy(np.where(seen, np.abs(transfer) / np.maximum(gauss, 1e-6), 0.0))
    variance = torch.tensor((noise * scale / data_scale) ** 2, dtype=torch.float64)
    return wiener_gain(ratio, ring_spectrum(torch.from_numpy(np.asarray(images, np.float64))), variance)
