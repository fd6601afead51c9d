"""The benchmark of denoising without truth: its risks are those of a simulation, and its classical denoisers do what they say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.operators.groups import Flips, QuarterTurns

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZE, COUNT = 16, 200


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    import importlib

    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in ("real_stamps", "classical_denoisers", "risk_checks")}
    finally:
        sys.path.remove(str(SCRIPTS))


def correlated() -> CorrelatedGaussian:
    lag = torch.tensor([0.3, 1.0, 0.3])
    return CorrelatedGaussian.from_correlation(torch.ones(1), (lag[:, None] * lag)[None, None], (SIZE, SIZE), white=0.0)


NOISES = {"white": Gaussian(torch.ones(1)), "correlated": correlated()}


def simulated(scripts: dict[str, ModuleType], noise: Gaussian | CorrelatedGaussian) -> tuple[Tensor, object]:
    """Truths, and stamps of them."""
    r = scripts["real_stamps"].radius((SIZE, SIZE))
    width = 1 + 2 * Rng.for_draws(1, range(COUNT), 1).uniform(torch.zeros(COUNT, 1, 1))
    x = 20 * torch.exp(-r / width)[:, None]
    y = noise.sample(x, Rng.for_draws(2, range(COUNT), 1))
    return x, scripts["real_stamps"].Stamps("simulated", y, noise, r > 6.5, r <= 4, ())


def agree(values: Tensor, truth: Tensor) -> bool:
    off = values - truth
    return bool(off.mean().abs() <= 4.5 * off.std() / len(off) ** 0.5)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_both_risks_without_truth_are_the_true_risk(scripts: dict[str, ModuleType], noise: Gaussian | CorrelatedGaussian) -> None:
    x, stamps = simulated(scripts, noise)
    make, checks = scripts["classical_denoisers"], scripts["risk_checks"]
    rows = torch.arange(COUNT)
    for model in (make.Same(), make.Smoothed(1.0), make.Shrunk(1.5, stamps.y, noise, hard=False)):
        found = checks.image_checks(model, stamps, rows)
        true = (found["image"] - x[:, 0]).square().flatten(1).mean(1)
        assert agree(found["sure"], true)
        assert agree(found["half"], found["sure of half"])
        assert not agree(found["sure"], 1.3 * true + 0.03)


def test_the_residual_of_the_truth_has_the_correlation_of_the_noise_and_no_flux(scripts: dict[str, ModuleType]) -> None:
    noise = NOISES["correlated"]
    x, stamps = simulated(scripts, noise)

    class Truth(scripts["classical_denoisers"].Same):
        def forward(self, observation: Observation) -> Tensor:
            return x.repeat_interleave(len(observation.y) // len(x), 0)

    found = scripts["risk_checks"].image_checks(Truth(), stamps, torch.arange(COUNT))
    mean, error = scripts["risk_checks"].spread(found["lag one, sky"])
    assert abs(mean - 0.3) <= 4.5 * error + 0.01
    assert agree(found["flux"], torch.zeros(COUNT))
    assert abs(float(found["flux"].std()) - 1) <= 4.5 / (2 * COUNT) ** 0.5
    assert agree(found["residual mean, sky"], torch.zeros(COUNT))


def test_a_threshold_of_zero_changes_nothing_and_a_hard_one_keeps_what_it_keeps(scripts: dict[str, ModuleType]) -> None:
    _, stamps = simulated(scripts, NOISES["white"])
    make = scripts["classical_denoisers"].Shrunk
    data = stamps.observation()
    for hard in (False, True):
        torch.testing.assert_close(make(0.0, stamps.y, stamps.noise, hard=hard)(data), stamps.y, atol=1e-4, rtol=1e-5)
    bright = Observation(1e4 * stamps.y, data.operator, data.noise)
    soft, kept = (make(3.0, stamps.y, stamps.noise, hard=hard)(bright) - bright.y for hard in (False, True))
    assert float(kept.abs().mean()) < 0.05 * float(soft.abs().mean())


def test_the_best_constant_by_sure_is_that_of_the_truth(scripts: dict[str, ModuleType]) -> None:
    x, stamps = simulated(scripts, NOISES["white"])
    make, widths, data = scripts["classical_denoisers"], (0.3, 0.5, 0.8, 1.2, 2.0), stamps.observation()
    _, found = make.by_sure(make.Smoothed, widths, data)
    risks = [float((make.Smoothed(w)(data) - x).square().mean()) for w in widths]
    assert found == widths[int(np.argmin(risks))]
    gain = make.Wiener(stamps.y, stamps.noise).gain
    assert float(gain.min()) >= 0 and float(gain[..., 0, 0]) > 0.9 and float(gain[..., 8, 8]) < 0.3


def test_moved_images_are_those_images_and_noise_of_their_own_is_refused(scripts: dict[str, ModuleType]) -> None:
    _, stamps = simulated(scripts, NOISES["white"])
    moved = scripts["real_stamps"].Moved(stamps.observation(), (QuarterTurns(), Flips()))
    index = torch.tensor([3, 3, 3, 3, 3, 3, 5])
    y = moved.batch(index, Rng.for_draws(0, range(7), 1)).observation.y
    torch.testing.assert_close(y.flatten(1).sort().values, stamps.y[index].flatten(1).sort().values)
    assert len({tuple(row.flatten().tolist()) for row in y[:6]}) > 2
    uneven = Observation(stamps.y, Identity((1, SIZE, SIZE)), Gaussian(torch.ones(COUNT)))
    with pytest.raises(UnsupportedError, match="one noise"):
        scripts["real_stamps"].Moved(uneven, (Flips(),))


def test_products_at_a_lag_find_the_correlation(scripts: dict[str, ModuleType]) -> None:
    field = NOISES["correlated"].sample(torch.zeros(COUNT, 1, SIZE, SIZE), Rng.for_draws(8, range(COUNT), 1))[:, 0].numpy()
    masks = [np.ones((SIZE, SIZE), dtype=bool)] * COUNT
    lags = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2)]
    found = scripts["real_stamps"].lag_products(list(field), masks, lags)
    for (mean, error), expected in zip(found, (0.3, 0.3, 0.09, 0.09, 0.0), strict=True):
        assert abs(mean - expected) <= 4.5 * error
