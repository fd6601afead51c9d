"""Channels are chosen by their middle, and the scatter that replaces a variance is that of the noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.cube_channels import cut, inside, with_scatter
from diffinv.data.cubes import Cube


def noisy_cube(channels: int = 400, side: int = 6) -> tuple[Cube, np.ndarray]:
    """A sloped continuum with noise of a σ that grows from pixel to pixel, and a line of ten channels in the middle."""
    sigma = np.linspace(0.5, 3.0, side * side).reshape(side, side)
    edges = np.linspace(5000.0, 5000.0 + channels, channels + 1)
    noise = sigma * np.random.default_rng(3).standard_normal((channels, side, side))
    data = 40 + 0.05 * np.arange(channels)[:, None, None] + noise
    data[channels // 2 - 5 : channels // 2 + 5] += 1e4
    good = np.ones(data.shape, bool)
    return Cube(data, np.full(data.shape, 7.0), good, edges[:-1], edges[1:], "Angstrom"), sigma


RANGES = [(5000.0, 5180.0), (5220.0, 5400.0)]


def test_a_window_keeps_the_channels_whose_middle_it_holds() -> None:
    cube, _ = noisy_cube()
    part = cut(cube, (5010.0, 5012.5))
    np.testing.assert_array_equal(part.low, [5010.0, 5011.0, 5012.0])
    np.testing.assert_array_equal(part.data, cube.data[10:13])
    assert part.variance.shape == part.mask.shape == part.data.shape
    with pytest.raises(InputError, match=r"no channel of the cube lies in 6000–6100 Angstrom; it has 5000–5400"):
        cut(cube, (6000.0, 6100.0))


def test_the_scatter_is_that_of_the_noise_without_slope_line_or_bad_values() -> None:
    cube, sigma = noisy_cube()
    mask = cube.mask.copy()
    mask[30:60, 2, 3] = False
    spoiled = replace(cube, data=np.where(mask, cube.data, 1e6), mask=mask)
    spoiled.data[5, 1, 1] = -1e5
    found = with_scatter(spoiled, RANGES)
    count = inside(cube, RANGES).sum()
    assert count == 360
    z = (np.sqrt(found.variance.max(0)) / sigma - 1) / (1.1664 / np.sqrt(2 * (count - 30)))
    assert np.abs(z).max() < 4.5  # 36 pixels; 1.1664 = √(1/0.3676), the efficiency of the median deviation
    assert (found.variance[mask] > 0).all() and (found.variance[~mask] == 0).all()
    np.testing.assert_array_equal(found.data, spoiled.data)


def test_a_pixel_without_scatter_or_channels_is_masked_and_a_cube_of_such_is_refused() -> None:
    cube, _ = noisy_cube()
    mask = cube.mask.copy()
    mask[:, 0, 1] = False
    assert (with_scatter(replace(cube, mask=mask), RANGES).variance[:, 0, 1] == 0).all()
    mask[4:395, 0, 2] = False
    data = cube.data.copy()
    data[:, 1, 1] = 1.0
    found = with_scatter(replace(cube, data=data, mask=mask), RANGES)
    assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(found.empty)), strict=True)) == [(0, 1), (0, 2), (1, 1)]
    assert ((found.variance > 0) == found.mask).all()
    with pytest.raises(InputError, match="no pixel has 10 good channels that scatter in the ranges given"):
        with_scatter(replace(cube, data=np.ones_like(cube.data)), RANGES)
