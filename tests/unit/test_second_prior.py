"""The second prior: Wiener's closed forms where they hold, spectra that are those of the draws, judgements of data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.engine.judge import signal_to_noise
from diffinv.likelihood import Flat, Joint, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.uncertainty.hallucination import null_part, wiener_gain
from diffinv.uncertainty.second_prior import SecondPrior, ring_spectrum

SIZE, STD = 16, 0.2


def white(*shape: int, seed: int = 0) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def frequency() -> Tensor:
    line = torch.fft.fftfreq(SIZE, dtype=torch.float64)
    return torch.hypot(line[:, None], line)


def problem() -> tuple[Observation, Tensor, Tensor]:
    """Data through a Gaussian blur on the torus, its transfer and the spectrum of the prior."""
    transfer = torch.exp(-2 * (math.pi * 1.2 * frequency()) ** 2)
    spectrum = (1 + (frequency() / 0.15) ** 2) ** -2
    kernel = torch.fft.fftshift(torch.fft.ifft2(transfer).real)[None, None]
    y = white(1, 1, SIZE, SIZE, seed=3)
    noise = Gaussian(torch.tensor([STD], dtype=torch.float64))
    return Observation(y, PeriodicConvolution(kernel, 1, (SIZE, SIZE)), noise), transfer, spectrum


def test_mean_and_null_part_are_wieners_on_the_torus() -> None:
    data, transfer, spectrum = problem()
    second = SecondPrior(data, spectrum)
    gain = wiener_gain(transfer, spectrum, torch.tensor(STD**2, dtype=torch.float64))
    expected = torch.fft.ifft2(gain / transfer * torch.fft.fft2(data.y)).real
    assert float((second.mean() - expected).norm() / expected.norm()) < 5e-3  # the solver stops at 1e-3
    image = white(1, 1, SIZE, SIZE, seed=4)
    null = null_part(image, gain)
    assert float((second.null_part(image) - null).norm() / null.norm()) < 5e-3
    other = SecondPrior(data, 4 * spectrum).null_part(image)
    assert float((other - null).norm() / null.norm()) > 0.02  # another spectrum is another null part


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
def test_spectrum_of_draws_is_the_one_that_made_them(shape: tuple[int, int]) -> None:
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
    true = torch.exp(-3 * torch.hypot(rows[:, None], columns))
    draws = torch.fft.ifft2(true.sqrt() * torch.fft.fft2(white(4000, 1, *shape))).real
    found = ring_spectrum(draws)
    assert found.shape == shape
    assert float((found / true - 1).abs().max()) < 0.2  # a ring is one frequency step wide, over which S falls by 17 %
    assert float((ring_spectrum(3 * draws) / found / 9 - 1).abs().max()) < 1e-9


def test_signal_to_noise_of_data_is_that_of_their_excess() -> None:
    noise = Gaussian(torch.tensor([2.0]))
    bright = Observation(torch.full((1, 1, 4, 4), 6.0), Identity((1, 4, 4)), noise)
    assert signal_to_noise(bright) == pytest.approx(math.sqrt(16 * 9 - 16))
    assert signal_to_noise(Joint((bright, bright))) == pytest.approx(math.sqrt(2 * (16 * 9 - 16)))
    faint = Observation(torch.ones(1, 1, 4, 4), Identity((1, 4, 4)), noise)
    assert signal_to_noise(faint) == 0.0
    assert signal_to_noise(Flat((1, 4, 4))) == 0.0
