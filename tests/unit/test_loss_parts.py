"""The parts of the losses that an expected gradient does not show: values, what a model gets to see, draws, delegations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.denoisers import Neighbor2Neighbor
from diffinv.losses.derivative import FiniteDifference, ForwardMode
from diffinv.losses.equivariant import EquivariantImaging
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import Noise2Void, RandomHiding, Splitting
from diffinv.losses.supervised import Noise2Noise
from diffinv.losses.sure import FirstOrderSure, ShiftedSure, Sure
from diffinv.losses.unsure import Covariance, Lags, SignalDependent, Unsure, White, robust_spread
from diffinv.losses.virtual import VirtualOperators
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Diagonal, Identity
from diffinv.operators.groups import Flips, OpenShifts, Product, Shifts
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import good_data
from tests.cases.operators import draw, positive
from tests.contracts.test_losses import Toy, measured

F64 = torch.float64


def streams(rows: int, seed: int = 13) -> Rng:
    return Rng.for_draws(seed, range(rows), 1)


def white(std: float, mask: Tensor | None = None) -> Gaussian:
    return Gaussian(torch.full((1,), std, dtype=F64), mask)


VALUES: dict[str, tuple[Loss, str, bool]] = {
    "SURE, correlated": (Sure(), "gaussian_correlated", False),
    "shifted SURE, Poisson-Gaussian": (ShiftedSure(6), "poisson_gaussian", False),
    "first order, Poisson": (FirstOrderSure(), "poisson", True),
    "first order, Poisson-Gaussian": (FirstOrderSure(), "poisson_gaussian", True),
    "first order, Gamma": (FirstOrderSure(), "gamma", True),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_value_of_a_risk_estimate_is_the_risk(name: str) -> None:
    """Constants included, which no gradient shows and validation reads; first order: of an affine model."""
    loss, noise, affine = VALUES[name]
    batch, model = measured(noise, 16000), Toy(16000, affine=affine)
    with torch.no_grad():
        difference = loss(model, batch, streams(16000)) - loss.oracle(model, batch, streams(16000))
    assert abs(float(difference.mean() / difference.std())) * 16000**0.5 <= 5


class Watched(Toy):
    """Remembers the observations that it was shown."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.seen: list[Observation] = []

    def forward(self, observation: Observation) -> Tensor:
        self.seen.append(observation)
        return super().forward(observation)


PROBED: dict[str, tuple[Loss, str]] = {
    "sure": (Sure(), "gaussian"),
    "unsure": (Unsure(White().start(0.5), White()), "poisson"),
    "first_order_sure": (FirstOrderSure(), "poisson"),
    "recorrupted": (Recorrupted(0.6), "gaussian"),
}


@pytest.mark.parametrize("name", PROBED)
def test_a_model_sees_nothing_under_a_mask_not_even_a_probe(name: str) -> None:
    loss, noise = PROBED[name]
    batch, model = measured(noise, 4), Watched(4)
    loss(model, batch, streams(4))
    masked = ~good_data(batch.observation)
    assert bool(masked.any()) and model.seen
    shown = [observation.y.unflatten(0, (4, -1)).movedim(1, 0) for observation in model.seen]  # a pass may have each row twice
    assert not any(bool(y[masked].any()) for passes in shown for y in passes)


def test_a_model_is_told_the_noise_of_the_part_that_it_sees() -> None:
    batch, model = measured("gaussian", 4), Watched(4)
    Recorrupted(0.25)(model, batch, streams(4))
    good, zero = good_data(batch.observation), torch.zeros_like(batch.observation.y)
    told, whole = (o.noise.variance(zero)[good] for o in (model.seen[0], batch.observation))
    torch.testing.assert_close(told, 4 * whole)


@pytest.mark.parametrize("family", [White(), Lags(2), SignalDependent()])
def test_multipliers_start_as_white_noise_of_the_variance(family: Covariance) -> None:
    v, y = draw(2, 1, 8, 8), 5 + draw(2, 1, 8, 8, seed=1)
    torch.testing.assert_close(family(family.start(0.3), v, y).detach(), 0.3 * v)


