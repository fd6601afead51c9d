"""The priors in the package: small enough, with a card that says what they are, and better than no prior on a galaxy."""

from __future__ import annotations

import pytest
import torch

from diffinv.core.rng import Rng
from diffinv.priors.store import SHIPPED, load_prior

NAMES = sorted(path.stem for path in SHIPPED.glob("*.safetensors"))
FACTS = ("what", "field", "resolution", "scale", "network", "noise levels", "data", "training", "hardware", "weights")


def test_there_are_shipped_priors() -> None:
    assert "galaxies-64" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_prior_is_small_and_has_a_card(name: str) -> None:
    assert (SHIPPED / f"{name}.safetensors").stat().st_size <= 10e6
    lines = (SHIPPED / f"{name}.md").read_text().splitlines()
    assert lines[0] == f"# {name}"
    missing = [fact for fact in FACTS if not any(line.startswith(f"| {fact} |") for line in lines)]
    assert not missing
    assert any("benchmarks/" in line for line in lines)  # where its figures are


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_prior_takes_the_noise_off_a_galaxy(name: str) -> None:
    """An exponential disc of rms 1 in every band; noise of σ = 0.3 must lose nine tenths of its power (it has 10 dB to gain)."""
    prior = load_prior(name)
    card = prior.card
    assert card.name == name
    grid = (torch.arange(card.size) - card.size / 2 + 0.5).expand(card.size, card.size)
    disc = (-torch.hypot(grid, 1.4 * grid.T) / 5).exp()
    x = (disc / disc.square().mean().sqrt()).expand(4, len(card.bands), -1, -1)
    sigma = torch.full((4,), 0.3, dtype=torch.float64)
    noisy = x + 0.3 * Rng.for_draws(0, range(4), 1).normal(torch.zeros_like(x))
    with torch.no_grad():
        left = (prior.denoiser(noisy, sigma) - x).square().mean()
    assert float(left) < 0.1 * 0.3**2
    assert prior.variance is not None and float(prior.variance.min()) > 0
