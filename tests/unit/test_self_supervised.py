"""Closed forms of the self-supervised losses: UNSURE's saddle, biased minimisers, and the limit that joins R2R and SURE."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import ShapeError, UnsupportedError
from diffinv.core.linalg import dense, expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Joint, Observation
from diffinv.losses.base import CleanBatch, Loss, MeasuredBatch, Total
from diffinv.losses.denoisers import Neighbor2Neighbor, Noise2Score
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.derivative import FiniteDifference, ForwardMode
from diffinv.losses.equivariant import EquivariantImaging
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import Noise2Void, RandomHiding, Splitting
from diffinv.losses.supervised import Supervised
from diffinv.losses.sure import FirstOrderSure, ShiftedSure, Sure
from diffinv.losses.unsure import Lags, SignalDependent, Unsure, White
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import PoissonGaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import Flips
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import hidden
from diffinv.schedules import LogNormal
from tests.contracts.test_losses import Toy, imaged, measured, z_values

F64 = torch.float64


class Shrink(Reconstructor):
    """x̂ = c y with c of its own for each row, (B,); as a score, s = −c y."""

    def __init__(self, factor: float, rows: int) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((rows,), factor, dtype=F64))

    def forward(self, observation: Observation) -> Tensor:
        return expand(self.factor, observation.y) * observation.y

    def score(self, observation: Observation) -> Tensor:
        return -self(observation)


def flat_images(rows: int, std: float) -> MeasuredBatch:
    """Images of one random brightness, N(0, 1) a row, under white noise."""
    x = Rng.for_draws(1, range(rows), 1).normal(torch.zeros(rows, 1, dtype=F64))[:, :, None, None].expand(-1, 1, 4, 4)
    noise = Gaussian(torch.full((1,), std, dtype=F64))
    return MeasuredBatch(Observation(noise.sample(x, Rng.for_draws(2, range(rows), 1)), Identity((1, 4, 4)), noise), x)


def slope(loss: Loss, factor: float, batch: MeasuredBatch) -> float:
    """z of d loss/dc at c = factor."""
    rows = batch.observation.y.shape[0]
    model = Shrink(factor, rows)
    (gradient,) = torch.autograd.grad(loss(model, batch, Rng.for_draws(3, range(rows), 1)).sum(), model.factor)
    return float(gradient.mean() / (gradient.std() / rows**0.5))


SIGMA, GAMMA, AMPLITUDE = 0.7, 0.5, 0.3
MINIMISERS: dict[str, tuple[Loss, float]] = {
    "Noise2Void": (Noise2Void(0.3, 1), 1 / (1 + SIGMA**2)),
    "Neighbor2Neighbor": (Neighbor2Neighbor(GAMMA), (1 + GAMMA) / (1 + SIGMA**2 + GAMMA)),
    "Noise2Score": (Noise2Score(AMPLITUDE), 1 / (1 + SIGMA**2 + 3 * AMPLITUDE**2)),
}


@pytest.mark.parametrize("name", MINIMISERS)
def test_a_biased_loss_has_the_minimiser_of_its_closed_form(name: str) -> None:
    loss, best = MINIMISERS[name]
    assert not loss.unbiased
    batch = flat_images(20000, SIGMA)
    assert abs(slope(loss, best, batch)) <= 4.5
    for wrong in (0.9 * best, 1.1 * best):
        assert abs(slope(loss, wrong, batch)) > 5


def correlated_signals(rows: int, std: float) -> tuple[MeasuredBatch, Tensor]:
    """Gaussian images of 3 × 3 pixels with a correlation length of a pixel, white noise; and the covariance of the data."""
    place = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    signal = torch.exp(-(torch.cdist(place, place) ** 2) / 4)
    x = (
        Rng.for_draws(4, range(rows), 1).normal(torch.zeros(rows, 9, dtype=F64))
        @ torch.linalg.cholesky(signal + 1e-9 * torch.eye(9)).T
    )
    noise = Gaussian(torch.full((1,), std, dtype=F64))
    x = x.reshape(rows, 1, 3, 3)
    data = Observation(noise.sample(x, Rng.for_draws(5, range(rows), 1)), Identity((1, 3, 3)), noise)
    return MeasuredBatch(data, x), signal + std**2 * torch.eye(9)


class Matrix(Reconstructor):
    """x̂ = W y."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(9, dtype=F64))

    def forward(self, observation: Observation) -> Tensor:
        return (observation.y.flatten(1) @ self.weight.T).reshape(observation.y.shape)


