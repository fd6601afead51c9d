"""What is learnt of a field: its posterior by Laplace's approximation, and maps that know how well the field is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.unmixing.field_fit import FittedField, antithetic, contour, fit_field, known_spread, laplace_root
from diffinv.unmixing.fields import Field, FieldPlan, PseudoData, Sites, field_posterior

F64 = torch.float64
ZERO = torch.tensor(0.0, dtype=F64)


def square(size: int, seed: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, size, size, dtype=F64))[0]


def field(height: float, length: float) -> Field:
    """One parameter; all of its variance in the smooth term."""
    return Field(
        torch.tensor([[[1e-6]], [[height]]], dtype=F64), torch.full((2, 1), length, dtype=F64), torch.zeros(1, dtype=F64), ZERO
    )


def pseudo(truth: Field, side: int, seed: int, sigma: float) -> tuple[Tensor, PseudoData]:
    """A map (N,) of a field about a mean from its box, and data of it."""
    sites = Sites.of((side, side), torch.ones(side**2, dtype=F64), torch.zeros(side**2, dtype=F64))
    covariance = truth.covariance(sites, sites) + 1e-9 * torch.eye(side**2, dtype=F64)
    draw = Rng([seed]).normal(torch.empty(1, 2 * side**2 + 1, dtype=F64))[0]
    u = 0.5 + draw[-1] / math.sqrt(12) + torch.linalg.cholesky(covariance) @ draw[: side**2]
    value = (u + sigma * draw[side**2 : -1])[:, None]
    return u, PseudoData(value, torch.full((side**2, 1, 1), sigma**2, dtype=F64), sites, (side, side))


def test_root_is_that_of_the_inverse_curvature_and_no_wider_than_the_prior() -> None:
    half, width = square(4, 1), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=F64)
    curvature = half @ half.T + torch.diag(2 / width**2)
    best = square(4, 2)[0]
    root = laplace_root(lambda x: 0.5 * (x - best) @ curvature @ (x - best), best, width)
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(curvature), rtol=1e-8, atol=1e-10)
    saddle = torch.diag(torch.tensor([4.0, -3.0, 0.1, 9.0], dtype=F64))
    root = laplace_root(lambda x: 0.5 * x @ saddle @ x, torch.zeros(4, dtype=F64), width)
    expected = torch.tensor([1 / 4, 0.5**2, 2.0**2 / max(1.0, 0.1 * 4), 1 / 9], dtype=F64)
    torch.testing.assert_close((root @ root.T), torch.diag(expected), rtol=1e-8, atol=1e-10)


def test_all_directions_have_mean_and_covariance_and_few_have_them_on_average() -> None:
    root = square(6, 3)
    every = torch.stack(antithetic(root, 6))
    assert len(every) == 12 == len(antithetic(root, 99))
    torch.testing.assert_close(every.mean(0), torch.zeros(6, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(every.T @ every / 12, root @ root.T, rtol=1e-10, atol=1e-12)
    two = torch.linalg.solve(root, torch.stack(antithetic(root, 2)).T).T
    torch.testing.assert_close(two @ two.T, 6 * torch.block_diag(*[torch.tensor([[1.0, -1], [-1, 1]], dtype=F64)] * 2))


def test_a_mixture_of_fields_has_the_moments_of_a_mixture() -> None:
    _, data = pseudo(field(0.3, 4.0), 6, 5, 0.2)
    fields = field(0.1, 2.0), field(0.4, 6.0)
    found = FittedField(fields[0], fields).posterior(data)
    one, two = (field_posterior(data, part) for part in fields)
    torch.testing.assert_close(found.mean, (one.mean + two.mean) / 2)
    expected = (one.covariance + two.covariance) / 2 + ((one.mean - two.mean) / 2)[..., None] ** 2
    torch.testing.assert_close(found.covariance, expected)


def test_the_most_probable_field_alone_is_what_no_pairs_give() -> None:
    _, data = pseudo(field(0.3, 4.0), 6, 6, 0.2)
    alone, all_of_them = fit_field(data, FieldPlan(pairs=0)), fit_field(data, FieldPlan(pairs=2))
    assert alone.likely == (alone.best,) and len(all_of_them.likely) == 4
    torch.testing.assert_close(alone.best.lengths, all_of_them.best.lengths, rtol=0, atol=0)
    torch.testing.assert_close(alone.posterior(data).mean, field_posterior(data, alone.best).mean)


def test_points_lie_where_the_density_is_as_low_as_a_gaussian_is_there() -> None:
    """A Gaussian keeps its points; twice as steep on one side, half the way there; no field beyond 1.5, short of it."""
    best = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=F64)
    steps = [2 * sign * row for row in torch.eye(4, dtype=F64)[:2] for sign in (1, -1)]

    def loss(theta: Tensor) -> Tensor:
        x, y = (theta - best)[:2]
        if float(y) > 1.5:
            return torch.linalg.cholesky(-torch.eye(2, dtype=F64)).sum()
        return 0.5 * (2 * x if x > 0 else x) ** 2 + 0.5 * y**2

    shifts = [float((point - best).sum()) for point in contour(loss, best, steps)]
    assert shifts[:2] + shifts[3:] == pytest.approx([1, -2, -2], rel=1e-3)
    assert 0.5 <= shifts[2] <= 1.5


def test_errors_know_that_a_field_is_learnt_from_little() -> None:
    """z² over 100 maps of 36 noisy pixels, of fields as various as the prior has them: the most probable field alone is too
    sure, and the points, of which the widest weigh most, are somewhat too wide."""
    z2: dict[int, list[Tensor]] = {0: [], 4: []}
    for seed in range(100):
        rng = Rng([1000 + seed]).normal(torch.empty(1, 4, dtype=F64))[0]
        heights, lengths = 0.1 * rng[:2].exp(), torch.tensor([8.0, 16.0], dtype=F64) * (0.7 * rng[2:]).exp()
        truth = Field(heights.reshape(2, 1, 1), lengths.reshape(2, 1), torch.zeros(1, dtype=F64), ZERO)
        u, data = pseudo(truth, 6, seed, 0.3)
        for pairs in z2:
            found = fit_field(data, FieldPlan(pairs=pairs)).posterior(data)
            z2[pairs].append((u - found.mean[:, 0]) ** 2 / found.covariance[:, 0, 0])
    alone, mixed = (torch.stack(z2[pairs]) for pairs in (0, 4))
    within = lambda z: float((z < 4).double().mean())
    assert 0.65 < float(mixed.mean()) < 1.1 < float(alone.mean()) and float(mixed.mean(1).max()) < 4
    assert within(alone) < 0.954 < within(mixed) < 0.985


def test_the_spread_of_maps_is_known_as_well_as_noise_lets_it() -> None:
    """Of the truth where it shows; of flat maps, less than noise hides, and never none."""
    draw = Rng([7]).normal(torch.empty(1, 4096, 2, dtype=F64))[0]
    seen = known_spread(0.5 + 0.2 * draw[:, :1] + 0.05 * draw[:, 1:], torch.full((4096, 1), 400.0, dtype=F64))
    assert float(seen) == pytest.approx(0.04, rel=0.1)
    flat = torch.stack([known_spread(0.5 + 0.1 * part, torch.full((64, 1), 100.0, dtype=F64)) for part in draw[:, :1].split(64)])
    error = math.sqrt(2 / 64) * 0.01
    assert 0.1 * error < float(flat.min()) and float(flat.mean()) == pytest.approx(error, rel=0.3)


def test_faint_pixels_do_not_hide_what_good_ones_show() -> None:
    """20 good pixels of a map of 0.2 rms among 2,000 faint ones; and of a flat map."""
    draw = Rng([8]).normal(torch.empty(1, 200, 2020, 2, dtype=F64))[0]
    precision = torch.cat([torch.full((20, 1), 2500.0, dtype=F64), torch.full((2000, 1), 0.1, dtype=F64)])
    values = 0.5 + 0.2 * draw[..., :1] + draw[..., 1:] / precision.sqrt()
    found = torch.stack([known_spread(value, precision)[0] for value in values])
    assert float(found.sqrt().median()) == pytest.approx(0.2, rel=0.1)
    flat = torch.stack([known_spread(value - 0.2 * own[:, :1], precision)[0] for value, own in zip(values, draw, strict=True)])
    assert float(flat.sqrt().max()) < 0.04


def test_maps_that_nothing_is_known_of_have_errors_of_a_box() -> None:
    """No datum, or one: how rough such maps are is a guess, which is neither none nor more than the box has room for."""
    value, none = torch.full((9, 2), 0.5, dtype=F64), torch.zeros(9, 2, dtype=F64)
    one = torch.cat([torch.full((1, 2), 1e6, dtype=F64), none[1:]])
    for precision in (none, one, none.float()):
        guess = known_spread(value.to(precision), precision)
        assert guess.dtype == precision.dtype and guess.sqrt().tolist() == pytest.approx([0.182, 0.182], rel=0.01)
    sites = Sites.of((8, 8), torch.ones(64, dtype=F64), torch.zeros(64, dtype=F64))
    covariance = torch.where(torch.arange(64)[:, None, None] == 9, 1e-6, 1000.0).to(F64)
    for given in (covariance, torch.full((64, 1, 1), 1000.0, dtype=F64)):
        data = PseudoData(torch.full((64, 1), 0.5, dtype=F64), given, sites, (8, 8))
        found = fit_field(data).posterior(data)
        far = found.covariance[[7, 56, 63], 0, 0].sqrt()
        assert float(far.min()) > 0.15 and float(far.max()) < 0.6


def test_values_that_are_not_finite_are_named() -> None:
    _, data = pseudo(field(0.3, 4.0), 6, 6, 0.2)
    data.value[3] = torch.nan
    with pytest.raises(DiffinvError, match="finite"):
        fit_field(data)


def test_pixels_without_data_say_nothing_of_the_height() -> None:
    """Data in every second pixel, and no information in the others: the field is as high as from those that have data."""
    side = 16
    _, data = pseudo(field(0.3, 4.0), side, 8, 0.1)
    gone = torch.arange(side**2) % 2 == 1
    smooth = torch.where(gone[:, None], 0.5, data.value)
    covariance = torch.where(gone[:, None, None], 1000.0, data.covariance)
    holed = PseudoData(smooth, covariance, data.sites, data.shape)
    assert bool((holed.information[gone] == 0).all()) and bool((holed.information[~gone] > 0).all())
    whole, half = (fit_field(d, FieldPlan(pairs=0)).best.variance(data.sites[:1]).sqrt() for d in (data, holed))
    assert 0.7 < float(half / whole) < 1.4


def test_the_root_does_not_turn_with_the_basis_of_equal_directions() -> None:
    width = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    flat = laplace_root(lambda x: 0.0 * x.sum(), torch.zeros(3, dtype=F64), width)
    torch.testing.assert_close(flat, torch.diag(width))
