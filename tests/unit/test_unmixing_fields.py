"""Gaussian fields over maps: exact posteriors, evidence, coverage, and what is reported of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from diffinv.core.rng import Rng
from diffinv.noise.poisson import Poisson
from diffinv.spectral.base import Parameter
from diffinv.unmixing.field_fit import fit_field
from diffinv.unmixing.fields import (
    Field,
    FieldPlan,
    PseudoData,
    Sites,
    Tile,
    brightness,
    exponential,
    field_posterior,
    filled,
    log_evidence,
    matern,
    mean_of,
    roughness,
)
from diffinv.unmixing.mixture import Coordinates, Mixture, SpectralData
from diffinv.unmixing.pipeline import UnmixingPlan, unmix
from diffinv.unmixing.pixels import CHI2_BAD, EXTRAPOLATED, FAINT, NODATA, UNCONVERGED, PixelPlan, quadratic, start_amplitude
from diffinv.unmixing.posterior_maps import (
    Posterior,
    flags,
    physical_moments,
    physical_quantile,
    predictive_check,
)
from tests.unit.test_unmixing_fit import BOTH, CHANNELS, HOT, counts, full

F64 = torch.float64
FIELD = Field(
    torch.tensor([[[0.1, 0.0], [-0.05, 0.1]], [[0.2, 0.0], [0.1, 0.1]]], dtype=F64),
    torch.tensor([[2.0, 3.0], [6.0, 5.0]], dtype=F64),
    torch.tensor([0.7, 0.2], dtype=F64),
    torch.tensor(0.4, dtype=F64),
)
MEAN = torch.eye(2, dtype=F64) / 12  # variance of what is common to all pixels


def places(side: int) -> Sites:
    """Pixels of a square map, unevenly rough and bright."""
    rough = 0.5 + Rng([3]).uniform(torch.empty(1, side * side, dtype=F64))[0]
    return Sites.of((side, side), rough, Rng([4]).normal(torch.empty(1, side * side, dtype=F64))[0])


def even(side: int) -> Sites:
    """Pixels of a square map that looks the same everywhere."""
    return Sites.of((side, side), torch.ones(side**2, dtype=F64), torch.zeros(side**2, dtype=F64))


def simulate(side: int, seed: int, sigma: float = 0.15) -> tuple[Tensor, PseudoData]:
    """A truth drawn from FIELD, (N, 2), and pseudo-data of it with correlated noise of uneven size."""
    sites = places(side)
    root = torch.linalg.cholesky(FIELD.covariance(sites, sites) + 1e-10 * torch.eye(2 * side**2, dtype=F64))
    rng = Rng([seed])
    common = 0.5 + rng.normal(torch.empty(1, 2, dtype=F64))[0] / math.sqrt(12)
    truth = common + (root @ rng.normal(torch.empty(1, 2 * side**2, dtype=F64))[0]).reshape(-1, 2)
    half = (
        sigma
        * torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=F64)
        * (0.5 + torch.arange(side**2, dtype=F64) / side**2)[:, None, None]
    )
    value = truth + (half @ rng.normal(torch.empty(1, side**2, 2, 1, dtype=F64))[0])[..., 0]
    return truth, PseudoData(value, half @ half.mT, sites, (side, side))


def test_kernels_are_one_at_zero_and_fall_as_their_smoothness_says() -> None:
    r = torch.tensor([0.0, 1e-4], dtype=F64)
    assert 1 - float(exponential(r)[1]) == pytest.approx(1e-4, rel=1e-3)
    assert 1 - float(matern(r)[1]) == pytest.approx(5 / 6 * 1e-8, rel=1e-3)
    assert float(matern(r)[0]) == float(exponential(r)[0]) == 1


def test_covariance_of_two_pixels_is_the_sum_over_its_factors() -> None:
    """⟨u_ip u_jr⟩ = Σ_q e_i^β_p L₁pq k₁ e_j^β_r L₁rq + L₂pq k₂ L₂rq, by loops."""
    sites = places(3)
    found = FIELD.covariance(sites[torch.arange(4)], sites).reshape(4, 2, 9, 2)
    for i, p, j, r in [(0, 0, 0, 0), (1, 0, 5, 1), (3, 1, 2, 0), (2, 1, 8, 1)]:
        scale, expected = sites.rough[i] ** FIELD.power[p] * sites.rough[j] ** FIELD.power[r], 0.0
        for t, kernel in enumerate((exponential, matern)):
            for q in range(2):
                apart = (sites.place[i] - sites.place[j]).norm() / FIELD.lengths[t, q]
                apart = torch.hypot(apart, FIELD.warp * (sites.bright[i] - sites.bright[j]))
                shared = FIELD.roots[t, p, q] * FIELD.roots[t, r, q] * kernel(apart)
                expected = expected + (scale if t == 0 else 1) * shared
        assert float(found[i, p, j, r]) == pytest.approx(float(expected), rel=1e-12)


def test_variance_is_the_diagonal_of_the_covariance() -> None:
    sites = places(4)
    blocks = FIELD.covariance(sites, sites).reshape(16, 2, 16, 2)
    torch.testing.assert_close(FIELD.variance(sites), blocks[torch.arange(16), :, torch.arange(16)], rtol=1e-10, atol=0)


def halves(data: PseudoData) -> list[Tile]:
    """The upper and the lower half of a map."""
    side, half = data.shape[0], data.shape[0] // 2
    return [Tile.of(data, rows, slice(0, side)) for rows in (slice(0, half), slice(half, side))]


@pytest.mark.parametrize("count", [1, 2])
def test_evidence_is_the_density_of_tiles_that_share_a_mean(count: int) -> None:
    _, data = simulate(5, 0)
    tiles = [Tile.of(data, slice(0, 5), slice(0, 5))] if count == 1 else halves(data)
    own = torch.block_diag(*(FIELD.covariance(t.sites, t.sites) + t.noise for t in tiles))
    expected = MultivariateNormal(torch.full((50,), 0.5, dtype=F64), own + MEAN.repeat(25, 25)).log_prob(data.value.flatten())
    torch.testing.assert_close(log_evidence(FIELD, tiles), expected, rtol=1e-10, atol=0)


def test_slopes_of_the_evidence_are_those_of_differences() -> None:
    tiles = halves(simulate(4, 2)[1])
    value = lambda r, n, p, w: log_evidence(Field(r, n, p, w), tiles)
    parts = [v.clone().requires_grad_(True) for v in (FIELD.roots, FIELD.lengths, FIELD.power, FIELD.warp)]
    assert torch.autograd.gradcheck(value, parts, rtol=1e-5, atol=1e-6)


def test_a_field_that_is_longer_than_a_tile_keeps_its_height() -> None:
    """12 tiles of 5 pixels from each of 8 maps of 40, ℓ of 8: the median of the fitted σ about m is the true one to ± 20 %."""
    field = Field(
        torch.stack([0.02 * torch.eye(1, dtype=F64), 0.3 * torch.eye(1, dtype=F64)]), full(8.0, 2), FIELD.power[:1], FIELD.warp
    )
    sites = even(40)
    root = torch.linalg.cholesky(field.covariance(sites, sites) + 1e-9 * torch.eye(1600, dtype=F64))
    rng, found = Rng([11]), []
    for k in range(8):
        draw = rng.spawn(k).normal(torch.empty(1, 2, 1600, dtype=F64))[0]
        value = (0.5 + root @ draw[0] + 0.1 * draw[1])[:, None]
        data = PseudoData(value, torch.full((1600, 1, 1), 0.01, dtype=F64), sites, (40, 40))
        found.append(
            float(fit_field(data, FieldPlan(values=25, tiles=12, evaluations=40, pairs=0)).best.variance(sites[:1]).sqrt())
        )
    assert float(torch.tensor(found).median()) == pytest.approx(0.3, rel=0.2)


def dense(data: PseudoData) -> tuple[Tensor, Tensor]:
    """Posterior mean (N, P) and std (N, P) in one piece."""
    side = data.shape[0]
    sites = places(side)
    prior = FIELD.covariance(sites, sites) + MEAN.repeat(side**2, side**2)
    _, noise = data.window(slice(0, side), slice(0, side))
    gain = torch.linalg.solve(prior + noise, prior).mT
    mean = 0.5 + (gain @ (data.value - 0.5).flatten()).reshape(-1, 2)
    return mean, (prior - gain @ prior).diagonal().sqrt().reshape(-1, 2)


def test_one_window_is_the_exact_posterior_and_windows_are_near_it() -> None:
    _, data = simulate(14, 1)
    mean, std = dense(data)
    whole = field_posterior(data, FIELD, FieldPlan(block=5, margin=14))
    torch.testing.assert_close(whole.mean, mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(whole.covariance.diagonal(dim1=1, dim2=2).sqrt(), std, rtol=1e-8, atol=1e-10)
    parts = field_posterior(data, FIELD, FieldPlan(block=5, margin=6))
    assert float(((parts.mean - mean) / std).abs().max()) < 0.1
    assert float((parts.covariance.diagonal(dim1=1, dim2=2).sqrt() / std - 1).abs().max()) < 0.03
    narrow = field_posterior(data, FIELD, FieldPlan(block=5, margin=0))
    assert float(((narrow.mean - mean) / std).abs().max()) > 0.3


def test_posterior_covers_truths_of_its_own_prior() -> None:
    """Mean of z² over 12 maps of 100 pixels and two parameters: 1 ± 4 standard errors over maps."""
    z2 = []
    for seed in range(12):
        truth, data = simulate(10, 100 + seed)
        found = field_posterior(data, FIELD)
        z2.append(float(((truth - found.mean) ** 2 / found.covariance.diagonal(dim1=1, dim2=2)).mean()))
    z2 = torch.tensor(z2)
    assert abs(float(z2.mean()) - 1) < 4 * float(z2.std()) / math.sqrt(len(z2))
    assert float(z2.std()) / math.sqrt(len(z2)) < 0.1


def test_a_fitted_field_has_more_evidence_than_the_true_one() -> None:
    """And is near it: the posterior it gives has the truth's errors."""
    truth, data = simulate(16, 7, sigma=0.05)
    plan = FieldPlan(tiles=1, evaluations=30)
    field = fit_field(data, plan).best
    tile = Tile.of(data, slice(0, 16), slice(0, 16))
    values = [float(log_evidence(f, [tile])) for f in (field, FIELD)]
    assert values[1] - 0.5 < values[0] < values[1] + 15
    found = field_posterior(data, field)
    z2 = (truth - found.mean) ** 2 / found.covariance.diagonal(dim1=1, dim2=2)
    assert float(z2.mean()) == pytest.approx(1, abs=0.2)


