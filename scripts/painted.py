"""Features that are painted into galaxies, or painted instead of them: shapes, their S/N in the data, and where they lie.

A shape is an image (64, 64) of 0.1″ pixels at the resolution of the truths (Gaussian PSF of 0.20″), of unit peak. Its S/N is that
of a matched filter on the data, √(Σ (A f)²/σ²), which an observer who knew the shape would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from diffinv.likelihood import Observation

SIZE, PSF = 64, 2.0 / 2.3548  # pixels; σ of the truths' PSF


def _grid() -> tuple[np.ndarray, np.ndarray]:
    line = np.arange(SIZE) - (SIZE - 1) / 2
    return line[:, None], line[None]


def _seen(sharp: np.ndarray) -> np.ndarray:
    """At the resolution of the truths, of unit peak."""
    image = ndimage.gaussian_filter(sharp, PSF)
    return image / np.abs(image).max()


def blob(rng: np.random.Generator, scale: float, low: float, high: float) -> np.ndarray:
    """A round Gaussian of σ `scale` pixels, between `low` and `high` pixels from the centre."""
    rows, columns = _grid()
    radius, angle = rng.uniform(low, high), rng.uniform(0, 2 * math.pi)
    square = (rows - radius * math.sin(angle)) ** 2 + (columns - radius * math.cos(angle)) ** 2
    return np.exp(-square / (2 * (scale**2 + PSF**2)))


def clump(rng: np.random.Generator) -> np.ndarray:
    """A knot within the galaxy, no wider than the PSF: the prior has seen such."""
    return blob(rng, 0.5, 3, 9)


def companion(rng: np.random.Generator) -> np.ndarray:
    """A small galaxy beside it: the prior has seen such."""
    return blob(rng, 1.5, 12, 20)


def ring(rng: np.random.Generator) -> np.ndarray:
    """A thin ring about the centre: in the prior, rarely."""
    rows, columns = _grid()
    tilt, turn, radius = rng.uniform(0.5, 1.0), rng.uniform(0, math.pi), rng.uniform(5, 10)
    x, y = columns * math.cos(turn) + rows * math.sin(turn), rows * math.cos(turn) - columns * math.sin(turn)
    return _seen(np.exp(-((np.hypot(x, y / tilt) - radius) ** 2) / (2 * 0.6**2)))


def arm(rng: np.random.Generator) -> np.ndarray:
    """A piece of a logarithmic spiral, half a turn long: in the prior, in pairs."""
    rows, columns = _grid()
    start, sense = rng.uniform(0, 2 * math.pi), rng.choice([-1, 1])
    image = np.zeros((SIZE, SIZE))
    for t in np.linspace(0, math.pi, 120):
        r, angle = 4 * math.exp(0.35 * t), start + sense * t
        image += np.exp(-((rows - r * math.sin(angle)) ** 2 + (columns - r * math.cos(angle)) ** 2) / (2 * 0.6**2))
    return _seen(image)


def grating(rng: np.random.Generator) -> np.ndarray:
    """Stripes of 2.5 pixels under a Gaussian: too fine for the data, in the null space."""
    rows, columns = _grid()
    turn = rng.uniform(0, math.pi)
    along = columns * math.cos(turn) + rows * math.sin(turn)
    return np.cos(2 * math.pi * along / 2.5) * np.exp(-(rows**2 + columns**2) / (2 * 5**2))


def trail(rng: np.random.Generator) -> np.ndarray:
    """A satellite's trail across the field: not in the prior."""
    rows, columns = _grid()
    turn, offset = rng.uniform(0, math.pi), rng.uniform(-8, 8)
    return _seen(np.exp(-((columns * math.sin(turn) - rows * math.cos(turn) - offset) ** 2) / (2 * 0.5**2)))


def spikes(rng: np.random.Generator) -> np.ndarray:
    """A star with diffraction spikes: not in the prior."""
    rows, columns = _grid()
    arms = np.exp(-np.abs(rows) / 8) * np.exp(-(columns**2) / 0.5) + np.exp(-np.abs(columns) / 8) * np.exp(-(rows**2) / 0.5)
    return _seen(20 * np.exp(-(rows**2 + columns**2) / 0.3) + arms)


def star(rng: np.random.Generator) -> np.ndarray:
    """A star alone."""
    return blob(rng, 1e-3, 0, 0.5)


Shape = Callable[[np.random.Generator], np.ndarray]
PAINTED: dict[str, Shape] = {f.__name__: f for f in (clump, companion, ring, arm, grating, trail)}
ALONE: dict[str, Shape] = {f.__name__: f for f in (star, spikes)}


def response(image: Tensor, data: Observation) -> float:
    """S/N of a matched filter for an image (1, 1, 64, 64) on the data: √Σ (A f)²/σ²."""
    return float((data.operator(image) ** 2 / data.noise.variance(data.y)).sum().sqrt())


def with_signal(shape: Tensor, data: Observation, signal: float) -> Tensor:
    """The shape (1, 1, 64, 64) at this matched-filter S/N in the data.

    Where the data see nothing of it, it is as bright as a clump at this S/N would be.
    """
    knot = torch.from_numpy(blob(np.random.default_rng(0), 0.5, 5, 6)).to(shape)[None, None]
    return shape * signal / max(response(shape, data), 0.2 * response(knot, data))
