"""Equivariant and multi-operator imaging: closed-form minimisers, gradients through the reconstruction, masks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.equivariant import EquivariantImaging, MeasurementConsistency, MultiOperatorImaging, _another, _measured
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Diagonal, Identity, Scaled
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.operators.groups import Flips, QuarterTurns, Shifts
from diffinv.operators.sampling import Mask
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import clean_data
from tests.cases.operators import draw, positive

SIGMA = 0.5
SHAPE = (1, 3, 3)
BIASED = {
    "consistency": MeasurementConsistency(),
    "equivariant": EquivariantImaging(QuarterTurns(), noisy=True),
    "multi-operator": MultiOperatorImaging(noisy=True),
}


def streams(count: int, seed: int = 0) -> Rng:
    return Rng.for_draws(seed, range(count), 1)


def gaussian(std: float, mask: Tensor | None = None) -> Gaussian:
    return Gaussian(torch.full((1,), std, dtype=torch.float64), mask)


class Matrix(Reconstructor):
    """f(y, A) = W y + V Aᵀ1, linear in its weights."""

    def __init__(self, size: int = 9, seed: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(2, size, size, seed=seed) / 3)

    def forward(self, observation: Observation) -> Tensor:
        y = clean_data(observation)
        seen = observation.operator.adjoint(torch.ones_like(y))
        return (y.flatten(1) @ self.weight[0] + seen.flatten(1) @ self.weight[1]).reshape(-1, *observation.image_shape)


class Tied(Reconstructor):
    """Two pixels of which A sees one: the seen one as it is, the other θ times it. θ: (B, 1, 1, 1)."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, observation: Observation) -> Tensor:
        y = observation.operator.adjoint(observation.y)
        return y + self.theta * y.flip(-1)


class Inverse(Reconstructor):
    """The inverse of a diagonal operator."""

    def forward(self, observation: Observation) -> Tensor:
        return observation.y / observation.operator.d


def small_batch(rows: int = 3) -> MeasuredBatch:
    """Masked rows with operators of their own."""
    mask = draw(rows, *SHAPE, seed=8) > -0.5
    return MeasuredBatch(Observation(draw(rows, *SHAPE), Diagonal(positive(rows, *SHAPE)), gaussian(0.3, mask)))


class Detached(EquivariantImaging):
    """Mutant: no gradient through x̂."""

    def __call__(self, model: Reconstructor, batch: MeasuredBatch, rng: Rng) -> Tensor:
        observation = batch.observation
        x = model(observation).detach()
        turned = self.group.draw(rng, observation.image_shape, x)(x)
        return ((model(_measured(observation, turned, rng, self.noisy)) - turned) ** 2).flatten(1).mean(1)


def gradient_is_the_derivative(loss: Loss) -> None:
    """Autograd of Σ loss along a direction = central difference, to 1e-7."""
    model, batch, direction, step = Matrix(), small_batch(), draw(2, 9, 9, seed=6), 1e-5
    loss(model, batch, streams(3)).sum().backward()
    slope, values = float((model.weight.grad * direction).sum()), []
    with torch.no_grad():
        for sign in (1, -1):
            moved = Matrix()
            moved.weight += sign * step * direction
            values.append(float(loss(moved, batch, streams(3)).sum()))
    assert abs(slope - (values[0] - values[1]) / (2 * step)) <= 1e-7 * abs(slope)


@pytest.mark.parametrize("name", BIASED)
def test_the_gradient_passes_through_the_reconstruction(name: str) -> None:
    gradient_is_the_derivative(BIASED[name])


def test_a_detached_reconstruction_fails_the_derivative() -> None:
    with pytest.raises(AssertionError):
        gradient_is_the_derivative(Detached(QuarterTurns(), noisy=True))


@pytest.mark.parametrize("name", BIASED)
def test_a_loss_is_a_row_each_and_declares_its_bias(name: str) -> None:
    loss = BIASED[name]
    assert loss(Matrix(), small_batch(), streams(3)).shape == (3,)
    assert not loss.unbiased
    with pytest.raises(UnsupportedError, match="no oracle"):
        loss.oracle(Matrix(), small_batch(), streams(3))


@pytest.mark.parametrize("name", ["consistency", "equivariant"])
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(name: str) -> None:
    batch, loss = small_batch(), BIASED[name]
    whole = loss(Matrix(), batch, streams(3))
    for row in range(3):
        alone = loss(Matrix(), batch.select([row]), streams(3).select(slice(row, row + 1)))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-12, atol=0)


