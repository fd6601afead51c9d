"""One patch seen by HSC and by HST: the image from space on the grid of an answer from the ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, signal
from torch import Tensor

from diffinv.data.fits import read_fits
from diffinv.data.grids import SkyGrid
from diffinv.data.psf import FWHM_TO_SIGMA
from diffinv.operators.canvas import fast_length

SCALE, TARGET = 0.1, 0.20
RINGS = ((0.0, 0.6), (0.6, 1.25), (1.25, 2.5))  # cycles an arcsec
EDGE = 0.3  # arcsec at the border of HST that are not compared: its PSF is matched there with light that was not seen


@dataclass(frozen=True)
class Reference:
    """HST on another grid. image: (H, W), flux per pixel of that grid, NaN outside. rows, columns: where it is to be trusted."""

    image: np.ndarray
    rows: slice
    columns: slice

    def cut(self, image: np.ndarray) -> Tensor:
        """The trusted part, mean subtracted, tapered over a tenth of each side: (1, 1, h, w)."""
        part = np.asarray(image, dtype=np.float64)[self.rows, self.columns]
        window = np.outer(*(signal.windows.tukey(n, 0.2) for n in part.shape))
        return torch.from_numpy((part - (part * window).sum() / window.sum()) * window)[None, None]


def reference(folder: Path, grid: SkyGrid, fwhm: float) -> Reference:
    """HST brought to a Gaussian PSF of `fwhm` arcsec and read at the pixel centres of `grid`.

    Its PSF stamp is cut 1.4 pixels (0.04″) off the star: the centroid of the core counts as the star's position.
    """
    plane = read_fits(folder / "Cut_HST.fits").planes[0]
    image = plane.data.astype(np.float64)
    native = SkyGrid.from_header(plane.header, image.shape)
    stamp = read_fits(folder / "PSF_HST.fits").planes[0].data.astype(np.float64)
    core = np.where(stamp > 0.2 * stamp.max(), stamp, 0.0)
    matched = match_psf(image - np.median(image), stamp, ndimage.center_of_mass(core), fwhm / native.pixel_scale)
    affine = grid.affine_to(native)
    centres = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1) @ affine.matrix.T + affine.offset
    values = ndimage.map_coordinates(matched, np.moveaxis(centres, -1, 0), order=5, cval=np.nan)
    edge = EDGE / native.pixel_scale
    inside = ((centres >= edge) & (centres <= np.array(image.shape) - 1 - edge)).all(-1)
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    ratio = (grid.pixel_scale / native.pixel_scale) ** 2
    return Reference(values * ratio, slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


def match_psf(image: np.ndarray, stamp: np.ndarray, centre: Sequence[float], fwhm: float, *, floor: float = 1e-2) -> np.ndarray:
    """The image with its PSF replaced by a wider Gaussian of `fwhm` pixels: x̂ Ĝ P̂*/(|P̂|² + floor²)."""
    shape = tuple(fast_length(n + max(stamp.shape)) for n in image.shape)
    frequency = [np.fft.fftfreq(n) for n in shape]
    centred = np.exp(2j * np.pi * (frequency[0][:, None] * centre[0] + frequency[1][None] * centre[1]))
    response = np.fft.fft2(stamp, s=shape) * centred
    gauss = np.exp(-2 * (np.pi * fwhm * FWHM_TO_SIGMA) ** 2 * (frequency[0][:, None] ** 2 + frequency[1][None] ** 2))
    ratio = gauss * response.conj() / (np.abs(response) ** 2 + floor**2)
    return np.fft.ifft2(np.fft.fft2(image, s=shape) * ratio).real[: image.shape[0], : image.shape[1]]


def offset(image: np.ndarray, truth: Reference) -> tuple[float, float]:
    """Shift (row, column) in arcsec that brings the image onto HST: the peak of the cross-power, to a hundredth of a pixel.

    Frequencies up to 1.25 cycles an arcsec, weighted as they come, so that sources count and noise does not.
    """
    found, true = (np.fft.fft2(truth.cut(v)[0, 0].numpy()) for v in (image, truth.image))
    rows, columns = (np.fft.fftfreq(n) for n in found.shape)
    low = np.hypot(rows[:, None], columns) < RINGS[1][1] * SCALE
    cross = np.where(low, true * found.conj(), 0)
    best, step = np.zeros(2), 0.5
    while step > 0.005:
        shifts = [best + step * np.array([i, j]) for i in range(-3, 4) for j in range(-3, 4)]
        values = [(cross * np.exp(2j * np.pi * (rows[:, None] * s[0] + columns * s[1]))).real.sum() for s in shifts]
        best, step = shifts[int(np.argmax(values))], step / 2
    return tuple(best * SCALE)