def test_the_multiplier_of_unsure_climbs_to_its_closed_form_and_the_network_to_its_saddle() -> None:
    """f = (I − η Σ_y⁻¹) y and η* = σ²/(1 − MMSE/σ²) = d/tr(Σ_y⁻¹), within 3 %."""
    batch, covariance = correlated_signals(3000, SIGMA)
    precision = torch.linalg.inv(covariance)
    mmse = SIGMA**2 - SIGMA**4 * float(precision.trace()) / 9
    expected = SIGMA**2 / (1 - mmse / SIGMA**2)
    assert abs(expected - 9 / float(precision.trace())) < 1e-9
    model, eta = Matrix(), White().start(0.1)
    loss = Unsure(eta, White())
    (multiplier,) = loss.multipliers
    down = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    up = torch.optim.SGD([multiplier], lr=0.03, maximize=True)
    values = []
    for step in range(1200):
        value = loss(model, batch, Rng.for_draws(step, range(3000), 1)).mean()
        down.zero_grad(), up.zero_grad()
        value.backward()
        down.step(), up.step()
        values.append(float(eta.detach()))
    found = sum(values[-400:]) / 400
    assert found > SIGMA**2
    assert abs(found / expected - 1) < 0.03
    y = batch.observation.y.flatten(1)
    sampled = torch.linalg.inv(y.T @ y / len(y))
    saddle = torch.eye(9, dtype=F64) - 9 / sampled.trace() * sampled
    torch.testing.assert_close(model.weight.detach(), saddle, atol=0.025, rtol=0)
    assert float((model.weight.detach() - (torch.eye(9, dtype=F64) - SIGMA**2 * sampled)).abs().max()) > 0.1


def test_the_multipliers_of_a_sum_of_losses_are_those_of_its_terms() -> None:
    first, second = (Unsure(White().start(v), White()) for v in (1.0, 2.0))
    total = 0.5 * first + Sure() + 2 * second
    assert isinstance(total, Total) and [float(p.detach()) for p in total.multipliers] == [1.0, 2.0]


def lagged_noise(rows: int) -> tuple[MeasuredBatch, Lags, torch.nn.Parameter]:
    """Noise whose covariance is that of five multipliers, on 4 × 4 images."""
    family = Lags(1)
    eta = torch.nn.Parameter(torch.tensor([0.5, 0.15, 0.03, 0.1, -0.04], dtype=F64))
    blank = torch.zeros(1, 1, 4, 4, dtype=F64)
    covariance = dense(lambda v: family(eta.detach(), v, v), blank)
    torch.testing.assert_close(covariance, covariance.T)
    batch = imaged("convolution", rows)
    x = Rng.for_draws(6, range(rows), 1).normal(blank.expand(rows, 1, 4, 4))
    draws = Rng.for_draws(7, range(rows), 1).normal(torch.zeros(rows, 16, dtype=F64))
    noise = (draws @ torch.linalg.cholesky(covariance).T).reshape(x.shape)
    return MeasuredBatch(Observation(x + noise, Identity((1, 4, 4)), batch.observation.noise), x), family, eta


def test_unsure_with_lags_is_exact_for_noise_of_that_covariance_and_white_unsure_is_not() -> None:
    batch, family, eta = lagged_noise(16000)
    assert float(z_values(Unsure(eta, family), batch).abs().max()) <= 5
    assert float(z_values(Unsure(White().start(0.5), White()), batch).abs().max()) > 5


def test_lags_want_images() -> None:
    with pytest.raises(ShapeError, match="images"):
        Lags(1)(Lags(1).start(1.0), torch.zeros(2, 5), torch.zeros(2, 5))


