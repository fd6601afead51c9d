"""Pixels of few photons and of none: they say as much of the parameters as their photons do, and are flagged."""

from __future__ import annotations

import torch

from diffinv.unmixing.pipeline import UnmixingPlan, unmix
from diffinv.unmixing.pixels import FAINT, PixelPlan, quadratic
from diffinv.unmixing.posterior_maps import expanded, is_faint, least_amplitude
from tests.unit.test_unmixing_fit import HOT, counts, full

F64 = torch.float64


def test_pixels_without_photons_say_nothing_and_faint_ones_as_much_as_their_photons() -> None:
    """At a tenth of a count a pixel: Σ F is that of all photons, Σ s is 0 at the truth, and both are 0 in pixels without."""
    count = 4000
    u = torch.full((count, 2), 0.5, dtype=F64)
    data = counts(HOT, full(0.1, count), u)
    photons = data.y.sum(1)
    least = least_amplitude(HOT, data, u)
    held = torch.maximum(full(0.1, count), least)
    step = expanded(HOT, data, held, u, is_faint(full(0.1, count), least))
    one = quadratic(HOT, data, least, u).fisher[0]  # of one count
    assert 200 < float(photons.sum()) < 800
    torch.testing.assert_close(step.fisher.sum(0), photons.sum() * one, rtol=0.02, atol=0)
    assert float(step.fisher[photons == 0].abs().max()) <= 2e-3 * float(one.abs().max())
    assert float(step.score[photons == 0].abs().max()) < 1e-6 * float(one.diagonal().max()) ** 0.5
    total = step.score.sum(0)
    assert float(total @ torch.linalg.solve(photons.sum() * one, total)) < 13.8  # χ² of 2, p = .001


def test_half_a_map_in_the_dark_is_flagged_and_as_uncertain_as_the_other_half_varies() -> None:
    side = 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    truth = torch.stack([0.5 + 0.3 * torch.sin(rows / 2.0), 0.5 + 0.3 * torch.cos(rows / 3.0)], -1).reshape(-1, 2).to(F64)
    dark = (columns >= 9).flatten()
    data = counts(HOT, torch.where(dark, 0.0, 300.0).to(F64)[:, None], truth)
    found = unmix(HOT, data, (side, side), UnmixingPlan(PixelPlan((0.25, 0.5, 0.75))))
    assert int(data.y[dark].sum()) == 0
    assert bool((found.flags[dark] & FAINT > 0).all()) and not bool((found.flags[~dark] & FAINT > 0).any())
    far = (columns >= 13).flatten()
    assert float(found.posterior.std[far].min()) > 0.5 * float(truth.std(0).min())
    assert float(found.posterior.std[far].min()) > 5 * float(found.posterior.std[~dark].median())
