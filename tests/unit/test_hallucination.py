"""Range and null parts, informativeness, distances of sets, and features that only the prior has seen."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.groups import OpenShifts, QuarterTurns, Shifts
from diffinv.operators.sampling import Mask
from diffinv.priors.analytic import FourierGaussianPrior
from diffinv.reconstructors.base import Reconstructor
from diffinv.uncertainty.equivariant import equivariant_bootstrap
from diffinv.uncertainty.hallucination import (
    hallucination_index,
    hellinger,
    informativeness,
    null_part,
    prior_swap,
    prior_swap_finding,
    range_part,
    swap_shift,
    wiener_gain,
)
from diffinv.uncertainty.prior_driven import Feature, Rule, prior_driven

SIZE = 16


def normal(seed: int, *shape: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def frequency() -> Tensor:
    line = torch.fft.fftfreq(SIZE, dtype=torch.float64)
    return torch.hypot(line[:, None], line)


def gain() -> Tensor:
    transfer = torch.exp(-20 * frequency() ** 2) * (frequency() < 0.3)
    return wiener_gain(transfer, torch.ones(SIZE, SIZE, dtype=torch.float64), torch.tensor(0.01))


def test_range_and_null_parts_add_and_are_what_the_data_tell() -> None:
    """A frequency beyond the cut-off is all null, a constant almost all range."""
    x = normal(1, 2, 1, SIZE, SIZE)
    torch.testing.assert_close(range_part(x, gain()) + null_part(x, gain()), x)
    checker = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)).remainder(2).double() * 2 - 1
    torch.testing.assert_close(null_part(checker, gain()), checker)
    torch.testing.assert_close(range_part(torch.ones(SIZE, SIZE), gain()), torch.full((SIZE, SIZE), 1 / 1.01))
    with pytest.raises(DiffinvError, match="variance of the data's noise"):
        wiener_gain(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(1))


def test_the_gain_is_the_share_of_the_prior_variance_that_the_data_remove() -> None:
    """1 − Var_post/Var_prior a frequency, so that informativeness is −½ ln(1 − g)."""
    g = gain()
    posterior = 1 - g
    torch.testing.assert_close(informativeness(torch.ones_like(g), posterior), -0.5 * torch.log1p(-g))
    assert float(informativeness(torch.ones(1), torch.zeros(1))) < math.inf


def test_hellinger_is_the_closed_form_and_its_limits() -> None:
    """Unit Gaussians a distance d apart: H² = 1 − exp(−d²/8); widths 1 and s: 1 − √(2s/(1 + s²))."""
    x = normal(2, 200000, 1)
    assert float(hellinger(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(hellinger(x, x + 1)) ** 2 == pytest.approx(1 - math.exp(-1 / 8), abs=2e-3)
    assert float(hellinger(x, 3 * x)) ** 2 == pytest.approx(1 - math.sqrt(6 / 10), abs=2e-3)
    assert float(hellinger(x, x + 50)) == pytest.approx(1)
    two = normal(3, 5, 400, 2)
    torch.testing.assert_close(hellinger(two, two + 1)[2], hellinger(two[2], two[2] + 1))
    with pytest.raises(ShapeError, match="give more"):
        hellinger(two[:, :2], two)


@pytest.mark.parametrize("function", ["index", "swap"])
def test_sets_of_one_distribution_do_not_fire_and_others_do(function: str) -> None:
    """150 pairs: false alarms of 5 % within the binomial's 4.5 σ; then a shift of 1 σ and, for the index, a width."""
    count, members = 150, 40
    first, second = normal(4, count, members, 1, 2, 2), normal(5, count, members, 1, 2, 2)

    def p_values(a: Tensor, b: Tensor) -> Tensor:
        if function == "swap":
            return prior_swap(a, b, Rng([1]), replicates=199).p_value
        return hallucination_index(a.flatten(2), b.flatten(2), Rng([1]), replicates=99).p_value

    assert int((p_values(first, second) <= 0.05).sum()) <= 150 * 0.05 + 4.5 * math.sqrt(150 * 0.0475)
    assert float((p_values(first, second + 1) <= 0.05).double().mean()) > 0.95
    if function == "index":
        assert float((p_values(first, 2 * second) <= 0.05).double().mean()) > 0.95


def test_a_pixel_that_is_zero_in_all_draws_does_not_make_the_swap_significant() -> None:
    first, second = normal(70, 40, 1, 4, 4), normal(71, 40, 1, 4, 4)
    plain = prior_swap(first, second, Rng([1]), replicates=199)
    first[..., 0, 0] = second[..., 0, 0] = 0.0
    masked = prior_swap(first, second, Rng([1]), replicates=199)
    assert math.isfinite(float(masked.statistic)) and float(masked.p_value) > 0.05 and float(plain.p_value) > 0.05


def test_the_swap_is_measured_in_posterior_sigmas() -> None:
    first = normal(6, 60, 1, SIZE, SIZE) * 2
    second = first.flip(0) + 4 * torch.eye(SIZE, dtype=torch.float64)
    shift = swap_shift(first, second)
    assert shift.shape == (1, SIZE, SIZE) and float(shift.diagonal(dim1=-2, dim2=-1).mean()) == pytest.approx(-2, rel=0.1)
    found = prior_swap_finding(first, second, Rng([1]))
    assert found.p_value <= 0.001 and found.draws == 60


