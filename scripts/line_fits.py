"""Emission lines of single spaxels by least squares (scipy), written without the package: the reference of `bench_muse`.

    F(λ) = a + b (λ − λ₀)/100 Å + Σ_k A_g(k) r_k G(λ; λ_k (1 + v/c), λ_k w/c),   G Gaussians at the middle of the channels,

lines in groups g of one flux. A grid over (v, w) with everything else by linear least squares gives the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit

LIGHT = 299792.458  # km/s
VELOCITY, WIDTH = (-400.0, 400.0), (40.0, 300.0)  # km/s


@dataclass(frozen=True)
class Lines:
    """(wavelength in Angstrom, relative flux, group) of each line; the range in Angstrom that is fitted."""

    lines: tuple[tuple[float, float, int], ...]
    span: tuple[float, float]

    def profiles(self, x: np.ndarray, velocity: float, width: float) -> np.ndarray:
        """Flux density of each group at unit flux, (groups, K)."""
        total = np.zeros((1 + max(group for *_, group in self.lines), len(x)))
        for centre, ratio, group in self.lines:
            sigma = centre * width / LIGHT
            total[group] += (
                ratio * np.exp(-0.5 * ((x - centre * (1 + velocity / LIGHT)) / sigma) ** 2) / (np.sqrt(2 * np.pi) * sigma)
            )
        return total


ALONE = Lines(((9070.5, 1.0, 0),), (9058.0, 9084.0))
TIED = Lines(((9070.5, 1.0, 0), (9050.1, 0.34, 1), (9098.9, 1.0, 1)), (9030.0, 9125.0))


def starts(lines: Lines, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The best node of the grid in each spaxel with a positive flux: (v, w, fluxes, a, b), (N, 4 + groups) of y (N, K)."""
    best, found = np.full(len(y), np.inf), np.full((len(y), 4 + 1 + max(g for *_, g in lines.lines)), np.nan)
    for velocity in np.arange(VELOCITY[0], VELOCITY[1] + 1, 20.0):
        for width in (60.0, 90.0, 130.0, 200.0):
            design = np.concatenate([lines.profiles(x, velocity, width), _slope(x)])
            rest = y @ np.linalg.pinv(design)
            miss = np.where(rest[:, 0] > 0, ((y - rest @ design) ** 2).sum(1), np.inf)
            better = miss < best
            best[better], found[better] = miss[better], np.insert(rest, 0, [[velocity], [width]], 1)[better]
    return found


def _slope(x: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(x), (x - x.mean()) / 100])


def refine(lines: Lines, x: np.ndarray, y: np.ndarray, sigma: float, start: np.ndarray) -> tuple[float, float, float]:
    """Velocity and its error, km/s, and flux of the first group over its error, of one spaxel; NaN where no fit is found."""

    def model(x: np.ndarray, velocity: float, width: float, *rest: float) -> np.ndarray:
        return np.array(rest) @ np.concatenate([lines.profiles(x, velocity, width), _slope(x)])

    low = np.array([VELOCITY[0] - 1, WIDTH[0] - 1, *[0.0] * (len(start) - 4), -np.inf, -np.inf])
    high = np.array([VELOCITY[1] + 1, WIDTH[1] + 1, *[np.inf] * (len(start) - 2)])
    if not np.isfinite(start).all():
        return np.nan, np.nan, np.nan
    try:
        start = np.clip(start, low + 1e-9, high - 1e-9)
        found, covariance = curve_fit(model, x, y, start, np.full(len(x), sigma), absolute_sigma=True, bounds=(low, high))
    except RuntimeError:
        return np.nan, np.nan, np.nan
    errors = np.sqrt(np.diag(covariance))
    return found[0], errors[0], found[2] / errors[2]


def fit_cube(lines: Lines, x: np.ndarray, data: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """Maps (H, W) of velocity, error and ratio, see `refine`. Arguments: x: Angstrom (K,). data: (K, H, W). sigma: (H, W)."""
    kept = (x > lines.span[0]) & (x < lines.span[1])
    x, y = x[kept], data[kept].reshape(kept.sum(), -1).T
    fits = [refine(lines, x, *row) for row in zip(y, sigma.flat, starts(lines, x, y), strict=True)]
    return {
        name: np.reshape(v, sigma.shape) for name, v in zip(("velocity", "error", "ratio"), zip(*fits, strict=True), strict=True)
    }
