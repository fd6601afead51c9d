"""What a catalogue says of an object: flux, size and ellipticity, measured on every posterior draw.

Measuring draws instead of their mean carries the image's uncertainty, with its correlations between pixels, into the
measurement. Invariant: a column's percentiles are those of the same draws that the product holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffinv.data.products import LEVELS, holds_quantile
from diffinv.uncertainty.metrics import adaptive_moments
from diffinv.uncertainty.quantiles import quantile


def measure(samples: Tensor, pixel_scale: float) -> dict[str, Tensor]:
    """Flux over the field, and size, e1, e2 of adaptive moments about its centre, of every draw and band.

    Arguments: samples: (M, C, H, W), flux per pixel. pixel_scale: arcsec.
    Returns: (M, C) each: flux in the images' unit; size, the σ of the matched Gaussian, in arcsec; e1, e2 distortion with x along
    columns. Size and ellipticity are NaN where the moments do not converge.
    """
    moments = adaptive_moments(samples.flatten(0, 1))
    shapes = {"size": moments.size * pixel_scale, "e1": moments.e1, "e2": moments.e2}
    grid = samples.shape[:2]
    return {"flux": samples.double().sum((2, 3)), **{name: value.reshape(grid) for name, value in shapes.items()}}


def catalog(names: Sequence[str], samples: Tensor, pixel_scale: float, chi2: Sequence[float]) -> dict[str, np.ndarray]:
    """One row a band: mean, std and percentiles over the draws of each measurement, and χ² a good datum.

    A measurement that fails on any draw is NaN throughout. Percentiles that M draws cannot hold are left out.
    """
    columns: dict[str, np.ndarray] = {"band": np.array(names)}
    for name, values in measure(samples, pixel_scale).items():
        columns |= {name: values.mean(0).numpy(), f"{name}_std": values.std(0).numpy()}
        for p in LEVELS:
            if holds_quantile(p, len(samples)):
                spread = torch.where(values.isfinite().all(0), quantile(values, p, dim=0), torch.nan)
                columns[f"{name}_q{round(100 * p):02d}"] = spread.numpy()
    return {**columns, "chi2": np.array(chi2)}
