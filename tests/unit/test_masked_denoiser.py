"""A denoiser that is told of masks: blind where it is told to be, and it fills gaps after a training on masked images alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.incomplete import MaskedAmbient
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.sampling import Mask
from diffinv.priors.masked import MaskAware
from diffinv.priors.unet import UNet
from diffinv.reconstructors.designs import initialise
from diffinv.schedules import LogUniform
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Measured
from tests.trainings import fields, reset_accelerate


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


class Linear(nn.Module):
    """F of an image of 2 × 64 numbers, one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(128, 64, bias=False)
        nn.init.zeros_(self.matrix.weight)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.matrix(x.flatten(1)).reshape(-1, 1, 8, 8)


def model() -> MaskAware:
    found = MaskAware(UNet(2, 1, widths=(8, 16), blocks=(1, 1)), sigma_data=1.0)
    initialise(found, 0)
    nn.init.normal_(found.network.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return found


def test_what_is_not_shown_has_no_say() -> None:
    x, mask = fields(2), fields(2) > 0
    sigma = torch.tensor([0.1, 1.0])
    with torch.no_grad():
        found = model()(x, sigma, mask)
        torch.testing.assert_close(model()(x.where(mask, torch.nan), sigma, mask), found)
        assert not torch.equal(model()(x, sigma), found)


def test_at_no_noise_what_is_shown_stays() -> None:
    x, mask = fields(2), fields(2) > 0
    with torch.no_grad():
        found = model()(x, torch.full((2,), 1e-5), mask)
    torch.testing.assert_close(found[mask], x[mask], rtol=0, atol=1e-3)
    assert bool((found[~mask] != 0).any())


def test_gaps_are_filled_after_a_training_on_masked_images_alone(tmp_path: Path) -> None:
    """Smooth fields, 60 % of the pixels and noise: held-out gaps, whose mean square is 1 a pixel where 0 stands."""
    x = fields(1200)
    x = x / x.std()
    mask = Rng.for_draws(3, range(1200), 1).uniform(x) < 0.6
    noise = Gaussian(torch.full((1,), 0.1))
    y = noise.sample(x, Rng.for_draws(4, range(1200), 1)).where(mask, 0.0)
    data = MeasuredBatch(Observation(y, Mask(mask), noise)).select(slice(0, 1000))
    denoiser = MaskAware(Linear(), sigma_data=1.0)
    plan = TrainingPlan(150, 64, 3e-2, warmup=10, ema_decay=0.9, save_every=150)
    trained = Trainer(denoiser, MaskedAmbient(LogUniform(0.11, 0.5), 1.0, 0.8), Measured(data), plan, tmp_path).run()
    held, gaps = slice(1000, 1200), ~mask[1000:]
    found = trained(y[held], torch.full((200,), 0.12), mask[held])
    assert float((found - x[held])[gaps].square().mean()) < 0.5 * float(x[held][gaps].square().mean())
