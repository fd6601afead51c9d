"""Losses of a denoiser that sees noisy images alone: the gradient of denoising score matching on clean ones, for every Gaussian
noise, and mutants that must fail. z-tests of paired differences as in `test_losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.ambient import Ambient, AmbientSure, BelowNoise, Consistency, NoiseOnly
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.derivative import ForwardMode
from diffinv.losses.topping import floor, top_up
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Diagonal, Identity, Scaled
from diffinv.operators.sampling import Mask
from diffinv.priors.base import Denoiser
from diffinv.schedules import Karras, LogNormal, LogUniform
from tests.cases.losses import CASES, LEVELS, NOISY_IMAGES
from tests.cases.noise import CASES as NOISES
from tests.cases.noise import SHAPE, correlation, ramp, spectrum, two

F64 = torch.float64
ROWS = 4000


def embedded(std: Tensor) -> CorrelatedGaussian:
    return CorrelatedGaussian.from_correlation(std, correlation(), SHAPE[1:], white=0.1)


GAUSSIANS: dict[str, Callable[[], Noise]] = {
    "white": lambda: Gaussian(two(0.5, 3)),
    "per pixel": lambda: Gaussian(ramp(0.5, 3)),
    "periodic": lambda: CorrelatedGaussian(two(0.7, 2), spectrum()),
    "correlated": lambda: embedded(two(0.7, 2)),
    "correlated and uneven": lambda: embedded(ramp(0.5, 2)),
}
LOSSES: dict[str, NoiseOnly] = {
    "p = 0": Ambient(LEVELS, 1.0, 0),
    "p = 1": Ambient(LEVELS, 1.0, 1),
    "ambient Tweedie": Ambient(LEVELS, 1.0),
    "GSURE": AmbientSure(LEVELS, 1.0, ForwardMode()),
    "GSURE, finite differences": AmbientSure(LEVELS, 1.0),
}


class Curved(Denoiser):
    """D = a tanh(c x) + d x/(1 + σ) + e roll(x): four parameters a row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.7, 0.8, 0.4, -0.3], dtype=F64).expand(rows, 4).clone())

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        a, c, d, e = (expand(p, x) for p in self.theta.repeat_interleave(len(x) // len(self.theta), 0).unbind(1))
        return a * torch.tanh(c * x) + d * x / expand(1 + sigma, x) + e * x.roll(1, -1)


def noisy(name: str, rows: int) -> MeasuredBatch:
    noise = GAUSSIANS[name]().repeat(rows // 2)
    x = ramp(-1, 2).repeat_interleave(rows // 2, 0)
    return MeasuredBatch(Observation(noise.sample(x, Rng.for_draws(1, range(rows), 1)), Identity(SHAPE), noise), x)


def gradients(values: Tensor, model: Curved) -> Tensor:
    return torch.autograd.grad(values.sum(), model.theta)[0]


def z_values(loss: NoiseOnly, batch: MeasuredBatch) -> Tensor:
    rows = batch.observation.y.shape[0]
    model, rng = Curved(rows), lambda: Rng.for_draws(11, range(rows), 1)
    difference = gradients(loss(model, batch, rng()), model) - gradients(loss.oracle(model, batch, rng()), model)
    return difference.mean(0) / difference.std(0) * rows**0.5


@pytest.mark.parametrize("noise", GAUSSIANS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_expected_gradient_is_that_of_clean_images(loss: str, noise: str) -> None:
    assert LOSSES[loss].unbiased
    z = z_values(LOSSES[loss], noisy(noise, ROWS))
    assert float(z.abs().max()) <= 5, z


@pytest.mark.parametrize("noise", GAUSSIANS)
def test_the_value_of_gsure_is_the_risk(noise: str) -> None:
    batch, loss, rng = noisy(noise, ROWS), LOSSES["GSURE"], lambda: Rng.for_draws(13, range(ROWS), 1)
    with torch.no_grad():
        difference = loss(Curved(ROWS), batch, rng()) - loss.oracle(Curved(ROWS), batch, rng())
    assert abs(float(difference.mean() / difference.std())) * ROWS**0.5 <= 5


@pytest.mark.parametrize("noise", GAUSSIANS)
def test_topped_up_data_are_white_and_independent_of_their_targets(noise: str) -> None:
    """Along 30 directions: Var[x_σ − x] = σ², and no covariance with t − x, z ≤ 5 of 10,000 draws an image."""
    batch = noisy(noise, 20000)
    data = batch.observation
    sigma = 1.2 * floor(data.noise, data.y)
    topped = top_up(data.noise, data.y, sigma, Rng.for_draws(2, range(20000), 1))
    assert bool((topped.c > 0).all())
    directions = torch.cos(torch.arange(30, dtype=F64)[:, None] * torch.arange(24, dtype=F64) ** 1.1 + 0.2)
    directions = directions / directions.norm(dim=1, keepdim=True)
    seen, met = ((v - batch.x).flatten(1) @ directions.T for v in (topped.x, topped.target))
    for image in range(2):
        rows = slice(10000 * image, 10000 * (image + 1))
        for product in (seen[rows] ** 2 - sigma[rows, None] ** 2, seen[rows] * met[rows], seen[rows], met[rows]):
            assert float((product.mean(0) / product.std(0)).abs().max()) * 10000**0.5 <= 5


def test_ambient_tweedie_is_recorruption_with_weight_c_squared() -> None:
    """`c D + (1 − c) x_σ − y = c [D − t]` for white noise, in every pixel, and so the loss of Daras et al."""
    batch, loss = noisy("white", 64), Ambient(LEVELS, 1.0)
    data, sigma, topped, weight = loss._level(batch, Rng.for_draws(3, range(64), 1))
    denoised = Curved(64)(topped.x, sigma)
    c = 1 - expand(two(0.5, 3).repeat_interleave(32) ** 2 / sigma**2, topped.x)
    daras = c * denoised + (1 - c) * topped.x - data.y
    torch.testing.assert_close(daras, c * (denoised - topped.target), rtol=1e-9, atol=1e-9)
    value = loss(Curved(64), batch, Rng.for_draws(3, range(64), 1))
    torch.testing.assert_close(value, weight * daras.square().flatten(1).mean(1), rtol=1e-9, atol=1e-12)


def test_far_above_the_noise_the_loss_is_that_of_the_data_as_if_clean() -> None:
    """As σ_n → 0, t → x and c → 1: denoising score matching of the row, to σ_n/τ ~ 1e-7 times its size."""
    x = ramp(-1, 2)
    batch = MeasuredBatch(Observation(x, Identity(SHAPE), Gaussian(two(1e-9, 1e-9))), x)
    rng = lambda: Rng.for_draws(5, range(2), 1)
    loss = Ambient(LEVELS, 1.0)
    torch.testing.assert_close(loss(Curved(2), batch, rng()), loss.oracle(Curved(2), batch, rng()), rtol=1e-6, atol=0)


class NoDivergence(AmbientSure):
    """Stein without Stein's term."""

    def __call__(self, model, batch, rng):
        data, sigma, topped, weight = self._level(batch, rng)
        return weight * (model(topped.x, sigma) - data.y).square().flatten(1).mean(1)


class DataAsTarget(Ambient):
    """The target is y, whose noise x_σ holds."""

    def __call__(self, model, batch, rng):
        data, sigma, topped, weight = self._level(batch, rng)
        return self._mean(model(topped.x, sigma) - data.y, topped, weight)


class StdForVariance(Ambient):
    """t = y − σ_n/τ z."""

    def __call__(self, model, batch, rng):
        data, sigma, topped, weight = self._level(batch, rng)
        std = data.noise.variance(torch.zeros_like(data.y)).sqrt()
        return self._mean(model(topped.x, sigma) - data.y - (topped.target - data.y) / std, topped, weight)


MUTANTS = {
    "no divergence": NoDivergence(LEVELS, 1.0, ForwardMode()),
    "y as target": DataAsTarget(LEVELS, 1.0),
    "σ for σ²": StdForVariance(LEVELS, 1.0),
}


@pytest.mark.parametrize("flaw", MUTANTS)
def test_a_flawed_loss_is_caught(flaw: str) -> None:
    assert float(z_values(MUTANTS[flaw], noisy("per pixel", ROWS)).abs().max()) > 5


def test_white_noise_for_correlated_noise_is_caught() -> None:
    batch = noisy("correlated", ROWS)
    wrong = replace(batch, observation=replace(batch.observation, noise=Gaussian(batch.observation.noise.std)))
    assert float(z_values(LOSSES["GSURE"], wrong).abs().max()) > 5


def test_a_row_trains_the_levels_above_its_noise_as_often_as_all_levels_would() -> None:
    batch = noisy("white", 40000)
    loss = Ambient(LEVELS, 1.0)
    _, sigma, _, _ = loss._level(batch, Rng.for_draws(0, range(40000), 1))
    assert bool((sigma[:20000] > 0.5).all())
    assert bool((sigma[20000:] > 3).all())
    share = LEVELS.above(two(0.5, 3))
    torch.testing.assert_close(share, 1 - (two(0.5, 3) / 0.05).log() / torch.tensor(400.0, dtype=F64).log(), rtol=1e-12, atol=0)
    u = (sigma[:20000] / 20).log() / (two(0.5, 0.5)[:1] / 20).log()  # uniform on (0, 1)
    assert abs(float(u.mean()) - 0.5) <= 5 * (1 / 12 / 20000) ** 0.5


def test_gsure_counts_levels_below_the_noise_at_the_noise() -> None:
    batch = noisy("white", 40000)
    _, sigma, _, weight = AmbientSure(LEVELS, 1.0)._level(batch, Rng.for_draws(0, range(40000), 1))
    lowest = two(0.5, 3).repeat_interleave(20000)
    lifted = sigma < lowest * (1 + 1e-5)
    assert bool((sigma > lowest).all())
    factor = torch.where(lifted, two(1, 1 / 9).repeat_interleave(20000), 1.0)  # 1/9 where the noise is 3 σ_d
    torch.testing.assert_close(weight, factor * (sigma**2 + 1) / sigma**2, rtol=1e-12, atol=0)
    below = 1 - LEVELS.above(two(0.5, 3))
    for found, share in zip(lifted.double().unflatten(0, (2, -1)).mean(1), below, strict=True):
        assert abs(float(found - share)) <= 5 * float(share * (1 - share) / 20000) ** 0.5


def test_a_row_of_hopeless_noise_does_not_drown_the_others() -> None:
    """The scatter of its gradient, against that of a row of noise 0.2 σ_d."""
    scatter, levels = [], LogNormal(-0.7, 1.7)
    for level in (0.2, 300.0):
        noise = Gaussian(torch.full((1,), level, dtype=F64))
        x = ramp(-1, 2).repeat_interleave(1000, 0)
        data = Observation(noise.sample(x, Rng.for_draws(1, range(2000), 1)), Identity(SHAPE), noise)
        model = Curved(2000)
        values = AmbientSure(levels, 1.0)(model, MeasuredBatch(data, x), Rng.for_draws(2, range(2000), 1))
        scatter.append(gradients(values, model).std(0).norm())
    assert float(scatter[1]) <= float(scatter[0])


@pytest.mark.parametrize("level", [1e-30, 1e-7])
def test_rows_of_hardly_any_noise_have_nothing_below_it(level: float) -> None:
    x = ramp(-1, 2)
    batch = MeasuredBatch(Observation(x, Identity(SHAPE), Gaussian(two(level, level))), x)
    with torch.no_grad():
        values = [BelowNoise(LogNormal(-0.7, 1.7), 1.0)(Curved(2), batch, Rng.for_draws(k, range(2), 1)) for k in range(20)]
    assert torch.stack(values).eq(0).all()


@pytest.mark.parametrize(("noise", "lowest"), [("white", (0.5, 3)), ("per pixel", None), ("correlated", None)])
def test_what_data_teach_and_what_draws_teach_is_all_of_denoising_score_matching(noise: str, lowest) -> None:
    """With the truth for draws: levels above the noise, by `Ambient`'s oracle, and those below are all levels once."""
    batch, clean = noisy(noise, 40000), DenoisingScoreMatching(LEVELS, 1.0)
    model, rng = Curved(40000), lambda seed: Rng.for_draws(seed, range(40000), 1)
    with torch.no_grad():
        below = BelowNoise(LEVELS, 1.0)(model, batch, rng(4))
        difference = below + Ambient(LEVELS, 1.0, 0).oracle(model, batch, rng(5)) - clean(model, batch, rng(6))
    assert abs(float(difference.mean() / difference.std())) * 40000**0.5 <= 5
    assert float((difference - below).mean() / difference.std()) * 40000**0.5 < -20  # and not without those below
    sigma, share = LEVELS.draw_below(rng(4), floor(batch.observation.noise, batch.observation.y))
    assert bool((sigma <= floor(batch.observation.noise, batch.observation.y)).all())
    if lowest is not None:
        torch.testing.assert_close(share[[0, -1]], 1 - LEVELS.above(two(*lowest)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [LogUniform(0.1, 10.0), Karras(0.1, 10.0), LogNormal(-0.7, 1.7)])
def test_the_share_above_a_level_inverts_the_schedule(schedule) -> None:
    u = torch.tensor([0.05, 0.3, 0.9], dtype=F64)
    torch.testing.assert_close(schedule.above(schedule.level(u)), u, rtol=1e-10, atol=0)
    assert schedule.above(torch.tensor([1e9, 1e-12], dtype=F64)).round(decimals=6).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", NOISY_IMAGES)
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(name: str) -> None:
    loss, batch = CASES[name]().loss, noisy("white", 4)
    whole = loss(Curved(4), batch, Rng.for_draws(0, range(4), 1))
    assert len(set(whole.tolist())) == 4
    torch.testing.assert_close(loss(Curved(1), batch.select([2]), Rng.for_draws(0, [2], 1)), whole[2:3], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["ambient", "ambient_sure", "below_noise"])
@pytest.mark.parametrize("noise", ["poisson", "gamma", "heteroscedastic_gaussian", "gaussian"])
def test_what_cannot_be_topped_up_is_refused(name: str, noise: str) -> None:
    """The last noise is Gaussian with masked pixels."""
    case = NOISES[noise]()
    batch = MeasuredBatch(Observation(case.mean, Identity(SHAPE), case.noise))
    with pytest.raises(UnsupportedError, match=";"):
        CASES[name]().loss.check(batch)


def test_other_operators_and_hopeless_levels_are_refused() -> None:
    y, noise = ramp(-1, 2), Gaussian(two(0.5, 3))
    for operator in (Mask(y > 0), Diagonal(y.exp())):
        with pytest.raises(UnsupportedError, match="not the identity"):
            Ambient(LEVELS, 1.0).check(MeasuredBatch(Observation(y, operator, noise)))
    with pytest.raises(UnsupportedError, match="above every level"):
        Ambient(LogUniform(0.1, 2.0), 1.0).check(MeasuredBatch(Observation(y, Identity(SHAPE), noise)))
    with pytest.raises(UnsupportedError, match="not white"):
        Consistency(LEVELS, 1.0).check(noisy("per pixel", 2))
    with pytest.raises(DiffinvError, match="power"):
        Ambient(LEVELS, 1.0, 3)


def test_a_flux_scale_is_a_unit() -> None:
    """y = s x + n is the image x with the noise n/s."""
    batch, rng = noisy("white", 2), lambda: Rng.for_draws(0, range(2), 1)
    data, scale = batch.observation, two(4.0, 0.5)
    scaled = Observation(expand(scale, data.y) * data.y, Scaled(scale, Identity(SHAPE)), Gaussian(scale * data.noise.std))
    expected = LOSSES["GSURE"](Curved(2), batch, rng())
    torch.testing.assert_close(LOSSES["GSURE"](Curved(2), replace(batch, observation=scaled), rng()), expected)


class Shrinkage(Denoiser):
    """The denoiser of N(0, 1), x/(1 + σ²), wrong by a factor below the level 0.5."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        gain = torch.where(sigma < 0.4999, self.factor, 1.0) / (1 + sigma**2)
        return expand(gain, x) * x


@pytest.mark.parametrize(("factor", "zero"), [(1.0, True), (1.3, False), (0.7, False)])
def test_consistency_vanishes_for_the_true_denoiser_alone(factor: float, zero: bool) -> None:
    """For a Gaussian prior the reverse kernel has the right mean at any step: the expectation is exactly 0 for the true D."""
    x = Rng.for_draws(1, range(ROWS), 1).normal(torch.zeros(ROWS, 1, 2, 2, dtype=F64))
    noise = Gaussian(torch.full((1,), 0.5, dtype=F64))
    batch = MeasuredBatch(Observation(noise.sample(x, Rng.for_draws(2, range(ROWS), 1)), Identity((1, 2, 2)), noise))
    loss = Consistency(LogUniform(0.05, 20.0), 1.0, ratio=20.0)  # t = σ_n: above, D is true
    assert not loss.unbiased
    values = loss(Shrinkage(factor), batch, Rng.for_draws(3, range(ROWS), 1))
    z = float(values.mean() / values.std()) * ROWS**0.5
    assert abs(z) <= 5 if zero else z > 20
