"""Every unbiased loss has the expected gradient of its oracle, for each noise and operator that it claims; others are refused.

The gradient of a row with respect to parameters of its own is compared over thousands of rows: a z-test of the paired
difference, |z| ≤ 5 in each of the parameters. Mutants of every loss must fail it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, mean_good
from diffinv.losses.derivative import ForwardMode
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import RandomHiding, Splitting
from diffinv.losses.supervised import Noise2Noise
from diffinv.losses.sure import FirstOrderSure, ShiftedSure, Sure, probe
from diffinv.losses.unsure import Unsure, White
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.base import LinearOperator
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import clean_data, good_data, whole
from tests.cases.losses import CASES as EVERY_LOSS
from tests.cases.losses import DENOISERS, EVERY, VARIANTS, LossCase
from tests.cases.noise import CASES as NOISES
from tests.cases.operators import CASES as OPERATORS
from tests.cases.operators import draw

F64 = torch.float64
CASES = {name: case for name, case in EVERY_LOSS.items() if name not in DENOISERS}
LINEAR = ("convolution", "mask", "sum_pool", "masked_fourier", "band_mixing", "radon", "affine", "compose")


class Toy(Reconstructor):
    """x̂ = a tanh(c v) + d v + e roll(v), v = Aᵀy: four parameters a row, (B, 4); curved unless `affine`."""

    def __init__(self, rows: int, *, affine: bool = False) -> None:
        super().__init__()
        start = torch.tensor([0.0 if affine else 0.7, 0.8, 0.4, -0.3], dtype=F64)
        self.theta = torch.nn.Parameter(start.expand(rows, 4).clone())

    def forward(self, observation: Observation) -> Tensor:
        v = observation.operator.adjoint(clean_data(observation))
        a, c, d, e = (expand(p, v) for p in self._rows(v.shape[0]).unbind(1))
        return a * torch.tanh(c * v) + d * v + e * v.roll(1, -1)

    def _rows(self, batch: int) -> Tensor:
        return self.theta.repeat_interleave(batch // len(self.theta), 0)

    def score(self, observation: Observation) -> Tensor:
        return self(observation)


def gradients(values: Tensor, model: Toy) -> Tensor:
    """∂ value/∂θ of each row: (B, 4)."""
    return torch.autograd.grad(values.sum(), model.theta)[0]


def z_values(loss: Loss, batch: MeasuredBatch, *, affine: bool = False) -> Tensor:
    """Mean paired difference of loss and oracle gradient over its standard error: (4,); 0 where a parameter has no say.

    affine: those of the affine parameters, at an affine model.
    """
    rows = batch.observation.y.shape[0]
    model, rng = Toy(rows, affine=affine), lambda: Rng.for_draws(11, range(rows), 1)
    difference = gradients(loss(model, batch, rng()), model) - gradients(loss.oracle(model, batch, rng()), model)
    error = difference.std(0) / rows**0.5
    rounding = 1e-12 * difference.abs().amax().clamp_min(1e-300)
    z = difference.mean(0) / torch.where(error > rounding, error, torch.inf)
    return z[2:] if affine else z


def measured(noise_name: str, rows: int) -> MeasuredBatch:
    """Images seen directly under one of the noises, with two exposures."""
    case = NOISES[noise_name]()
    noise = case.noise.repeat(rows // 2)
    x = case.mean.clamp_min(0.6).repeat_interleave(rows // 2, 0)  # above every floor: there E[y | x] = x
    exposures = [noise.sample(x, Rng.for_draws(seed, range(rows), 1)) for seed in (1, 2)]
    first, second = (Observation(y, Identity(tuple(x.shape[1:])), noise) for y in exposures)
    return MeasuredBatch(first, x, second)


def imaged(operator_name: str, rows: int) -> MeasuredBatch:
    """White noise behind one of the operators, with two exposures."""
    operator: LinearOperator = OPERATORS[operator_name]().repeat(rows // 2)
    x = draw(rows, *operator.in_shape, seed=4)
    noise = Gaussian(torch.full((1,), 0.5, dtype=F64))
    mean = operator(x)
    first, second = (Observation(noise.sample(mean, Rng.for_draws(s, range(rows), 1)), operator, noise) for s in (1, 2))
    return MeasuredBatch(first, x, second)


UNBIASED = {n: c for n, c in {**CASES, **VARIANTS}.items() if c().noises}


@pytest.mark.parametrize(("name", "noise"), [(n, k) for n, c in UNBIASED.items() for k in c().noises])
def test_the_expected_gradient_is_that_of_the_oracle_under_every_noise(name: str, noise: str) -> None:
    case = UNBIASED[name]()
    assert case.loss.unbiased
    z = z_values(case.loss, measured(noise, case.rows))
    assert float(z.abs().max()) <= 5, z


@pytest.mark.parametrize(("name", "noise"), [("sure", "gaussian"), ("shifted_sure", "poisson"), ("shifted_sure", "gamma")])
def test_risk_estimates_have_the_value_of_the_risk_too(name: str, noise: str) -> None:
    """Self-supervised validation reads the value, constants included."""
    case, batch = CASES[name](), measured(noise, 16000)
    rng = lambda: Rng.for_draws(13, range(16000), 1)
    with torch.no_grad():
        difference = case.loss(Toy(16000), batch, rng()) - case.loss.oracle(Toy(16000), batch, rng())
    assert abs(float(difference.mean() / difference.std())) * 16000**0.5 <= 5


OPERATED = {n: c for n, c in UNBIASED.items() if "gaussian" in c().noises and "weighted" not in n}


@pytest.mark.parametrize("operator", LINEAR)
@pytest.mark.parametrize("name", OPERATED)
def test_the_expected_gradient_is_that_of_the_oracle_behind_every_operator(name: str, operator: str) -> None:
    case = OPERATED[name]()
    loss = Splitting(RandomHiding(0.6, together=1)) if operator == "masked_fourier" and name == "splitting" else case.loss
    z = z_values(loss, imaged(operator, case.rows))
    assert float(z.abs().max()) <= 5, z


@pytest.mark.parametrize("noise", ["poisson", "poisson_gaussian", "gamma"])
def test_first_order_sure_is_exact_for_affine_models_and_biased_for_curved_ones(noise: str) -> None:
    batch = measured(noise, 16000)
    assert float(z_values(FirstOrderSure(), batch, affine=True).abs().max()) <= 5
    assert not FirstOrderSure().unbiased
    assert float(z_values(FirstOrderSure(), batch).abs().max()) > 5


def test_unsure_at_the_true_variance_has_the_gradient_of_the_risk_and_at_another_has_not() -> None:
    batch = imaged("convolution", 16000)
    for variance, holds in ((0.25, True), (0.5, False)):
        z = z_values(Unsure(White().start(variance), White()), batch)
        assert bool((z.abs() <= 5).all()) == holds


@pytest.mark.parametrize(
    ("name", "noise"), [(n, k) for n, c in CASES.items() if c().noises for k in EVERY if k not in c().noises]
)
def test_a_noise_without_an_identity_is_refused_with_the_reason(name: str, noise: str) -> None:
    case = CASES[name]()
    with pytest.raises(UnsupportedError, match=r";") as error:
        case.loss.check(measured(noise, 2))
    assert "\n" not in str(error.value)


def test_what_a_loss_needs_is_asked_for_before_training() -> None:
    batch = measured("gaussian", 2)
    with pytest.raises(UnsupportedError, match="one exposure"):
        Noise2Noise().check(replace(batch, second=None))
    with pytest.raises(UnsupportedError, match="no true images"):
        CASES["supervised"]().loss.check(replace(batch, x=None))
    for name in ("noise2void", "neighbor2neighbor", "noise2score"):
        with pytest.raises(UnsupportedError, match="denoising alone"):
            CASES[name]().loss.check(imaged("convolution", 2))
    with pytest.raises(UnsupportedError, match="same noise"):
        CASES["neighbor2neighbor"]().loss.check(batch)


ROWS_TALK = ("multi_operator_imaging",)
MEASURED = [n for n in {**CASES, **VARIANTS} if n not in ROWS_TALK]


def suited(name: str, rows: int) -> MeasuredBatch:
    """A batch that the loss takes."""
    if name == "neighbor2neighbor":
        y = draw(rows, 2, 4, 6)
        return MeasuredBatch(Observation(y, Identity((2, 4, 6)), Gaussian(torch.ones(1, dtype=F64))))
    noises = {**CASES, **VARIANTS}[name]().noises
    return measured("poisson" if name == "first_order_sure" else noises[0] if noises else "gaussian", rows)


@pytest.mark.parametrize("name", MEASURED)
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(name: str) -> None:
    loss, batch = {**CASES, **VARIANTS}[name]().loss, suited(name, 4)
    whole = loss(Toy(4), batch, Rng.for_draws(0, range(4), 1))
    assert whole.shape == (4,)
    assert len(set(whole.tolist())) == 4
    alone = loss(Toy(1), batch.select([2]), Rng.for_draws(0, [2], 1))
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in MEASURED if n not in ("neighbor2neighbor", "noise2score")])
@pytest.mark.parametrize("bad", [torch.nan, 1e6])
def test_masked_data_do_not_matter(name: str, bad: float) -> None:
    loss, batch = {**CASES, **VARIANTS}[name]().loss, suited(name, 4)
    if "splitting, R2R" in name or "recorrupted" in name:
        batch = suited("sure", 4)
    good = good_data(batch.observation)
    assert not bool(good.all())
    spoilt = [replace(o, y=o.y.where(good, bad)) for o in (batch.observation, batch.second)]
    values = []
    for data in (batch, replace(batch, observation=spoilt[0], second=spoilt[1])):
        model = Toy(4)
        value = loss(model, data, Rng.for_draws(0, range(4), 1))
        values.append((value.detach(), gradients(value, model)))
    for plain, changed in zip(*values, strict=True):
        torch.testing.assert_close(changed, plain, rtol=1e-12, atol=1e-12)


class NoDivergence(Sure):
    """Stein without Stein's term."""

    def __call__(self, model, batch, rng):
        data = whole(batch.observation)
        return mean_good((data.operator(model(data)) - data.y) ** 2, good_data(data))