def test_a_pixel_far_from_data_has_the_prior() -> None:
    side = 20
    fisher = torch.zeros(side**2, 2, 2, dtype=F64)
    fisher[0] = 1e4 * torch.eye(2, dtype=F64)
    u, sites = torch.full((side**2, 2), 0.5, dtype=F64), even(side)
    short = replace(FIELD, lengths=torch.ones(2, 2, dtype=F64))
    data = PseudoData.of(u, torch.zeros_like(u), fisher, sites, (side, side))
    found = field_posterior(data, short)
    torch.testing.assert_close(found.mean[-1], torch.full((2,), 0.5, dtype=F64), rtol=0, atol=2e-3)
    expected = FIELD.variance(sites)[-1] + mean_of(data, short)[1]
    torch.testing.assert_close(found.covariance[-1], expected, rtol=2e-3, atol=1e-5)
    assert bool((mean_of(data, short)[1].diagonal() < 1 / 12).all())
    torch.testing.assert_close(found.mean[0], u[0], rtol=0, atol=1e-3)


def test_roughness_falls_off_from_a_clump_without_holes() -> None:
    u = torch.zeros(33, 33, dtype=F64)
    u[16, 16] = 1.0
    row = roughness(u.reshape(-1, 1), (33, 33)).reshape(33, 33)[16, 16:24]
    assert bool((row[1:] <= row[:-1]).all())


