"""Conformal factors: the closed form of split conformal prediction, coverage on fresh objects, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.uncertainty.widening import fewest_objects, needed_factor, smallest_factor, stretched


def white(*shape: int, seed: int = 0) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def test_one_value_an_object_is_split_conformal() -> None:
    """f̂ is the ⌈(N + 1)(1 − α)⌉-th smallest r."""
    for objects in (9, 19, 50, 101):
        r = white(objects, seed=objects).abs()
        rank = -(-(objects + 1) * 9 // 10)
        assert smallest_factor(list(r[:, None]), 0.1) == float(r.sort().values[rank - 1])


def test_a_factor_is_what_just_holds_the_truth() -> None:
    low, middle, high = torch.tensor([0.0, 0, 0]), torch.tensor([1.0, 1, 1]), torch.tensor([3.0, 3, 3])
    truth = torch.tensor([4.0, -1.0, 1.0])
    factor = needed_factor(truth, low, middle, high)
    assert factor.tolist() == [1.5, 2.0, 0.0]
    ends = stretched(low.double(), middle.double(), high.double(), factor)
    assert float(ends[1][0]) == 4.0 and float(ends[0][1]) == -1.0
    assert needed_factor(torch.tensor([2.0]), middle[:1], middle[:1], middle[:1]).isinf().all()


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_intervals_of_any_width_cover_what_they_say_on_fresh_objects(width: float) -> None:
    """500 fits of 40 objects with 30 pixels that share half of their error: mean coverage of fresh objects is 0.9 and 1/41 more.

    The standard error of the mean over fits is below 0.002; pixels of equal weight, objects as units.
    """
    fits, objects, pixels = 500, 40, 30
    error = white(fits, 2 * objects, 1, seed=1) + white(fits, 2 * objects, pixels, seed=2)
    r = (error / (width * 2.0)).abs()
    covered = []
    for first, fresh in zip(r[:, :objects], r[:, objects:], strict=True):
        covered.append(float((fresh <= smallest_factor(list(first), 0.1)).double().mean()))
    mean = sum(covered) / fits
    assert 0.9 - 0.007 < mean < 0.9 + 1 / 41 + 0.007
    assert abs(float((r <= 1).double().mean()) - mean) > 0.01  # as they were, they do not


def test_objects_count_equally_whatever_their_pixels() -> None:
    many = [torch.full((1000,), 5.0)] + [torch.full((1,), float(k)) for k in range(1, 20)]
    assert smallest_factor(many, 0.1) == 18.0


def test_a_promise_with_probability_is_kept_by_that_share_of_fits() -> None:
    """2,000 fits of 60 objects with one value: the true coverage of the factor is known, and at most a tenth are below 0.9.

    With every L_i 0 or 1 the bound is binomial, and close: half as many failures would be far from 0.1.
    """
    fits, objects = 2000, 60
    r = white(fits, objects, seed=5).abs()
    factors = torch.tensor([smallest_factor(list(row[:, None]), 0.1, 0.1) for row in r], dtype=torch.float64)
    broken = float((torch.special.erf(factors / 2**0.5) < 0.9).double().mean())
    assert broken < 0.1 + 5 * (0.09 / fits) ** 0.5
    assert broken > 0.001  # not by being infinitely wide
    plain = torch.tensor([smallest_factor(list(row[:, None]), 0.1) for row in r], dtype=torch.float64)
    assert float((torch.special.erf(plain / 2**0.5) < 0.9).double().mean()) > 0.3  # a promise on average breaks often
    assert fewest_objects(0.1, 0.1) == 22
    with pytest.raises(DiffinvError, match="at least 22"):
        smallest_factor([torch.ones(1)] * 21, 0.1, 0.1)
    assert smallest_factor([torch.ones(1)] * 22, 0.1, 0.1) == 1


def test_too_few_objects_and_empty_intervals_are_refused() -> None:
    assert fewest_objects(0.1) == 9 and fewest_objects(0.32) == 3
    with pytest.raises(DiffinvError, match="at least 9"):
        smallest_factor([torch.ones(1)] * 8, 0.1)
    with pytest.raises(DiffinvError, match="no width"):
        smallest_factor([torch.tensor([torch.inf])] * 20, 0.1)
    with pytest.raises(DiffinvError, match="inside"):
        smallest_factor([torch.ones(1)] * 20, 0.0)
