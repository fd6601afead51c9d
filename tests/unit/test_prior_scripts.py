"""What bench_priors measures with: 0 for the same images, right for Gaussians, and the toys are what they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import prior_blobs
import prior_blurred
import prior_manifold
import prior_masked
import prior_quality

from diffinv.core.rng import Rng

F64 = torch.float64


def cloud(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + Rng.for_draws(seed, range(count), 1).normal(torch.zeros(count, 3, dtype=F64))


def test_the_transport_cost_of_shifted_clouds_is_half_the_squared_shift() -> None:
    """Shifting each point by δ is the best pairing of a cloud with itself shifted, ½|δ|² = 1.5 · 0.5², in whatever order."""
    a, b = cloud(200, 0), cloud(200, 0, shift=0.5)
    assert prior_quality.transport_cost(a, b.flip(0)) == pytest.approx(0.375)
    assert prior_quality.transport_cost(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    assert 0 < prior_quality.transport_cost(a, cloud(200, 1)) < 0.375


def test_quality_is_perfect_for_the_images_themselves_and_tells_others() -> None:
    x = prior_blobs.blobs(64)
    same = prior_quality.quality(x, x)
    assert all(value == pytest.approx(0, abs=1e-9) for value in same.values())
    noisy = prior_quality.quality(x + 0.2 * Rng.for_draws(1, range(64), 1).normal(x), x)
    assert noisy["power, worst ring, dB"] > 10
    assert noisy["sliced W1"] > 0


def test_blobs_have_the_stated_rms_and_do_not_depend_on_their_number() -> None:
    x = prior_blobs.blobs(4096)
    assert float(x.square().mean().sqrt()) == pytest.approx(prior_blobs.RMS, rel=0.02)
    torch.testing.assert_close(prior_blobs.blobs(3), x[:3])


def test_the_network_has_the_stated_size() -> None:
    count = sum(p.numel() for p in prior_blobs.network(prior_blobs.Size(), 0).parameters())
    assert 0.75e6 < count < 0.85e6


def test_the_curve_is_a_curve_of_unit_spread_and_its_gaussian_has_its_moments() -> None:
    x = prior_manifold.curve(4000, 0)
    torch.testing.assert_close(x.square().mean(0), torch.ones(5), rtol=0.1, atol=0)
    near = torch.cdist(x[:200], x).topk(2, largest=False).values[:, 1]
    assert float(near.median()) < 0.02  # one dimension: 4,000 points on a length of some 20
    found = prior_manifold.gaussian(prior_manifold.seen(4000, 0).data.observation)
    error = found.covariance - torch.cov(x.T)
    assert float(error.norm() / torch.cov(x.T).norm()) < 0.15


def test_masks_hide_three_quarters_and_do_not_depend_on_the_number_of_images() -> None:
    x = prior_blobs.blobs(200)
    batch = prior_masked.masked(x, 0)
    shown = batch.observation.y != 0
    assert float(shown.double().mean()) == pytest.approx(prior_masked.SHOWN, abs=5 * 0.43 / shown.numel() ** 0.5)
    noise = (batch.observation.y - x)[shown]
    assert float(noise.std()) == pytest.approx(prior_masked.SIGMA_N, rel=0.02)
    torch.testing.assert_close(prior_masked.masked(x[:3], 0).observation.y, batch.observation.y[:3])
    assert not torch.equal(prior_masked.masked(x[:3], 1).observation.y != 0, shown[:3])


def test_interpolated_data_are_the_convolution_that_is_said() -> None:
    """Without noise, of a PSF that hides what is finer than the data's Nyquist frequency; a shift by a pixel is told apart."""
    axis = torch.arange(63) - 31.0
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / 2 / 3.0**2)[None, None]
    kernel = (kernel / kernel.sum()).expand(2, 1, 63, 63)
    place = torch.arange(64) - 31.5
    blob = lambda row, column: torch.exp(-((place[:, None] - row) ** 2 + (place - column) ** 2) / 2 / 1.5**2)
    truth = torch.stack([blob(0, 0), blob(-4, 3)])[:, None]
    data = prior_blurred.GalaxySet(
        "set", ("a", "b"), truth, torch.zeros(2, 1, 32, 32), torch.full((2, 1, 32, 32), 1e-4), kernel, 1.0
    )
    seen = replace(data, data=data.operator()(truth))
    scale = seen.scale().float()[:, None, None, None]
    found = prior_blurred.interpolated(seen, seen.scale().float())
    torch.testing.assert_close(found.operator(truth / scale), found.y, rtol=0, atol=1e-4 * float(found.y.max()))
    moved = found.operator(truth.roll(1, -1) / scale)
    assert float((moved - found.y).abs().max()) > 0.05 * float(found.y.max())
