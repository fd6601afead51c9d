"""How often diagnostics fire on exact draws of a deconvolution and on faults: `scripts/bench_diagnostics` at a small size."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.priors.analytic import FourierGaussianPrior, GaussianPrior

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STUDIES, POWER = 150, 25

# The faults that each diagnostic must catch in three of four studies, and those that it cannot see.
CAUGHT = {
    "SBC ECDF, flux": {"bias of 0.2 σ", "feature in the range"},
    "SBC ECDF, power ν < 0.3": {"blur 6 % wider", "feature in the range"},
    "SBC χ², power ν > 0.45": {"std × 0.7"},
    "SBC ECDF, central pixel": {"feature in the range", "feature in the null space"},
    "TARP, θ near x̂(y)": {"returns the prior", "std × 0.7", "feature in the range"},
    "coverage 90 %": {"std × 0.7", "feature in the range"},
    "spread–skill": {"std × 0.7", "feature in the range"},
    "CRPS": {"std × 0.7", "feature in the range"},
    "energy score": {"std × 0.7", "feature in the range"},
    "predictive χ²": {"returns the prior", "noise 20 % larger", "bias of 0.2 σ", "feature in the range"},
    "held-out PIT, shape": {"bias of 0.2 σ", "feature in the range"},
    "kernel Stein": {"returns the prior", "bias of 0.2 σ", "feature in the range", "feature in the null space"},
    "prior swap": {"feature in the range", "feature in the null space"},
    "hallucination index": {"std × 0.7", "feature in the null space"},
}
BLIND = {
    "returns the prior": {"SBC ECDF, flux", "TARP, θ independent of y", "coverage 90 %", "spread–skill", "CRPS", "energy score"},
    "feature in the null space": {"predictive χ²", "held-out PIT, shape", "held-out PIT, width"},
    "blur 6 % wider": {"kernel Stein"},
    "noise 20 % larger": {"kernel Stein"},
}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("diagnostic_problem")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def fired(module: ModuleType) -> dict[str, dict[str, Tensor]]:
    """p ≤ 0.05 of every diagnostic in every study, by fault."""
    found = {}
    for number, (name, fault) in enumerate(module.FAULTS.items()):
        rng = Rng.for_draws(5, [number], 1)
        p_values = module.p_values(module.Problem(), fault, POWER if number else STUDIES, rng)
        found[name] = {test: p <= 0.05 for test, p in p_values.items()}
    return found


def test_the_draws_are_those_of_the_dense_posterior(module: ModuleType) -> None:
    """Mean, covariance and operator of the problem against `GaussianPrior.posterior`."""
    problem = module.Problem(size=6)
    eye = torch.eye(36, dtype=torch.float64).reshape(36, 1, 6, 6)
    prior = FourierGaussianPrior(torch.zeros(1, 1, 6, 6, dtype=torch.float64), problem.spectrum[None, None])
    covariance = problem.filtered(eye, problem.spectrum).flatten(1)
    operator = problem.observation(eye.float()).operator
    matrix = problem.filtered(eye, problem.transfer).flatten(1)
    torch.testing.assert_close(operator(eye.float()).flatten(1).double(), matrix, atol=1e-6, rtol=0)
    dense = GaussianPrior(prior.mean, (covariance + covariance.T) / 2)
    y = module.white(Rng([1]), 3, 1, 6, 6).double()
    mean, posterior = dense.posterior(matrix, y.flatten(1), torch.tensor(problem.std**2, dtype=torch.float64))
    torch.testing.assert_close(problem.mean(y), mean)
    torch.testing.assert_close(problem.filtered(eye, problem.posterior_spectrum).flatten(1), posterior, atol=1e-10, rtol=0)


def test_exact_draws_raise_a_false_alarm_in_one_study_of_twenty(fired: dict[str, dict[str, Tensor]]) -> None:
    """Every count inside the binomial's interval of probability 1 − 10⁻⁴; together the diagnostics fire as often as they say."""
    counts = {test: int(f.sum()) for test, f in fired["none"].items()}
    low, high = binom.isf(1 - 1e-4, STUDIES, 0.05), binom.isf(1e-4, STUDIES, 0.05)
    assert len(counts) >= 25
    assert not {test: count for test, count in counts.items() if not low <= count <= high}
    assert sum(counts.values()) / (len(counts) * STUDIES) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("test", CAUGHT)
def test_a_diagnostic_catches_its_faults(fired: dict[str, dict[str, Tensor]], test: str) -> None:
    for fault in CAUGHT[test]:
        assert float(fired[fault][test].double().mean()) >= 0.75, fault


@pytest.mark.parametrize("fault", BLIND)
def test_a_diagnostic_does_not_see_what_it_cannot(fired: dict[str, dict[str, Tensor]], fault: str) -> None:
    for test in BLIND[fault]:
        assert int(fired[fault][test].sum()) <= binom.isf(1e-4, POWER, 0.05), test


def test_every_fault_is_caught_by_something(fired: dict[str, dict[str, Tensor]]) -> None:
    for fault, tests in fired.items():
        if fault != "none":
            assert max(float(f.double().mean()) for f in tests.values()) > 0.9, fault
