"""A cube as the data of an unmixing: pixels in rows, with the noise that its file implies.

With a variance the noise is Gaussian; without one the values must be counts, and the noise is Poisson.
Invariant: row i is the pixel i of the image in row-major order; a masked value has no say.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.unmixing.mixture import SpectralData

_FLOOR = 1e-9  # counts a channel: the faintest rate that is told from zero, far below any real background


def pixels_of(cube: Cube, background: Tensor | None = None) -> SpectralData:
    """The spectra of all H · W pixels in float64.

    Arguments: cube. background: expected counts (or flux) a channel beside the model, (1|N, K), or None for none.
    Raises: InputError if a cube without variance holds no counts, or nothing in it is good.
    """
    if not cube.mask.any():
        raise InputError(f"the cube {cube.data.shape} has no good value; check its mask, variance and flags.")
    mask = _rows(cube.mask)
    known = torch.zeros(1, len(cube.data), dtype=torch.float64) if background is None else background
    if cube.variance is not None:
        std = torch.where(mask, _rows(cube.variance), 1.0).sqrt()
        return SpectralData(_rows(cube.data), Gaussian(std, mask), known)
    one = torch.ones(1, dtype=torch.float64)
    return SpectralData(_rows(cube.counts()), Poisson(one, torch.zeros_like(one), mask, floor=_FLOOR), known)


def _rows(values: np.ndarray) -> Tensor:
    """(K, H, W) → (H W, K), floating values in float64."""
    rows = np.ascontiguousarray(rearrange(values, "k h w -> (h w) k"))
    return torch.from_numpy(rows if rows.dtype == bool else rows.astype(np.float64))
