"""Conformal intervals keep their promise over many calibrations, and refuse what they cannot promise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.uncertainty.conformal import ConformalMap, Regime, allowed_risk, excess, hoeffding_bentkus, k_rcps, rcps

ALPHA, DELTA, PIXELS, IMAGES = 0.1, 0.1, 25, 200
REGIME = Regime("tiny", "exact", "σ = 1", "none")


def normal(seed: int, *shape: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def images(seed: int, count: int) -> Tensor:
    """Errors whose pixels share a part, whose size differs from image to image, and with a left half twice as wide: (N, 25)."""
    size = 0.5 + normal(seed, count, 1).abs()
    scale = torch.where(torch.arange(PIXELS) < PIXELS // 2, 2.0, 1.0)
    return size * scale * (normal(seed + 1, count, 1) + normal(seed + 2, count, PIXELS)) / 2**0.5


def intervals(truth: Tensor, half: float) -> tuple[Tensor, Tensor]:
    return torch.full_like(truth, -half), torch.full_like(truth, half)


def calibrated(truth: Tensor, half: float) -> ConformalMap:
    return rcps(truth, *intervals(truth, half), alpha=ALPHA, delta=DELTA, regime=REGIME)


def test_the_bound_is_a_p_value() -> None:
    """P(p ≤ δ) ≤ δ for the least favourable risk, losses of 0 and 1 with mean α."""
    counts = torch.arange(IMAGES + 1)
    p = torch.tensor([hoeffding_bentkus(c / IMAGES, ALPHA, IMAGES) for c in counts.tolist()])
    mass = torch.from_numpy(binom.pmf(counts.numpy(), IMAGES, ALPHA))
    for delta in (0.01, 0.1, 0.3):
        assert float(mass[p <= delta].sum()) <= delta
    assert float(mass[p <= 0.1].sum()) > 0.01
    assert bool((p.diff() >= -1e-12).all())


def test_the_allowed_risk_is_the_largest_that_is_proved() -> None:
    limit = allowed_risk(ALPHA, DELTA, IMAGES)
    assert 0 < limit < ALPHA
    assert hoeffding_bentkus(limit - 1e-9, ALPHA, IMAGES) <= DELTA < hoeffding_bentkus(limit + 1e-6, ALPHA, IMAGES)
    assert allowed_risk(ALPHA, DELTA, 20000) > 0.95 * ALPHA


def test_too_few_images_are_refused_with_the_number_that_is_needed() -> None:
    fewest = math.ceil(math.log(DELTA) / math.log(1 - ALPHA))
    with pytest.raises(DiffinvError, match=f"at least {fewest}"):
        allowed_risk(ALPHA, DELTA, fewest - 1)
    assert allowed_risk(ALPHA, DELTA, fewest) >= 0
    with pytest.raises(DiffinvError, match="inside"):
        allowed_risk(1.0, DELTA, 100)


def test_the_risk_exceeds_alpha_in_at_most_a_share_delta_of_calibrations() -> None:
    """300 calibrations; the true risk of each λ̂ from 20,000 other images. Without the bound, R̂ = α, half of them exceed."""
    fresh = images(90, 20000)
    sets = images(1, 300 * IMAGES).unflatten(0, (300, IMAGES))
    needed = fresh.abs().flatten().sort().values

    def risk(reach: float) -> float:
        return 1 - float(torch.searchsorted(needed, torch.tensor(reach, dtype=needed.dtype))) / len(needed)

    found = [calibrated(truth, 0.5) for truth in sets]
    broken = sum(risk(0.5 + f.widening[0]) > ALPHA for f in found)
    assert broken <= binom.isf(1e-4, 300, DELTA)
    naive = sum(risk(float(truth.abs().flatten().quantile(1 - ALPHA))) > ALPHA for truth in sets[:60])
    assert naive > binom.isf(1e-4, 60, DELTA)
    assert all(f.risk <= allowed_risk(ALPHA, DELTA, IMAGES) + 1e-12 for f in found)


def test_lambda_is_the_smallest() -> None:
    truth = images(5, IMAGES)
    found = calibrated(truth, 0.5)
    low, high = intervals(truth, 0.5)
    assert float((excess(truth, low, high) > found.widening[0]).double().mean()) <= allowed_risk(ALPHA, DELTA, IMAGES)
    assert float((excess(truth, low, high) > found.widening[0] - 1e-3).double().mean()) > found.risk - 1e-12
    less = found.widening[0] - 0.02
    assert float((excess(truth, low, high) > less).double().mean()) > allowed_risk(ALPHA, DELTA, IMAGES)


def test_an_honest_sampler_needs_no_widening() -> None:
    assert calibrated(images(6, 2000), 5.0).widening == (0.0,)
    assert calibrated(images(6, 2000), 0.1).widening[0] > 1


def two_groups(seed: int, count: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    truth = images(seed, count)
    return (truth, *intervals(truth, 0.5)), (torch.arange(PIXELS) >= PIXELS // 2).long().expand(count, -1)


def test_two_groups_give_shorter_intervals_at_the_same_risk() -> None:
    (first, group1), (second, group2) = two_groups(20, 300), two_groups(30, 1000)
    found = k_rcps(first, second, (group1, group2), alpha=ALPHA, delta=DELTA, regime=REGIME)
    single = rcps(*second, alpha=ALPHA, delta=DELTA, regime=REGIME)
    assert found.widening[0] > found.widening[1]
    mean = torch.tensor(found.widening, dtype=torch.float64)[group2].mean()
    assert float(mean) < single.widening[0]
    fresh, group = two_groups(40, 20000)
    low, high = found.apply(*fresh[1:], REGIME, groups=group)
    assert float(((fresh[0] < low) | (fresh[0] > high)).double().mean()) <= ALPHA
    with pytest.raises(UnsupportedError, match="give groups="):
        found.apply(*fresh[1:], REGIME)
    with pytest.raises(ShapeError, match="one group a pixel"):
        k_rcps(first, second, (group1[:2], group2), alpha=ALPHA, delta=DELTA, regime=REGIME)


def test_a_map_refuses_another_regime_and_comes_back_from_json() -> None:
    found = calibrated(images(7, IMAGES), 0.5)
    assert ConformalMap.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    low, high = found.apply(torch.zeros(1, 3), torch.ones(1, 3), REGIME)
    assert float(high[0, 0] - low[0, 0]) == pytest.approx(1 + 2 * found.widening[0])
    with pytest.raises(UnsupportedError, match="noise \\('σ = 1', here 'σ = 2'\\)"):
        found.apply(low, high, replace(REGIME, noise="σ = 2"))
    assert "\n" not in str(found) and "with probability 0.9" in str(found)


@pytest.mark.parametrize("unit", [1e-18, 1e-6, 1e12])
def test_the_unit_of_an_image_does_not_matter(unit: float) -> None:
    (first, group1), (second, group2) = two_groups(40, IMAGES), two_groups(50, IMAGES)
    plain = k_rcps(first, second, (group1, group2), alpha=ALPHA, delta=DELTA, regime=REGIME)
    scale = lambda parts: tuple(unit * part for part in parts)
    found = k_rcps(scale(first), scale(second), (group1, group2), alpha=ALPHA, delta=DELTA, regime=REGIME)
    assert torch.tensor(found.widening) / unit == pytest.approx(torch.tensor(plain.widening), rel=1e-6)


def test_a_group_that_only_the_second_set_has_is_calibrated_there() -> None:
    (first, group1), (second, group2) = two_groups(40, IMAGES), two_groups(50, IMAGES)
    found = k_rcps(first, second, (torch.zeros_like(group1), group2), alpha=ALPHA, delta=DELTA, regime=REGIME)
    assert len(found.widening) == 2 and found.risk <= ALPHA


def test_nan_is_refused_and_not_certified() -> None:
    truth = images(60, IMAGES)
    truth[:, 0] = math.nan
    with pytest.raises(DiffinvError, match=f"{IMAGES} of {truth.numel()} pixels are NaN"):
        calibrated(truth, 1.0)
