"""Random streams: independent of batch-mates exactly, and of the stated distribution to a z-score of 4.5 (7e-6 two-sided)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffinv.core.batched import collate
from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.operators.algebra import Diagonal

COUNT = 200_000
LIMIT = 4.5
F64 = torch.float64

DRAWS: dict[str, Callable[[Rng, Tensor], Tensor]] = {
    "uniform": lambda rng, like: rng.uniform(like),
    "normal": lambda rng, like: rng.normal(like),
    "rademacher": lambda rng, like: rng.rademacher(like),
    "gamma": lambda rng, like: rng.gamma(1.5 + like),
    "poisson": lambda rng, like: rng.poisson(3 + like),
    "binomial": lambda rng, like: rng.binomial(torch.full_like(like, 9), 0.3),
    "beta": lambda rng, like: rng.beta(2 + like, 5 + like),
}


def one(dtype: torch.dtype = F64, *, seed: int = 0, count: int = COUNT) -> tuple[Rng, Tensor]:
    return Rng.for_draws(seed, [7], 1), torch.zeros(1, count, dtype=dtype)


def mean_z(sample: Tensor, mean: float, variance: float) -> float:
    return float((sample.double().mean() - mean) / math.sqrt(variance / sample.numel()))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_row_never_depends_on_its_batch_mates(name, dtype):
    draw = DRAWS[name]
    batch, mates = Rng.for_draws(3, [4, 5, 6], 2), Rng.for_draws(3, [9, 5], 2)
    like = torch.zeros(6, 2, 5, dtype=dtype)
    for _ in range(3):
        rows, others = draw(batch, like), draw(mates, like[:4])
        assert torch.equal(rows[2:4], others[2:4])
        assert not torch.equal(rows[:2], others[:2])


@pytest.mark.parametrize("name", DRAWS)
def test_same_seed_gives_the_same_numbers_and_calls_and_rows_differ(name):
    draw, like = DRAWS[name], torch.zeros(2, 50, dtype=F64)
    first, second = Rng.for_draws(1, [0, 1], 1), Rng.for_draws(1, [0, 1], 1)
    a, b = draw(first, like), draw(first, like)
    assert torch.equal(a, draw(second, like)) and torch.equal(b, draw(second, like))
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    assert not torch.equal(a, draw(Rng.for_draws(2, [0, 1], 1), like))


@pytest.mark.parametrize("name", DRAWS)
def test_select_continues_the_streams_of_its_rows(name):
    draw, like = DRAWS[name], torch.zeros(3, 8, dtype=F64)
    rng = Rng.for_draws(0, [1, 2, 3], 1)
    draw(rng, like)
    chosen = rng.select(torch.tensor([2, 0]))
    assert torch.equal(draw(chosen, like[:2]), draw(rng, like)[[2, 0]])


@pytest.mark.parametrize("name", DRAWS)
def test_global_random_state_is_neither_read_nor_moved(name):
    rng, like = one(count=20)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = DRAWS[name](rng, like)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, DRAWS[name](Rng.for_draws(0, [7], 1), like))


@pytest.mark.parametrize("name", DRAWS)
def test_draws_keep_dtype_and_shape(name):
    for dtype in (torch.float32, F64):
        rng, like = one(dtype, count=6)
        result = DRAWS[name](rng, like)
        assert result.dtype == dtype and result.shape == like.shape


def test_draws_are_ordered_as_a_repeated_batch():
    rng = Rng.for_draws(0, [5, 6], 3)
    keys = torch.cat([Rng.for_draws(0, [5], 3).keys, Rng.for_draws(0, [6], 3).keys])
    assert torch.equal(rng.keys, keys)
    assert torch.equal(Rng.for_draws(0, [5], 2, first_draw=1).keys, keys[1:3])
    images = collate([Diagonal(torch.full((1, 2), value, dtype=F64)) for value in (5, 6)]).repeat(3)
    assert images.d[:, 0].tolist() == [5, 5, 5, 6, 6, 6]


def test_a_hundred_thousand_streams_have_different_keys():
    keys = Rng.for_draws(0, range(1000), 100).keys
    assert keys.unique().numel() == 100_000


def test_spawn_is_independent_of_and_does_not_advance_its_parent():
    rng, like = one()
    rng.normal(like)
    child, other = rng.spawn(0).normal(like), rng.spawn(1).normal(like)
    parent = rng.normal(like)
    assert torch.equal(child, rng.spawn(0).normal(like))
    for a, b in ((child, other), (child, parent), (other, parent)):
        assert abs(mean_z(a * b, 0, 1)) < LIMIT


def test_a_wrong_batch_is_refused():
    with pytest.raises(ShapeError, match="2 streams but a batch of 3"):
        Rng.for_draws(0, [1, 2], 1).normal(torch.zeros(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_uniform_passes_kolmogorov_smirnov_and_excludes_its_ends(dtype):
    rng, like = one(dtype)
    sample = rng.uniform(like)
    assert stats.kstest(sample.double().numpy()[0], "uniform").pvalue > 1e-5
    assert float(sample.min()) > 0 and float(sample.max()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_normal_has_the_moments_of_a_normal_and_passes_kolmogorov_smirnov(dtype):
    rng, like = one(dtype)
    z = rng.normal(like).double()
    assert stats.kstest(z.numpy()[0], "norm").pvalue > 1e-5
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(mean_z(z**power, mean, variance)) < LIMIT


def test_kolmogorov_smirnov_would_see_a_two_percent_error():
    rng, like = one()
    assert stats.kstest(1.02 * rng.normal(like).numpy()[0], "norm").pvalue < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_steps_rows_and_neighbouring_pixels_are_uncorrelated(dtype):
    rng, like = Rng.for_draws(0, [0, 1], 1), torch.zeros(2, COUNT, dtype=dtype)
    first, second = rng.normal(like).double(), rng.normal(like).double()
    pairs = [(first, second), (first[0], first[1]), (first[:, 1:], first[:, :-1]), (first[:, 64:], first[:, :-64])]
    for a, b in pairs:
        assert abs(mean_z(a * b, 0, 1)) < LIMIT
        assert abs(mean_z((a**2 - 1) * (b**2 - 1), 0, 4)) < LIMIT


def test_many_short_calls_are_as_normal_as_one_long_call():
    rng, like = Rng.for_draws(0, range(200), 1), torch.zeros(200, 2, dtype=torch.float32)
    z = torch.cat([rng.normal(like) for _ in range(250)]).double()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-5
    assert abs(mean_z(z[:, 0] * z[:, 1], 0, 1)) < LIMIT


@pytest.mark.parametrize(
    ("name", "mean", "variance", "fourth"),
    [
        ("rademacher", 0.0, 1.0, 1.0),
        ("gamma", 1.5, 1.5, 3 * 1.5**2 + 6 * 1.5),
        ("poisson", 3.0, 3.0, 3 * 9 + 3),
        ("binomial", 2.7, 1.89, 1.89 * (1 + 3 * (9 - 2) * 0.21)),
        ("beta", 2 / 7, 10 / (49 * 8), float(stats.beta(2, 5).stats("k") + 3) * (10 / (49 * 8)) ** 2),
    ],
)
def test_mean_and_variance(name, mean, variance, fourth):
    rng, like = one()
    sample = DRAWS[name](rng, like)
    assert abs(mean_z(sample, mean, variance)) < LIMIT
    spread = fourth - variance**2
    if spread > 0:
        assert abs(mean_z((sample - mean) ** 2, variance, spread)) < LIMIT
    else:
        assert bool((sample.abs() == 1).all())


def test_poisson_follows_a_rate_that_varies_over_pixels():
    rate = torch.tensor([0.0, 0.1, 4.0, 1e4], dtype=F64)
    sample = one()[0].poisson(rate.repeat(1, 20_000).reshape(1, 20_000, 4))
    z = (sample.mean((0, 1)) - rate) / (rate.clamp_min(1e-9) / 20_000).sqrt()
    assert float(sample[..., 0].abs().max()) == 0 and float(z.abs().max()) < LIMIT
