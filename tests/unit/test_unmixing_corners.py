"""Corner plots of a pixel: densities and regions against their closed forms, and the page that shows them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffinv.report.maps import draw_corner
from diffinv.spectral.base import Parameter
from diffinv.unmixing.corners import MASSES, corner
from diffinv.unmixing.mixture import Coordinates

F64 = torch.float64
AXES = Coordinates((Parameter("kT", "keV", 0.5, 5.0), Parameter("z", "", -1.0, 1.0)), ("kT",))
MEAN = torch.tensor([0.4, 0.7], dtype=F64)
COVARIANCE = torch.tensor([[0.01, 0.006], [0.006, 0.04]], dtype=F64)


def test_densities_are_the_lognormal_and_the_normal() -> None:
    found = corner(AXES, MEAN, COVARIANCE)
    theta, z = found.values
    scale = math.log(10)
    expected = np.exp(-((np.log(theta / 0.5) / scale - 0.4) ** 2) / 0.02) / (math.sqrt(2 * math.pi) * 0.1 * scale * theta)
    np.testing.assert_allclose(found.density[0], expected, rtol=1e-6)
    np.testing.assert_allclose(found.density[1], np.exp(-((z - 0.4) ** 2) / 0.32) / (math.sqrt(2 * math.pi) * 0.4), rtol=1e-6)
    assert found.names == ("kT, keV", "z")


def test_regions_hold_their_share_of_draws() -> None:
    """Within 4 standard errors of 4000 draws: inside is (u − m)ᵀ V⁻¹ (u − m) below that of every point of the curve."""
    found = corner(AXES, MEAN, COVARIANCE)
    draws = np.random.default_rng(0).multivariate_normal(MEAN.numpy(), COVARIANCE.numpy(), 4000)
    inverse = np.linalg.inv(COVARIANCE.numpy())
    distance = lambda u: np.einsum("ni,ij,nj->n", u - MEAN.numpy(), inverse, u - MEAN.numpy())
    for mass, region in zip(MASSES, found.regions[0, 1], strict=True):
        edge = distance(AXES.unit(torch.from_numpy(region)).numpy())
        assert np.ptp(edge) < 1e-5
        assert (distance(draws) < edge[0]).mean() == pytest.approx(mass, abs=4 * math.sqrt(mass * (1 - mass) / 4000))


def test_a_drawing_holds_every_panel_and_escapes_its_title() -> None:
    text = draw_corner("<b>", corner(AXES, MEAN, COVARIANCE))
    assert text.count("<rect") == 3 and text.count("<polyline") == 4 and "&lt;b&gt;" in text and "nan" not in text
