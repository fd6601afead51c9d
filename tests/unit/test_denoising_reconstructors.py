"""Reconstructors of images that are measured directly, A = s I: conjugate pairs, blind spots and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import ConfigError, ShapeError, UnsupportedError
from diffinv.core.linalg import dense
from diffinv.likelihood import Observation
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Compose, Diagonal, Identity, Scaled
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.artifact_free import ArtifactFree
from diffinv.reconstructors.autoencoder import Bottleneck
from diffinv.reconstructors.blind_spot import BlindSpot, BlindSpotNetwork
from diffinv.reconstructors.observed import identity_scale
from diffinv.reconstructors.tweedie import ScoreReconstructor
from tests.cases.guidance import SHAPE, SIZE, blur, kernels, smooth_prior
from tests.cases.operators import draw, positive
from tests.contracts.test_guidance import levels
from tests.toys import STDS, correlated, counts, electrons, white

EYE = Identity(SHAPE)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Shrink(Denoiser):
    """The denoiser of N(0, 1): x/(1 + σ²), which knows σ."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def data_score(density: Callable[[Tensor], Tensor]) -> nn.Module:
    """∇ log p(y) of an elementwise log-density, by differentiation: no formula of ours is trusted."""

    def score(y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_(True)
            return torch.autograd.grad(density(leaf).sum(), leaf)[0]

    return Function(score)


def test_a_denoiser_answers_white_noise_with_the_noise_level_of_each_row() -> None:
    data = white(EYE)
    expected = data.y / (1 + STDS.reshape(2, 1, 1, 1) ** 2)
    torch.testing.assert_close(ArtifactFree(Shrink())(data), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", [STDS, STDS.reshape(2, 1, 1, 1), STDS.reshape(2, 1, 1, 1).expand(2, *SHAPE)])
def test_the_flux_scale_is_divided_out_of_data_and_noise(std: Tensor) -> None:
    """y = s x + σ z with x ~ N(0, 1): E[x | y] = s y/(s² + σ²), for negative s too."""
    scale = levels(3.0, -0.5)
    data = Observation(draw(2, *SHAPE, seed=3), Compose((Scaled(scale, EYE), EYE)), Gaussian(std))
    s, sigma = scale.reshape(2, 1, 1, 1), STDS.reshape(2, 1, 1, 1)
    torch.testing.assert_close(ArtifactFree(Shrink())(data), s * data.y / (s**2 + sigma**2), rtol=1e-12, atol=1e-12)


def test_a_gaussian_prior_as_a_reconstructor_gives_its_posterior_mean() -> None:
    prior, data = smooth_prior(), white(EYE)
    found = ArtifactFree(prior)(data)
    for row in (0, 1):
        zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
        mean = prior(zero, levels(1e6)).flatten()
        jacobian = dense(lambda v, row=row: prior(v, STDS[[row]].expand(len(v))) - prior(0 * v, STDS[[row]].expand(len(v))), zero)
        exact = mean + jacobian @ (data.y[row].flatten() - mean)
        torch.testing.assert_close(found[row].flatten(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: white(blur(kernels())), "Convolution is not the identity"),
        (lambda: white(Diagonal(positive(2, *SHAPE, seed=1))), "Diagonal is not the identity"),
        (lambda: counts(EYE), "Poisson noise is not white Gaussian"),
        (lambda: correlated(EYE), "CorrelatedGaussian noise is not white"),
        (lambda: replace(white(EYE), noise=Gaussian(positive(2, *SHAPE, seed=1))), "σ differs between the pixels"),
        (lambda: replace(white(EYE), noise=Gaussian(STDS, draw(2, *SHAPE, seed=1) > 0)), "some are masked"),
    ],
)
def test_a_denoiser_refuses_what_is_not_an_image_and_white_noise(data: Callable[[], Observation], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as error:
        ArtifactFree(Shrink())(data())
    assert "use" in str(error.value) and "\n" not in str(error.value)


def test_the_scale_of_an_identity_is_found_however_deep() -> None:
    twice = Scaled(levels(2.0), Scaled(levels(3.0, 5.0), EYE))
    assert identity_scale(Compose((twice, EYE, Scaled(levels(-1.0), EYE)))).tolist() == [-6.0, -10.0]
    assert identity_scale(Compose((twice, Diagonal(torch.ones(1, *SHAPE))))) is None


@pytest.mark.parametrize(("channels", "size"), [(1, (5, 5)), (2, (4, 6))])
def test_an_output_pixel_sees_every_input_pixel_but_its_own(channels: int, size: tuple[int, int]) -> None:
    network = BlindSpotNetwork(channels, width=4, depth=4).double()
    x = draw(1, channels, *size, seed=2)
    pixels = size[0] * size[1]
    jacobian = torch.func.jacrev(network)(x).reshape(channels, pixels, channels, pixels)
    own = torch.eye(pixels, dtype=torch.bool)[None, :, None].expand(channels, -1, channels, -1)
    assert bool((jacobian[own] == 0).all())
    assert bool((jacobian[~own] != 0).all())


def test_a_blind_spot_reconstructor_divides_by_the_flux_scale_and_refuses_a_blur() -> None:
    network = BlindSpotNetwork(1, width=3, depth=2).double()
    data, scale = white(EYE), levels(4.0, 2.0)
    brighter = Observation(data.y * scale.reshape(2, 1, 1, 1), Scaled(scale, EYE), data.noise)
    torch.testing.assert_close(BlindSpot(network)(brighter), network(data.y), rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedError, match=r"BlindSpot: Convolution is not the identity.*use BackProjected"):
        BlindSpot(network)(white(blur(kernels())))


def test_gaussian_data_with_the_true_score_give_the_posterior_mean() -> None:
    """x ~ N(m, v), y = s x + σ z a pixel: p(y) = N(s m, s² v + σ²)."""
    m, v, s, sigma = 0.7, 2.0, 1.5, STDS.reshape(2, 1, 1, 1)
    data = Observation(draw(2, *SHAPE, seed=3), Scaled(levels(s), EYE), Gaussian(STDS))
    score = data_score(lambda y: -((y - s * m) ** 2) / (s**2 * v + sigma**2) / 2)
    exact = m + s * v * (data.y - s * m) / (s**2 * v + sigma**2)
    torch.testing.assert_close(ScoreReconstructor(score)(data), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [False, True])
def test_correlated_data_with_the_true_score_give_the_posterior_mean(bad: bool) -> None:
    """x ~ N(0, I), y = x + n on the good pixels: E[x | y] = (I + Σ)⁻¹ y, Σ by lags, no FFT."""
    correlation = torch.tensor([[0.1, 0.2, 0.1], [0.2, 1.0, 0.2], [0.1, 0.2, 0.1]], dtype=torch.float64)[None, None]
    mask = torch.ones(1, *SHAPE, dtype=torch.bool)
    mask[..., 1, 1:3] = not bad
    std = positive(1, *SHAPE, seed=4)
    noise = CorrelatedGaussian.from_correlation(std, correlation, SHAPE[1:], white=0.1, mask=mask)
    row, column = (torch.arange(SIZE) // 4, torch.arange(SIZE) % 4)
    lags = [(a[:, None] - a[None]) for a in (row, column)]
    near = (lags[0].abs() <= 1) & (lags[1].abs() <= 1)
    table = 0.9 * correlation[0, 0]
    table[1, 1] = 1.0
    covariance = torch.where(near, table[lags[0].clamp(-1, 1) + 1, lags[1].clamp(-1, 1) + 1], 0.0)
    covariance = covariance * std.flatten()[:, None] * std.flatten()
    good = mask.flatten().nonzero()[:, 0]
    total = covariance[good][:, good] + torch.eye(len(good), dtype=torch.float64)

    def score(y: Tensor) -> Tensor:
        out = torch.zeros_like(y).flatten()
        out[good] = -torch.linalg.solve(total, y.flatten()[good])
        return out.reshape(y.shape)

    y = draw(1, *SHAPE, seed=3).where(mask, torch.nan)
    found = ScoreReconstructor(Function(score))(Observation(y, EYE, noise)).flatten()
    torch.testing.assert_close(found[good], torch.linalg.solve(total, y.flatten()[good]), rtol=1e-10, atol=1e-10)
    assert bool((found[~mask.flatten()] == 0).all())


def test_counts_with_the_true_score_give_the_geometric_posterior_mean() -> None:
    """λ = g (x + b) ~ Gamma(a, β): the posterior is Gamma(a + k, β + 1), with E log λ = ψ(a + k) − log(β + 1)."""
    a, beta, gain, background = 2.5, 0.4, levels(2.0, 5.0), levels(0.5, 0.25)
    g, b = gain.reshape(2, 1, 1, 1), background.reshape(2, 1, 1, 1)
    k = torch.arange(32, dtype=torch.float64).reshape(2, *SHAPE)
    data = Observation(k / g - b, EYE, Poisson(gain, background))

    def density(y: Tensor) -> Tensor:
        n = g * (y + b)
        return torch.lgamma(n + a) - torch.lgamma(n + 1) - n * torch.log(torch.tensor(1 + beta))

    found = g * (ScoreReconstructor(data_score(density))(data) + b)
    torch.testing.assert_close(found, (torch.digamma(a + k)).exp() / (1 + beta), rtol=1e-6, atol=1e-6)
    mean, variance = (a + k) / (1 + beta), (a + k) / (1 + beta) ** 2
    torch.testing.assert_close(mean - found, variance / mean / 2, rtol=0.06, atol=0)  # the stated bias: next term 1/(12 (a + k))


def test_speckle_with_the_true_score_gives_the_harmonic_posterior_mean() -> None:
    """x ~ inverse Gamma(a, β): the posterior is inverse Gamma(a + L, β + L y), with E[1/x] = (a + L)/(β + L y)."""
    a, beta, looks = 3.0, 2.0, levels(1.0, 4.0)
    count = looks.reshape(2, 1, 1, 1)
    data = Observation(positive(2, *SHAPE, seed=5), EYE, Gamma(looks, levels(1e-3)))
    score = data_score(lambda y: (count - 1) * y.log() - (a + count) * (beta + count * y).log())
    exact = (beta + count * data.y) / (a + count)
    torch.testing.assert_close(ScoreReconstructor(score)(data), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "noise",
    [Poisson(levels(2.0, 5.0), levels(0.5, 0.3)), Gamma(levels(1.0, 2.0), levels(0.1)), Gaussian(levels(1.0))],
    ids=lambda n: type(n).__name__,
)
def test_bad_data_give_zero_there_and_finite_gradients(noise: Noise) -> None:
    mask = torch.ones(2, *SHAPE, dtype=torch.bool)
    mask[..., 0] = False
    network = nn.Conv2d(1, 1, 3, padding=1).double()
    y = positive(2, *SHAPE, seed=1).where(mask, torch.nan)
    found = ScoreReconstructor(network)(Observation(y, EYE, replace(noise, mask=mask)))
    found.sum().backward()
    assert bool((found[~mask] == 0).all()) and bool(found.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_the_score_is_refused_where_there_is_no_formula() -> None:
    with pytest.raises(UnsupportedError, match="PoissonGaussian has no closed formula"):
        ScoreReconstructor(nn.Identity())(replace(electrons(), operator=EYE))
    with pytest.raises(UnsupportedError, match="not the identity"):
        ScoreReconstructor(nn.Identity())(white(blur(kernels())))


def test_the_images_of_an_autoencoder_form_a_surface_of_the_stated_dimension() -> None:
    network = Bottleneck(2, 8, 3, widths=(4, 6)).double()
    x = draw(2, 2, 8, 8, seed=1)
    assert network.encode(x).shape == (2, 3) and network(x).shape == x.shape
    jacobian = torch.func.jacrev(network)(x[:1]).reshape(128, 128)
    assert int(torch.linalg.matrix_rank(jacobian, rtol=1e-10)) == 3


@pytest.mark.parametrize(("size", "latent", "widths"), [(10, 3, (4, 4)), (8, 0, (4,)), (8, 2, ())])
def test_an_impossible_autoencoder_is_refused(size: int, latent: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="multiple of"):
        Bottleneck(1, size, latent, widths=widths)
    with pytest.raises(ShapeError, match="expects"):
        Bottleneck(1, 8, 2, widths=(4,))(torch.zeros(1, 1, 16, 16))