def masked_data_do_not_matter(loss: Loss) -> None:
    """NaN under the mask leaves values and gradients finite and as they were."""
    found = []
    for fill in (0.0, torch.nan):
        model, batch = Matrix(), small_batch()
        observation = batch.observation
        spoilt = replace(observation, y=observation.y.where(observation.noise.mask, fill))
        value = loss(model, MeasuredBatch(spoilt), streams(3))
        value.sum().backward()
        found.append((value.detach(), model.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", BIASED)
def test_data_under_the_mask_do_not_matter(name: str) -> None:
    masked_data_do_not_matter(BIASED[name])


class Careless(MeasurementConsistency):
    """Mutant: subtracts what stands under the mask before it is left out."""

    def __call__(self, model: Reconstructor, batch: MeasuredBatch, rng: Rng) -> Tensor:
        residual = batch.observation.operator(model(batch.observation)) - batch.observation.y
        return (residual**2).where(batch.observation.noise.mask, 0.0).flatten(1).sum(1)


def test_a_residual_that_is_masked_too_late_fails() -> None:
    with pytest.raises(AssertionError):
        masked_data_do_not_matter(Careless())


def test_an_exact_inverse_has_no_equivariance_error_without_noise() -> None:
    x, d = draw(4, *SHAPE), positive(4, *SHAPE)
    batch = MeasuredBatch(Observation(d * x, Diagonal(d), gaussian(0.1)))
    loss = EquivariantImaging(QuarterTurns(), noisy=False)(Inverse(), batch, streams(4))
    assert float(loss.max()) <= 1e-30
    noisy = EquivariantImaging(QuarterTurns(), noisy=True)(Inverse(), batch, streams(4))
    assert float(noisy.min()) > 1e-4


def test_an_equivariant_reconstructor_of_an_equivariant_operator_has_no_error_beyond_its_projection() -> None:
    """A = periodic blur, f = g·: T f(y) = f(T y), so that the term is ‖x̂ − f A x̂‖², the same for every shift."""
    blur = PeriodicConvolution(positive(1, 1, 3, 3), 1, (4, 4))

    class Scale(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return 0.1 * observation.y

    batch = MeasuredBatch(Observation(draw(3, 1, 4, 4), blur, gaussian(0.1)))
    estimate = 0.1 * batch.observation.y
    expected = ((estimate - 0.1 * blur(estimate)) ** 2).flatten(1).mean(1)
    for seed in (0, 1):
        loss = EquivariantImaging(Shifts(2), noisy=False)(Scale(), batch, streams(3, seed))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_consistency_wants_the_noise_back_and_leaves_the_null_space_free() -> None:
    """A = diag(2, 0): f = θ y has its minimum at θ = ½, noise or not, and the unseen pixel has no gradient."""
    y = torch.cat([draw(50, 1, 1, 1), torch.zeros(50, 1, 1, 1, dtype=torch.float64)], -1)
    operator = Diagonal(torch.tensor([2.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2))
    batch = MeasuredBatch(Observation(y, operator, gaussian(SIGMA)))

    class Fill(Reconstructor):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.5, 3.0], dtype=torch.float64))

        def forward(self, observation: Observation) -> Tensor:
            return self.theta * observation.y[..., :1]

    model = Fill()
    MeasurementConsistency()(model, batch, streams(50)).sum().backward()
    assert float(model.theta.grad.abs().max()) <= 1e-12


def two_pixels(rows: int) -> MeasuredBatch:
    """One pixel of two is seen, y = x + n, x of unit variance."""
    mask = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    x, n = draw(rows, 1, 1, 2, seed=1), draw(rows, 1, 1, 2, seed=2)
    return MeasuredBatch(Observation(x.where(mask, 0.0) + SIGMA * n, Mask(mask), gaussian(SIGMA, mask)))


def z_score(loss: Loss, theta: float, rows: int = 20000) -> float:
    """Mean of d loss/dθ over the rows, in units of its standard error."""
    parameter = torch.full((rows, 1, 1, 1), theta, dtype=torch.float64, requires_grad=True)
    value = loss(Tied(parameter), two_pixels(rows), streams(rows, 3))
    (gradient,) = torch.autograd.grad(value.sum(), parameter)
    return float(gradient.mean() / (gradient.std() / rows**0.5))


def test_the_minimiser_under_noise_ties_the_flipped_pixels_by_a_wiener_factor() -> None:
    """loss = ½ [(1 + θ²) σ² + ½ (1 − θ²)² (1 + σ²)], smallest at θ² = 1/(1 + σ²), whatever the images' correlation is."""
    loss, best = EquivariantImaging(Flips(), noisy=True), (1 / (1 + SIGMA**2)) ** 0.5
    assert abs(z_score(loss, best)) <= 4.5
    assert abs(z_score(loss, -best)) <= 4.5
    assert min(abs(z_score(loss, wrong)) for wrong in (1.0, 1 / (1 + SIGMA**2), 0.5)) > 8
    assert abs(z_score(Detached(Flips(), noisy=True), best)) > 8


def test_the_loss_has_its_closed_form_with_and_without_noise() -> None:
    rows, theta, total = 20000, 0.6, 1 + SIGMA**2
    expected = {
        True: ((1 + theta**2) * SIGMA**2 + (1 - theta**2) ** 2 * total / 2) / 2,
        False: (1 - theta**2) ** 2 * total / 4,
    }
    for noisy, value in expected.items():
        model = Tied(torch.tensor(theta, dtype=torch.float64))
        loss = EquivariantImaging(Flips(), noisy=noisy)(model, two_pixels(rows), streams(rows, 3))
        assert abs(float(loss.mean()) - value) <= 4.5 * float(loss.std()) / rows**0.5
        assert abs(float(loss.mean()) - expected[not noisy]) > 10 * float(loss.std()) / rows**0.5


def orbits() -> tuple[MeasuredBatch, Tensor]:
    """4 × 4 images that are constant on each orbit of the quarter turns, one pixel of each orbit seen, no noise."""
    pixels = torch.arange(16).reshape(4, 4)
    orbit = torch.stack([torch.rot90(pixels, k) for k in range(4)]).amin(0)
    mask = (orbit == pixels).reshape(1, 1, 4, 4)
    x = draw(200, 16)[:, orbit].reshape(200, 1, 4, 4)
    return MeasuredBatch(Observation(x.where(mask, 0.0), Mask(mask), gaussian(0.01)), x), orbit


class Orbit(Reconstructor):
    """Fills the unseen pixels of an orbit with θ times the seen one."""

    def __init__(self, theta: float, orbit: Tensor) -> None:
        super().__init__()
        self.theta, self.orbit = nn.Parameter(torch.tensor(theta, dtype=torch.float64)), orbit

    def forward(self, observation: Observation) -> Tensor:
        seen = observation.operator.adjoint(observation.y)
        return seen + self.theta * (seen.flatten(1)[:, self.orbit].unsqueeze(1) - seen)


def test_turns_recover_images_that_no_single_mask_determines_and_the_pseudo_inverse_does_not() -> None:
    """A turn costs y² [(1 − θ²)² + 2 (θ² − θ)²] an orbit: flat at θ = 0, the pseudo-inverse, least at the truth θ = 1."""
    batch, orbit = orbits()
    loss = EquivariantImaging(QuarterTurns(), noisy=False) + MeasurementConsistency()
    value = {t: loss(Orbit(t, orbit), batch, streams(200)).mean().item() for t in (-1.0, 0.0, 0.5, 1.0)}
    assert value[1.0] <= 1e-30 < 0.01 < min(value[t] for t in (-1.0, 0.0, 0.5))
    for t in (-1.0, 0.5):
        expected = ((1 - t**2) ** 2 + 2 * (t**2 - t) ** 2) * value[0.0]
        assert abs(value[t] - expected) <= 1e-12
    model = Orbit(0.3, orbit)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(60):
        optimiser.zero_grad()
        loss(model, batch, streams(200, step)).mean().backward()
        optimiser.step()
    torch.testing.assert_close(model(batch.observation), batch.x, rtol=0, atol=1e-6)
    assert float((Orbit(0.0, orbit)(batch.observation) - batch.x).detach().abs().max()) > 1


def test_a_twin_of_the_truth_has_no_loss_either() -> None:
    """Two pixels under flips: x₂ = x₁ and x₂ = −x₁ are both closed under the group and seen by one pixel."""
    batch = two_pixels(50)
    loss = EquivariantImaging(Flips(), noisy=False)
    for theta, zero in ((1.0, True), (-1.0, True), (0.0, False)):
        value = loss(Tied(torch.tensor(theta, dtype=torch.float64)), batch, streams(50)).mean()
        assert (float(value) <= 1e-30) == zero


def swapped_masks(channels: int) -> MeasuredBatch:
    """Two rows that see one pixel each of two, many independent pairs a row."""
    mask = torch.tensor([[True, False], [False, True]]).reshape(2, 1, 1, 2).expand(2, channels, 1, 2)
    y = draw(2, channels, 1, 2, seed=1) + SIGMA * draw(2, channels, 1, 2, seed=2)
    return MeasuredBatch(Observation(y.where(mask, 0.0), Mask(mask), gaussian(SIGMA)))


@pytest.mark.parametrize("noisy", [False, True])
def test_the_minimiser_of_multi_operator_imaging_has_its_closed_form(noisy: bool) -> None:
    """loss = ½ [(1 − θ²)² (1 + σ²) + n (1 + θ²) σ²], n = 1 with noise: smallest at θ² = 1 − n σ²/2(1 + σ²)."""
    channels = 100000
    best = (1 - noisy * SIGMA**2 / (2 * (1 + SIGMA**2))) ** 0.5

    def slope(theta: float) -> float:
        parameter = torch.full((2, channels, 1, 1), theta, dtype=torch.float64, requires_grad=True)
        value = MultiOperatorImaging(noisy)(Tied(parameter), swapped_masks(channels), streams(2, 3))
        gradient = torch.autograd.grad(value.sum(), parameter)[0].flatten()
        return float(gradient.mean() / (gradient.std() / len(gradient) ** 0.5).clamp_min(1e-30))

    assert abs(slope(best)) <= 4.5
    assert min(abs(slope(wrong)) for wrong in (0.7, best - 0.05, best + 0.05)) > 8


def test_every_row_gets_an_operator_that_is_not_its_own_and_all_others_in_turn() -> None:
    found = {tuple(_another(4, streams(4, seed)).tolist()) for seed in range(60)}
    assert found == {tuple((i + k) % 4 for i in range(4)) for k in (1, 2, 3)}


def test_multi_operator_imaging_swaps_the_noise_with_the_operator() -> None:
    """f = y, A = I up to 1e-9, σ of 0.1 and 2: each row's loss is the other row's variance."""
    operator = Diagonal(1 + torch.tensor([0.0, 1e-9], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 5000, 1, 2))
    noise = Gaussian(torch.tensor([0.1, 2.0], dtype=torch.float64))

    class Data(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return observation.y

    batch = MeasuredBatch(Observation(draw(2, 5000, 1, 2), operator, noise))
    loss = MultiOperatorImaging(noisy=True)(Data(), batch, streams(2))
    ratio = loss / torch.tensor([4.0, 0.01], dtype=torch.float64)
    assert float((ratio - 1).abs().max()) <= 4.5 * (2 / 10000) ** 0.5


def test_drawn_counts_follow_the_model_and_let_the_gradient_through() -> None:
    x = torch.full((2, 1, 20, 20), 3.0, dtype=torch.float64, requires_grad=True)
    noise = Poisson(*(torch.full((1,), v, dtype=torch.float64) for v in (2.0, 0.0)))
    observation = Observation(torch.ones(2, 1, 20, 20, dtype=torch.float64), Identity((1, 20, 20)), noise)
    y = _measured(observation, x, streams(2), True).y
    assert bool((2 * y == (2 * y).round()).all())
    assert abs(float(y.detach().var()) - 1.5) <= 4.5 * 1.5 * (2 / 800) ** 0.5 * 1.2
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


def one_operator() -> Observation:
    return Observation(draw(3, *SHAPE), Diagonal(positive(1, *SHAPE)), gaussian(0.3))


def equal_operators() -> Observation:
    return Observation(draw(3, *SHAPE), Diagonal(positive(1, *SHAPE).expand(3, *SHAPE)), gaussian(0.3))


@pytest.mark.parametrize(
    ("loss", "make", "word"),
    [
        (MultiOperatorImaging(True), one_operator, "nothing to swap"),
        (MultiOperatorImaging(True), equal_operators, "one and the same"),
        (
            EquivariantImaging(QuarterTurns(), True),
            lambda: Observation(draw(2, 1, 2, 3), Identity((1, 2, 3)), gaussian(1.0)),
            "square",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_one_line(loss: Loss, make: Callable[[], Observation], word: str) -> None:
    with pytest.raises(UnsupportedError, match=word) as refused:
        loss.check(MeasuredBatch(make()))
    assert "\n" not in str(refused.value)


def test_one_operator_is_refused_at_the_call_too_and_good_batches_pass() -> None:
    with pytest.raises(UnsupportedError, match="one operator"):
        MultiOperatorImaging(True)(Matrix(), MeasuredBatch(one_operator()), streams(3))
    for loss in BIASED.values():
        loss.check(small_batch())
    scaled = Scaled(positive(3), Identity(SHAPE))
    MultiOperatorImaging(True).check(MeasuredBatch(Observation(draw(3, *SHAPE), scaled, gaussian(0.3))))


def test_terms_add_and_draw_numbers_of_their_own() -> None:
    total = MeasurementConsistency() + 0.5 * BIASED["equivariant"]
    batch, model = small_batch(), Matrix()
    parts = MeasurementConsistency()(model, batch, streams(3)), BIASED["equivariant"](model, batch, streams(3).spawn(1))
    torch.testing.assert_close(total(model, batch, streams(3)), parts[0] + 0.5 * parts[1])
    assert not total.unbiased
