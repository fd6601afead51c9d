"""From checked bands to a likelihood: which image explains these pixels, on which grid, and how bright it is about.

The image x holds flux per output pixel at the target resolution. A band sees the point samples of K ∗ x at its own pixel
centres p_j, times the ratio of pixel areas (see `psf`):

    y_j = (H/h)² (k ∗ x)(p_j) + n_j,   n_j ~ N(0, var_j), bad pixels masked.

k ∗ x is band-limited, so that a Kaiser-windowed sinc reads it between pixels. The PSF already holds the data's pixel: larger
data pixels are not summed once more. The canvas is the output grid with `margin` more pixels on every side, so that light
from outside the field has a place to come from, and one more row or column where its sides would be odd, which networks that
halve images cannot take whole; beyond the canvas there is no light.
Invariant: the same x explains all bands and exposures that are given together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.core.checks import InputError
from diffinv.data.grids import SkyGrid, output_grid
from diffinv.data.observation import Band
from diffinv.data.psf import difference_kernel
from diffinv.likelihood import Joint, Likelihood, Observation
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.border import ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.geometry import resample
from diffinv.operators.interpolation import KaiserSinc
from diffinv.operators.spectral import BandMixing

INTERPOLATION = KaiserSinc(8, 8.0)
WHITE_PART = 0.01  # of the variance of correlated noise: resampled coadds have none at their highest frequencies


@dataclass(frozen=True, eq=False)
class Field:
    """What inference needs of one object.

    likelihood: p(y | x), float32, x (1, C, H′, W′) in flux per output pixel. canvas: the grid of x. grid: the output's, (H, W).
    margin: m, the output's place in the canvas; H′ and W′ are H + 2m and W + 2m, or one more if these are odd. target_fwhm:
    arcsec. scale: first guess of the rms of x over 64² pixels, in the unit of x. notes: of all bands.
    """

    likelihood: Likelihood
    canvas: SkyGrid
    grid: SkyGrid
    margin: int
    target_fwhm: float
    scale: float
    notes: tuple[str, ...]

    def inner(self, images: Tensor) -> Tensor:
        """Images (…, H′, W′) of the canvas cut to the output grid (…, H, W)."""
        (height, width), m = self.grid.shape, self.margin
        return images[..., m : m + height, m : m + width]


def build_field(
    bands: Sequence[Band],
    *,
    pixel_scale: float,
    target_fwhm: float,
    margin: int,
    mixing: np.ndarray | None = None,
    smallest: int = 1,
    grid: SkyGrid | None = None,
) -> Field:
    """The likelihood of one image given all of `bands` together (exposures or instruments of a band; or bands that mix).

    Arguments:
        bands: checked bands; the first sets the output grid where `grid` gives none.
        pixel_scale: of the output, arcsec. target_fwhm: of the output's Gaussian PSF, arcsec; 0 deconvolves fully.
        margin: output pixels added on every side. mixing: (len(bands), C), weight of each channel of x in each band; None: C = 1.
        smallest: least side of the canvas in pixels (the prior's field); the margin grows until it is reached.
        grid: of the output, with pixels of `pixel_scale`.
    Returns: the field.
    Raises: InputError if the bands do not share coordinates, or are sharper than the target.
    """
    grid = output_grid(bands[0].grid, pixel_scale) if grid is None else grid
    even = grid.even()
    margin = max(margin, -(-(smallest - min(even.shape)) // 2))
    canvas = even.padded(margin)
    weights = np.ones((len(bands), 1)) if mixing is None else np.asarray(mixing, dtype=np.float64)
    if weights.shape[0] != len(bands):
        raise InputError(f"mixing has {weights.shape[0]} rows but there are {len(bands)} bands; give one row a band.")
    parts, notes = [], []
    for band, row in zip(bands, weights, strict=True):
        try:
            parts.append(band_likelihood(band, canvas, target_fwhm=target_fwhm, mixing=row))
        except InputError as error:
            raise InputError(f"band {band.name}: {error}") from error
        notes += [f"{band.name}: {note}" for note in band.notes]
    likelihood = (parts[0] if len(parts) == 1 else Joint(tuple(parts))).to(torch.float32)
    estimates = [
        estimate_scale(b.image, b.variance, b.good, area_ratio=(b.grid.pixel_scale / pixel_scale) ** 2) / max(abs(r).sum(), 1e-12)
        for b, r in zip(bands, weights, strict=True)
    ]
    scale = float(np.median(estimates))
    return Field(likelihood, canvas, grid, margin, float(target_fwhm), scale, tuple(dict.fromkeys(notes)))


def band_likelihood(band: Band, canvas: SkyGrid, *, target_fwhm: float, mixing: np.ndarray) -> Observation:
    """p(y | x) of one band for images x (1, C, H, W) on `canvas`, in float64.

    Arguments: target_fwhm: arcsec. mixing: (C,) weight of each channel of x in this band; (1,) ones for a grey image.
    """
    affine = band.grid.affine_to(canvas)
    ratio = band.grid.pixel_scale / canvas.pixel_scale
    kernel = difference_kernel(
        band.psf,
        pixel_scale=band.grid.pixel_scale,
        out_scale=canvas.pixel_scale,
        target_fwhm=target_fwhm,
        axes=np.linalg.inv(affine.matrix) * ratio,
    )
    blur = Convolution(torch.from_numpy(kernel)[None, None], 1, canvas.shape, ZeroBorder())
    matrix = torch.from_numpy(np.concatenate([affine.matrix, affine.offset[:, None]], 1))[None]
    read = resample(matrix, blur.out_shape, band.grid.shape, INTERPOLATION, conserve_flux=True, tolerance=1e-4)
    operator = read @ blur
    if len(mixing) > 1 or mixing[0] != 1:
        operator = operator @ BandMixing(torch.from_numpy(np.asarray(mixing, dtype=np.float64))[None, None], canvas.shape)
    good = torch.from_numpy(band.good)[None, None]
    data = torch.where(good, torch.from_numpy(np.where(band.good, band.image, 0.0))[None, None], 0.0)
    return Observation(data, operator, _noise(band, good))


def _noise(band: Band, good: Tensor) -> Noise:
    std = torch.from_numpy(np.sqrt(np.where(band.good, band.variance, 1.0)))[None, None]
    mask = None if bool(good.all()) else good
    if band.noise_correlation is None:
        return Gaussian(std, mask)
    correlation = torch.from_numpy(band.noise_correlation)[None, None]
    return CorrelatedGaussian.from_correlation(std, correlation, band.image.shape, white=WHITE_PART, mask=mask)


def estimate_scale(image: np.ndarray, variance: np.ndarray, good: np.ndarray, *, area_ratio: float) -> float:
    """A first guess of the flux scale s of an object from its noisy image, for priors whose images have rms 1 over 64² pixels.

        s² = max(Σ_good (y² − var), √(2 Σ_good var²)) / (area_ratio · 64²)

    Σ y² of blurred data is Σ x² · area_ratio where the blur is weak and less where it is strong, so that s is biased low by a
    factor that depends on the image. The field's size does not enter: a larger field with the same object has the same s.
    The second term is the standard deviation of the first for an empty field, so that s never vanishes.

    Arguments: image: (H, W), flux per data pixel. variance: (H, W), its square. good: (H, W) bool. area_ratio: (H/h)², data pixel
        over output pixel.
    Returns: s, in flux per output pixel.
    """
    signal = float((image[good] ** 2 - variance[good]).sum())
    floor = float(np.sqrt(2 * (variance[good] ** 2).sum()))
    return float(np.sqrt(max(signal, floor) / (area_ratio * 64**2)))