class StdForVariance(Sure):
    """The divergence weighed by σ."""

    def __call__(self, model, batch, rng):
        data, good = whole(batch.observation), good_data(batch.observation)
        omega = probe(data.noise, data.y, rng).where(good, 0.0)
        u, along = ForwardMode()(model, data, omega.abs().sqrt() * omega.sign(), omega)
        return mean_good((u - data.y) ** 2 + 2 * omega.abs().sqrt() * omega.sign() * along, good)


class HalfDivergence(Sure):
    """The factor two forgotten."""

    def __call__(self, model, batch, rng):
        return (super().__call__(model, batch, rng) + NoDivergence()(model, batch, rng)) / 2


class Leaky(Recorrupted):
    """The target is the measurement itself, whose noise y₁ has seen."""

    def __call__(self, model, batch, rng):
        first, _ = self._split(batch, rng)
        data = whole(batch.observation)
        return mean_good((data.operator(model(first)) - data.y) ** 2, good_data(data))


class SameExposure(Noise2Noise):
    """Both exposures are one."""

    def __call__(self, model, batch, rng):
        return super().__call__(model, replace(batch, second=batch.observation), rng)


class Peeking(Splitting):
    """The network sees what is hidden."""

    def _risk(self, model, batch, rng, target, *, oracle):
        data = batch.observation
        keep = self.hiding.keep(data, rng)
        return mean_good((data.operator(model(data)) - target) ** 2, good_data(data) & ~keep)