@pytest.mark.parametrize("read", [0.0, 0.8])
def test_signal_dependent_unsure_is_exact_for_affine_models_under_poisson_gaussian_noise(read: float) -> None:
    rows, gain = 16000, 2.0
    zero = torch.zeros(1, dtype=F64)
    noise = PoissonGaussian(zero + gain, zero + read, zero) if read else Poisson(zero + gain, zero)
    x = 0.5 + 3 * Rng.for_draws(8, range(rows), 1).uniform(torch.zeros(rows, 1, 3, 4, dtype=F64))
    batch = MeasuredBatch(Observation(noise.sample(x, Rng.for_draws(9, range(rows), 1)), Identity((1, 3, 4)), noise), x)
    eta = torch.nn.Parameter(torch.tensor([1 / gain, (read / gain) ** 2], dtype=F64))
    assert float(z_values(Unsure(eta, SignalDependent()), batch, affine=True).abs().max()) <= 5
    wrong = torch.nn.Parameter(torch.tensor([0.5 / gain, (read / gain) ** 2], dtype=F64))
    assert float(z_values(Unsure(wrong, SignalDependent()), batch, affine=True).abs().max()) > 5


@pytest.mark.parametrize("noise", ["gaussian", "gaussian_correlated"])
def test_r2r_of_vanishing_recorruption_is_sure(noise: str) -> None:
    """‖u(y + τω) − y + ω/τ‖² − ‖ω‖²/τ² − (2/τ) ωᵀ(u(y) − y) → ‖u − y‖² + 2 ωᵀJω for every ω as τ → 0."""
    batch, rows = measured(noise, 4), 4
    data = batch.observation
    good = data.noise.variance(torch.zeros_like(data.y)).isfinite()
    batch = MeasuredBatch(Observation(data.y.where(good, 0.0), data.operator, data.noise), batch.x)
    model, differences = Toy(rows), []
    for tau in (1e-2, 1e-3):
        share = 1 / (1 + tau**2)
        rng = Rng.for_draws(12, range(rows), 1)
        omega = (data.noise.split(batch.observation.y, rng, share=share)[0][0] - batch.observation.y) / tau
        omega = omega.where(good, 0.0)
        u, along = ForwardMode()(model, batch.observation, omega, omega)
        mean = lambda v: v.where(good, 0.0).flatten(1).sum(1) / good.flatten(1).sum(1)
        y = batch.observation.y
        loss = Recorrupted(share)(model, batch, Rng.for_draws(12, range(rows), 1))
        limit = loss - mean(omega**2) / tau**2 - 2 / tau * mean(omega * (u - y))
        differences.append(float((limit - mean((u - y) ** 2 + 2 * omega * along)).detach().abs().max()))
    assert differences[0] < 0.1
    assert differences[1] < 0.15 * differences[0]


@pytest.mark.parametrize(
    "make", [lambda s: Sure(s), lambda s: Unsure(White().start(0.5), White(), s), lambda s: FirstOrderSure(s)]
)
def test_the_finite_difference_agrees_with_forward_mode(make: Callable[[object], Loss]) -> None:
    batch, model = measured("gaussian" if isinstance(make(ForwardMode()), Sure) else "poisson", 4), Toy(4)
    exact, near = (make(s)(model, batch, Rng.for_draws(0, range(4), 1)) for s in (ForwardMode(), FiniteDifference(1e-4)))
    torch.testing.assert_close(near, exact, rtol=1e-4, atol=1e-4)


def test_what_is_hidden_is_gone_from_data_operator_and_noise() -> None:
    data = measured("poisson", 2).observation
    left = RandomHiding(0.5)(data, Rng.for_draws(1, range(2), 1))
    kept = RandomHiding(0.5).keep(data, Rng.for_draws(1, range(2), 1))
    assert 0 < int(kept.sum()) < kept.numel()
    assert not bool(left.y[~kept].any()) and not bool(left.operator(torch.ones_like(data.y))[~kept].any())
    assert torch.equal(left.noise.mask, kept & data.noise.mask)
    with pytest.raises(UnsupportedError, match="correlated between data"):
        hidden(measured("gaussian_correlated", 2).observation, kept)
    with pytest.raises(UnsupportedError, match="between 0 and 1"):
        RandomHiding(1.0)