def feature(part: str, height: float) -> tuple[Tensor, Tensor]:
    """Draws of unit spread a pixel about 0 (60, H, W), and this part of a feature in the middle, of some height."""
    line = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
    width = {"range": 2.0, "null": 0.5}[part]
    blob = torch.exp(-(line[:, None] ** 2 + line**2) / (2 * width**2))
    shape = {"range": range_part, "null": null_part}[part](blob, gain())
    return normal(7, 60, SIZE, SIZE), height * shape / shape.max()


def features(draws: Tensor, swapped: Tensor) -> tuple[Feature, ...]:
    return prior_driven(draws, swapped, lambda x: null_part(x, gain()), Rule(smooth=2.0))[1]


def test_a_feature_of_the_null_space_that_moves_under_the_swap_is_flagged() -> None:
    draws, painted = feature("null", 8.0)
    labels, found = prior_driven(draws + painted, draws.mean(0), lambda x: null_part(x, gain()), Rule(smooth=2.0))
    best = found[0]
    assert best.prior_driven and abs(best.row - 8) <= 1 and abs(best.column - 8) <= 1
    assert best.signal_to_noise > 3 and best.null_share > 0.5 and abs(best.shift) > 3
    assert int((labels == best.label).sum()) == best.pixels
    assert "PRIOR_DRIVEN" in str(best) and Feature.from_dict(json.loads(json.dumps(best.to_dict()))) == best


def test_each_of_the_three_conditions_is_needed() -> None:
    draws, painted = feature("null", 8.0)
    assert not any(f.prior_driven for f in features(draws + painted, (draws + painted).mean(0)))
    assert not any(f.prior_driven for f in features(draws + 0.2 * painted, draws.mean(0)))
    draws, painted = feature("range", 8.0)
    found = features(draws + painted, draws.mean(0))
    assert found[0].signal_to_noise > 3 and abs(found[0].shift) > 3
    assert not found[0].prior_driven and found[0].null_share < 0.5


def test_draws_without_features_have_none() -> None:
    flat = torch.cat([normal(8, 40, SIZE, SIZE), -normal(8, 40, SIZE, SIZE)])
    labels, found = prior_driven(flat, torch.zeros(SIZE, SIZE), lambda x: null_part(x, gain()), Rule(smooth=2.0))
    assert found == () and int(labels.max()) == 0
    with pytest.raises(DiffinvError, match="at least three"):
        features(flat[:2], flat[0])


@dataclass(eq=False)
class Wiener(Reconstructor):
    """The posterior mean under the prior, masked pixels included, by dense algebra."""

    covariance: Tensor

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, observation: Observation) -> Tensor:
        mask = observation.operator.mask[0].flatten().double()
        gain = self.covariance * mask
        matrix = mask[:, None] * gain + 0.04 * torch.eye(len(mask), dtype=gain.dtype)
        solved = torch.linalg.solve(matrix, (observation.y.flatten(1) * mask).T)
        return (gain @ solved).T.reshape(observation.y.shape)


def inpainting(count: int) -> tuple[Tensor, Observation, Wiener]:
    """A quarter of the image is not seen; turns by 90 degrees move the hole."""
    spectrum = torch.exp(-40 * frequency()[::2, ::2] ** 2)[None, None]
    prior = FourierGaussianPrior(torch.zeros(1, 1, 8, 8, dtype=torch.float64), spectrum / spectrum.mean())
    truth = prior.sample(torch.empty(count, 1, 8, 8, dtype=torch.float64), Rng(range(count)))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :4] = False
    data = Observation(mask * (truth + 0.2 * normal(9, *truth.shape)), Mask(mask), Gaussian(torch.tensor([0.2]).double()))
    eye = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    covariance = torch.fft.ifft2(prior.spectrum * torch.fft.fft2(eye)).real.flatten(1)
    return truth, data, Wiener(covariance)


def test_the_group_sees_the_null_space_that_the_plain_bootstrap_does_not() -> None:
    """Of the whole error: a group of one element is the plain bootstrap, whose hidden quarter was smooth already."""
    truth, data, model = inpainting(40)
    error = (truth - model(data)).flatten(1).norm(dim=1).mean()
    groups = {"turned": QuarterTurns(), "plain": Shifts(0)}
    found = {name: equivariant_bootstrap(model, data, group, Rng(range(40)), replicas=39) for name, group in groups.items()}
    share = {name: float(bootstrap.distances.mean() / error) for name, bootstrap in found.items()}
    assert found["turned"].replicas.shape == (40, 39, 1, 8, 8) and found["turned"].std.shape == truth.shape
    assert 1.1 * share["plain"] < share["turned"] < 1.05


def test_the_radius_is_a_quantile_of_the_distances_and_the_check_a_rank_among_them() -> None:
    truth, data, model = inpainting(6)
    found = equivariant_bootstrap(model, data, QuarterTurns(), Rng(range(6)), replicas=19)
    torch.testing.assert_close(found.radius(0.95), found.distances.amax(1))
    distance = (truth - found.estimate).flatten(1).norm(dim=1)
    expected = (1 + (found.distances >= distance[:, None]).sum(1)) / 20
    assert [f.p_value for f in found.check(truth)] == pytest.approx(expected.tolist())
    assert all(f.p_value == 1 / 20 and "\n" not in str(f) for f in found.check(truth + 100))
    with pytest.raises(DiffinvError, match="at least 39"):
        found.radius(0.975)


def test_a_group_that_loses_light_is_refused() -> None:
    _, data, model = inpainting(2)
    with pytest.raises(DiffinvError, match="loses light"):
        equivariant_bootstrap(model, data, OpenShifts(3), Rng(range(2)), replicas=2)
