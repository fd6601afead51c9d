"""DDRM against the three cases of its paper, and the bases that it works in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.likelihood import Flat, Joint, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.sampling import Mask
from diffinv.posterior import Posterior
from diffinv.samplers.base import sample
from diffinv.samplers.ddrm import Ddrm, SpectralState
from diffinv.samplers.spectrum import DenseBasis, FourierBasis
from tests.cases.guidance import SHAPE, blur, kernels, smooth_prior
from tests.cases.operators import draw
from tests.contracts.checks import close
from tests.contracts.test_guidance import levels, noisy
from tests.toys import (
    GRID,
    STDS,
    UNUSED,
    correlated,
    mixture,
    periodic,
    streams,
    white,
    zeros,
)


def mask() -> Mask:
    keep = torch.ones(2, *SHAPE, dtype=torch.bool)
    keep[0, 0, 1] = keep[1, 0, :, 2] = False
    return Mask(keep)


def three_cases(data: Observation, seen: Tensor, u0: Tensor, x: Tensor, z: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The paper's update pixel by pixel with H = diag(seen), η = 0.6, η_b = 0.8: written as scalars."""
    out, eta, eta_b = torch.zeros_like(x), 0.6, 0.8
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 4))).tolist():
        at, s, t, noise = (b, 0, i, j), float(sigma[b]), float(sigma_next[b]), float(STDS[b])
        if not seen[at]:
            mean, std = u0[at] + math.sqrt(1 - eta**2) * t * (x[at] - u0[at]) / s, eta * t
        elif t < noise:
            mean, std = u0[at] + math.sqrt(1 - eta**2) * t * (data.y[at] - u0[at]) / noise, eta * t
        else:
            mean, std = (1 - eta_b) * u0[at] + eta_b * data.y[at], math.sqrt(t**2 - noise**2 * eta_b**2)
        out[at] = mean + std * z[at]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pair", [(1.0, 0.5), (0.2, 0.15), (0.15, 0.05), (0.05, 0.0)])
def test_ddrm_has_the_three_cases_of_the_paper(masked: bool, pair: tuple[float, float]) -> None:
    """σ_n is 0.1 and 0.3: the levels are above both, between them, and below both."""
    operator = mask() if masked else Identity(SHAPE)
    data = white(operator)
    target = Posterior(mixture(), data, UNUSED)
    seen = operator(torch.ones_like(zeros())) > 0
    sampler = Ddrm(eta=0.6, eta_b=0.8)
    sigma, sigma_next = levels(pair[0], pair[0]), levels(pair[1], pair[1])
    start = sampler.init(target, zeros(), levels(2.0, 2.0), streams())
    x, z = noisy(sigma), streams(5).normal(zeros())
    state = SpectralState(x, spectrum=start.spectrum)
    got = sampler.step(target, state, sigma, sigma_next, streams(5)).x
    expected = three_cases(data, seen, mixture()(x, sigma), x, z, sigma, sigma_next)
    close(got, expected, 1e-11)
    with pytest.raises(AssertionError):
        close(Ddrm(eta=0.8, eta_b=0.6).step(target, state, sigma, sigma_next + 0.01, streams(5)).x, expected, 1e-3)


def test_ddrm_starts_at_the_data_where_they_are_seen_and_at_the_prior_elsewhere() -> None:
    """N(ȳ, σ² − σ_n²) or N(D, σ²); with a first level of 0.2 the second image's data (σ_n = 0.3) are not used."""
    data, prior = white(mask()), smooth_prior()
    seen = data.operator(torch.ones_like(zeros())) > 0
    for level, used in ((2.0, (True, True)), (0.2, (True, False))):
        sigma, rng = levels(level, level), streams()
        first, second = rng.normal(zeros()), rng.normal(zeros())
        at_data = seen & torch.tensor(used).reshape(2, 1, 1, 1)
        std = torch.where(at_data, (level**2 - expand(STDS, first) ** 2).clamp_min(0).sqrt(), level)
        expected = torch.where(at_data, data.y, prior(level * first, sigma)) + std * second
        close(Ddrm().init(Posterior(prior, data, UNUSED), zeros(), sigma, streams()).x, expected, 1e-11)


@pytest.mark.parametrize("make", [white, correlated])
def test_the_fourier_basis_gives_what_the_dense_basis_gives(make: Callable) -> None:
    """Noise is drawn in image space: the same draws in any orthonormal basis."""
    target = Posterior(mixture(), Joint((make(periodic()), correlated(Identity(SHAPE)))), UNUSED)
    fourier, dense = (sample(Ddrm(basis=b), target, GRID, zeros(), streams()).x for b in (FourierBasis(), DenseBasis()))
    close(fourier, dense, 1e-9)


@pytest.mark.parametrize("basis", [DenseBasis(), FourierBasis()])
def test_a_spectrum_holds_the_information_and_the_data(basis) -> None:
    """V diag(f) Vᵀ x = F x, V diag(f) ȳ = score(0), and analysis inverts synthesis."""
    data, x = correlated(periodic()), draw(2, *SHAPE, seed=2)
    found = basis.decompose(data, x)
    close(found.synthesise(found.information * found.analyse(x)), data.fisher(x)(x), 1e-10)
    close(found.synthesise(found.information * found.datum), data.score(zeros()), 1e-10)
    close(found.synthesise(found.analyse(x)), x, 1e-12)


def test_rows_that_see_alike_share_one_decomposition() -> None:
    shared = Observation(draw(2, *SHAPE), Identity(SHAPE), Gaussian(levels(0.1, 0.1)))
    assert DenseBasis().decompose(shared, zeros()).vectors.shape[0] == 1
    assert DenseBasis().decompose(white(Identity(SHAPE)), zeros()).vectors.shape[0] == 2


def test_ddrm_decomposes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real, target = [], torch.linalg.eigh, Posterior(mixture(), white(mask()), UNUSED)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(1) or real(m))
    sample(Ddrm(), target, GRID, zeros(), streams())
    assert len(calls) == 2  # one an image


@pytest.mark.parametrize(
    ("data", "what"), [(lambda: white(blur(kernels())), "blur"), (lambda: white(mask()), "mask")], ids=["blur", "mask"]
)
def test_the_fourier_basis_refuses_what_is_not_periodic(data: Callable, what: str) -> None:
    with pytest.raises(UnsupportedError, match="not diagonal in the DFT"):
        FourierBasis().decompose(data(), zeros())


def test_the_dense_basis_refuses_large_images() -> None:
    with pytest.raises(UnsupportedError, match="at most 4096"):
        DenseBasis().decompose(Flat((1, 65, 64)), torch.zeros(1, 1, 65, 64))


def test_float32_data_give_float32_spectra() -> None:
    for basis in (DenseBasis(), FourierBasis()):
        single = basis.decompose(correlated(periodic()).to(torch.float32), zeros().float())
        assert single.information.dtype == torch.float32
        assert single.synthesise(single.analyse(zeros().float())).dtype == torch.float32
