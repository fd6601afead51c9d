"""Catalogue columns: measured on every draw, in the units that they claim."""

from __future__ import annotations

import numpy as np
import torch

from diffinv.engine.measure import catalog, measure


def draws(count: int) -> torch.Tensor:
    """An elliptical Gaussian galaxy, σ 4 and 2 pixels along columns and rows, of flux 100 to 100 + count − 1: (M, 1, 32, 32)."""
    axis = torch.arange(32, dtype=torch.float64) - 15.5
    image = torch.exp(-(axis[None] ** 2) / 32 - axis[:, None] ** 2 / 8)
    flux = 100.0 + torch.arange(count, dtype=torch.float64)
    return flux.reshape(-1, 1, 1, 1) * (image / image.sum())[None, None]


def test_a_gaussian_galaxy_has_its_flux_size_and_ellipticity() -> None:
    found = measure(draws(3), pixel_scale=0.1)
    torch.testing.assert_close(found["flux"][:, 0], torch.tensor([100.0, 101.0, 102.0], dtype=torch.float64))
    torch.testing.assert_close(found["size"], torch.full((3, 1), 0.1 * 8**0.5, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(found["e1"], torch.full((3, 1), 12 / 20, dtype=torch.float64), rtol=2e-3, atol=0)
    assert float(found["e2"].abs().max()) < 1e-6


def test_percentiles_are_those_of_the_draws_and_are_left_out_where_draws_are_few() -> None:
    columns = catalog(("i",), draws(19), 0.1, [1.0])
    assert columns["flux_q05"] == np.array([100.0]) and columns["flux_q50"] == np.array([109.0])
    assert "flux_q05" not in catalog(("i",), draws(18), 0.1, [1.0])


def test_an_empty_draw_makes_the_shape_unknown_and_not_the_flux() -> None:
    images = draws(19)
    images[4] = 0
    columns = catalog(("i",), images, 0.1, [1.0])
    assert np.isnan(columns["size"]) and np.isnan(columns["size_q50"]) and np.isfinite(columns["flux"])