def test_the_step_of_unsure_follows_the_spread_and_not_the_brightness() -> None:
    class Curved(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return torch.tanh(observation.y - 1e3)

    batch = MeasuredBatch(Observation(1e3 + draw(4, 1, 16, 16), Identity((1, 16, 16)), white(1.0)))
    losses = (Unsure(White().start(1.0), White(), slope) for slope in (FiniteDifference(0.05), ForwardMode()))
    near, exact = (loss(Curved(), batch, streams(4)).detach() for loss in losses)
    torch.testing.assert_close(near, exact, atol=1e-2, rtol=0)


def test_the_step_is_no_smaller_than_float32_can_tell_apart() -> None:
    """At a brightness of 10⁶ numbers are 1/16 apart; a step of 64 rounding errors leaves ½/64 of error in the slope of u = y."""

    class Copy(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return observation.y

    data = Observation(1e6 + draw(2, 1, 16, 16).float(), Identity((1, 16, 16)), Gaussian(torch.ones(1)))
    omega = torch.ones_like(data.y)
    _, along = FiniteDifference(0.05)(Copy(), data, omega, torch.ones(2))
    assert float((along - 1).abs().max()) <= 1 / 64


def test_the_step_has_the_size_of_a_share_of_the_noise_whatever_the_direction() -> None:
    batch, model = measured("poisson", 2), Watched(2)
    omega = torch.full_like(batch.observation.y, 10.0)
    FiniteDifference(0.05)(model, batch.data, omega, torch.full((2,), 2.0, dtype=F64))
    here, there = model.seen[0].y.unflatten(0, (2, 2)).unbind(1)
    step = there - here
    torch.testing.assert_close(step, torch.full_like(step, 0.1))


def test_dropout_that_sleeps_is_no_obstacle() -> None:
    batch, model = measured("gaussian", 2), Watched(2)
    model.dropout = torch.nn.Dropout(0.5)
    with pytest.raises(UnsupportedError, match="active dropout"):
        Sure()(model, batch, streams(2))
    assert bool(Sure()(model.eval(), batch, streams(2)).isfinite().all())


@pytest.mark.parametrize("kept", [0.1, 0.8])
def test_hiding_keeps_the_share_that_it_says(kept: float) -> None:
    data = Observation(draw(20, 1, 32, 32), Identity((1, 32, 32)), white(1.0))
    found = RandomHiding(kept).keep(data, streams(20)).double()
    assert abs(float(found.mean()) - kept) <= 5 * (kept * (1 - kept) / found.numel()) ** 0.5


def test_noise2void_replaces_the_share_that_it_says_and_looks_there_alone() -> None:
    batch, share = MeasuredBatch(Observation(draw(20, 1, 32, 32), Identity((1, 32, 32)), white(1.0))), 0.1

    class Copy(Watched):
        def forward(self, observation: Observation) -> Tensor:
            self.seen.append(observation)
            return observation.y

    model = Copy(1)
    loss = Noise2Void(share, 1)(model, batch, streams(20))
    error = (model.seen[0].y - batch.observation.y).flatten(1)
    changed = error != 0
    assert abs(float(changed.double().mean()) - share) <= 5 * (share * (1 - share) / changed.numel()) ** 0.5
    torch.testing.assert_close(loss, error.square().sum(1) / changed.sum(1))


def test_noise2void_draws_every_neighbour_in_reach_as_often_and_no_other() -> None:
    rows = 4000
    y = torch.arange(49, dtype=F64).reshape(1, 1, 7, 7).expand(rows, 1, 7, 7)
    found = Noise2Void(0.5, 1)._neighbours(y, streams(rows))[:, 0, 3, 3].long()
    number = torch.bincount(found, minlength=49).reshape(7, 7)
    near = number[2:5, 2:5].flatten()
    assert int(near.sum()) == rows and int(near[4]) == 0
    around = torch.cat([near[:4], near[5:]])
    assert float((around - rows / 8).abs().max()) <= 5 * (rows / 8 * 7 / 8) ** 0.5


def test_the_pixels_of_neighbor2neighbor_are_side_by_side_in_their_cell() -> None:
    """Along a row or a column, each of the eight ordered pairs as often as the others."""
    first, second = Neighbor2Neighbor._neighbours(draw(200, 1, 8, 8), streams(200))
    apart = (first // 2 - second // 2).abs() + (first % 2 - second % 2).abs()
    assert bool((apart == 1).all())
    number = torch.bincount((4 * first + second).flatten(), minlength=16)
    total = first.numel()
    assert int((number > 0).sum()) == 8
    assert float((number[number > 0] - total / 8).abs().max()) <= 5 * (total / 8 * 7 / 8) ** 0.5


def test_neighbours_of_masked_pixels_are_refused() -> None:
    mask = draw(2, 1, 4, 4) > -0.5
    data = Observation(draw(2, 1, 4, 4), Identity((1, 4, 4)), white(1.0, mask))
    with pytest.raises(UnsupportedError, match="without masks"):
        Neighbor2Neighbor(1.0).check(MeasuredBatch(data))


def test_the_second_exposure_has_an_operator_and_a_mask_of_its_own() -> None:
    shape, x = (1, 4, 4), draw(2, 1, 4, 4, seed=3)
    masks = [draw(2, *shape, seed=s) > 0 for s in (4, 5)]
    first, second = (
        Observation(d * x, Diagonal(d), white(1.0, mask)) for d, mask in zip((positive(2, *shape), 2 * x), masks, strict=True)
    )
    batch, model = MeasuredBatch(first, x, second), Toy(2)
    error = (second.operator(model(batch.data)) - second.y).where(masks[1], 0.0)
    expected = error.square().flatten(1).sum(1) / masks[1].flatten(1).sum(1)
    for value in (Noise2Noise()(model, batch, streams(2)), Noise2Noise().oracle(model, batch, streams(2))):
        torch.testing.assert_close(value, expected)


def test_a_virtual_operator_sees_the_moved_image_as_the_operator_sees_the_image() -> None:
    """A T_g T_g⁻¹x = A x, with shifts, which are not their own inverse."""
    x, d = draw(3, 1, 5, 7), positive(1, 1, 5, 7)
    batch = MeasuredBatch(Observation(d * x, Diagonal(d), white(0.1)), x)
    loss = VirtualOperators(Sure(), Shifts(2))
    seen = loss._seen(batch, loss._draw(batch, streams(3)))
    torch.testing.assert_close(seen.observation.operator(seen.x), d * x)
    assert not torch.equal(seen.x, x) and torch.equal(seen.observation.y, batch.observation.y)


def test_one_part_of_a_product_that_loses_light_is_enough_to_refuse_virtual_operators() -> None:
    x = draw(2, 1, 4, 4)
    batch = MeasuredBatch(Observation(x, Identity((1, 4, 4)), white(0.1)), x)
    VirtualOperators(Sure(), Product((Flips(), Shifts(1)))).check(batch)
    with pytest.raises(UnsupportedError, match="no exact inverse"):
        VirtualOperators(Sure(), Product((Flips(), OpenShifts(1)))).check(batch)


WRAPPED: dict[str, Callable[[Loss], Loss]] = {
    "virtual operators": lambda loss: VirtualOperators(loss, Flips()),
    "splitting": lambda loss: Splitting(RandomHiding(0.5), loss),
    "a sum": lambda loss: Sure(ForwardMode()) + loss,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_loss_of_a_loss_hands_on_what_that_is(name: str) -> None:
    wrap, eta = WRAPPED[name], White().start(0.3)
    assert wrap(Recorrupted(0.5)).unbiased and not wrap(EquivariantImaging(Flips(), noisy=True)).unbiased
    assert wrap(Sure(FiniteDifference(0.1))).differences and not wrap(Recorrupted(0.5)).differences
    assert wrap(Unsure(eta, White())).multipliers == (eta,) and wrap(Recorrupted(0.5)).multipliers == ()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_loss_of_a_loss_refuses_what_that_refuses(name: str) -> None:
    batch = measured("poisson", 2)
    with pytest.raises(UnsupportedError, match="SURE: Poisson is not Gaussian"):
        WRAPPED[name](Sure()).check(batch)


def test_a_loss_that_hides_next_to_nothing_is_refused() -> None:
    batch = MeasuredBatch(Observation(draw(2, 1, 8, 8), Identity((1, 8, 8)), white(1.0)))
    Splitting(RandomHiding(0.9)).check(batch)
    with pytest.raises(UnsupportedError, match=r"hides 0\.0064 of the 64 data of a row"):
        Splitting(RandomHiding(0.9999)).check(batch)


@pytest.mark.parametrize("loss", [Recorrupted(0.5), ShiftedSure(2), FirstOrderSure()])
def test_negative_intensities_are_refused_as_speckle(loss: Loss) -> None:
    one, mask = torch.ones(1, dtype=F64), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 0, 0] = False
    y = draw(2, 1, 4, 4).abs()
    y[:, 0, 0, 0] = -1
    batch = MeasuredBatch(Observation(y, Identity((1, 4, 4)), Gamma(4 * one, 1e-3 * one, mask)))
    loss.check(batch)
    y = y.clone()
    y[1, 0, 2, 2] = -0.25
    with pytest.raises(DiffinvError, match=r"Gamma: an intensity of -0\.25"):
        loss.check(replace(batch, observation=replace(batch.observation, y=y)))


def test_shifted_sure_wants_whole_counts() -> None:
    one = torch.ones(1, dtype=F64)
    counts = torch.arange(32, dtype=F64).reshape(2, 1, 4, 4)
    data = Observation(counts / 50, Identity((1, 4, 4)), Poisson(50 * one, 0 * one))
    ShiftedSure(2).check(MeasuredBatch(data))
    with pytest.raises(DiffinvError, match="whole counts"):
        ShiftedSure(2).check(MeasuredBatch(replace(data, noise=Poisson(37 * one, 0 * one))))


def test_the_spread_of_masked_data_is_that_of_the_good_ones() -> None:
    y = Rng.for_draws(9, range(4), 1).normal(torch.zeros(4, 1, 32, 32))
    good = Rng.for_draws(10, range(4), 1).uniform(torch.zeros(4, 1, 32, 32)) < 0.25
    good[3] = False
    found = robust_spread(torch.where(good, y, 0.0), good)
    assert float((found[:3] - 1).abs().max()) < 0.2 and float(found[3]) == 0