def test_complex_data_are_hidden_in_pairs() -> None:
    data = imaged("masked_fourier", 2).observation
    keep = RandomHiding(0.5, together=1).keep(data, Rng.for_draws(1, range(2), 1))
    assert torch.equal(keep[..., 0], keep[..., 1]) and 0 < int(keep.sum()) < keep.numel()
    apart = RandomHiding(0.5).keep(data, Rng.for_draws(1, range(2), 1))
    assert not torch.equal(apart[..., 0], apart[..., 1])


def test_a_hidden_datum_does_not_reach_the_network() -> None:
    batch, rng = measured("gaussian", 2), lambda: Rng.for_draws(1, range(2), 1)
    loss, model = Splitting(RandomHiding(0.5)), Toy(2)
    keep = loss.hiding.keep(batch.observation, rng())
    changed = batch.observation.y.where(keep, batch.observation.y + 1)
    left, other = (
        hidden(Observation(y, batch.observation.operator, batch.observation.noise), keep) for y in (batch.observation.y, changed)
    )
    assert torch.equal(model(left), model(other))


class Pixelwise(Reconstructor):
    """x̂ = p + tanh(y − p) about a pedestal p, with a factor that can be trained."""

    def __init__(self, pedestal: float) -> None:
        super().__init__()
        self.pedestal, self.factor = pedestal, torch.nn.Parameter(torch.ones(()))

    def forward(self, observation: Observation) -> Tensor:
        return self.pedestal + self.factor * torch.tanh(observation.y - self.pedestal)


@pytest.mark.parametrize("pedestal", [0.0, 1e2, 1e3])
def test_finite_differences_follow_the_noise_and_not_the_brightness_in_float32(pedestal: float) -> None:
    rows = 400
    y = pedestal + Rng.for_draws(1, range(rows), 1).normal(torch.zeros(rows, 1, 8, 8))
    batch = MeasuredBatch(Observation(y, Identity((1, 8, 8)), Gaussian(torch.ones(1))))
    model = Pixelwise(pedestal)
    near, exact = (
        Sure(s)(model, batch, Rng.for_draws(2, range(rows), 1)).mean() for s in (FiniteDifference(0.05), ForwardMode())
    )
    assert abs(float((near - exact).detach())) < 3e-3


def test_one_bright_star_does_not_move_the_step_of_unsure() -> None:
    y = Rng.for_draws(1, range(2), 1).normal(torch.zeros(2, 1, 16, 16, dtype=F64))
    y[:, 0, 3, 3] = 1e5
    batch = MeasuredBatch(Observation(y, Identity((1, 16, 16)), Gaussian(torch.ones(1, dtype=F64))))
    model, values = Pixelwise(0.0), []
    for slope_of in (FiniteDifference(0.05), ForwardMode()):
        values.append(Unsure(White().start(1.0), White(), slope_of)(model, batch, Rng.for_draws(2, range(2), 1)).detach())
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_row_without_any_signal_has_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    y = torch.zeros(2, 1, 4, 4, dtype=dtype)
    white = Observation(y, Identity((1, 4, 4)), Gaussian(torch.full((1,), 300.0, dtype=dtype)))
    counts = Observation(y, Identity((1, 4, 4)), Poisson(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)))
    for loss, data in ((Sure(), white), (Unsure(White().start(1.0), White()), counts), (FirstOrderSure(), counts)):
        model = Pixelwise(0.1)
        value = loss(model, MeasuredBatch(data), Rng.for_draws(0, range(2), 1)).sum()
        value.backward()
        assert bool(value.isfinite()) and bool(model.factor.grad.isfinite())


class Counted(Toy):
    """A toy that counts the rows of its passes."""

    rows = 0

    def forward(self, observation: Observation) -> Tensor:
        self.rows += len(observation.y)
        return super().forward(observation)


def test_the_terms_of_a_sum_share_the_pass_over_the_data() -> None:
    batch, rng = measured("gaussian", 2), lambda: Rng.for_draws(3, range(2), 1)
    for parts in permutations((Sure(), EquivariantImaging(Flips(), noisy=True))):
        apart = sum(loss(Toy(2), batch, rng().spawn(k)) for k, loss in enumerate(parts))
        model = Counted(2)
        together = Total(tuple((1.0, loss) for loss in parts))(model, batch, rng())
        torch.testing.assert_close(together, apart)
        assert model.rows == 3 * 2