def test_roughness_is_large_at_an_edge_and_least_in_the_plain() -> None:
    u = torch.zeros(32, 32, dtype=F64)
    u[:, 16:] = 1
    rough = roughness(u.reshape(-1, 1), (32, 32)).reshape(32, 32)
    assert float(rough[:, 15:17].min()) > 1 > float(rough[:, :4].max())
    assert float(rough.min()) == pytest.approx(0.1)


def test_roughness_is_common_to_parameters_whatever_their_units() -> None:
    """An edge of one and noise of equal power everywhere in the other: e² is the mean of theirs."""
    u = torch.zeros(32, 32, 2, dtype=F64)
    u[:, 16:, 0] = 1
    u[..., 1] = 50 * Rng([6]).normal(torch.empty(1, 32, 32, dtype=F64))[0]
    both, edge, noise = (roughness(v.reshape(1024, -1), (32, 32)) for v in (u, u[..., :1], u[..., 1:]))
    assert float(noise.min()) > 0.1
    calm = edge <= 0.1
    torch.testing.assert_close(both[~calm], ((edge**2 + noise**2) / 2)[~calm].sqrt(), rtol=1e-9, atol=0)
    assert bool((both[calm] >= (noise[calm] ** 2 / 2).sqrt() - 1e-9).all())


