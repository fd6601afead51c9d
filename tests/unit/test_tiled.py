"""A prior of small fields on a large one: no seam, no border, nothing changed where one tile is enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.guidance.base import Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.posterior import Posterior
from diffinv.priors.analytic import FourierGaussianPrior, GaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.priors.tiled import Tiled, tile_starts

SIZE = 8
FIELDS = [(8, 8), (8, 13), (16, 16), (19, 12)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Rng.for_draws(seed, range(shape[0]), 1).normal(torch.zeros(shape, dtype=torch.float64))


def stationary(channels: int = 1) -> FourierGaussianPrior:
    """A translation-invariant Gaussian on the tile's torus."""
    frequency = torch.fft.fftfreq(SIZE, dtype=torch.float64)
    power = 20 * torch.exp(-8 * (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()) + 0.01
    shape = (1, channels, SIZE, SIZE)
    return FourierGaussianPrior(torch.full(shape, 0.3, dtype=torch.float64), power.expand(shape).contiguous())


def white(field: tuple[int, int]) -> GaussianPrior:
    count = field[0] * field[1]
    return GaussianPrior(torch.zeros(1, 1, *field, dtype=torch.float64), 4 * torch.eye(count, dtype=torch.float64))


def tiled(prior: Denoiser, field: tuple[int, int], overlap: int = 2) -> Tiled:
    return Tiled(prior, size=SIZE, field=field, overlap=overlap)


def levels(batch: int, value: float = 0.7) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


@pytest.mark.parametrize(("length", "overlap"), [(8, 2), (9, 2), (13, 4), (64, 2), (65, 0), (100, 7)])
def test_tiles_cover_the_field_and_overlap_enough(length: int, overlap: int) -> None:
    starts = tile_starts(length, SIZE, overlap)
    assert starts[0] == 0 and starts[-1] == length - SIZE
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(0 < step <= SIZE - overlap for step in steps)
    assert len(starts) == 1 or (len(starts) - 2) * (SIZE - overlap) + SIZE < length, "one tile fewer would do"


def test_a_field_of_one_tile_is_the_prior_exactly() -> None:
    x = draw(3, 2, SIZE, SIZE)
    prior = stationary(2)
    assert torch.equal(tiled(prior, (SIZE, SIZE))(x, levels(3)), prior(x, levels(3)))


@pytest.mark.parametrize("field", FIELDS)
def test_the_weights_of_the_tiles_sum_to_one(field: tuple[int, int]) -> None:
    """In float32, of up to nine terms: 1e-6."""
    one = tiled(stationary(), field)
    total = one.blend(torch.ones(2, len(one.corners), 3, SIZE, SIZE))
    assert total.shape == (2, 3, *field)
    assert float((total - 1).abs().max()) < 1e-6
    assert float(one.weights.min()) > 0


@pytest.mark.parametrize("field", FIELDS)
def test_tiles_of_an_image_blend_to_that_image(field: tuple[int, int]) -> None:
    class Nothing(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x

    x = draw(2, 1, *field)
    torch.testing.assert_close(tiled(Nothing(), field)(x, levels(2)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("field", FIELDS)
def test_a_constant_image_stays_constant_without_a_seam(field: tuple[int, int]) -> None:
    """m + S(0)/(S(0) + σ²) (c − m) in every pixel."""
    prior = stationary()
    x = torch.stack([torch.full((1, *field), value, dtype=torch.float64) for value in (2.0, -5.0)])
    power = float(prior.spectrum[0, 0, 0, 0])
    expected = 0.3 + power / (power + 0.7**2) * (x - 0.3)
    torch.testing.assert_close(tiled(prior, field)(x, levels(2)), expected, rtol=1e-6, atol=0)


def test_hard_cut_tiles_have_the_seam_that_the_blend_removes() -> None:
    """The mean square jump between columns, at the border over its median: large for a hard cut, as inside for a blend."""
    axis = torch.arange(SIZE, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    covariance = torch.exp(-(torch.cdist(points, points) ** 2) / 8) + 1e-3 * torch.eye(SIZE**2, dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64), covariance)
    x = 0.7 * draw(400, 1, SIZE, 2 * SIZE)
    blended = tiled(prior, (SIZE, 2 * SIZE))(x, levels(400))
    cut = torch.cat([prior(x[..., :SIZE], levels(400)), prior(x[..., SIZE:], levels(400))], -1)
    jump = lambda image: image.diff(dim=-1).square().mean((0, 1, 2))
    ratio = lambda image: float(jump(image)[SIZE - 1] / jump(image).median())
    assert ratio(cut) > 2
    assert ratio(blended) < 1.3


@pytest.mark.parametrize("field", FIELDS[1:])
def test_tiles_of_a_white_prior_are_the_white_prior_of_the_field(field: tuple[int, int]) -> None:
    x = draw(2, 1, *field)
    torch.testing.assert_close(tiled(white((SIZE, SIZE)), field)(x, levels(2)), white(field)(x, levels(2)), rtol=1e-6, atol=1e-6)


def test_guidance_through_tiles_is_guidance_of_the_field() -> None:
    """The pull-back goes through the blend: with a white prior the posterior is that of the untiled field."""
    field, sigma = (8, 13), levels(2)
    likelihood = Observation(draw(2, 1, *field, seed=3), Identity((1, *field)), Gaussian(levels(2, 0.2)))
    guidance = MomentMatching(Gmres(20, 1e-12))
    x = draw(2, 1, *field)
    one, other = (Posterior(p, likelihood, guidance)(x, sigma) for p in (tiled(white((8, 8)), field), white(field)))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    x, sigma = draw(3, 1, 13, 16), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    prior = tiled(stationary(), (13, 16))
    for i in range(3):
        torch.testing.assert_close(prior(x[i : i + 1], sigma[i : i + 1]), prior(x, sigma)[i : i + 1], rtol=1e-12, atol=1e-12)


def test_a_field_of_another_size_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"made for fields \(8, 13\), got \(13, 8\)"):
        tiled(stationary(), (8, 13))(draw(1, 1, 13, 8), levels(1))


def test_a_field_smaller_than_a_tile_is_refused() -> None:
    with pytest.raises(ShapeError, match="pad"):
        tiled(stationary(), (7, 13))
