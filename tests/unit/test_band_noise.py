"""The noise of a cube that does not say it: measured where channels are mixtures of a few spectra, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.band_noise import channel_noise, with_noise
from diffinv.data.cubes import Cube, masked_cube

CHANNELS, SIDE = 40, 48


def scene(std: np.ndarray, seed: int = 0) -> Cube:
    """Mixtures of three smooth spectra with noise of `std` (K,) in each channel."""
    rng, axis = np.random.default_rng(seed), np.linspace(0, 1, CHANNELS)
    spectra = np.stack([1 + axis, np.exp(-(((axis - 0.4) / 0.2) ** 2)), np.cos(3 * axis) ** 2])
    data = np.tensordot(spectra.T, rng.dirichlet(np.ones(3), SIDE * SIDE).T.reshape(3, SIDE, SIDE), 1)
    data = data + std[:, None, None] * rng.standard_normal(data.shape)
    low = np.arange(1.0, CHANNELS + 1) - 0.5
    return masked_cube(data, None, np.ones(data.shape, bool), low, low + 1, "band")


def test_noise_of_each_channel_is_what_others_do_not_predict() -> None:
    std = np.where(np.arange(CHANNELS) < 20, 0.01, 0.05)
    found = np.mean([channel_noise(scene(std, seed).data.reshape(CHANNELS, -1).T) for seed in range(4)], 0)
    assert (found / std).min() > 0.97
    assert np.median(found / std) == pytest.approx(1, abs=0.08)


def test_independent_channels_give_their_own_scatter() -> None:
    """1/(S⁻¹)_kk of a Wishart matrix S of N − 1 degrees of freedom is σ² χ² of N − K: unbiased however few the spectra."""
    rng = np.random.default_rng(1)
    found = np.mean([channel_noise(rng.standard_normal((60, 10))) ** 2 for _ in range(300)], 0)
    np.testing.assert_allclose(found, 1.0, atol=4 * (2 / 50 / 300) ** 0.5)


def test_a_number_is_everybodys_noise_and_bad_values_have_none() -> None:
    cube = scene(np.full(CHANNELS, 0.01))
    cube.mask[3, 2, 1] = False
    noisy = with_noise(cube, 0.5)
    assert noisy.variance[3, 2, 1] == 0 and noisy.variance[0, 0, 0] == 0.25
    measured = with_noise(cube, "estimate")
    assert measured.variance[0, 0, 0] == measured.variance[0, -1, -1] == pytest.approx(1e-4, rel=0.2)


def test_blank_pixels_and_channels_that_are_bad_everywhere_do_not_count() -> None:
    plain = scene(np.full(CHANNELS, 0.01))
    data, mask = plain.data.copy(), plain.mask.copy()
    data[:, :, : SIDE // 2], mask[7] = 0.0, False
    data[7] = 0.0
    found = with_noise(replace(plain, data=data, mask=mask), "estimate")
    assert (found.variance[7] == 0).all()
    assert np.median(found.variance[:7, 0, -1]) == pytest.approx(1e-4, rel=0.15)
    data[20] = 0.3
    with pytest.raises(InputError, match="channel 21 is 0.3 everywhere"):
        with_noise(replace(plain, data=data, mask=mask), "estimate")


def test_what_cannot_be_measured_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="100 whole spectra of 40 channels are too few"):
        channel_noise(rng.standard_normal((100, CHANNELS)))
    still = rng.standard_normal((400, 10))
    for value in (2.0, 0.1, 1000.1):
        still[:, 4] = value
        with pytest.raises(InputError, match=f"channel 5 is {value:g} everywhere"):
            channel_noise(still)
    still[:, 4] = still[:, 3] - still[:, 5]
    with pytest.raises(InputError, match="exact functions of others"):
        channel_noise(still)
    with pytest.raises(InputError, match="2000 whole spectra of 3 channels are too few"):
        channel_noise(rng.standard_normal((2000, 3)))
    with pytest.raises(InputError, match="whose square is 0"):
        with_noise(scene(np.full(CHANNELS, 0.01)), 1e-200)
    with pytest.raises(InputError, match="would replace the file's variance"):
        with_noise(with_noise(scene(np.full(CHANNELS, 0.01)), 0.1), 0.1)
