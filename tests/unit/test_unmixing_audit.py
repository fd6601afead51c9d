"""NUTS on pixels: the decoder in JAX is the one in torch, and a Gaussian cavity comes back where the data say nothing."""

from __future__ import annotations

import pytest
import torch

from diffinv.core.checks import UnsupportedError
from diffinv.unmixing.emulator import EmulatorDesign, EmulatorPlan, train_emulator
from diffinv.unmixing.mixture import Component, Mixture
from diffinv.unmixing.pixels import quadratic
from tests.unit.test_unmixing_fit import F64, HOT, SLOPE, counts, full

pytest.importorskip("numpyro", reason="needs numpyro: pip install 'diffinv[unmix]'")


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    plan = EmulatorPlan(examples=256, design=EmulatorDesign(width=32))
    return Mixture((Component("cold", train_emulator(SLOPE, (), plan)),))


def test_both_decoders_agree(mixture: Mixture) -> None:
    from diffinv.unmixing.bayes import decode

    network = mixture.components[0].model.network
    u = torch.linspace(0, 1, 9, dtype=F64)[:, None]
    assert float((decode(network, u) / network.spectrum(u) - 1).abs().max()) < 1e-5


def test_the_cavity_is_the_posterior_less_the_likelihood() -> None:
    from diffinv.unmixing.bayes import Cavity

    prior, fisher = (
        torch.tensor([[[0.04, 0.01], [0.01, 0.02]]], dtype=F64),
        torch.tensor([[[90.0, 10.0], [10.0, 40.0]]], dtype=F64),
    )
    about, score, centre = (torch.tensor([v], dtype=F64) for v in ([0.4, 0.5], [3.0, -2.0], [0.5, 0.6]))
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + fisher)
    mean = (covariance @ (torch.linalg.inv(prior) @ centre[..., None] + fisher @ about[..., None] + score[..., None]))[..., 0]
    cavity = Cavity.of(mean, covariance, about, score, fisher)
    torch.testing.assert_close(cavity.mean, centre)
    torch.testing.assert_close(cavity.covariance, prior)


def test_nuts_agrees_with_the_gaussian_posterior_where_counts_are_many(mixture: Mixture) -> None:
    """Four pixels of 5,000 counts and a wide cavity: mean within 0.2 σ and width within 15 %, for 400 draws."""
    from diffinv.unmixing.bayes import Cavity, audit

    amplitude, u = full(5000.0, 4), full(0.5, 4)
    data = counts(mixture, amplitude, u)
    cavity = Cavity(u, 0.04 * torch.eye(1, dtype=F64).expand(4, 1, 1))
    step = quadratic(mixture, data, amplitude, u)
    precision = step.fisher[:, 0, 0] + 25
    mean, std = u[:, 0] + step.score[:, 0] / precision, precision.rsqrt()
    found = audit(mixture, data, (amplitude, u), cavity, samples=300, warmup=150)
    assert found.rhat < 1.05
    assert float(((found.mean[:, 0] - mean) / std).abs().max()) < 0.3
    assert float((found.std[:, 0] / std - 1).abs().max()) < 0.2


def test_what_has_no_copy_in_jax_is_refused() -> None:
    from diffinv.unmixing.bayes import Cavity, audit

    amplitude, u = full(50.0, 1), torch.full((1, 2), 0.5, dtype=F64)
    cavity = Cavity(u, torch.eye(2, dtype=F64)[None])
    with pytest.raises(UnsupportedError, match="emulators"):
        audit(HOT, counts(HOT, amplitude, u), (amplitude, u), cavity, samples=1, warmup=1)
