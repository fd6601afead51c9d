"""Cubes as data: the noise follows from what the file holds, and a masked value has no say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffinv.core.checks import InputError
from diffinv.data.cube_data import pixels_of
from diffinv.data.cubes import Cube, masked_cube

SHAPE = (5, 2, 3)
LOW = np.arange(5.0) + 1


def cube(data: np.ndarray, variance: np.ndarray | None, mask: np.ndarray | None = None) -> Cube:
    return masked_cube(data, variance, np.ones(SHAPE, bool) if mask is None else mask, LOW, LOW + 1, "keV", bunit="count")


def test_counts_have_the_poisson_likelihood_of_their_good_channels() -> None:
    counts = np.random.default_rng(0).poisson(4.0, SHAPE).astype(float)
    counts[3, 1, 2] = np.nan
    data = pixels_of(cube(counts, None))
    mean = torch.from_numpy(np.random.default_rng(1).uniform(2.0, 6.0, (6, 5)))
    terms = stats.poisson.logpmf(np.nan_to_num(counts).reshape(5, 6).T, mean.numpy())
    terms[5, 3] = 0.0
    np.testing.assert_allclose(-data.loss(mean), terms.sum(1), rtol=1e-10)


def test_fluxes_with_a_variance_have_the_gaussian_likelihood() -> None:
    rng = np.random.default_rng(0)
    flux, variance = rng.normal(size=SHAPE), rng.uniform(0.5, 2.0, SHAPE)
    variance[:, 0, 1] = 0.0
    data = pixels_of(cube(flux, variance))
    mean = torch.from_numpy(rng.normal(size=(6, 5)))
    terms = stats.norm.logpdf(flux.reshape(5, 6).T, mean.numpy(), np.sqrt(np.where(variance > 0, variance, 1)).reshape(5, 6).T)
    terms[1] = 0.0
    np.testing.assert_allclose(-data.loss(mean), terms.sum(1), rtol=1e-10, atol=1e-12)


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(InputError, match=r"cube \(count\): 30 values are no counts"):
        pixels_of(cube(np.full(SHAPE, 0.5), None))
    with pytest.raises(InputError, match=r"the cube \(5, 2, 3\) has no good value"):
        pixels_of(cube(np.full(SHAPE, np.nan), None))
