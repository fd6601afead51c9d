"""Mixtures of clean, simulated and noisy images: each row keeps its image, its noise and its stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.ambient import Ambient
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.topping import floor
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import QuarterTurns
from diffinv.priors.analytic import FourierGaussianPrior
from diffinv.schedules import LogUniform
from diffinv.training.augment import GalaxyViews, GroupViews
from diffinv.training.sources import Certain, CleanImages, Measured, Mixture
from tests.trainings import fields

SHAPE = (1, 8, 8)
LEVELS = LogUniform(0.02, 20.0)


def noisy(count: int, std: Tensor) -> Measured:
    y = 5 + Rng.for_draws(3, range(count), 1).normal(torch.zeros(count, *SHAPE))
    return Measured(MeasuredBatch(Observation(y, Identity(SHAPE), Gaussian(std))))


def clean(count: int) -> Certain:
    return Certain(CleanImages(fields(count), GalaxyViews(shift=1)))


def mixture() -> Mixture:
    return Mixture((clean(4), noisy(6, torch.tensor([0.5])), noisy(3, torch.full((3, *SHAPE), 2.0))), (2, 1, 1))


def test_rows_come_in_the_order_that_was_asked_for_with_noise_of_their_own() -> None:
    index = torch.tensor([16, 0, 9, 5, 8, 0])
    batch = mixture().batch(index, Rng.for_draws(0, index, 1))
    assert len(mixture()) == 17
    levels = floor(batch.observation.noise, batch.observation.y)
    assert [round(v, 3) for v in levels.tolist()] == [2.0, 0.0, 0.5, 0.0, 0.5, 0.0]
    torch.testing.assert_close(batch.observation.y[2], noisy(6, torch.tensor([0.5])).data.observation.y[1])
    torch.testing.assert_close(batch.observation.y[1], batch.observation.y[5])
    for k, number in enumerate(index.tolist()):
        alone = mixture().batch(torch.tensor([number]), Rng.for_draws(0, [number], 1))
        torch.testing.assert_close(alone.observation.y[0], batch.observation.y[k], rtol=0, atol=0)


def test_views_and_noise_levels_are_independent() -> None:
    """A view of a part is not chosen by the numbers that choose the level of noise: every turn meets every level."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., 0, 0] = 1.0
    source, count = Mixture((Certain(CleanImages(image, GroupViews(QuarterTurns()))),), (1,)), 4096
    rng = Rng.for_draws(0, range(count), 1)
    turn = source.batch(torch.zeros(count, dtype=torch.int64), rng).x.flatten(1).argmax(1)
    level = rng.uniform(torch.zeros(count, 1))[:, 0]
    means = torch.stack([level[turn == place].mean() for place in turn.unique()])
    assert len(means) == 4 and float((means - 0.5).abs().max()) < 0.05


def test_a_part_is_drawn_as_often_as_it_counts() -> None:
    index = torch.arange(17)
    y = mixture().batch(index, Rng.for_draws(0, index, 1)).observation.y
    assert int((y.flatten(1).mean(1) < 3).sum()) == 8  # the clean images, twice


def test_certain_images_train_every_level_like_clean_ones() -> None:
    """t − x = σ_n²/τ z ~ ε² rms²/σ: the same draws give the loss of denoising score matching up to the rounding of σ."""
    index = torch.arange(4)
    source = clean(4)
    prior = FourierGaussianPrior(torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE))
    x = source.source.batch(index, Rng.for_draws(0, index, 1))
    batch = source.batch(index, Rng.for_draws(0, index, 1))
    assert batch.x is not None
    rng = lambda: Rng.for_draws(1, index, 1)
    expected = DenoisingScoreMatching(LEVELS, 1.0)(prior, x, rng())
    torch.testing.assert_close(Ambient(LEVELS, 1.0)(prior, batch, rng()), expected.to(batch.x), rtol=1e-4, atol=0)


def test_what_does_not_mix_is_refused() -> None:
    y = fields(2)
    counts = Measured(MeasuredBatch(Observation(y, Identity(SHAPE), Poisson(torch.ones(1), torch.ones(1)))))
    other = noisy(2, torch.tensor([0.5]))
    with pytest.raises(DiffinvError, match="Poisson does not mix"):
        Mixture((counts, other), (1, 1)).batch(torch.tensor([0, 3]), Rng.for_draws(0, [0, 3], 1))
    small = Measured(MeasuredBatch(Observation(y[..., :4], Identity((1, 8, 4)), Gaussian(torch.ones(1)))))
    with pytest.raises(DiffinvError, match=r"shapes \[\(1, 8, 4\), \(1, 8, 8\)\]"):
        Mixture((small, other), (1, 1)).batch(torch.tensor([0, 3]), Rng.for_draws(0, [0, 3], 1))
    with pytest.raises(DiffinvError, match="whole number"):
        Mixture((other,), (1, 2))
