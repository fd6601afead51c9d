"""`diffinv evaluate` and `diffinv calibrate`: from observations with truth to tables, panels and products that are corrected."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import diffinv.cli
from diffinv.cli import main
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.products import Product, Quality, read_product
from diffinv.engine.calibration import load_calibration
from diffinv.engine.mocks import sky_cards
from tests.small import band_planes, blob, write_prior

OBJECTS = 10
SAMPLER = ("sampler.samples=20", "sampler.steps=4", "sampler.guidance.iterations=2")
CONFIG = """
simulate: {survey: lsst, bands: [i], count: %d, seed: 7}
calibrate: {signal_to_noise: [1]}
prior: {name: %s}
sampler: {samples: 20, steps: 4, guidance: {iterations: 2}}
"""


def write_simulated(path: Path, seed: int, *, truth: bool = True) -> None:
    rng = np.random.default_rng(seed)
    planes = [Plane("PRIMARY", None, {}), *band_planes("i", 1, rng)]
    cards = {**sky_cards((16, 16), 0.1), "BAND": "i", "BUNIT": "nJy", "TPSFFWHM": 0.2}
    planes += [Plane("TRUTH", blob(16, 7.4, 100.0).astype(np.float32), cards, 1)] if truth else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_fits(planes))


class Simulated:
    """Stands in for GalSim's mocks."""

    def __init__(self, *, count: int, seed: int, **others: object) -> None:
        self.count, self.seed = count, seed

    def write(self, out: Path):
        for number in range(self.count):
            path = out / f"mock-{self.seed}-{number:04d}.fits"
            write_simulated(path, 1000 * self.seed + number)
            yield path


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *(f"--set={s}" for s in SAMPLER), *extra])