def test_brightness_has_no_edges_at_holes() -> None:
    """A ramp with a step, a wide hole and a lost column: what is known stays, the step alone is rough."""
    x = 4 * (torch.arange(32, dtype=F64) / 32 + (torch.arange(32) >= 16))
    truth, known = x.expand(32, 32), torch.ones(32, 32, dtype=torch.bool)
    known[8:20, 2:10], known[:, 27] = False, False
    given = torch.where(known, truth, -5.0).flatten()
    found = filled(given, known.flatten(), (32, 32))
    assert torch.equal(found[known.flatten()], given[known.flatten()])
    assert float((found - truth.flatten()).abs().max()) < 0.8
    rough = roughness(found[:, None], (32, 32)).reshape(32, 32)
    assert float(rough[:, 15:17].min()) > 4 * float(torch.cat([rough[:, :12], rough[:, 20:]], 1).max())
    amplitude = torch.stack([given.clamp_min(0) ** 2, torch.zeros(1024, dtype=F64)], 1)
    bright = brightness(amplitude, known.flatten(), (32, 32))
    assert float(bright.mean()) == pytest.approx(0, abs=1e-12) and float(bright.pow(2).mean()) == pytest.approx(1)
    assert float(torch.corrcoef(torch.stack([bright, truth.flatten()]))[0, 1]) > 0.99
    assert torch.equal(brightness(amplitude, torch.zeros(1024, dtype=torch.bool), (32, 32)), torch.zeros(1024, dtype=F64))
    assert float(filled(torch.full((1,), 3.0, dtype=F64), known[:1, 0], (1, 1))) == 3


def test_a_clump_that_differs_in_brightness_has_values_of_its_own() -> None:
    """No data within a bright square: its errors are those of the prior nearly, and small where it looks like the rest."""
    side, inside = 12, torch.zeros(12, 12, dtype=torch.bool)
    inside[4:8, 4:8] = True
    inside, sites = inside.flatten(), even(12)
    fisher = torch.where(inside[:, None, None], 0.0, 1e4) * torch.eye(2, dtype=F64)
    u, widths = torch.full((side**2, 2), 0.5, dtype=F64), []
    for contrast in (0.0, 6.0):
        seen = replace(sites, bright=torch.where(inside, contrast, 0.0).to(F64))
        data = PseudoData.of(u, torch.zeros_like(u), fisher, seen, (side, side))
        found = field_posterior(data, replace(FIELD, lengths=4 * FIELD.lengths))
        widths.append((found.covariance / FIELD.variance(seen)).diagonal(dim1=1, dim2=2)[inside])
    assert float(widths[0].max()) < 0.2 and float(widths[1].min()) > 0.6


