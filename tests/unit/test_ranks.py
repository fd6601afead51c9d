"""Ranks and their nulls: ties, envelopes, TARP, and records that come back from a file."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.uncertainty import summaries
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import exchange_test, integers, two_sided, upper_tail
from diffinv.uncertainty.ranks import RankFinding, UniformRanks, histogram, rank_findings, ranks, sbc
from diffinv.uncertainty.tarp import TarpFinding, references_near, tarp

OBJECTS, DRAWS = 60, 19


def normal(seed: int, *shape: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def test_ties_are_broken_evenly_and_nan_is_a_value() -> None:
    """Draws of three values, and of which a third are NaN: ranks are uniform still."""
    values = torch.floor(3 * Rng([1]).uniform(torch.empty(1, 20000, DRAWS + 1, dtype=torch.float64))[0])
    for x in (values, torch.where(values == 0, torch.nan, values)):
        counts = histogram(ranks(x[:, 0], x[:, 1:], Rng([2])), DRAWS + 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < chi2.isf(1e-5, DRAWS)
    always_below = (values[:, 1:] < values[:, :1]).sum(1)
    assert float(((histogram(always_below, DRAWS + 1) - 1000) ** 2 / 1000).sum()) > chi2.isf(1e-5, DRAWS)


def test_ranks_count_the_draws_below() -> None:
    x = torch.tensor([[2.5, 1, 2, 3], [0, 1, 2, 3.0], [9, 1, 2, 3]])
    assert ranks(x[:, 0], x[:, 1:], Rng([0])).tolist() == [2, 0, 3]
    with pytest.raises(ShapeError, match="do not fit"):
        ranks(x, x[:, 1:], Rng([0]))
    with pytest.raises(ShapeError, match="one"):
        ranks(x[:, 0], x[:, 1:], Rng([0, 1]))


def test_a_monte_carlo_p_value_is_a_rank() -> None:
    null = torch.arange(1, 100, dtype=torch.float64)
    assert float(upper_tail(torch.tensor(95.5), null).p_value) == pytest.approx(5 / 100)
    assert float(upper_tail(torch.tensor(1000.0), null).p_value) == pytest.approx(1 / 100)
    assert float(two_sided(torch.tensor(2.0), null).p_value) == pytest.approx(6 / 100)
    outcome = two_sided(torch.tensor([2.0, 50.0]), null)
    assert outcome.p_value.tolist() == pytest.approx([0.06, 1.0]) and float(outcome.low[0]) < 5


def test_chi2_of_uniform_ranks_is_chi2() -> None:
    """With 400 objects and ten bins the simulated null has the textbook quantiles."""
    null = UniformRanks(400, DRAWS, 10, Rng([3]))
    for q in (0.5, 0.95):
        at = torch.tensor(chi2.ppf(q, 9))
        p = float((null._chi2 <= at).double().mean())
        assert abs(p - q) < 4.5 * math.sqrt(q * (1 - q) / 19999) + 0.01


def test_the_envelope_holds_all_points_together_and_no_single_point_more() -> None:
    null = UniformRanks(OBJECTS, DRAWS, 5, Rng([4]))
    low, high = null.envelope(0.95)
    rank = integers(Rng([5]), DRAWS + 1, (4000, OBJECTS), torch.empty(0, dtype=torch.float64))
    share = histogram(rank, DRAWS + 1).cumsum(-1)[:, :-1] / OBJECTS
    inside = ((share >= low) & (share <= high)).all(1).double().mean()
    assert 0.935 < float(inside) < 0.975
    fires = null.ecdf(rank).p_value <= 0.05
    assert abs(float(fires.double().mean()) - 0.05) < 4.5 * math.sqrt(0.0475 / 4000 + 0.0475 / 19999)
    middle = ((share >= low) & (share <= high))[:, DRAWS // 2].double().mean()
    assert float(middle) > 0.98


@pytest.mark.parametrize(("name", "scale", "shift"), [("narrow", 0.6, 0.0), ("wide", 1.8, 0.0), ("biased", 1.0, 0.6)])
def test_rank_tests_catch_width_and_bias(name: str, scale: float, shift: float) -> None:
    x = normal(6, 200, DRAWS + 1)
    for found in rank_findings(ranks(x[:, 0], scale * x[:, 1:] + shift, Rng([7])), DRAWS, name, Rng([8])):
        assert found.p_value < 0.01 and found.fires()
    for found in rank_findings(ranks(x[:, 0], x[:, 1:], Rng([7])), DRAWS, name, Rng([8])):
        assert found.p_value > 0.01


def test_sbc_asks_every_summary_and_catches_only_those_that_are_wrong() -> None:
    """Draws whose gradient from left to right is too strong: their flux is right, their projection on it is not."""
    x = normal(9, 120, DRAWS + 1, 1, 6, 6)
    ramp = (torch.arange(6, dtype=torch.float64) - 2.5).expand(1, 6, 6) / 10
    asked = {"flux": summaries.flux, "ramp": lambda image: summaries.projection(image, ramp)}
    found = {(f.diagnostic, f.quantity): f.p_value for f in sbc(x[:, 0], x[:, 1:] + ramp, asked, Rng([1]))}
    assert len(found) == 4
    assert found["SBC ECDF", "flux"] > 0.01 and found["SBC ECDF", "ramp"] < 0.01


def test_summaries_of_a_known_image() -> None:
    image = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    image[:, 0, 3, 5] = 4.0
    image[1, 1, 6, 2] = -1.0
    assert summaries.flux(image).tolist() == [4, 3]
    assert summaries.peak_row(image).tolist() == [3, 3] and summaries.peak_column(image).tolist() == [5, 5]
    assert summaries.pixel(image, 1, 6, 2).tolist() == [0, -1]
    assert summaries.half_light_radius(image)[0].item() == pytest.approx(math.hypot(0.5, 1.5))
    assert bool(summaries.half_light_radius(-image).isnan().all())
    assert summaries.band_power(image, 0.0, 2.0)[0].item() == pytest.approx(16 / 128)
    direction = summaries.random_direction(image, Rng([1]))
    assert direction.norm().item() == pytest.approx(1)
    assert summaries.projection(image, direction)[0].item() == pytest.approx(4 * float(direction[0, 3, 5]))
    axis = torch.arange(31, dtype=torch.float64) - 15
    round_one = torch.exp(-(axis[:, None] ** 2 / 8 + axis**2 / 18))[None, None]
    assert summaries.ellipticity(round_one, 0).item() == pytest.approx((9 - 4) / 13, abs=1e-3)
    assert summaries.ellipticity(round_one, 1).item() == pytest.approx(0, abs=1e-6)


def conjugate(objects: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit prior, unit noise, 25 pixels: truth, exact draws, prior draws, posterior mean."""
    truth = normal(10, objects, 1, 5, 5)
    mean = (truth + normal(11, *truth.shape)) / 2
    z = normal(12, objects, DRAWS, 1, 5, 5)
    return truth, mean[:, None] + z * 0.5**0.5, z, mean


