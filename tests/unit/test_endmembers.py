"""Linear unmixing: corners are found exactly without noise, the factorisation never rises, least squares obeys its conditions."""

from __future__ import annotations

import math

import pytest
import torch

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.unmixing.endmembers import abundances, factorise, on_simplex, spectral_angle, vertices


def scene(
    count: int = 4, pixels: int = 300, channels: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spectra (N, K), abundances (N, C) of which rows 0 … C − 1 are pure, and endmembers (C, K)."""
    draws = Rng.for_draws(seed, [0, 1], 1)
    noise = draws.uniform(torch.empty(2, pixels, max(count, channels), dtype=torch.float64))
    a = -noise[0, :, :count].log()
    a = a / a.sum(1, keepdim=True)
    a[:count] = torch.eye(count).to(a)
    e = 0.1 + noise[1, :count, :channels]
    return a @ e, a, e


@pytest.mark.parametrize("seed", range(5))
def test_corners_of_noiseless_spectra_are_the_pure_pixels(seed: int) -> None:
    y, _, _ = scene(seed=seed)
    assert sorted(vertices(y, 4, Rng.for_draws(seed, [0], 1)).tolist()) == [0, 1, 2, 3]


def test_corners_are_those_of_the_mixture_and_not_of_the_brightness() -> None:
    y, _, _ = scene()
    lit = y * Rng.for_draws(1, [0], 1).uniform(torch.empty(1, len(y), 1, dtype=torch.float64))[0].clamp_min(0.05)
    assert sorted(vertices(lit, 4, Rng.for_draws(0, [0], 1)).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_corners_beside_known_ones_are_the_others(seed: int) -> None:
    y, _, e = scene(seed=seed)
    known = 3.0 * e[[1, 3]]  # how bright they are does not count
    assert sorted(vertices(y, 2, Rng.for_draws(seed, [0], 1), known).tolist()) == [0, 2]
    with pytest.raises(DiffinvError, match="do not span 5 dimensions"):
        vertices(y, 3, Rng.for_draws(seed, [0], 1), known)


def test_more_corners_than_dimensions_are_refused() -> None:
    y, _, _ = scene()
    with pytest.raises(DiffinvError, match=r"\(300, 40\) spectra do not span 5 dimensions"):
        vertices(y, 5, Rng.for_draws(0, [0], 1))


def test_abundances_of_noiseless_spectra_are_exact() -> None:
    y, a, e = scene()
    for add_up in (True, False):
        torch.testing.assert_close(abundances(y, e, add_up=add_up, iterations=5000), a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("add_up", [True, False])
def test_abundances_of_noisy_spectra_are_at_the_minimum(add_up: bool) -> None:
    y, _, e = scene()
    y = y + 0.3 * Rng.for_draws(2, [0], 1).normal(y[None])[0]
    a = abundances(y, e, add_up=add_up, iterations=5000)
    slope = (a @ e - y) @ e.mT
    level = torch.where(a > 1e-7, slope, -torch.inf).amax(1, keepdim=True) if add_up else torch.zeros(len(a), 1).to(a)
    assert bool((a >= 0).all()) and (not add_up or float((a.sum(1) - 1).abs().max()) < 1e-12)
    assert float(torch.where(a > 1e-7, slope - level, 0.0).abs().max()) < 1e-5  # one slope where free
    assert float((level - slope)[a == 0].max()) < 1e-5  # and no lower one where not
    assert 0.05 < float((a == 0).double().mean()) < 0.9


def test_a_point_is_projected_onto_the_simplex() -> None:
    points = torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [0.6, 0.6, -1.0], [1.0, 1.0, 1.0]]).double()
    wanted = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]).double()
    torch.testing.assert_close(on_simplex(points), wanted)


def test_factorisation_never_rises_and_keeps_what_is_held() -> None:
    y, _, e = scene()
    y = y + 0.05 * Rng.for_draws(3, [0], 1).normal(y[None])[0]
    start = (e + 0.3 * Rng.for_draws(4, [0], 1).uniform(e[None])[0]).clamp_min(0)
    held = torch.tensor([True, False, False, False])
    found = factorise(y, start, held=held, iterations=200)
    losses = torch.tensor(found.loss).double()
    assert bool((losses.diff() <= 1e-12 * losses[:-1]).all()) and float(losses[-1]) < 0.95 * float(losses[0])
    assert torch.equal(found.endmembers[0], start[0]) and not torch.equal(found.endmembers[1], start[1])
    assert bool((found.abundance >= 0).all()) and float((found.abundance.sum(1) - 1).abs().max()) < 1e-12


def test_the_truth_is_a_fixed_point_of_the_factorisation() -> None:
    y, _, e = scene()
    found = factorise(y, e, held=torch.zeros(4, dtype=torch.bool), iterations=20)
    torch.testing.assert_close(found.endmembers, e, rtol=0, atol=1e-6)


def test_bad_factors_are_refused() -> None:
    y, _, e = scene()
    with pytest.raises(DiffinvError, match="must be ≥ 0"):
        factorise(y, e - 1, held=torch.zeros(4, dtype=torch.bool), iterations=1)
    with pytest.raises(ShapeError, match="3 of `held` for 4 endmembers"):
        factorise(y, e, held=torch.zeros(3, dtype=torch.bool), iterations=1)


def test_the_spectral_angle_is_blind_to_brightness() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]).double()
    b = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 0.5]]).double()
    torch.testing.assert_close(spectral_angle(a, b), torch.tensor([0.0, math.pi / 4, math.pi / 2]).double())
