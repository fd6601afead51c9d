"""Evaluations of products whose posterior is exact, or wrong in a known way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffinv.core.rng import Rng
from diffinv.data.grids import SkyGrid
from diffinv.data.null_space import error_maps, soft_gain
from diffinv.data.products import Exposure, Product, Provenance, Quality
from diffinv.engine.evaluate import cases_of, tarp_rank
from diffinv.engine.evaluation import assemble, coverage_table, extreme_by_chance, spread_table
from diffinv.engine.measure import catalog
from diffinv.report.panels import render_evaluation
from diffinv.uncertainty.quantiles import quantile
from diffinv.uncertainty.ranks import UniformRanks
from tests.small import blob

SIZE, DRAWS, SIGMA = 16, 24, 0.5
POSTERIOR = SIGMA / math.sqrt(2)  # of a prior N(galaxy, σ²) and data with noise σ, pixel by pixel
SOURCE = Provenance("0", "c", "p", "w", "s", "uncalibrated", DRAWS, 1.0, 0, "i", 1.0, 0.2, "ab")


def product(number: int, width: float = 1.0, *, keep: bool = True) -> Product:
    """Draws of the exact posterior of noisy pixels under a Gaussian prior about a galaxy, `width` times as wide."""
    noise = Rng([number]).normal(torch.empty(1, DRAWS + 2, SIZE, SIZE))[0]
    galaxy = torch.from_numpy(blob(SIZE, 6.0, 300.0)).float()
    truth = galaxy + SIGMA * noise[0]
    data = truth + SIGMA * noise[1]
    samples = ((galaxy + data) / 2 + width * POSTERIOR * noise[2:])[:, None]
    flux = {p: quantile(samples, p, dim=0).numpy() for p in (0.05, 0.16, 0.5, 0.84, 0.95)}
    grid = SkyGrid.linear((SIZE, SIZE), 0.1)
    row = {"sn": np.array([10.0 * (1 + number % 3)]), "psf_fwhm": np.array([0.6]), "noise_std": np.array([SIGMA])}
    row |= {"chi2_draw": np.array([1.0]), "chi2_p": np.array([0.01 + (number % 100) / 100])}
    exposure = Exposure("i", "", np.zeros((SIZE, SIZE)), grid, blob(15, 3.0), 0.1, data.numpy())
    return Product(
        object_id=f"{number:03d}",
        bands=("i",),
        unit="nJy",
        grid=grid,
        mean=samples.mean(0).numpy(),
        std=samples.std(0).numpy(),
        quality=np.zeros((1, SIZE, SIZE), np.int32),
        provenance=replace(SOURCE, seed=number),
        quantiles=flux,
        samples=samples.numpy() if keep else None,
        exposures=(exposure,),
        catalog=catalog(("i",), samples, 0.1, [1.0]) | row,
        truth=truth[None].numpy(),
    )


def evaluated(count: int, width: float):
    products = [product(number, width) for number in range(count)]
    return assemble([case for each in products for case in cases_of(each, each.truth, 1)], (15.0, 25.0))


def test_exact_draws_cover_and_spread_as_they_should_and_narrow_ones_do_not() -> None:
    """30 objects of some 100 pixels on the source: standard errors of 0.006 for the coverage, 0.02 for the spread."""
    exact, narrow = evaluated(30, 1.0), evaluated(15, 0.5)
    pick = lambda found, name: next(r for r in found.coverage if r["quantity"] == name and r["bin"] == "all")
    nominal = 1 - 2 * 0.05  # positions (M + 1)p
    row = pick(exact, "pixels on source")
    assert abs(row["coverage"] - nominal) < 4.5 * max(row["error"], 0.004)
    assert row["objects"] == 30 and pick(narrow, "pixels on source")["coverage"] < 0.72
    ratio = {name: next(r["ratio"] for r in f.spread if r["bin"] == "all") for name, f in (("exact", exact), ("narrow", narrow))}
    assert ratio["exact"] == pytest.approx(1, abs=0.06) and ratio["narrow"] == pytest.approx(0.5, abs=0.06)
    fires = lambda found: {f.diagnostic for f in found.findings if f.p_value < 5e-3}
    assert {"coverage", "spread–skill", "SBC ECDF"} <= fires(narrow)
    assert not {"coverage", "spread–skill", "SBC ECDF", "SBC χ²", "TARP"} & fires(exact)
    assert {r["bin"] for r in exact.coverage} == {"S/N 0 – 15", "S/N 15 – 25", "S/N > 25", "all"}


def test_tarp_about_disjoint_draws_is_uniform_for_exact_draws_and_not_for_narrow_ones() -> None:
    null = UniformRanks(300, DRAWS // 2, 2, Rng([5]))
    p = {}
    for width in (1.0, 0.5):
        ranks = []
        for number in range(300):
            noise = Rng([number + 1000]).normal(torch.empty(1, DRAWS + 2, 6, 6))[0].double()
            mean = noise[0]
            samples = mean + width * noise[2:]
            ranks.append(tarp_rank((mean + noise[1])[None, None], samples[None, :, None], Rng([number])))
        p[width] = float(null.kolmogorov(torch.tensor(ranks)).p_value)
    assert p[1.0] > 1e-3 and p[0.5] < 1e-3


def test_parts_of_the_error_add_and_a_smooth_error_is_seen_while_a_fine_one_is_not() -> None:
    base = product(1)
    gain = soft_gain(base, 0)
    assert gain is not None and float(gain.min()) >= 0 and float(gain.max()) <= 1
    assert float(gain[0, 0]) > 0.99 and float(gain[SIZE // 2, SIZE // 2]) < 0.01
    coarse = replace(base.exposures[0], grid=SkyGrid.linear((8, 8), 0.2), image=None)
    assert float(soft_gain(replace(base, exposures=(coarse,)), 0)[SIZE // 2, 0]) == 0.0  # beyond the data's Nyquist frequency
    line = np.arange(SIZE)
    smooth = np.full((SIZE, SIZE), 3.0)
    fine = 3.0 * np.where((line[:, None] + line) % 2, 1.0, -1.0)
    for error, share in ((smooth, 0.0), (fine, 1.0)):
        shifted = replace(base, mean=(base.truth + error[None]).astype(np.float32))
        seen, null = error_maps(shifted, 0, base.truth[0])
        np.testing.assert_allclose(seen + null, error, atol=1e-4)
        assert (null**2).sum() / (error**2).sum() == pytest.approx(share, abs=0.02)
    assert error_maps(replace(base, exposures=()), 0, base.truth[0]) is None


def test_without_draws_or_truth_what_is_left_is_evaluated() -> None:
    few = product(3, keep=False)
    (case,) = cases_of(few, few.truth, 1)
    assert not case.tables and "rank_flux" not in case.row and math.isfinite(float(case.row["inside_on"]))
    flagged = replace(few, truth=None, quality=np.full((1, SIZE, SIZE), int(Quality.PRIOR_DRIVEN), np.int32))
    (bare,) = cases_of(flagged, None, 1)
    assert bare.row["prior_driven"] == 1.0 and "PSNR" not in bare.row
    page = render_evaluation(assemble([case, bare], (15.0,)).to_dict())
    assert "predictive" in page and "nan" not in page.lower()


def test_tables_are_means_over_objects() -> None:
    names = ("on", "off", "flux", "size", "e1", "e2")
    row = {"sn": 5.0, "error2_on": 4.0, "spread2_on": 1.0}
    rows = [
        row | {"object_id": str(k)} | {f"inside_{name}": value for name in names}
        for k, value in enumerate((1.0, 0.0, math.nan, 1.0))
    ]
    found = next(iter(coverage_table(rows, (10.0,))))
    assert found["coverage"] == pytest.approx(2 / 3) and found["objects"] == 3
    assert found["error"] == pytest.approx(math.sqrt((2 / 9) * 3 / 2 / 3))
    assert next(iter(coverage_table([*rows, *rows], (10.0,)))) == found  # bands of the same objects are no more objects
    assert next(iter(spread_table([*rows, *rows], (10.0,))))["ratio"] == pytest.approx(0.5)
    assert next(iter(coverage_table([r for r in rows if r["inside_on"] == 1.0], (10.0,))))["error"] == 0.5  # not 0


def test_bands_of_an_object_are_tested_as_one() -> None:
    """Thirty objects whose three bands say the same are thirty objects: no statistic is that of ninety."""
    single = [case for number in range(30) for case in cases_of(product(number), product(number).truth, 1)]
    threefold = [replace(case, row=case.row | {"band": band}) for case in single for band in "gri"]
    first, second = assemble(single, ()), assemble(threefold, ())
    assert [f.to_dict() for f in first.findings] == [f.to_dict() for f in second.findings]
    for table in ("coverage", "spread"):
        for row, same in zip(getattr(first, table), getattr(second, table), strict=True):
            assert row == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in same.items()}
    assert len(second.rows) == 90 and {row["objects"] for row in second.flags} == {row["objects"] for row in first.flags}


@pytest.mark.parametrize(("draws", "shape", "width"), [(18, 0.0, 0.0), (32, 1 / 33, 0.0), (39, 2 / 40, 2 / 40), (99, 0.05, 0.04)])
def test_a_held_out_test_is_judged_by_what_its_draws_can_show(draws: int, shape: float, width: float) -> None:
    """Of calibrated objects that share is extreme; where it is 0 there is no finding but a line that says so."""
    assert extreme_by_chance("pit_shape_p", {"posterior_draws": draws}) == pytest.approx(shape)
    assert extreme_by_chance("pit_width_p", {"posterior_draws": draws}) == pytest.approx(width)
    assert extreme_by_chance("chi2_p", {"posterior_draws": draws}) == pytest.approx(0.05)
    (case,) = cases_of(product(1, keep=False), None, 1)
    row = case.row | {"posterior_draws": draws, "pit_shape_p": 1 / (draws + 1), "pit_width_p": 2 / (draws + 1)}
    found = assemble([replace(case, row=row | {"object_id": str(k)}) for k in range(20)], ())
    fired = {f.diagnostic for f in found.findings if f.p_value < 1e-6}
    assert fired >= {name for name, q in (("held-out PIT, shape", shape), ("held-out PIT, width", width)) if q}
    said = "held-out PIT, width cannot be extreme with so few draws; give --samples 39 or more" in found.summary()
    assert said == (width == 0)
