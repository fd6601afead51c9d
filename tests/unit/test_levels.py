"""What a training estimates from its data: robust, the same every time, and refused where it would mean nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, InputError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.engine.levels import (
    brightness,
    evenly,
    fingerprint,
    image_scale,
    noise_std,
    prior_scale,
    sampling_weight,
    take,
    white_twin,
)
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.algebra import Diagonal, Identity
from diffinv.operators.fourier import MaskedFourier
from diffinv.operators.sampling import SumPool
from diffinv.training.sources import CleanImages, Measured, Source


def white(rows: int, size: int = 32, stream: int = 0) -> Tensor:
    return Rng.for_draws(stream, range(rows), 1).normal(torch.zeros(rows, 1, size, size))


def source(y: Tensor, second: Tensor | None = None, mask: Tensor | None = None) -> Source:
    noise, operator = Gaussian(torch.ones(1), mask), Identity(tuple(y.shape[1:]))
    other = None if second is None else Observation(second, operator, noise)
    return Measured(MeasuredBatch(Observation(y, operator, noise), None, other))


def test_rows_are_spread_from_the_first_to_the_last() -> None:
    assert evenly(1000, 5).tolist() == [0, 250, 500, 749, 999]
    assert evenly(3, 5).tolist() == [0, 1, 2]


def test_the_scale_is_the_typical_rms_and_one_bright_row_does_not_move_it() -> None:
    y = 3 * white(40)
    assert image_scale(source(y)) == pytest.approx(3, rel=5 / math.sqrt(2 * 32**2))
    y[7] *= 1e6
    assert image_scale(source(y)) == pytest.approx(3, rel=5 / math.sqrt(2 * 32**2))
    with pytest.raises(DiffinvError, match="images' rms is 0"):
        image_scale(source(torch.zeros(4, 1, 8, 8)))


def test_the_scale_is_of_the_image_and_not_of_the_data() -> None:
    operator = SumPool((1, 32, 32), 2)
    flat = Observation(torch.full((4, 1, 16, 16), 8.0), operator, Gaussian(torch.ones(1)))
    assert image_scale(Measured(MeasuredBatch(flat))) == pytest.approx(2.0)


@pytest.mark.parametrize("std", [0.05, 1.0, 4.0])
def test_the_scale_of_a_prior_is_without_the_noise(std: float) -> None:
    """A sampler brings an image, not its data, to the rms that the prior knows."""
    x, data = 3 * white(200), Gaussian(torch.full((1,), std))
    y = x + std * white(200, stream=1)
    found = Measured(MeasuredBatch(Observation(y, Identity((1, 32, 32)), data)))
    assert prior_scale(found) == pytest.approx(3, rel=0.03)
    with pytest.raises(DiffinvError, match="next to nothing but noise"):
        prior_scale(source(torch.zeros(40, 1, 8, 8)))


def test_the_scale_of_a_prior_is_over_the_pixels_that_are_seen() -> None:
    y, good = 3 * white(200), Rng.for_draws(2, range(200), 1).uniform(torch.zeros(200, 1, 32, 32)) < 0.25
    masked = Observation(y.where(good, torch.nan), Identity((1, 32, 32)), Gaussian(torch.full((1,), 0.1), good))
    assert prior_scale(Measured(MeasuredBatch(masked))) == pytest.approx(3, rel=0.03)
    mask = Observation(y * good, Diagonal(good.float()), Gaussian(torch.full((1,), 0.1)))
    assert prior_scale(Measured(MeasuredBatch(mask))) == pytest.approx(3, rel=0.03)


def test_brightness_is_a_high_percentile_whatever_the_size() -> None:
    for size in (32, 128):
        assert brightness(source(white(16, size))) == pytest.approx(2.576, rel=0.05)


def test_brightness_sees_every_column() -> None:
    y = torch.ones(4, 1, 64, 64)
    y[..., 1::2] = 10.0
    assert brightness(source(y)) == 10.0


def test_one_noisy_row_does_not_move_the_level() -> None:
    noisy = 0.3 * white(60)
    noisy[7] *= 1e3
    for second in (None, 0.3 * white(60, stream=1)):
        assert noise_std(source(noisy, second))[0].tolist() == [pytest.approx(0.3, rel=0.03)]


def test_noise_is_seen_through_images_and_masks() -> None:
    slope = torch.linspace(0, 50, 32)[:, None] + torch.zeros(60, 1, 32, 32)
    noisy, again = slope + 0.3 * white(60), slope + 0.3 * white(60, stream=1)
    std, method = noise_std(source(noisy))
    assert (method, std.tolist()) == ("wavelet MAD", [pytest.approx(0.3, rel=0.03)])
    std, method = noise_std(source(noisy, again))
    assert (method, std.tolist()) == ("difference of the exposures", [pytest.approx(0.3, rel=0.03)])
    mask = white(60, stream=2) > -1
    std, _ = noise_std(source(noisy.where(mask, 1e9), mask=mask))
    assert std.tolist() == [pytest.approx(0.3, rel=0.03)]
    with pytest.raises(DiffinvError, match="no noise at all"):
        noise_std(source(slope))


def test_the_finest_detail_of_k_space_is_not_noise() -> None:
    operator = MaskedFourier(torch.ones(1, 8, 8, dtype=torch.bool), 1)
    data = Observation(torch.ones(2, 1, 8, 8, 2), operator, UnknownLevel())
    with pytest.raises(UnsupportedError, match="finest detail of images"):
        noise_std(Measured(MeasuredBatch(data)))


def test_data_are_known_again_by_their_values() -> None:
    y = white(8)
    assert fingerprint(source(y)) == fingerprint(source(y.clone()))
    y[3, 0, 0, 0] += 1e-3
    assert fingerprint(source(y)) != fingerprint(source(white(8)))
    noisier = Measured(MeasuredBatch(Observation(y, Identity((1, 32, 32)), Gaussian(2 * torch.ones(1)))))
    masked = source(y, mask=torch.ones_like(y).bool())
    longer = source(torch.cat([y, y]))
    assert len({fingerprint(each) for each in (source(y), noisier, masked, longer, CleanImages(y, lambda x, rng: x))}) == 5


def test_clean_images_are_no_measurements() -> None:
    with pytest.raises(InputError, match="gives CleanBatch"):
        take(CleanImages(white(4), lambda x, rng: x), torch.tensor([0]))


def test_counts_have_the_white_noise_of_their_mean_rate() -> None:
    y = torch.full((4, 1, 32, 32), 2.0)
    y[:, :, ::2] = 0.0
    counts = Observation(y, Identity((1, 32, 32)), Poisson(torch.tensor([10.0]), torch.tensor([0.0])))
    twin, level = white_twin(counts, None)
    assert level == pytest.approx(math.sqrt(0.1), rel=1e-3)
    assert twin.noise.std.tolist() == [pytest.approx(level)]
    unknown = Observation(y, counts.operator, UnknownLevel(y > 1))
    with pytest.raises(UnsupportedError, match="give identifiability.noise_level"):
        white_twin(unknown, None)
    assert torch.equal(white_twin(unknown, 0.5)[0].noise.mask, y > 1)


def test_the_weight_of_a_datum_is_one_over_how_often_it_is_good() -> None:
    often = torch.tensor([4, 2, 1, 0])  # of four rows
    mask = (torch.arange(4)[:, None] < often).float()[:, None, None, :].expand(4, 1, 4, 4).bool()
    assert sampling_weight(source(white(4, 4), mask=mask))[0, 0, 0].tolist() == [1, 2, 4, 0]
