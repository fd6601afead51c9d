"""Figures of merit of galaxies, and the classical rows of benchmark B3."""

from __future__ import annotations

import torch
from baselines import PowerLaw, bicubic, richardson_lucy, starlet, total_variation, wiener
from galaxy_sets import PIXEL, GalaxySet
from torch import Tensor

from diffinv.uncertainty.metrics import adaptive_moments, aperture_flux, psnr, ring_correlation, ssim

APERTURE = 1.5 / PIXEL
RING = (1.25 * PIXEL, 2.5 * PIXEL)
# Tuned on val32 for PSNR, then SSIM: corner, slope; iterations; strength, iterations; strengths, reweightings, knee, iterations.
TUNED = {
    "T1": {
        "wiener": (0.03, 0.75),
        "richardson_lucy": 3200,
        "tv": (0.01, 200),
        "starlet": ((0.03, 0.03, 0.03, 0.06), 2, 1.0, 300),
    },
    "T2": {
        "wiener": (0.02, 1.0),
        "richardson_lucy": 800,
        "tv": (0.01, 300),
        "starlet": ((0.024, 0.012, 0.012, 0.012), 0, 1.0, 500),
    },
}


def classical(track: str, objects: GalaxySet) -> dict[str, Tensor]:
    """Row name → images (N, 1, 64, 64)."""
    data, variance, operator, tuned = objects.data, objects.variance, objects.operator(), TUNED[track]
    start = bicubic(data, 2)
    positive = start.clamp_min(0.0)
    corner, slope = tuned["wiener"]
    strength, rounds, knee, iterations = tuned["starlet"]
    return {
        "bicubic": start,
        "Wiener": wiener(data, operator, variance, objects.scale().double(), PowerLaw(corner, slope, 2.0)),
        f"Richardson–Lucy, sky-aware, {tuned['richardson_lucy']} it": richardson_lucy(
            data, operator, objects.sky, iterations=tuned["richardson_lucy"]
        ),
        "TV + positivity": total_variation(
            data, operator, variance, strength=tuned["tv"][0], start=positive, iterations=tuned["tv"][1]
        ),
        "starlet + positivity": starlet(
            data, operator, variance, strength=strength, reweightings=rounds, knee=knee, start=positive, iterations=iterations
        ),
    }


def shapes(images: Tensor) -> dict[str, Tensor]:
    """Flux in 1.5″, adaptive size in arcsec and distortion of images (..., 64, 64), NaN where moments do not exist."""
    flat = images.reshape(-1, *images.shape[-2:])
    moments = adaptive_moments(flat)
    values = {"flux": aperture_flux(flat, APERTURE), "size": moments.size * PIXEL, "e1": moments.e1, "e2": moments.e2}
    return {name: v.reshape(images.shape[:-2]) for name, v in values.items()}


def fidelity(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Figures of merit of every object: (N,) each."""
    found, true = shapes(images[:, 0]), shapes(truth[:, 0])
    return {
        "PSNR": psnr(images, truth),
        "SSIM": ssim(images, truth),
        "flux %": 100 * (found["flux"] / true["flux"] - 1).abs(),
        "|Δe|": torch.hypot(found["e1"] - true["e1"], found["e2"] - true["e2"]),
        "size %": 100 * (found["size"] / true["size"] - 1).abs(),
        "hf-xcorr": ring_correlation(images, truth, *RING),
    }
