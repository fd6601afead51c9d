"""The problem of benchmark B1b and its joint coverage, against definitions that do not use its code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffinv.core.rng import Rng

TRIALS, DRAWS = 2000, 50


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "deconvolution64.py"
    spec = importlib.util.spec_from_file_location("bench_deconvolution64", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _load()


@pytest.fixture(scope="module")
def trials() -> object:
    return bench.make_trials(Rng.for_draws(0, range(TRIALS), 1))


@pytest.fixture(scope="module")
def exact(trials: object) -> torch.Tensor:
    return trials.exact_draws(DRAWS, Rng.for_draws(1, range(TRIALS), 1))


def coverage(trials: object, draws: torch.Tensor) -> float:
    return float(bench.covered(trials, draws).double().mean())


def test_prior_is_a_sum_of_independent_jumps() -> None:
    sums = torch.ones(64, 64, dtype=torch.float64).tril()
    # eigh and back: k·eps·‖C‖, ‖C‖ ≈ 415.
    assert (bench.prior().covariance - 0.25 * sums @ sums.T).abs().max() < 1e-11


def test_jumps_of_the_truths_have_variance_a_quarter(trials: object) -> None:
    jumps = trials.truth.diff(dim=1)
    # 2000·63 squares of N(0, ¼): z = 5.
    assert abs(float(jumps.pow(2).mean()) - 0.25) < 5 * 0.25 * (2 / jumps.numel()) ** 0.5


def test_blur_keeps_a_line_on_its_valid_part() -> None:
    line = torch.arange(64, dtype=torch.float64)
    matrix = bench.matrix()
    assert matrix.shape == (52, 64)
    torch.testing.assert_close(matrix @ line, line[6:58])
    ratio = matrix[0, 4] / matrix[0, 6]
    torch.testing.assert_close(ratio, torch.exp(torch.tensor(-0.5, dtype=torch.float64)))  # two samples are one σ


def test_data_have_25_db(trials: object) -> None:
    clean = trials.truth @ bench.matrix().T
    noise = trials.y - clean
    decibel = 10 * torch.log10(clean.pow(2).mean() / noise.pow(2).mean())
    # The power of a walk has a relative spread of about 1.3 a trial (its top mode alone: √2): 5 × 10/ln 10 × 1.4/√2000.
    assert abs(float(decibel) - 25) < 5 * 4.34 * 1.4 / TRIALS**0.5


def test_posterior_is_that_of_the_information_form(trials: object) -> None:
    matrix, variance = bench.matrix(), bench.noise_std() ** 2
    precision = torch.linalg.inv(bench.prior().covariance) + matrix.T @ matrix / variance
    torch.testing.assert_close(trials.covariance, torch.linalg.inv(precision), rtol=1e-7, atol=1e-9)
    mean = torch.linalg.solve(precision, matrix.T @ trials.y.T / variance).T
    torch.testing.assert_close(trials.mean, mean, rtol=1e-6, atol=1e-7)


def test_exact_draws_cover_as_order_statistics_say(trials: object, exact: torch.Tensor) -> None:
    expected = bench.expected_coverage(DRAWS)
    assert expected == 45 / 51
    assert abs(coverage(trials, exact) - expected) < 4 * (expected * (1 - expected) / TRIALS) ** 0.5
    assert abs(float(bench.pixel_coverage(trials, exact).mean()) - 0.9) < 0.005


def test_draws_five_per_cent_too_narrow_cover_too_little(trials: object, exact: torch.Tensor) -> None:
    narrow = trials.mean[:, None] + 0.95 * (exact - trials.mean[:, None])
    assert coverage(trials, narrow) < bench.expected_coverage(DRAWS) - 0.1


def test_draws_of_a_biased_mean_cover_too_much(trials: object, exact: torch.Tensor) -> None:
    assert coverage(trials, exact + 0.5 * trials.covariance.diagonal().sqrt()) > bench.expected_coverage(DRAWS) + 0.05