class Untaped(Loss):
    """Reconstructs without a graph, as a target."""

    def __call__(self, model: torch.nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        with torch.no_grad():
            return model(batch.data).flatten(1).sum(1)


def test_a_pass_without_a_graph_is_not_lent_to_a_loss_that_wants_one() -> None:
    batch, slopes = measured("gaussian", 2), []
    for loss in (Supervised() + Untaped(), Untaped() + Supervised()):
        model = Toy(2)
        slopes.append(torch.autograd.grad(loss(model, batch, Rng.for_draws(3, range(2), 1)).sum(), model.theta)[0])
    torch.testing.assert_close(*slopes)


def test_a_scaled_loss_of_a_denoiser_works() -> None:
    class Half(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x / 2

    loss, batch = DenoisingScoreMatching(LogNormal(-0.7, 1.7), 1.0), CleanBatch(torch.ones(2, 1, 2, 2))
    whole, half = ((f * loss)(Half(), batch, Rng.for_draws(0, range(2), 1)) for f in (1.0, 0.5))
    torch.testing.assert_close(whole, 2 * half)


def test_splitting_hands_on_the_multipliers_of_its_inner_loss() -> None:
    eta = White().start(0.3)
    assert Splitting(RandomHiding(0.5), Unsure(eta, White())).multipliers == (eta,)


def test_the_ensure_weight_gives_the_risk_of_the_full_sampling() -> None:
    """For an error that does not depend on the sampling: E_mask[Σ_good r²/p]/d = mean r² over all pixels."""
    rows, kept = 20000, torch.tensor([0.2, 0.9], dtype=F64).repeat_interleave(8).reshape(1, 1, 4, 4)
    x = Rng.for_draws(1, range(rows), 1).normal(torch.zeros(rows, 1, 4, 4, dtype=F64))
    mask = Rng.for_draws(2, range(rows), 1).uniform(x) < kept
    noise = Gaussian(torch.full((1,), 0.5, dtype=F64), mask)
    data = Observation(noise.sample(x, Rng.for_draws(3, range(rows), 1)), Identity((1, 4, 4)), noise)

    class Blind(Reconstructor):
        def forward(self, observation: Observation) -> Tensor:
            return torch.zeros_like(observation.y)

    found = Sure(weight=1 / kept)(Blind(), MeasuredBatch(data, x), Rng.for_draws(4, range(rows), 1))
    assert abs(float(found.mean()) - 1) <= 5 * float(found.std()) / rows**0.5
    plain = Sure()(Blind(), MeasuredBatch(data, x), Rng.for_draws(4, range(rows), 1))
    assert float(plain.std()) > 0


def test_noise2void_never_shows_the_pixel_itself() -> None:
    for shape in ((2, 1, 1, 5), (2, 1, 4, 4), (2, 1, 5, 1)):
        y = torch.arange(2 * shape[2] * shape[3], dtype=F64).reshape(shape)
        for seed in range(40):
            stand_ins = Noise2Void(0.2, 1)._neighbours(y, Rng.for_draws(seed, range(2), 1))
            assert not bool((stand_ins == y).any())


def test_traps_are_refused_with_a_remedy() -> None:
    batch = measured("gaussian", 2)
    with pytest.raises(UnsupportedError, match="one Observation a row"):
        MeasuredBatch(Joint((batch.observation, batch.observation)))
    with pytest.raises(ShapeError, match="x"):
        Supervised().check(MeasuredBatch(batch.observation, batch.x[:, :1]))
    with pytest.raises(UnsupportedError, match="masked pixel"):
        Noise2Void(0.2, 1).check(batch)
    with pytest.raises(UnsupportedError, match="between 1 and"):
        ShiftedSure(100).check(measured("poisson", 2))
    shaky = torch.nn.Sequential(torch.nn.Dropout(0.1))
    with pytest.raises(UnsupportedError, match="dropout"):
        Sure()(shaky, batch, Rng.for_draws(0, range(2), 1))
