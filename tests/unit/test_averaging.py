"""Averages at test time, and predictions of left-out data: closed forms, reproducibility, and what none may see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Diagonal
from diffinv.operators.groups import Flips, Group, Shifts
from diffinv.reconstructors.averaging import EquivariantAverage, LeaveOut, RecorruptedAverage, SplittingAverage
from diffinv.reconstructors.backprojected import BackProjected
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import whole
from tests.cases.guidance import SHAPE, blur, kernels
from tests.cases.operators import draw, positive
from tests.contracts.test_guidance import levels
from tests.toys import counts, electrons, white
from tests.unit.test_reconstructors import EYE, half, hide, masked, small_net


class Repeat(Reconstructor):
    """The data themselves, A = I."""

    def forward(self, observation: Observation) -> Tensor:
        return whole(observation).y


def test_the_average_over_recorruptions_of_a_linear_model_is_the_model_up_to_the_noise_of_the_mean() -> None:
    """f(y₁) = y + τω: the mean of 400 draws deviates by σ/√400 a pixel; 5 standard deviations over 32 pixels."""
    data = white(EYE)
    found = RecorruptedAverage(Repeat(), share=0.5, draws=400, seed=1)(data)
    z = (found - data.y) / data.noise.std.reshape(2, 1, 1, 1) * 20
    assert 0.5 < float(z.std()) < 1.5
    assert float(z.abs().max()) < 5


def test_the_average_over_recorruptions_thins_counts() -> None:
    """E[y₁ | y] = y for binomial thinning; Var = y (1 − α)/(α g) for no background."""
    data = replace(counts(EYE), noise=replace(counts(EYE).noise, background=levels(0.0, 0.0), gain=levels(1.0, 1.0)))
    found = RecorruptedAverage(Repeat(), share=0.5, draws=400, seed=1)(data)
    assert float(((found - data.y).abs() - 5 * data.y.sqrt() / 20).max()) <= 1e-12


def test_an_average_is_reproducible_and_its_seed_matters() -> None:
    data = white(blur(kernels()))
    average = lambda seed: RecorruptedAverage(BackProjected(small_net()), share=0.5, draws=2, seed=seed)(data)
    assert torch.equal(average(3), average(3))
    assert not torch.equal(average(3), average(4))


def test_the_average_over_splittings_is_the_mean_over_the_masks() -> None:
    """f = the data with 0 where hidden: the mean is y times the share of draws that show the pixel, in steps of 1/8."""
    data = white(EYE)
    found = SplittingAverage(Repeat(), hide=hide, draws=8, seed=2)(data) / data.y
    torch.testing.assert_close(found * 8, (found * 8).round(), rtol=0, atol=1e-12)
    assert len(found[0].flatten().mul(8).round().unique()) > 2


def test_noise_that_does_not_split_is_refused_by_the_average() -> None:
    with pytest.raises(DiffinvError, match="thinned"):
        half(BackProjected(small_net()))(electrons())


def test_the_equivariant_average_of_every_element_commutes_with_the_group() -> None:
    """Data of T x are those of x through the virtual operator: the mean over all four flips turns with the image."""
    x, turn = draw(2, *SHAPE), Flips().draw(Rng([3, 5]), SHAPE, draw(2, *SHAPE))
    average = EquivariantAverage(BackProjected(small_net()), group=Flips(), draws=400, seed=2)
    data = Observation(x, EYE, Gaussian(torch.full((1,), 0.1, dtype=torch.float64)))
    turned = average(replace(data, y=turn(x)))
    scatter = 5 / 400**0.5 * float(BackProjected(small_net())(data).detach().abs().max())
    torch.testing.assert_close(turned, turn(average(data)), rtol=0, atol=scatter)
    plain = BackProjected(small_net())
    assert float((plain(replace(data, y=turn(x))) - turn(plain(data))).detach().abs().max()) > scatter


@pytest.mark.parametrize("group", [None, Shifts(8)])
def test_a_left_out_prediction_does_not_see_its_own_datum(group: Group | None) -> None:
    data = masked(white(EYE), 0.0)
    model = LeaveOut(BackProjected(nn.Identity()), folds=4, seed=3, group=group)
    seen = data.noise.mask
    assert torch.equal(model(data)[seen], torch.zeros_like(data.y)[seen])
    slope = torch.autograd.functional.jacobian(
        lambda y: LeaveOut(BackProjected(small_net()), folds=4, seed=3)(replace(data, y=y)), data.y
    )
    assert float(slope.reshape(data.y.numel(), -1).diagonal().abs().max()) == 0.0
    assert float(slope.abs().max()) > 0


def test_leaving_out_wants_one_pixel_a_datum() -> None:
    with pytest.raises(UnsupportedError, match="mixes pixels"):
        LeaveOut(BackProjected(small_net()), folds=3, seed=4)(white(blur(kernels())))


def test_what_nobody_saw_is_the_mean_over_the_folds_and_what_was_seen_is_of_its_own() -> None:
    """A model that counts its data: Σ_n (total − |J_n|)/N = total (1 − 1/N) where A is 0 or the datum is masked."""

    class Count(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return observation.noise.mask.double().flatten(1).sum(1)[:, None, None, None].expand_as(observation.y)

    mask, d = draw(2, 1, 5, 5) > -1, positive(2, 1, 5, 5).where(draw(2, 1, 5, 5, seed=1) > -0.5, 0.0)
    data = Observation(draw(2, 1, 5, 5), Diagonal(d), Gaussian(torch.ones(1, dtype=torch.float64), mask))
    found, folds = LeaveOut(Count(), folds=4, seed=2)(data), 4
    total = mask.double().flatten(1).sum(1)[:, None, None, None].expand_as(found)
    unseen = ~mask | (d == 0)
    assert bool((mask & (d == 0)).any()) and bool((~mask & (d != 0)).any())
    torch.testing.assert_close(found[unseen], (total * (1 - 1 / folds))[unseen])
    assert bool((found[~unseen] == found[~unseen].round()).all()) and len(set(found[~unseen].tolist())) > folds
