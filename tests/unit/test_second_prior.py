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
    assert float((second.mean() - expected).norm() / expected.norm()) < 1e-5
    image = white(1, 1, SIZE, SIZE, seed=4)
    null = null_part(image, gain)
    assert float((second.null_part(image) - null).norm() / null.norm()) < 1e-5
    other = SecondPrior(data, 4 * spectrum).null_part(image)
    assert float((other - null).norm() / null.norm()) > 0.02  # another spectrum is another null part


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
def test_spectrum_of_draws_is_the_one_that_made_them(shape: tuple[int, int]) -> None:
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
    true = torch.exp(-3 * torch.hypot(rows[:, None], columns))
    draws = torch.fft.ifft2(true.sqrt() * torch.fft.fft2(white(4000, 1, *shape))).real
    found = ring_spectrum(draws)
    assert found.shape == (1, *shape)
    assert float((found / true - 1).abs().max()) < 0.2  # a ring is one frequency step wide, over which S falls by 17 %
    assert float((ring_spectrum(3 * draws) / found / 9 - 1).abs().max()) < 1e-9


@pytest.mark.parametrize("signal_to_noise", [100.0, 1000.0, 3000.0])
def test_of_bright_objects_too_the_second_mean_is_exact_to_a_tenth_of_its_sigma(signal_to_noise: float) -> None:
    """In float32, as products are made: what is left of the solver must not look like a move of the mean."""
    size = 64
    line = torch.fft.fftfreq(size, dtype=torch.float64)
    nu = torch.hypot(line[:, None], line)
    transfer, spectrum = torch.exp(-2 * (math.pi * 2.5 * nu) ** 2), (1 + (nu / 0.03) ** 2) ** -2
    truth = torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(white(1, 1, size, size, seed=5))).real
    signal = torch.fft.ifft2(transfer * torch.fft.fft2(truth)).real
    std = float(signal.norm()) / signal_to_noise
    y = signal + std * white(1, 1, size, size, seed=6)
    kernel = torch.fft.fftshift(torch.fft.ifft2(transfer).real)[None, None]
    data = Observation(y.float(), PeriodicConvolution(kernel.float(), 1, (size, size)), Gaussian(torch.tensor([std])))
    gain = wiener_gain(transfer, spectrum, torch.tensor(std**2, dtype=torch.float64))
    exact = torch.fft.ifft2(torch.where(gain > 0, gain / transfer, 0.0) * torch.fft.fft2(y)).real
    sigma = float((spectrum * (1 - gain)).mean().sqrt())
    assert float((SecondPrior(data, spectrum[None]).mean() - exact).abs().max()) < 0.1 * sigma


def test_a_faint_band_has_its_own_spectrum() -> None:
    """Bands do not lend each other power: the null part of a faint one is that of the same band alone."""
    data, _, _ = problem()
    draws = white(8, 1, SIZE, SIZE, seed=7) * 0.05
    both = torch.cat([draws, 100 * draws], 1)
    alone = SecondPrior.fitted(data, draws)
    pair = Observation(data.y.expand(-1, 2, -1, -1), PeriodicConvolution(data.operator.kernel, 2, (SIZE, SIZE)), data.noise)
    together = SecondPrior.fitted(pair, both)
    image = white(1, 1, SIZE, SIZE, seed=8)
    found = together.null_part(torch.cat([image, torch.zeros_like(image)], 1))[:, :1]
    assert float((found - alone.null_part(image)).norm() / image.norm()) < 1e-4


def test_signal_to_noise_of_data_is_that_of_their_excess() -> None:
    noise = Gaussian(torch.tensor([2.0]))
    bright = Observation(torch.full((1, 1, 4, 4), 6.0), Identity((1, 4, 4)), noise)
    assert signal_to_noise(bright) == pytest.approx(math.sqrt(16 * 9 - 16))
    assert signal_to_noise(Joint((bright, bright))) == pytest.approx(math.sqrt(2 * (16 * 9 - 16)))
    faint = Observation(torch.ones(1, 1, 4, 4), Identity((1, 4, 4)), noise)
    assert signal_to_noise(faint) == 0.0
    assert signal_to_noise(Flat((1, 4, 4))) == 0.0
