"""Tests by relabelling: coverage, spread and skill, scores; against the same numbers computed one label at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.uncertainty.coverage import coverage, coverage_by_group, hit_table, item_ranks, order, signal_to_noise_bins
from diffinv.uncertainty.metrics import crps, spread_and_error
from diffinv.uncertainty.nulls import chance, exchange_test, relabelled, two_sided, upper_tail
from diffinv.uncertainty.scores import crps_table, energy_score, energy_table, score_test
from diffinv.uncertainty.spread_skill import spread_error_tables, spread_skill

OBJECTS, DRAWS, PIXELS = 80, 19, 16


def normal(seed: int, *shape: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def posteriors(seed: int = 0, objects: int = OBJECTS) -> tuple[Tensor, Tensor]:
    """Pixels of one object share most of their error: truth (N, 16), exact draws (N, M, 16)."""
    items = normal(seed, objects, DRAWS + 1, 1) + 0.3 * normal(seed + 1, objects, DRAWS + 1, PIXELS)
    return items[:, 0], items[:, 1:]


def each_label(function, truth: Tensor, samples: Tensor) -> Tensor:
    """function(samples, truth) with every label in turn as the truth: (N, M + 1)."""
    items = torch.cat([truth[:, None], samples], 1)
    keep = [[i for i in range(items.shape[1]) if i != j] for j in range(items.shape[1])]
    return torch.stack([function(items[:, rest], items[:, j]) for j, rest in enumerate(keep)], 1)


def brute_energy(samples: Tensor, truth: Tensor) -> Tensor:
    first = (samples - truth[:, None]).norm(dim=2).mean(1)
    pairs = (samples[:, :, None] - samples[:, None]).norm(dim=3).sum((1, 2))
    return first - pairs / (2 * samples.shape[1] * (samples.shape[1] - 1))


def test_tables_are_the_statistic_of_every_label() -> None:
    truth, samples = posteriors()
    torch.testing.assert_close(crps_table(truth, samples), each_label(crps, truth, samples).mean(2))
    torch.testing.assert_close(energy_table(truth, samples), each_label(brute_energy, truth, samples))
    torch.testing.assert_close(energy_score(samples, truth), brute_energy(samples, truth))
    everywhere = torch.ones(OBJECTS, PIXELS, dtype=torch.bool)
    for k, table in enumerate(spread_error_tables(truth, samples)):
        expected = each_label(lambda x, t, k=k: spread_and_error(x, t, everywhere)[k], truth, samples)
        torch.testing.assert_close(table, expected)
    inside = each_label(
        lambda x, t: ((x.sort(1).values[:, 1] <= t) & (t <= x.sort(1).values[:, -2])).double().sum(1), truth, samples
    )
    torch.testing.assert_close(hit_table(truth, samples, 2, Rng([0]))[0], inside)


def test_fair_energy_score_does_not_depend_on_the_number_of_draws() -> None:
    """Unbiased: few draws score as many; the plain score of few draws is worse by E‖x − x'‖/2M."""
    truth, samples = normal(3, 4000, 4), normal(4, 4000, 20, 4)
    few, many = energy_score(samples[:, :3], truth), energy_score(samples, truth)
    off = few - many
    assert abs(float(off.mean())) < 4.5 * float(off.std()) / 4000**0.5
    plain = off + (samples[:, 0] - samples[:, 1]).norm(dim=1) / 6
    assert float(plain.mean()) > 4.5 * float(plain.std()) / 4000**0.5


@pytest.mark.parametrize(
    ("draws", "level", "k"), [(19, 0.9, 1), (39, 0.9, 2), (39, 0.95, 1), (32, 0.9, 1), (9, 0.5, 2), (99, 0.68, 16)]
)
def test_intervals_cover_at_least_what_is_asked(draws: int, level: float, k: int) -> None:
    assert order(draws, level) == k and 1 - 2 * k / (draws + 1) >= level - 1e-9


@pytest.mark.parametrize(("draws", "level", "fewest"), [(18, 0.9, 19), (38, 0.95, 39), (10, 0.9, 19)])
def test_too_few_draws_are_refused_with_the_number_that_is_needed(draws: int, level: float, fewest: int) -> None:
    with pytest.raises(DiffinvError, match=f"at least {fewest}"):
        order(draws, level)
    assert order(fewest, level) == 1
    with pytest.raises(DiffinvError, match="inside"):
        order(draws, 1.0)


def test_ties_do_not_favour_a_label() -> None:
    """Images of zeros: the truth covers as often as it should, not always and not never."""
    truth, samples = torch.zeros(4000, 1), torch.zeros(4000, DRAWS, 1)
    rank = item_ranks(torch.cat([truth[:, None], samples], 1), Rng([1]))
    assert torch.equal(rank.sort(1).values[0, :, 0], torch.arange(DRAWS + 1))
    share = float(hit_table(truth, samples, 2, Rng([1]))[0][:, 0].mean())
    assert abs(share - 0.8) < 4.5 * math.sqrt(0.16 / 4000)


