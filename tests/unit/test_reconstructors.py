"""Reconstructors for any operator: their closed forms, their gradients, and what no row and no masked datum may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import ConfigError, UnsupportedError
from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Diagonal, Identity, Scaled, compose
from diffinv.operators.base import Operator
from diffinv.operators.detector import Arcsinh
from diffinv.operators.groups import Shifts
from diffinv.operators.sampling import Mask, SumPool
from diffinv.reconstructors.averaging import EquivariantAverage, LeaveOut, RecorruptedAverage, SplittingAverage
from diffinv.reconstructors.backprojected import (
    BackProjected,
    BackProjection,
    LinearInverse,
    NormalisedConvolution,
    RegularisedLeastSquares,
    largest_eigenvalue,
    plain_unet,
)
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.blind_spot import BlindSpot, BlindSpotNetwork
from diffinv.reconstructors.tweedie import ScoreReconstructor
from diffinv.reconstructors.unrolled import Unrolled
from tests.cases.guidance import SHAPE, SIZE, blur, kernels
from tests.cases.operators import draw
from tests.contracts.test_guidance import levels
from tests.toys import correlated, counts, electrons, periodic, white

EYE = Identity(SHAPE)


def small_net(*, seed: int = 1) -> nn.Module:
    """A convolution and a bounded non-linearity, all weights nowhere zero."""
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double()
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(0.3 * draw(*parameter.shape, seed=seed + number))
    return network


def masked(observation: Observation, filling: float) -> Observation:
    """The first two columns of the data masked, and `filling` written there."""
    mask = torch.ones_like(observation.y, dtype=torch.bool)
    mask[..., :2] = False
    return replace(observation, y=observation.y.where(mask, filling), noise=replace(observation.noise, mask=mask))


def hide(observation: Observation, rng: Rng) -> Observation:
    """Half of the data masked at random."""
    return replace(observation, noise=replace(observation.noise, mask=rng.uniform(observation.y) < 0.5))


def half(model: Reconstructor) -> RecorruptedAverage:
    return RecorruptedAverage(model, share=0.5, draws=3, seed=4)


MODELS: dict[str, Callable[[], Reconstructor]] = {
    "back_projected": lambda: BackProjected(small_net()),
    "residual": lambda: BackProjected(small_net(), residual=True),
    "least_squares": lambda: BackProjected(small_net(), inverse=RegularisedLeastSquares(8, 0.1)),
    "normalised_convolution": lambda: BackProjected(small_net(), inverse=NormalisedConvolution(1.0)),
    "unrolled": lambda: Unrolled(small_net(), iterations=3),
    "unrolled_from_zero": lambda: Unrolled(small_net(), iterations=2, start=None),
    "blind_spot": lambda: BlindSpot(BlindSpotNetwork(1, width=3, depth=2).double()),
    "score": lambda: ScoreReconstructor(small_net()),
    "recorrupted": lambda: half(BackProjected(small_net())),
    "splitting": lambda: SplittingAverage(BackProjected(small_net()), hide=hide, draws=3, seed=4),
    "equivariant": lambda: EquivariantAverage(BackProjected(small_net()), group=Shifts(8), draws=3, seed=4),
    "left_out": lambda: LeaveOut(BackProjected(small_net()), folds=3, seed=4),
}
LOCAL = {"blind_spot", "score", "left_out"}  # A = s I only
INVERSES: dict[str, LinearInverse] = {"adjoint": BackProjection(), "least_squares": RegularisedLeastSquares(6, 0.05)}


def operator_of(name: str) -> Operator:
    return Scaled(levels(2.0, -0.5), EYE) if name in LOCAL else compose(SumPool(SHAPE, 2), blur(kernels()))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    model, data = MODELS[name](), white(operator_of(name))
    together = model(data)
    assert together.shape == (2, *SHAPE)
    for row in (0, 1):
        torch.testing.assert_close(model(data.select([row])), together[[row]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_under_the_mask_does_not_matter(name: str) -> None:
    model, data = MODELS[name](), white(Scaled(levels(2.0, -0.5), EYE))
    found = [model(masked(data, filling)) for filling in (0.0, 7.0, torch.nan, torch.inf)]
    assert bool(found[0].isfinite().all())
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_are_finite_beside_bad_data(name: str) -> None:
    model, data = MODELS[name](), masked(white(Scaled(levels(2.0, -0.5), EYE)), torch.nan)
    model(data).pow(2).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_through_the_data_is_the_finite_difference(name: str) -> None:
    """What SURE needs of a model; central differences err by h² f‴."""
    model, data, along = MODELS[name](), white(operator_of(name)), draw(2, *operator_of(name).out_shape, seed=8)
    f = lambda y: model(replace(data, y=y))
    slope = torch.func.jvp(f, (data.y,), (along,))[1]
    torch.testing.assert_close(slope, (f(data.y + 1e-4 * along) - f(data.y - 1e-4 * along)) / 2e-4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_one_array_of_data_serves_rows_with_different_noise(name: str) -> None:
    model, data = MODELS[name](), white(operator_of(name))
    shared = replace(data, y=data.y[:1])
    torch.testing.assert_close(model(shared), model(replace(data, y=data.y[[0, 0]])), rtol=0, atol=0)


def test_the_identity_gives_the_network_of_the_data() -> None:
    network, data = small_net(), white(EYE)
    torch.testing.assert_close(BackProjected(network)(data), network(data.y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(BackProjected(network, residual=True)(data), data.y + network(data.y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", INVERSES)
def test_a_linear_inverse_is_linear_in_the_data_and_does_not_see_the_unit_of_the_operator(name: str) -> None:
    inverse, data, other = INVERSES[name], white(blur(kernels())), draw(2, *SHAPE, seed=8)
    at = lambda y: inverse(replace(data, y=y))
    torch.testing.assert_close(at(3 * data.y - other), 3 * at(data.y) - at(other), rtol=1e-12, atol=1e-12)
    scale = levels(1e3, 1e-3)
    brighter = Observation(data.y * scale.reshape(2, 1, 1, 1), Scaled(scale, data.operator), data.noise)
    torch.testing.assert_close(inverse(brighter), inverse(data), rtol=1e-9, atol=1e-9)


def test_a_masked_datum_does_not_set_the_scale_of_the_back_projection() -> None:
    """A = diag(5, 5, 2, …, 2) with the fives masked: λ = 4 and x₀ = 2y/4."""
    d = torch.full((1, *SHAPE), 2.0, dtype=torch.float64)
    d[..., :2] = 5.0
    data = masked(white(Diagonal(d)), torch.nan)
    expected = torch.where(data.noise.mask, data.y / 2, 0.0)
    torch.testing.assert_close(BackProjection()(data), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", [blur(kernels()), Diagonal(draw(2, *SHAPE, seed=5)), SumPool(SHAPE, 2)])
def test_least_squares_converges_to_the_ridge_solution(operator: Operator) -> None:
    damping = 0.02
    std = 0.1 + draw(2, *operator.out_shape, seed=6).abs()
    data = Observation(draw(2, *operator.out_shape, seed=7), operator, Gaussian(std))
    found = RegularisedLeastSquares(200, damping)(data)
    strongest = largest_eigenvalue(data.fisher(found), found)
    for row in (0, 1):
        one = data.select([row])
        matrix = dense(one.operator.apply, torch.zeros(1, *SHAPE, dtype=torch.float64)) / std[row].flatten()[:, None]
        normal = matrix.T @ matrix + damping * strongest[row] * torch.eye(SIZE, dtype=torch.float64)
        exact = torch.linalg.solve(normal, matrix.T @ (data.y[row] / std[row]).flatten())
        torch.testing.assert_close(found[row].flatten(), exact, rtol=1e-9, atol=1e-9)


def test_chebyshev_holds_where_the_power_method_falls_short() -> None:
    """A dense spectrum on [0, 1] with its top in a few pixels: an iteration beyond its interval would grow without bound."""
    d = torch.linspace(0, 1, 4096, dtype=torch.float64).sqrt().reshape(1, 1, 64, 64)
    data = Observation(draw(1, 1, 64, 64, seed=3), Diagonal(d), Gaussian(levels(1.0)))
    value = largest_eigenvalue(data.fisher(d), d)
    assert 0.8 < float(value) <= 1 + 1e-12
    exact = d * data.y / (d**2 + 0.01 * value)
    torch.testing.assert_close(RegularisedLeastSquares(300, 0.01)(data), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [lambda: white(blur(kernels())), lambda: correlated(periodic())])
def test_unrolled_with_the_identity_converges_to_weighted_least_squares(make: Callable[[], Observation]) -> None:
    """For square A of full rank the least-squares solution solves A x = y: error (1 − 1/κ)ᴷ."""
    operator = Diagonal(1 + draw(2, *SHAPE, seed=5).abs())
    data = replace(make(), operator=operator)
    found = Unrolled(nn.Identity(), iterations=4000, step=1.8, start=None)(data)
    torch.testing.assert_close(found, data.y / operator.d, rtol=1e-7, atol=1e-7)


def test_unrolled_with_a_shrinking_network_converges_to_the_gaussian_posterior_mean() -> None:
    """The fixed point of x = c (x + t s/λ) solves (t F/λ + (1/c − 1)) x = t AᵀPy/λ: the MAP of N(0, t/(λ (1/c − 1)) I)."""

    class Shrink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.8 * x

    data = masked(white(blur(kernels())), torch.nan)
    found = Unrolled(Shrink(), iterations=200, step=1.0)(data).detach()
    zero = torch.zeros_like(found)
    strongest = largest_eigenvalue(data.fisher(zero), zero)
    for row in (0, 1):
        one = data.select([row])
        fisher = dense(lambda v, one=one: one.fisher(v)(v), zero[:1])
        ridge = fisher + 0.25 * strongest[row] * torch.eye(SIZE, dtype=torch.float64)
        exact = torch.linalg.solve(ridge, one.score(zero[:1]).flatten())
        torch.testing.assert_close(found[row].flatten(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("data", [counts, electrons, lambda: white(compose(Arcsinh(SHAPE, levels(0.4, 1.0)), blur(kernels())))])
def test_unrolled_climbs_the_likelihood_of_any_noise_and_of_a_non_linear_operator(data: Callable[[], Observation]) -> None:
    observation = data()
    values = [
        observation.log_prob(Unrolled(nn.Identity(), iterations=k, step=0.5, start=None)(observation).detach())
        for k in (1, 4, 16, 64)
    ]
    assert all(bool((after > before).all()) for before, after in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("data", [counts, electrons, lambda: white(compose(Arcsinh(SHAPE, levels(0.4, 1.0)), blur(kernels())))])
def test_forward_mode_follows_the_step_where_the_curvature_depends_on_the_image(data: Callable[[], Observation]) -> None:
    """With the curvature taken for a constant the slope is wrong by a tenth; the power method's vector is good to 1e-3."""
    observation = data()
    start = None if observation.operator.linearize(observation.y) is not observation.operator else BackProjection()
    model, along = Unrolled(nn.Identity(), iterations=3, start=start), draw(2, *SHAPE, seed=8)
    f = lambda y: model(replace(observation, y=y)).detach()
    slope = torch.func.jvp(lambda y: model(replace(observation, y=y)), (observation.y,), (along,))[1].detach()
    difference = (f(observation.y + 1e-5 * along) - f(observation.y - 1e-5 * along)) / 2e-5
    assert float((slope - difference).norm()) < 1e-4 * float(difference.norm())