class Unshifted(ShiftedSure):
    """Evaluated at the data instead of one count below."""

    def _at(self, model, data, move, chosen):
        return super()._at(model, data, replace(move, moved=data.y), chosen)


@dataclass(frozen=True)
class Mutant:
    """flaw; a noise that must show it."""

    loss: Callable[[], Loss]
    noise: str
    rows: int = 16000


MUTANTS = {
    "no divergence": Mutant(NoDivergence, "gaussian"),
    "no divergence, correlated": Mutant(NoDivergence, "gaussian_correlated"),
    "σ for σ²": Mutant(StdForVariance, "gaussian"),
    "half the divergence": Mutant(HalfDivergence, "gaussian"),
    "a target with the noise that was seen, Gaussian": Mutant(lambda: Leaky(0.7), "gaussian"),
    "a target with the noise that was seen, Poisson": Mutant(lambda: Leaky(0.7), "poisson"),
    "a target with the noise that was seen, Gamma": Mutant(lambda: Leaky(0.7), "gamma"),
    "one exposure twice": Mutant(SameExposure, "poisson_gaussian"),
    "hidden data are seen": Mutant(lambda: Peeking(RandomHiding(0.6)), "gaussian"),
    "Poisson data not shifted": Mutant(lambda: Unshifted(6), "poisson"),
    "Gamma data not shifted": Mutant(lambda: Unshifted(6), "gamma"),
}


@pytest.mark.parametrize("flaw", MUTANTS)
def test_a_flawed_loss_is_caught(flaw: str) -> None:
    mutant = MUTANTS[flaw]
    assert float(z_values(mutant.loss(), measured(mutant.noise, mutant.rows)).abs().max()) > 5


def test_white_noise_for_correlated_noise_is_caught() -> None:
    batch = measured("gaussian_correlated", 16000)
    noise = batch.observation.noise
    wrong = replace(batch, observation=replace(batch.observation, noise=Gaussian(noise.std, noise.mask)))
    assert float(z_values(Sure(), wrong).abs().max()) > 5


def test_a_wrong_gain_is_caught() -> None:
    batch = measured("poisson", 12000)
    noise: Poisson = batch.observation.noise
    wrong = replace(batch, observation=replace(batch.observation, noise=replace(noise, gain=2 * noise.gain)))
    assert float(z_values(ShiftedSure(6), wrong).abs().max()) > 5


def test_cases_name_their_noises() -> None:
    for case in [c() for c in {**CASES, **VARIANTS}.values()]:
        assert isinstance(case, LossCase)
        assert set(case.noises) <= set(EVERY) <= set(NOISES)
