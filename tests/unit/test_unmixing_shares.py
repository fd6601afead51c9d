"""Ratios of components as parameters: the chain rule, amplitudes, and maps where one pixel alone says little."""

from __future__ import annotations

import pytest
import torch

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.unmixing.fields import Field, FieldPlan
from diffinv.unmixing.maps import MapPlan, fit_map_at
from diffinv.unmixing.mixture import Mixture
from diffinv.unmixing.pipeline import UnmixingPlan
from diffinv.unmixing.pixels import PixelPlan, fit_pixels
from diffinv.unmixing.posterior_maps import Posterior, posterior
from diffinv.unmixing.shares import Shares, unmix_shares
from tests.unit.test_unmixing_fit import BOTH, CHANNELS, F64, HOT, counts, full

SHARES = Shares.of(BOTH)
NONE = torch.zeros(1, CHANNELS, dtype=F64)


def points(count: int, seed: int) -> torch.Tensor:
    return 0.2 + 0.6 * Rng([seed]).uniform(torch.empty(1, count, 4, dtype=F64))[0]


def test_a_blend_is_the_mixture_at_the_shares_of_its_ratio() -> None:
    u, total = points(7, 0), full(300.0, 7)
    ratio = 0.01 * 1e4 ** u[:, 3:]
    parts = total * torch.cat([1 / (1 + ratio), ratio / (1 + ratio)], 1)
    torch.testing.assert_close(SHARES.mean(total, u, NONE), BOTH.mean(parts, u[:, :3], NONE), rtol=1e-12, atol=1e-12)
    assert SHARES.names == ("blend.hot.T", "blend.hot.centre", "blend.cold.Gamma", "blend.cold.ratio")


def test_the_chain_rule_gives_the_slopes_of_forward_mode() -> None:
    u, total = points(7, 1), full(300.0, 7)
    for found, expected in zip(SHARES.linearise(total, u, NONE), Mixture.linearise(SHARES, total, u, NONE), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_errors_of_amplitudes_are_those_of_draws() -> None:
    """For small errors of u, to 4 standard errors of the spread of 4000 draws; A_1 + A_2 has the error of counts."""
    count = 4000
    u, total = points(1, 2).expand(count, 4), full(300.0, count)
    data = counts(SHARES, total, u)
    root = 0.01 * torch.tensor([[1, 0, 0, 0], [0.5, 1, 0, 0], [0, 0.3, 1, 0], [0.2, 0, -0.6, 1]], dtype=F64)
    nowhere = Field(torch.zeros(2, 4, 4), torch.ones(2, 4), torch.ones(4), torch.ones(()))
    found = Posterior(u, (root @ root.mT).expand(count, 4, 4), total, full(0.0, count), nowhere, torch.zeros(count))
    mean, std = SHARES.amplitudes(data, found)
    torch.testing.assert_close(mean.sum(1), total[:, 0])
    z = Rng([3]).normal(torch.empty(1, count, 5, dtype=F64))[0]
    f, _ = SHARES.fractions(u + z[:, :4] @ root.mT)
    drawn = (total + 300**0.5 * z[:, 4:]) * f
    torch.testing.assert_close(std[0], drawn.std(0), rtol=4 / (2 * count) ** 0.5, atol=0)


def test_maps_of_ratios_err_less_than_free_amplitudes() -> None:
    """Smooth ratios, brightness that is not: the second amplitude errs less than by pixels alone."""
    side = 12
    ramp = torch.linspace(0, 1, side, dtype=F64)
    across, along = ramp[:, None].expand(side, side).flatten(), ramp.expand(side, side).flatten()
    u = torch.stack([0.4 + 0.2 * across, 0.4 + 0.2 * along, 0.5 + 0.1 * across, 0.45 + 0.15 * along], 1)
    total = 400 * torch.exp(0.5 * Rng([4]).normal(torch.empty(1, side**2, 1, dtype=F64))[0])
    data, truth = counts(SHARES, total, u), total[:, 0] * SHARES.fractions(u)[0][:, 1]
    pixels = PixelPlan((0.25, 0.75), refined=1)
    start = SHARES.start(data, (side, side), 3, pixels)
    smooth = fit_map_at(SHARES, data, (side, side), start, 1.0, MapPlan(scales=2, rounds=3, iterations=40))
    found = posterior(SHARES, data, (side, side), smooth, FieldPlan(values=256, tiles=2, evaluations=10))
    mean = SHARES.unblended(data, found).amplitude
    error = lambda amplitude: float((amplitude - truth).pow(2).mean().sqrt())
    assert error(mean[:, 1]) < error(fit_pixels(BOTH, data, pixels).amplitude[:, 1])


def test_unmixing_with_shares_reports_the_parameters_of_the_components() -> None:
    side = 8
    u = torch.tensor([0.4, 0.6, 0.5, 0.5], dtype=F64).expand(side**2, 4)
    data = counts(SHARES, full(500.0, side**2), u)
    maps, field = MapPlan(scales=2, kappas=(1.0,)), FieldPlan(values=128, tiles=2, evaluations=5)
    found = unmix_shares(BOTH, data, (side, side), UnmixingPlan(PixelPlan((0.25, 0.75)), maps, field))
    post = found.posterior
    assert post.u.shape == (side**2, 3) and post.covariance.shape == (side**2, 3, 3)
    assert post.amplitude.shape == post.amplitude_std.shape == (side**2, 2) and bool((found.flags == 0).all())
    assert float(((post.u - u[:, :3]).abs() / post.std).mean()) < 2
    assert float((post.amplitude.mean(0) - 250).abs().max()) < 25


def test_one_component_has_no_shares() -> None:
    with pytest.raises(DiffinvError, match="one component"):
        Shares.of(HOT)