def test_each_step_is_scaled_by_the_curvature_where_it_stands() -> None:
    data = counts()
    x = BackProjection()(data)
    for _ in range(2):
        x = x + 0.5 * data.score(x) / largest_eigenvalue(data.fisher(x), x).reshape(2, 1, 1, 1)
    found = Unrolled(nn.Identity(), iterations=2, step=0.5)(data).detach()
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)  # the step is a float32 parameter


def test_a_residual_network_that_gives_zero_leaves_gradient_descent() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    data = white(blur(kernels()))
    found, plain = Unrolled(Nothing(), iterations=3, residual=True)(data), Unrolled(nn.Identity(), iterations=3)(data)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


def test_steps_start_as_stated_and_stay_positive() -> None:
    model = Unrolled(nn.Identity(), iterations=2, step=0.7)
    torch.testing.assert_close(model.steps, torch.tensor([0.7, 0.7]))
    model.raw_steps.data.fill_(-30.0)
    assert bool((model.steps > 0).all())


def test_a_list_of_networks_gives_each_step_its_own() -> None:
    class Add(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x + self.value

    data = white(EYE)
    found = Unrolled(nn.ModuleList([Add(1.0), Add(2.0)]), iterations=2)(data)
    assert bool((found == 2).all())


def test_a_plain_unet_starts_at_zero_and_keeps_the_shape() -> None:
    network = plain_unet(2, (8, 16), (1, 1))
    assert torch.equal(network(torch.ones(3, 2, 8, 12)), torch.zeros(3, 2, 8, 12))


@pytest.mark.parametrize("name", ["back_projected", "least_squares", "unrolled"])
def test_a_non_linear_operator_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"Arcsinh is not linear.*start=None") as error:
        MODELS[name]()(white(Arcsinh(SHAPE, levels(0.4, 1.0))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RegularisedLeastSquares(0, 0.1), "use BackProjection"),
        (lambda: BackProjection(0.0), "largest must be > 0"),
        (lambda: NormalisedConvolution(0.0), "width must be > 0"),
        (lambda: LeaveOut(small_net(), folds=1, seed=0), "folds must be ≥ 2"),
        (lambda: RegularisedLeastSquares(3, 0.0), "got 3 and 0.0"),
        (lambda: Unrolled(nn.Identity(), iterations=0), "must be > 0"),
        (lambda: Unrolled(nn.Identity(), iterations=2, step=-1.0), "must be > 0"),
        (lambda: Unrolled(nn.ModuleList([nn.Identity()]), iterations=2), "1 networks for 2 iterations"),
        (lambda: half(nn.Identity()).__class__(nn.Identity(), share=0.5, draws=0, seed=1), "draws must be ≥ 1"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_row_without_any_good_datum_gives_the_network_of_zero() -> None:
    data = white(blur(kernels()))
    mask = torch.ones_like(data.y, dtype=torch.bool)
    mask[1] = False
    network = small_net()
    found = BackProjected(network)(replace(data, noise=replace(data.noise, mask=mask)))
    torch.testing.assert_close(found[1], network(torch.zeros(1, *SHAPE, dtype=torch.float64))[0])


def test_normalised_convolution_keeps_what_was_seen_and_fills_gaps_from_their_neighbours() -> None:
    x = 3.0 + 0 * draw(2, *SHAPE)
    x[..., 0, 0] = 5.0
    gaps = torch.ones_like(x, dtype=torch.bool)
    gaps[..., 1, 1] = gaps[..., -1, -1] = False
    noise = Gaussian(torch.full((1,), 0.1, dtype=torch.float64))
    for operator in (Mask(gaps), compose(Mask(gaps), Shifts(2).draw(Rng([1, 2]), SHAPE, x))):
        found = NormalisedConvolution(1.0)(Observation(operator(x), operator, noise))
        seen = operator.adjoint(operator(torch.ones_like(x))) > 0
        torch.testing.assert_close(found[seen], x[seen], rtol=1e-12, atol=0)
        assert bool(((found[~seen] >= 3) & (found[~seen] < 4)).all())
    far = torch.zeros_like(gaps)
    far[..., 0, 0] = True
    assert float(NormalisedConvolution(0.5)(Observation(x * far, Mask(far), noise))[..., -1, -1].abs().max()) == 0.0