def test_the_error_of_coverage_is_that_of_objects_and_not_of_pixels() -> None:
    """Over 150 studies the clustered error is the scatter; the binomial error of pixels is several times too small."""
    truth, samples = posteriors(5, 150 * OBJECTS)
    hits, pixels = hit_table(truth, samples, 1, Rng([0]))
    scatter = float((hits[:, 0].reshape(150, -1).sum(1) / (OBJECTS * PIXELS)).std())
    found = coverage(truth[:OBJECTS], samples[:OBJECTS], 0.9, Rng([1]))
    assert found.nominal == pytest.approx(0.9) and found.pixels == OBJECTS * PIXELS
    assert 0.6 < found.error / scatter < 1.5
    assert math.sqrt(0.09 / found.pixels) < 0.5 * scatter
    assert found.p_value > 0.01 and f"nominal {0.9:.4g}" in str(found)


@pytest.mark.parametrize("scale", [0.6, 1.8])
def test_every_test_catches_a_wrong_width(scale: float) -> None:
    truth, samples = posteriors(7)
    mean = samples.mean(1, keepdim=True)
    wrong = mean + scale * (samples - mean)
    p_values = [
        coverage(truth, wrong, 0.8, Rng([1])).p_value,
        spread_skill(truth, wrong, Rng([2])).p_value,
        score_test(crps_table(truth, wrong), Rng([3]), quantity="CRPS").p_value,
        score_test(energy_table(truth, wrong), Rng([4]), quantity="energy").p_value,
    ]
    assert max(p_values) < 0.01
    honest = spread_skill(truth, samples, Rng([2]))
    assert honest.p_value > 0.01 and honest.rmse == pytest.approx(honest.spread, rel=0.3)


def test_a_sampler_that_returns_the_prior_passes_all_of_them() -> None:
    """What they cannot catch: truth and draws are then exchangeable too."""
    truth, samples = normal(20, OBJECTS, PIXELS), normal(21, OBJECTS, DRAWS, PIXELS)
    assert coverage(truth, samples, 0.8, Rng([1])).p_value > 0.01
    assert spread_skill(truth, samples, Rng([2])).p_value > 0.01
    assert score_test(energy_table(truth, samples), Rng([4]), quantity="energy").p_value > 0.01


def test_groups_from_the_data_are_calibrated_and_groups_from_the_truth_are_not() -> None:
    signal = 2 * normal(9, 400, PIXELS)
    y = signal + normal(10, *signal.shape)
    samples = 0.8 * y[:, None] + 0.8**0.5 * normal(11, 400, DRAWS, PIXELS)
    for found in coverage_by_group(signal, samples, 0.9, signal_to_noise_bins(y.abs(), (1.0, 3.0)), Rng([1])):
        assert found.p_value > 0.002 and abs(found.statistic - 0.9) < 4.5 * found.error
    assert len(signal_to_noise_bins(y, (1.0, 3.0))) == 3
    assert coverage(signal, samples, 0.9, Rng([1]), mask=signal > 4.5).p_value < 0.01
    with pytest.raises(DiffinvError, match="drop the group"):
        coverage(signal, samples, 0.9, Rng([1]), mask=torch.zeros_like(signal, dtype=torch.bool))


def test_relabelling_keeps_the_dependence_of_pixels() -> None:
    """A null that shuffles pixels one by one would be too narrow, and fire."""
    truth, samples = posteriors(12)
    table = hit_table(truth, samples, 1, Rng([0]))[0]
    _, null = relabelled(table, Rng([1]))
    by_pixel = math.sqrt(0.09 / (OBJECTS * PIXELS)) * PIXELS
    assert float(null.std()) > 2 * by_pixel


def test_objects_without_a_value_are_left_out() -> None:
    table = normal(13, 10, 20)
    with_nan = torch.cat([table, torch.full((3, 20), torch.nan, dtype=torch.float64)])
    assert float(exchange_test(with_nan, Rng([1])).statistic) == pytest.approx(float(table[:, 0].mean()))
    with pytest.raises(DiffinvError, match="no object"):
        exchange_test(with_nan[-3:], Rng([1]))


@pytest.mark.parametrize(("test", "sides"), [(upper_tail, 1), (two_sided, 2)])
@pytest.mark.parametrize("replicates", [18, 32, 39, 199])
def test_the_chance_of_a_small_p_is_that_of_all_orders(test, sides: int, replicates: int) -> None:
    """Every rank of a continuous statistic among K replicates is as likely as any other."""
    null = torch.arange(replicates, dtype=torch.float64)
    p = test(torch.arange(replicates + 1) - 0.5, null).p_value
    assert float((p <= 0.05).double().mean()) == pytest.approx(chance(0.05, replicates, sides=sides))


def test_a_statistic_that_is_not_a_number_has_no_p_value() -> None:
    null = torch.arange(32, dtype=torch.float64)
    for test in (upper_tail, two_sided):
        found = test(torch.tensor([math.nan, 100.0]), null).p_value
        assert math.isnan(float(found[0])) and float(found[1]) < 0.1