def test_moments_and_quantiles_of_a_logarithmic_axis_are_those_of_the_lognormal() -> None:
    axes = Coordinates((Parameter("kT", "keV", 0.5, 5.0), Parameter("z", "", -1.0, 1.0)), ("kT",))
    mean, std = torch.tensor([[0.4, 0.7]], dtype=F64), torch.tensor([[0.1, 0.2]], dtype=F64)
    centre, width = physical_moments(axes, mean, std)
    m, s = math.log(0.5) + 0.4 * math.log(10), 0.1 * math.log(10)
    expected = [math.exp(m + s * s / 2), -1 + 2 * 0.7]
    assert centre[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert width[0].tolist() == pytest.approx([expected[0] * math.sqrt(math.exp(s * s) - 1), 0.4], rel=1e-6)
    quantile = physical_quantile(axes, mean, std, 0.95)
    assert quantile[0].tolist() == pytest.approx([math.exp(m + 1.6448536 * s), -1 + 2 * (0.7 + 1.6448536 * 0.2)], rel=1e-6)


def test_flags_say_what_is_wrong() -> None:
    u = torch.tensor([[0.5, 0.5], [1.1, 0.5], [0.5, 0.5], [0.5, -0.1]], dtype=F64)
    given = torch.tensor([0, 0, NODATA, FAINT])
    misfit, moved = torch.tensor([0.0, 0.0, 0.0, 9.0]), torch.tensor([0.4, 0.6, 0.0, 0.0])
    found = Posterior(u, torch.eye(2).expand(4, 2, 2), full(1.0, 4), full(1.0, 4), FIELD, moved)
    assert flags(found, given, misfit).tolist() == [0, EXTRAPOLATED | UNCONVERGED, NODATA, EXTRAPOLATED | CHI2_BAD | FAINT]


def test_predictive_check_is_calm_for_the_model_and_sees_a_wrong_channel() -> None:
    count = 400
    amplitude, u = full(400.0, count), torch.full((count, 2), 0.5, dtype=F64)
    amplitude[200:] = 2.0  # channels of less than a count
    data = counts(HOT, amplitude, u)
    y = data.y.clone()
    y[0, 2] += 60
    tiny = 1e-8 * torch.eye(2, dtype=F64).expand(count, 2, 2)
    fitted = y.sum(1, keepdim=True)
    found = Posterior(u, tiny, fitted, fitted.sqrt(), FIELD, torch.zeros(count, dtype=F64))
    z = predictive_check(HOT, replace(data, y=y), found, Rng.for_draws(1, range(count), 1), draws=48)
    assert float(z[0]) > 8
    for part in (z[1:200], z[200:]):
        assert abs(float(part.mean())) < 4 * 1.05 / math.sqrt(len(part))
    assert float(z[1:200].std()) == pytest.approx(1, abs=0.2)
    assert 0.3 < float(z[200:].std()) < 1  # of two counts the amplitude, which is fitted, is most of what may vary
    assert float(z[1:].abs().max()) < 5


def test_predictive_check_knows_that_amplitudes_trade_against_each_other_and_the_parameters() -> None:
    """Two slopes that are hard to tell apart, drawn from the model: no pixel is called bad."""
    steep = replace(BOTH.components[1], name="steep")
    two = Mixture((BOTH.components[1], steep))
    count = 150
    u = torch.tensor([0.35, 0.55], dtype=F64).expand(count, 2)
    data = counts(two, full(500.0, count, 2), u)
    amplitude = start_amplitude(data, torch.stack(two.shapes(u), 1), iterations=400)
    step = quadratic(two, data, amplitude, u)
    wide = torch.linalg.inv(step.fisher + 400 * torch.eye(2, dtype=F64))  # with a field that knows u to 0.05
    std = step.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert float((std / amplitude).median()) > 0.15
    found = Posterior(u, wide, amplitude, std, FIELD, torch.zeros(count, dtype=F64))
    z = predictive_check(two, data, found, Rng.for_draws(1, range(count), 1))
    assert abs(float(z.mean())) < 0.5 and float((z.abs() > 5).double().mean()) < 0.01


def test_unmixing_covers_and_fills_what_is_missing() -> None:
    """A map of 20 × 20 with an edge: errors below the pixels', coverage of ±σ within what 800 dependent values allow."""
    side = 20
    ramp = torch.linspace(0.3, 0.6, side, dtype=F64)
    u = torch.stack([ramp[:, None].expand(side, side), ramp[None].expand(side, side)], -1).reshape(-1, 2).clone()
    u[: side * 6, 1] += 0.2
    data = counts(HOT, full(200.0, side**2), u)
    mask = torch.ones(side**2, CHANNELS, dtype=torch.bool)
    mask[side * 12 + 7] = False
    broken = replace(data, y=data.y.where(mask, torch.nan), noise=replace(data.noise, mask=mask))
    found = unmix(HOT, broken, (side, side), UnmixingPlan(PixelPlan((0.25, 0.5, 0.75))))
    hole = side * 12 + 7
    assert int(found.flags[hole]) == NODATA and int((found.flags & NODATA).sum()) == NODATA
    assert bool(found.posterior.u.isfinite().all()) and bool((found.posterior.std > 0).all())
    assert float((found.posterior.u[hole] - u[hole]).abs().max()) < 0.1
    z = (found.posterior.u - u) / found.posterior.std
    assert 0.55 < float((z.abs() < 1).double().mean()) < 0.9
    assert float((z.abs() < 3).double().mean()) > 0.97


def test_poisson_pixels_without_counts_are_no_obstacle() -> None:
    side = 8
    u = torch.full((side**2, 2), 0.5, dtype=F64)
    noise = Poisson(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64), floor=1e-9)
    data = counts(HOT, full(100.0, side**2), u)
    y = data.y.clone()
    y[:3] = 0
    found = unmix(HOT, SpectralData(y, noise, data.background), (side, side), UnmixingPlan(PixelPlan((0.25, 0.75)), rounds=2))
    assert bool(found.posterior.u.isfinite().all()) and bool(found.posterior.amplitude.isfinite().all())
    assert float(found.posterior.amplitude[:3].max()) < 10


