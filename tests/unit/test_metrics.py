"""Metrics against closed forms, against GalSim's adaptive moments, and with what each must notice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.uncertainty.metrics import (
    adaptive_moments,
    aperture_flux,
    crps,
    interval_hits,
    masked_mean,
    psnr,
    ring_correlation,
    spread_and_error,
    ssim,
)


def normal(seed: int, *shape: int) -> Tensor:
    return Rng.for_draws(seed, range(shape[0]), 1).normal(torch.zeros(shape, dtype=torch.float64))


def gaussian(size: int, covariance: tuple[float, float, float], centre: tuple[float, float]) -> Tensor:
    """exp(−½ δᵀM⁻¹δ) with M = (rr, cc, rc): (1, size, size)."""
    rr, cc, rc = covariance
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    dr, dc = row - centre[0], column - centre[1]
    return torch.exp(-0.5 * (cc * dr**2 + rr * dc**2 - 2 * rc * dr * dc) / (rr * cc - rc**2))[None]


def test_psnr_is_the_peak_of_the_truth_over_the_rms_error() -> None:
    truth = normal(0, 2, 1, 8, 8)
    truth = truth / truth.flatten(1).amax(1).reshape(-1, 1, 1, 1) * torch.tensor([5.0, 20.0]).reshape(-1, 1, 1, 1)
    assert torch.allclose(psnr(truth + 0.5, truth), torch.tensor([20.0, 20 * math.log10(40)], dtype=torch.float64), atol=1e-12)
    assert torch.isclose(psnr(3 * truth, 3 * (truth + 0.5)), psnr(truth, truth + 0.5), atol=1e-12).all()


def ssim_by_loops(x: Tensor, y: Tensor) -> float:
    """The definition, window by window, for one image."""
    offset = torch.arange(-5, 6, dtype=torch.float64)
    weight = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    weight = weight / weight.sum()
    span = y.max() - y.min()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(torch.stack(values).mean())


def test_ssim_equals_its_definition() -> None:
    truth = gaussian(16, (9.0, 4.0, 1.0), (7.0, 8.0)) * 10
    image = truth + 0.3 * normal(1, 1, 16, 16) + 0.1
    assert float(ssim(image[None], truth[None])) == pytest.approx(ssim_by_loops(image[0], truth[0]), abs=1e-12)
    assert float(ssim(truth[None], truth[None])) == pytest.approx(1, abs=1e-12)


def test_ssim_takes_the_range_of_the_truth() -> None:
    truth, image = gaussian(16, (9.0, 4.0, 1.0), (7.0, 8.0))[None], gaussian(16, (16.0, 9.0, 1.0), (7.0, 8.0))[None]
    assert not torch.isclose(ssim(3 * image, truth), ssim(truth, 3 * image), atol=1e-3)


def test_aperture_flux_of_a_constant_is_the_area_of_the_circle() -> None:
    flux = aperture_flux(torch.full((2, 1, 65, 64), 2.0), 15.0)
    assert flux.shape == (2, 1)
    # Ten subpixels a side: an error of order rim/100 × √(1/(10 · rim)) pixels, far below a tenth of a per cent.
    assert torch.allclose(flux, torch.tensor(2 * math.pi * 15**2, dtype=torch.float64), rtol=1e-3)
    assert not torch.allclose(aperture_flux(torch.full((1, 64, 64), 2.0), 15.2), flux[0], rtol=1e-3)


def test_aperture_flux_is_about_the_centre_of_the_field() -> None:
    image = gaussian(64, (4.0, 4.0, 0.0), (31.5, 31.5))
    assert float(aperture_flux(image, 10.0)) == pytest.approx(8 * math.pi * (1 - math.exp(-100 / 8)), rel=2e-3)
    assert float(aperture_flux(image.roll(20, -1), 10.0)) < 0.01


def test_ring_correlation_sees_only_its_ring() -> None:
    axis = torch.arange(64, dtype=torch.float64)
    wave = lambda cycles, phase: torch.cos(2 * math.pi * cycles * axis / 64 + phase).expand(64, 64)[None, None]
    image, truth = 5 * wave(4, 0.0) + wave(12, 0.4), wave(4, 1.0) + 2 * wave(12, 0.0)
    ring = lambda low, high: float(ring_correlation(image, truth, low, high))
    assert ring(10 / 64, 14 / 64) == pytest.approx(math.cos(0.4), abs=1e-9)
    assert ring(3 / 64, 5 / 64) == pytest.approx(math.cos(1.0), abs=1e-9)


def test_ring_correlation_ignores_scale_and_falls_with_noise() -> None:
    truth = normal(2, 64, 1, 32, 32)
    noisy = 7 * (truth + normal(3, 64, 1, 32, 32))
    mean = float(ring_correlation(noisy, truth, 0.125, 0.25).mean())
    # E r = 1/√2 for equal powers; a ring holds ~150 of 1024 frequencies (half of them free), 64 images: s.e. below .01.
    assert mean == pytest.approx(math.sqrt(0.5), abs=0.04)
    assert torch.allclose(ring_correlation(truth, truth, 0.125, 0.25), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("covariance", [(4.0, 4.0, 0.0), (9.0, 4.0, 2.0), (3.0, 12.0, -3.0)])
def test_adaptive_moments_of_a_gaussian_are_its_own(covariance: tuple[float, float, float]) -> None:
    rr, cc, rc = covariance
    found = adaptive_moments(gaussian(64, covariance, (30.3, 33.1)))
    expected = torch.tensor(
        [30.3, 33.1, (rr * cc - rc**2) ** 0.25, (cc - rr) / (cc + rr), 2 * rc / (cc + rr)], dtype=torch.float64
    )
    assert bool(found.converged)
    got = torch.cat([found.row, found.column, found.size, found.e1, found.e2])
    assert torch.allclose(got, expected, atol=3e-4)  # the tolerance of the iteration times its gain 1/(1 − ½), and e/size ≲ 10


def test_adaptive_moments_agree_with_galsim_on_a_cuspy_profile() -> None:
    galsim = pytest.importorskip("galsim", reason="galsim is not installed")
    profile = galsim.Convolve(galsim.Sersic(3.0, half_light_radius=3.0).shear(e1=0.3, e2=-0.2), galsim.Gaussian(fwhm=2.0))
    image = profile.shift(0.4, -0.7).drawImage(nx=64, ny=64, scale=1.0, method="no_pixel")
    theirs = galsim.hsm.FindAdaptiveMom(image)
    ours = adaptive_moments(torch.from_numpy(image.array)[None])
    got = [float(v) for v in (ours.size, ours.e1, ours.e2, ours.column + 1, ours.row + 1)]
    wanted = [theirs.moments_sigma, theirs.observed_e1, theirs.observed_e2, theirs.moments_centroid.x, theirs.moments_centroid.y]
    assert got == pytest.approx(wanted, abs=1e-3)  # GalSim stops at 1e-3 a step


def test_adaptive_moments_do_not_depend_on_batch_mates() -> None:
    images = torch.cat([gaussian(64, (4.0, 4.0, 0.0), (31.0, 31.0)), gaussian(64, (30.0, 9.0, 5.0), (28.0, 35.0))])
    together, alone = adaptive_moments(images), adaptive_moments(images[1:])
    assert torch.equal(together.e1[1:], alone.e1) and torch.equal(together.size[1:], alone.size)


def test_adaptive_moments_of_an_empty_or_negative_image_are_nan() -> None:
    images = torch.stack([torch.zeros(32, 32), -gaussian(32, (4.0, 4.0, 0.0), (16.0, 16.0))[0].float(), torch.ones(32, 32)])
    found = adaptive_moments(images)
    assert not found.converged.any()
    assert found.size.isnan().all() and found.e1.isnan().all()


def test_adaptive_moments_want_single_images() -> None:
    with pytest.raises(ShapeError, match=r"\(N, H, W\)"):
        adaptive_moments(torch.zeros(2, 1, 8, 8))


def draws(spread: float, rows: int = 400, number: int = 32) -> tuple[Tensor, Tensor]:
    """Draws of N(0, spread²) and truths of N(0, 1), 16 pixels each."""
    return spread * normal(5, rows, number, 16), normal(6, rows, 16)


def test_interval_hits_cover_their_level() -> None:
    samples, truth = draws(1.0)
    share = float(interval_hits(samples, truth, 0.9).double().mean())
    assert share == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / truth.numel()))
    narrow = float(interval_hits(*draws(0.8), 0.9).double().mean())
    assert narrow < 0.9 - 5 * math.sqrt(0.09 / truth.numel())


def test_spread_equals_error_for_honest_draws() -> None:
    mask = torch.ones(400, 16, dtype=torch.bool)
    ratio = lambda s: math.sqrt(*(a / b for a, b in [tuple(v.mean() for v in spread_and_error(*draws(s, number=4), mask))]))
    # Var of the mean of 6,400 squares is 2/6400 and the spread adds a third of it: 5 σ of the ratio is 0.05.
    assert ratio(1.0) == pytest.approx(1, abs=0.05)
    assert ratio(0.8) < 0.95


def test_spread_and_error_keep_to_the_mask() -> None:
    samples, truth = draws(1.0, rows=2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :3] = True
    spoiled = truth.clone()
    spoiled[:, 3:] = 1e6
    for clean, dirty in zip(spread_and_error(samples, truth, mask), spread_and_error(samples, spoiled, mask), strict=True):
        assert torch.equal(clean, dirty)


def test_masked_mean_of_an_empty_mask_is_nan() -> None:
    values, mask = torch.ones(2, 4), torch.tensor([[True] * 4, [False] * 4])
    found = masked_mean(values, mask)
    assert found[0] == 1 and found[1].isnan()


def test_crps_equals_the_mean_over_pairs() -> None:
    samples, truth = draws(1.0, rows=3, number=5)
    pairs = (samples[:, :, None] - samples[:, None]).abs().sum((1, 2)) / (5 * 4)
    direct = (samples - truth[:, None]).abs().mean(1) - pairs / 2
    assert torch.allclose(crps(samples, truth), direct, atol=1e-12)


def test_crps_is_unbiased_and_least_for_honest_draws() -> None:
    score = lambda s: float(crps(*draws(s, number=8)).mean())
    # E|x − t| − ½E|x − x'| = 2/√π − 1/√π for two standard normals; its standard deviation a pixel is about ½.
    assert score(1.0) == pytest.approx(1 / math.sqrt(math.pi), abs=5 * 0.5 / math.sqrt(6400))
    assert score(0.5) > score(1.0) + 0.02
    assert score(2.0) > score(1.0) + 0.05