def products(out: Path) -> dict[str, Product]:
    return {p.object_id: p for p in map(read_product, (out / "products").glob("*/*.fits"))}


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Path:
    """What `diffinv calibrate` leaves: observations, run, calibration.json."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "c.yaml").write_text(CONFIG % (OBJECTS, prior))
    real, diffinv.cli._mocks = diffinv.cli._mocks, lambda: Simulated
    try:
        assert main(["calibrate", "--config", str(folder / "c.yaml"), "--out", str(folder / "out")]) == 0
        before = (folder / "out" / "calibration.json").read_bytes()
        assert main(["calibrate", "--config", str(folder / "c.yaml"), "--out", str(folder / "out")]) == 0  # nothing left to do
        assert (folder / "out" / "calibration.json").read_bytes() == before
    finally:
        diffinv.cli._mocks = real
    return folder / "out"


def test_a_calibration_says_where_it_holds_and_what_it_does(calibrated: Path) -> None:
    found = load_calibration(calibrated / "calibration.json")
    assert found.run.draws == 20 and found.run.target_fwhm == 0.2
    assert found.data.data_scale == pytest.approx(0.2) and found.data.correlated == 0
    assert {f.quantity for f in found.factors} >= {"pixels on source", "pixels off source", "flux"}
    assert all(f.factor > 0 and f.objects == OBJECTS for f in found.factors if f.quantity == "flux")
    assert len(found.inputs) == OBJECTS


def test_products_are_corrected_named_and_refused_elsewhere(
    calibrated: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = calibrated / "calibration.json"
    write_simulated(tmp_path / "in" / "new.fits", 99)
    (tmp_path / "in" / "old.fits").write_bytes(next((calibrated / "observations").glob("*.fits")).read_bytes())
    assert sample(tmp_path / "in", tmp_path / "raw", prior) == 0
    assert sample(tmp_path / "in", tmp_path / "out", prior, "--calibration", str(file)) == 0
    new, raw = products(tmp_path / "out")["new"], products(tmp_path / "raw")["new"]
    found = load_calibration(file)
    if found.refusal({k: float(new.catalog[k][0]) for k in ("sn", "psf_fwhm", "data_scale", "correlated")}) is None:
        factor = {(f.quantity, f.level): f.factor for f in found.factors if f.signal_to_noise[0] <= new.catalog["sn"][0]}
        assert new.provenance.calibration == "calibrated" and new.provenance.calibration_sha256 == found.digest
        assert new.provenance.calibration_factor == pytest.approx(factor["pixels on source", 0.9])
        width = lambda p: p.catalog["flux_q95"][0] - p.catalog["flux_q50"][0]
        assert width(new) == pytest.approx(width(raw) * factor["flux", 0.9], rel=1e-6)
        assert np.array_equal(new.std, raw.std) and np.array_equal(new.samples, raw.samples)
        assert (new.quantiles[0.05] <= new.quantiles[0.16]).all() and (new.quantiles[0.84] <= new.quantiles[0.95]).all()
    else:
        assert any("not calibrated" in note for note in new.notes)
    old = products(tmp_path / "out")["old"]
    assert old.provenance.calibration == "uncalibrated"
    assert any("one of the simulations" in note for note in old.notes)
    capsys.readouterr()
    assert sample(tmp_path / "in", tmp_path / "no", prior, "--calibration", str(file), "--samples", "21") == 2
    assert "another run (draws 20, here 21)" in capsys.readouterr().err
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 2  # the same directory without it is another run
    assert "calibration_sha256" in capsys.readouterr().err


def test_an_evaluation_with_truth_has_tables_tests_and_panels(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = calibrated / "run"
    assert main(["evaluate", str(run), "--bins", "10", "1000"]) == 0
    printed = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert printed == ["evaluation.json", "evaluation.ecsv", "report.html"]
    found = json.loads((run / "evaluation.json").read_text())
    assert found["with_truth"] == len(found["rows"]) == OBJECTS
    tests = {(f["diagnostic"], f["quantity"]) for f in found["findings"]}
    assert {("SBC ECDF", "flux"), ("TARP", "image, half of the draws"), ("predictive χ²", "objects with p ≤ 0.05")} <= tests
    assert {("coverage", "pixels on source"), ("spread–skill", "pixels on source")} <= tests
    product = products(run)[found["rows"][0]["object_id"]]
    row, truth = found["rows"][0], product.truth[0]
    error = ((product.mean[0].astype(float) - truth) ** 2).mean()
    assert row["PSNR"] == pytest.approx(10 * np.log10(truth.max() ** 2 / error), rel=1e-6)
    data = product.exposures[0].image
    source = np.kron(data > max(0.05 * data.max(), 3.0), np.ones((2, 2))) > 0  # noise of 1 nJy
    inside = (truth >= product.quantiles[0.05][0]) & (truth <= product.quantiles[0.95][0])
    assert row["inside_on"] == pytest.approx(inside[source].mean())
    (table,) = [r for r in found["coverage"] if r["quantity"] == "pixels on source" and r["bin"] == "all"]
    assert table["coverage"] == pytest.approx(np.mean([r["inside_on"] for r in found["rows"]]))
    assert 0 <= row["error_null_share"] <= 1.5
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 6 and "predictive χ²" in page and "http" not in re.sub(r"http-equiv", "", page)


def test_an_evaluation_without_truth_judges_fit_and_flags_alone(prior: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_simulated(tmp_path / "in" / f"{number}.fits", number, truth=False)
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 0
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["with_truth"] == 0 and not found["coverage"]
    assert [f["diagnostic"] for f in found["findings"]] == ["predictive χ²"]
    assert all(0.01 <= row["chi2_p"] <= 1 for row in found["rows"])
    first = products(tmp_path / "out")["0"]
    row = next(r for r in found["rows"] if r["object_id"] == "0")
    assert row["prior_driven"] == pytest.approx(((first.quality[0] & Quality.PRIOR_DRIVEN) != 0).mean())
    write_simulated(tmp_path / "truth" / "1.fits", 1)
    assert main(["evaluate", str(tmp_path / "out"), "--truth", str(tmp_path / "truth")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["with_truth"] == 1


def test_held_out_data_judge_draws_of_the_rest(prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_simulated(tmp_path / "in" / f"{number}.fits", number)
    assert sample(tmp_path / "in", tmp_path / "out", prior, "--set", "sampler.held_out=0.5") == 0
    product = products(tmp_path / "out")["0"]
    assert 1 / 21 - 1e-9 <= product.catalog["pit_shape_p"][0] <= 1 and 2 / 21 - 1e-9 <= product.catalog["pit_width_p"][0] <= 1
    assert any("draws see 50% of the information" in note for note in product.notes)
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "held-out PIT, shape" in {f["diagnostic"] for f in found["findings"]}
    assert "held-out PIT, width cannot be extreme with so few draws; give --samples 39 or more" in capsys.readouterr().err
    capsys.readouterr()
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 2
    assert "held_out" in capsys.readouterr().err


def test_wrong_uses_are_told_in_a_line(prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "no products" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--bins", "3", "1"]) == 2
    assert "ascend" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(CONFIG % (3, prior))
    assert main(["calibrate", "--config", str(tmp_path / "c.yaml"), "--set", "sampler.samples=8"]) == 2
    assert "at least 19" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    write_simulated(tmp_path / "a.fits", 1)
    assert sample(tmp_path / "a.fits", tmp_path / "out", prior, "--calibration", str(tmp_path / "x.json")) == 2
    assert "is no calibration" in capsys.readouterr().err


def test_simulations_of_another_kind_are_not_mixed(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["calibrate", "--config", str(calibrated.parent / "c.yaml"), "--out", str(calibrated)]
    assert main([*config, "--set", "simulate.survey=lsst_year_1"]) == 2
    assert "holds other simulations (survey 'lsst', here 'lsst_year_1'); give another --out" in capsys.readouterr().err


def test_a_truth_of_one_object_is_not_that_of_others(prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_simulated(tmp_path / "in" / f"{name}.fits", ord(name), truth=False)
    write_simulated(tmp_path / "a.fits", 1)
    write_simulated(tmp_path / "c.fits", 1)
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 0
    assert main(["evaluate", str(tmp_path / "out"), "--truth", str(tmp_path / "a.fits")]) == 0
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert {row["object_id"]: "PSNR" in row for row in rows} == {"a": True, "b": False}
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--truth", str(tmp_path / "c.fits")]) == 2
    assert "has none of the 2 objects of the run, which are 'a', 'b'; it has 'c'" in capsys.readouterr().err
    assert sample(tmp_path / "in" / "a.fits", tmp_path / "one", prior) == 0
    assert main(["evaluate", str(tmp_path / "one"), "--truth", str(tmp_path / "c.fits")]) == 0  # one object, one truth
    assert "1 with truth" in capsys.readouterr().err