@pytest.mark.parametrize("side", [1, 2, 12])
def test_where_all_pixels_agree_the_width_is_that_of_their_mean(side: int) -> None:
    """One value in all pixels and no field: ±σ covers 68 % of 200 maps, or the box's own share where one pixel says little."""
    count, size = 200, side**2
    rng, z = Rng.for_draws(5, range(count), 1), []
    truth = rng.uniform(torch.empty(count, 2, dtype=F64))
    for k in range(count):
        noise = 0.1 * rng.spawn(k).normal(torch.empty(count, size, 2, dtype=F64))[k]
        covariance = (0.1**2 * torch.eye(2, dtype=F64)).expand(size, 2, 2)
        data = PseudoData(truth[k] + noise, covariance, even(side), (side, side))
        flat = replace(FIELD, roots=1e-6 * FIELD.roots)
        found = field_posterior(data, flat)
        z.append(((found.mean[0] - truth[k]) / found.covariance[0].diagonal().sqrt()).abs())
    assert float((torch.stack(z) < 1).double().mean()) == pytest.approx(0.683, abs=4 * 0.465 / math.sqrt(2 * count))


def test_a_pixel_without_counts_has_an_amplitude_of_nought_give_or_take_one() -> None:
    side = 8
    data = counts(HOT, full(30.0, side**2), torch.full((side**2, 2), 0.5, dtype=F64))
    y = data.y.clone()
    y[:3] = 0
    plan = UnmixingPlan(PixelPlan((0.25, 0.75)), rounds=2)
    found = unmix(HOT, replace(data, y=y), (side, side), plan).posterior
    assert float(found.amplitude[:3].abs().max()) < 0.3
    assert float(found.amplitude_std[:3].min()) > 0.8 and float(found.amplitude_std[:3].max()) < 1.3
    torch.testing.assert_close(found.amplitude_std[3:, 0], y[3:].sum(1).sqrt(), rtol=0.1, atol=0)
