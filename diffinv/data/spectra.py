"""Fourier transforms on the sky: grids, transfer functions and the spectra of knots and rasters.

F(k) = int f(x) exp(-i k x) dx with k in rad / arcsec; spectra are (len(ky), len(kx)) on a half plane (kx >= 0) and have
their origin at the centre of the field.

Invariant: a spectrum is that of the continuous sky, so that grids of any length and step sample the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import signal

from diffinv.data.scenes import Knots

Table = tuple[np.ndarray, np.ndarray]  # log k, transfer function


def lookup(table: Table, k: np.ndarray) -> np.ndarray:
    """The tabulated function at wave numbers k >= 0 of any shape."""
    return np.interp(np.log(k + 1e-12), *table)


@dataclass(frozen=True)
class FourierGrid:
    """Wave numbers in rad / arcsec of a periodic grid of `length` points, `step` arcsec apart."""

    length: int
    step: float

    @staticmethod
    def covering(size: int, scale: float, *, step: float, box: float) -> FourierGrid:
        """The grid that contains the samples of (size, scale), is at least `box` wide and at most `step` coarse."""
        fine = scale / np.ceil(scale / step - 1e-9)
        return FourierGrid(32 * int(np.ceil(box / fine / 32 - 1e-9)), float(fine))

    @property
    def kx(self) -> np.ndarray:
        """Half axis: (length // 2 + 1,)."""
        return 2 * np.pi * np.fft.rfftfreq(self.length, self.step)

    @property
    def ky(self) -> np.ndarray:
        """Full axis: (length,)."""
        return 2 * np.pi * np.fft.fftfreq(self.length, self.step)

    def sample(self, spectrum: np.ndarray, size: int, scale: float) -> np.ndarray:
        """Flux per pixel at the (size, size) pixel centres of a grid whose centre is the origin of the spectrum."""
        factor, centre = round(scale / self.step), (size - 1) / 2 * scale
        shifted = spectrum * np.exp(-1j * self.ky * centre)[:, None] * np.exp(-1j * self.kx * centre)
        image = np.fft.irfft2(shifted, s=(self.length, self.length)) * factor**2
        return image[: size * factor : factor, : size * factor : factor]


def gaussian_transfer(sigma: float, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Transfer function of a unit Gaussian of standard deviation `sigma` arcsec: (len(ky), len(kx))."""
    return np.exp(-0.5 * (sigma * ky) ** 2)[:, None] * np.exp(-0.5 * (sigma * kx) ** 2)


def pixel_transfer(pixel_scale: float, grid: FourierGrid) -> np.ndarray:
    """Transfer function of a square pixel: (len(ky), len(kx))."""
    unit = pixel_scale / (2 * np.pi)
    return np.sinc(unit * grid.ky)[:, None] * np.sinc(unit * grid.kx)


def knots_spectrum(knots: Knots, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Fourier transform of the knots, separable in x and y: (len(ky), len(kx)) complex; wave numbers in rad / arcsec."""
    along_x = np.exp(-0.5 * (knots.width[:, None] * kx) ** 2 - 1j * kx * (knots.x + knots.dx[:, None]))
    along_y = np.exp(-0.5 * (knots.width[:, None] * ky) ** 2 - 1j * ky * (knots.y + knots.dy[:, None]))
    return np.einsum("ky,kx->yx", knots.flux * knots.share[:, None] * along_y, along_x)


def image_spectrum(image: np.ndarray, scale: float, grid: FourierGrid) -> np.ndarray:
    """Fourier transform of a raster of flux per pixel, zero beyond the Nyquist wave number of the raster.

    Chirp-z transforms, exact on a grid whose step is no multiple of the raster's.

    Arguments:
        image: (N, N) flux per pixel, its centre is the origin.
        scale: arcsec a pixel.
        grid: the wave numbers.

    Returns:
        (length, length // 2 + 1) complex.
    """
    along_x = _centred_transform(image, scale, grid, 0, grid.length // 2 + 1)
    both = _centred_transform(along_x.T, scale, grid, -(grid.length // 2), grid.length)
    inside = [np.abs(k) <= np.pi / scale for k in (grid.ky, grid.kx)]
    return np.fft.ifftshift(both, axes=1).T * inside[0][:, None] * inside[1]


def _centred_transform(rows: np.ndarray, scale: float, grid: FourierGrid, first: int, count: int) -> np.ndarray:
    """Fourier transform along the last axis at the wave numbers first .. first + count of the grid: (M, count)."""
    size, turn = rows.shape[-1], 2 * np.pi * scale / (grid.length * grid.step)
    transform = _chirp(size, count, turn, first)
    return transform(rows) * np.exp(1j * turn * (size - 1) / 2 * np.arange(first, first + count))


@lru_cache(maxsize=64)
def _chirp(size: int, count: int, turn: float, first: int) -> signal.CZT:
    return signal.CZT(size, count, np.exp(-1j * turn), np.exp(1j * turn * first))