def test_tarp_with_references_near_the_data_catches_the_prior_and_plain_tarp_does_not() -> None:
    truth, exact, prior, mean = conjugate(150)
    near = references_near(mean, torch.tensor([3.5], dtype=torch.float64), Rng([2]))
    blind = normal(13, *truth.shape)
    assert tarp(truth, exact, near, Rng([3])).p_value > 0.01
    assert tarp(truth, prior, blind, Rng([3])).p_value > 0.01
    caught = tarp(truth, prior, near, Rng([3]))
    assert caught.p_value < 0.001 and caught.sharpness > 1.3 * tarp(truth, exact, near, Rng([3])).sharpness


def test_the_mean_of_the_same_draws_is_no_reference() -> None:
    """The trap: a perfect sampler fails."""
    truth, exact, _, _ = conjugate(150)
    assert tarp(truth, exact, exact.mean(1), Rng([3])).p_value < 0.01


@pytest.mark.parametrize("cls", [Finding, RankFinding, TarpFinding])
def test_a_finding_is_one_line_and_comes_back_from_json(cls: type[Finding]) -> None:
    truth, exact, _, mean = conjugate(40)
    plain = exchange_test(normal(1, 30, 20), Rng([1])).finding("test", "nothing", 30, 19)
    ecdf = rank_findings(ranks(truth[:, 0, 0, 0], exact[:, :, 0, 0, 0], Rng([1])), DRAWS, "pixel", Rng([2]))[1]
    found = {Finding: plain, RankFinding: ecdf, TarpFinding: tarp(truth, exact, mean, Rng([3]))}[cls]
    assert cls.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "\n" not in str(found) and "p = " in str(found)
    with pytest.raises(DiffinvError, match="use that class"):
        cls.from_dict({**found.to_dict(), "record": "Other"})
