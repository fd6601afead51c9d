"""Fine-tuning on one measurement: it helps where the image or its noise is new, and is refused where it only learns the noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.sure import Sure
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.reconstructors.backprojected import BackProjected, plain_unet
from diffinv.reconstructors.base import Reconstructor
from diffinv.training.adapt import adapt, compare, every, gains, unseen_risk
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Measured
from tests.trainings import Filter, reset_accelerate, same

SIZE, LOW, HIGH = 32, 0.1, 0.4
PLAN = TrainingPlan(25, 8, 3e-2, warmup=3, ema_decay=0.8)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def sized(value: float) -> Tensor:
    return torch.full((1,), value)


def blobs(count: int, seed: int) -> Tensor:
    """Round smooth images of random size."""
    width = 3 + 5 * Rng.for_draws(seed, range(count), 1).uniform(torch.zeros(count, 1, 1))
    axis = torch.arange(SIZE) - SIZE / 2 + 0.5
    return torch.exp(-torch.hypot(axis[:, None], axis) / width)[:, None]


def rings(count: int, seed: int) -> Tensor:
    """Images of another kind: a wave that runs outwards."""
    phase = 6 * Rng.for_draws(seed, range(count), 1).uniform(torch.zeros(count, 1, 1))
    axis = torch.arange(SIZE) - SIZE / 2 + 0.5
    return torch.sin(0.6 * torch.hypot(axis[:, None], axis) + phase)[:, None]


def seen(x: Tensor, noise: Noise, seed: int) -> Observation:
    return Observation(noise.sample(x, Rng.for_draws(seed, range(len(x)), 1)), Identity(tuple(x.shape[1:])), noise)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A network that knows blobs and little noise."""
    reset_accelerate()
    torch.manual_seed(0)
    network = BackProjected(plain_unet(1, (8, 16), (1, 1)), residual=True)
    survey = MeasuredBatch(seen(blobs(64, 1), Gaussian(sized(LOW)), 2))
    plan = TrainingPlan(100, 8, 3e-3, warmup=10, ema_decay=0.95)
    return Trainer(network, Recorrupted(0.8), Measured(survey), plan, tmp_path_factory.mktemp("denoiser")).run()


def error(model: nn.Module, observation: Observation, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(observation) - x).square().mean())


@pytest.mark.parametrize("loss", [Sure(), Recorrupted(0.8)], ids=["sure", "recorrupted"])
@pytest.mark.parametrize("kind", ["more noise", "other images"])
def test_adaptation_to_one_image_lowers_its_true_error(denoiser: nn.Module, loss: Loss, kind: str) -> None:
    x, sigma = (blobs(1, 7), HIGH) if kind == "more noise" else (rings(1, 7), LOW)
    observation = seen(x, Gaussian(sized(sigma)), 8)
    start = {name: t.clone() for name, t in denoiser.state_dict().items()}
    found = adapt(denoiser, loss, observation, PLAN, share=0.8, parts=gains)
    assert found.kept and found.gain > found.error > 0
    assert abs(found.before - found.after - found.gain) <= 1e-4 * found.before + 1e-6
    assert error(found.model, observation, x) < 0.85 * error(denoiser, observation, x)
    assert all(torch.equal(t, start[name]) for name, t in denoiser.state_dict().items())


def test_noise_learnt_by_heart_is_refused_though_the_loss_on_the_same_data_fell(denoiser: nn.Module, tmp_path: Path) -> None:
    observation = seen(blobs(1, 9), Gaussian(sized(LOW)), 10)
    plan = replace(PLAN, steps=60, learning_rate=1e-2)
    found = adapt(denoiser, Sure(), observation, plan, share=0.8, parts=every)
    assert not found.kept and same(found.model, denoiser)
    assert found.gain < -3 * found.error

    def sure(model: nn.Module) -> float:
        rows = MeasuredBatch(replace(observation, y=observation.y.expand(64, -1, -1, -1)))
        with torch.no_grad():
            return float(Sure()(model, rows, Rng.for_draws(77, range(64), 1)).mean())

    fitted = BackProjected(plain_unet(1, (8, 16), (1, 1)), residual=True)
    fitted.load_state_dict(denoiser.state_dict())
    fitted = Trainer(fitted, Sure(), Measured(MeasuredBatch(observation)), plan, tmp_path).run()
    assert sure(fitted) < sure(denoiser)  # with probes that neither has seen
    assert error(fitted, observation, blobs(1, 9)) > 3 * error(denoiser, observation, blobs(1, 9))


def correlated() -> Noise:
    lag = torch.tensor([0.3, 1.0, 0.3])
    return CorrelatedGaussian.from_correlation(sized(0.5), (lag[:, None] * lag)[None, None], (8, 8), white=0.0)


@pytest.mark.parametrize("noise", [Gaussian(sized(0.5)), correlated(), Poisson(sized(4.0), sized(0.0))], ids=type)
def test_the_gain_is_unbiased_and_its_error_is_its_scatter(noise: Noise) -> None:
    """z = (gain − true gain)/error has mean 0 and standard deviation 1, and the risk of y₁ is met on average."""
    rows = 1500
    x = 2 + Rng.for_draws(3, range(rows), 1).uniform(torch.zeros(rows, 1, 1, 1)) * torch.ones(1, 1, 8, 8)
    data = seen(x, noise, 4)
    (y, first), (y2, second) = noise.split(data.y, Rng.for_draws(5, range(rows), 1), share=0.7)
    batch = MeasuredBatch(Observation(y, data.operator, first), second=Observation(y2, data.operator, second))
    start, tuned = Filter(), Filter()
    nn.init.constant_(tuned.conv.weight, 0.1)
    gain, size = compare(start, tuned, batch, Rng.for_draws(6, range(rows), 1))
    with torch.no_grad():
        risks = [(m(batch.data) - x).square().flatten(1).mean(1) for m in (start, tuned)]
    z = (gain - (risks[0] - risks[1])) / size
    assert abs(float(z.mean())) <= 4.5 / rows**0.5
    assert abs(float(z.std()) - 1) <= 4.5 / (2 * rows) ** 0.5 + 0.03
    off = unseen_risk(tuned, batch) - risks[1]
    assert abs(float(off.mean())) <= 4.5 * float(off.std()) / rows**0.5


def test_masked_data_count_nowhere() -> None:
    mask = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., :9] = False
    observation = seen(blobs(1, 1), Gaussian(sized(HIGH), mask), 2)
    spoilt = replace(observation, y=observation.y.where(mask, torch.nan))
    plan = replace(PLAN, steps=3)
    first, again = (adapt(Filter(), Sure(), data, plan, share=0.8, parts=every) for data in (observation, spoilt))
    assert (first.gain, first.error) == (again.gain, again.error)
    assert same(first.model, again.model)


def test_what_cannot_be_adapted_is_refused(denoiser: nn.Module) -> None:
    observation = seen(blobs(2, 1), Gaussian(sized(LOW)), 2)
    with pytest.raises(DiffinvError, match="2 measurements"):
        adapt(denoiser, Sure(), observation, PLAN, share=0.8, parts=gains)
    model: Reconstructor = Filter()
    with pytest.raises(DiffinvError, match="nothing to adapt"):
        adapt(model, Sure(), observation.select([0]), PLAN, share=0.8, parts=gains)
