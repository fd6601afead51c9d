"""Moments and quantiles of draws that are never held together: the results of all at once, bounds that hold, bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.uncertainty.quantiles import quantile
from diffinv.uncertainty.sketch import QuantileSketch
from diffinv.uncertainty.streaming import RunningCovariance, RunningMoments

SHAPE = (2, 3, 4, 5)
BATCHES = ((100,), (1, 99), (33, 33, 34), (1,) * 100)


def draws(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, count, *shape, dtype=torch.float64))[0].movedim(0, 1)


def orders(count: int) -> dict[str, Tensor]:
    """(1, M, 2) draws that are hard for a sketch: values are their own ranks but for ties."""
    rising = torch.arange(1, count + 1, dtype=torch.float64)
    shuffled = rising[Rng([3]).uniform(torch.empty(1, count))[0].argsort()]
    zigzag = torch.stack([rising[: count // 2], rising[count // 2 :].flip(0)], 1).flatten()
    sets = {"rising": rising, "falling": rising.flip(0), "shuffled": shuffled, "zigzag": zigzag}
    sets |= {"constant": torch.full_like(rising, 7.0), "ties": torch.floor(shuffled / 10), "two values": (rising % 2) * 5}
    return {name: values[None, :, None].expand(1, count, 2).clone() for name, values in sets.items()}


ORDERS = orders(1024)


@pytest.mark.parametrize("sizes", BATCHES)
def test_moments_in_batches_are_the_moments_of_all_draws(sizes: tuple[int, ...]) -> None:
    """Far from zero, where a sum of squares would have lost all its digits."""
    x = 1e6 + draws(100)
    state = RunningMoments.empty(SHAPE)
    for part in x.split(list(sizes), 1):
        state = state.update(part)
    assert state.count == 100
    torch.testing.assert_close(state.mean, x.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(state.variance, x.var(1), rtol=1e-8, atol=0)
    naive = (x.pow(2).mean(1) - x.mean(1) ** 2) * 100 / 99
    assert float((naive / x.var(1) - 1).abs().max()) > 1e-5


def test_moments_do_not_depend_on_who_merges_with_whom() -> None:
    first, second, third = (RunningMoments.empty(SHAPE).update(x) for x in draws(100).split([5, 60, 35], 1))
    left, right = first.merge(second).merge(third), third.merge(first.merge(second))
    torch.testing.assert_close(left.variance, right.variance, rtol=1e-13, atol=0)
    torch.testing.assert_close(RunningMoments.empty(SHAPE).merge(first).mean, first.mean)


def test_covariance_in_batches_is_the_covariance_of_all_draws() -> None:
    values = draws(50, (2, 3)) @ torch.tensor([[1.0, 2, 0], [0, 1, 1], [0, 0, 3]], dtype=torch.float64) + 1e4
    state = RunningCovariance.empty(2, 3)
    for part in values.split([7, 1, 42], 1):
        state = state.update(part)
    torch.testing.assert_close(state.covariance, torch.stack([torch.cov(v.T) for v in values]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.mean, values.mean(1))


def test_too_few_draws_and_other_shapes_are_refused() -> None:
    with pytest.raises(DiffinvError, match="at least two"):
        _ = RunningMoments.empty(SHAPE).update(draws(1)).std
    with pytest.raises(DiffinvError, match="at least two"):
        _ = RunningCovariance.empty(2, 3).covariance
    with pytest.raises(ShapeError, match="axis 1"):
        RunningMoments.empty(SHAPE).update(draws(2, (2, 3, 4, 4)))
    with pytest.raises(ShapeError, match="do not fit"):
        QuantileSketch.empty(SHAPE, 8).update(draws(2, (1, 3, 4, 5)))
    with pytest.raises(DiffinvError, match="even"):
        QuantileSketch.empty(SHAPE, 7)
    with pytest.raises(DiffinvError, match="at least 19"):
        QuantileSketch.empty(SHAPE, 64).update(draws(18)).quantile(0.05)


def sketched(x: Tensor, size: int, batches: int) -> QuantileSketch:
    state = QuantileSketch.empty((x.shape[0], *x.shape[2:]), size, like=x)
    for part in x.split(math.ceil(x.shape[1] / batches), 1):
        state = state.update(part)
    return state


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("batches", [1, 3, 40])
def test_a_sketch_is_exact_until_two_buffers_are_full(p: float, batches: int) -> None:
    x = draws(127)
    state = sketched(x, 64, batches)
    assert state.rank_error == 0
    torch.testing.assert_close(state.quantile(p), quantile(x, p), rtol=1e-12, atol=1e-12)


def outside(found: Tensor, ordered: Tensor, rank: int, over: int, under: int) -> bool:
    """Whether a value lies outside the order statistics rank − over … rank + under."""
    low, high = ordered[:, max(rank - over, 1) - 1], ordered[:, min(rank + under, ordered.shape[1]) - 1]
    return bool(((found < low) | (found > high)).any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "batches"), [(16, 1), (16, 10), (64, 7), (8, 100)])
def test_every_rank_keeps_its_bound_in_adversarial_orders(order: str, size: int, batches: int) -> None:
    x = ORDERS[order]
    state = sketched(x, size, batches)
    ordered = x.sort(1).values
    found = state.order_statistics(tuple(range(1, 1025)))
    assert not [r for r, v in enumerate(found, 1) if outside(v, ordered, r, state.over, state.under)]
    merges = math.log2(1024 / size)
    assert 0 < state.rank_error <= 1.5 * merges * 1024 / (4 * size) + 2**merges


def test_a_bound_that_is_smaller_is_broken_somewhere() -> None:
    """The proof is not slack by much: a quarter of the bound fails on one of the orders."""
    broken = 0
    for x in ORDERS.values():
        state, ordered = sketched(x, 8, 1), x.sort(1).values
        found = state.order_statistics(tuple(range(1, 1025)))
        broken += sum(outside(v, ordered, r, state.over // 4, state.under // 4) for r, v in enumerate(found, 1))
    assert broken > 0


def test_merged_sketches_keep_the_sum_of_their_bounds() -> None:
    x = ORDERS["shuffled"]
    parts = [sketched(part, 16, 3) for part in x.split([300, 500, 224], 1)]
    state = parts[2].merge(parts[0]).merge(parts[1])
    assert state.count == 1024
    ordered = x.sort(1).values
    for rank, value in enumerate(state.order_statistics(tuple(range(1, 1025))), 1):
        assert not outside(value, ordered, rank, state.over, state.under)
    assert state.rank_error < 200
    with pytest.raises(DiffinvError, match="differ"):
        parts[0].merge(sketched(x, 8, 1))


def test_memory_of_256_draws_of_three_bands_is_bounded() -> None:
    """256 draws of 3 × 64²: never more than k (L + 2) values a pixel, and half of all draws at the end."""
    shape, size = (1, 3, 64, 64), 32
    state, most = QuantileSketch.empty(shape, size), 0
    for number in range(64):
        state = state.update(Rng([number]).normal(torch.empty(1, 4, *shape[1:])))
        most = max(most, state.stored)
        kept = sum(t.untyped_storage().nbytes() for t in (state.loose, *state.levels) if t is not None)
        assert kept <= 2 * state.stored * math.prod(shape) * 4
    assert state.count == 256 and most <= size * (3 + 2) and state.stored <= 128
    assert state.rank_error <= 8
    assert state.quantile(0.5).shape == shape
