"""Calibrations of posteriors that are too narrow in a known way: what they mend, what they promise, where they refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.data.products import Product
from diffinv.engine.calibration import MEASURED, OFF, ON, Calibration, RunRegime, fit, load_calibration, on_source
from tests.unit.test_evaluation import DRAWS, product

RUN = RunRegime("w", "m", DRAWS, 0.2)


def narrow(number: int, **columns: float) -> Product:
    """A product whose draws are half as wide as they should be, with an input of its own."""
    base = product(number, 0.5)
    given = {"data_scale": 0.1, "correlated": 0.0, **columns}
    source = replace(base.provenance, input_sha256=f"{number:064d}"[::-1])
    return replace(base, provenance=source, catalog={**base.catalog, **{k: np.array([v]) for k, v in given.items()}})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit((narrow(number, sn=20.0 + number) for number in range(30)), (15.0,), RUN, "30 simulations")


def test_factors_are_those_of_the_fault_and_survive_a_file(calibration: Calibration, tmp_path) -> None:
    factor = {(f.quantity, f.signal_to_noise[0], f.level): f for f in calibration.factors}
    assert {q for q, _, _ in factor} == {ON, OFF, *MEASURED}
    on = factor[ON, 15.0, 0.9]
    # half the width wants twice the interval, and 30 objects aim at (0.1 · 31 − 1)/30 = 7 % outside: 1.81/1.645 times that
    assert on.factor == pytest.approx(2.2, abs=0.25)
    assert on.before < 0.72 and on.objects == 30
    (tmp_path / "c.json").write_bytes(calibration.dump())
    again = load_calibration(tmp_path / "c.json")
    assert again == calibration and again.digest == calibration.digest
    other = json.loads(calibration.dump())
    other["factors"][0]["factor"] += 1e-6
    (tmp_path / "d.json").write_text(json.dumps(other))
    assert load_calibration(tmp_path / "d.json").digest != calibration.digest


def test_a_promise_with_probability_is_wider_and_said(calibration: Calibration) -> None:
    sure = fit((narrow(number, sn=20.0 + number) for number in range(30)), (15.0,), RUN, "30 simulations", delta=0.1)
    wider = [(a.factor, b.factor) for a, b in zip(sure.factors, calibration.factors, strict=True) if a.level == b.level == 0.9]
    assert all(a >= b for a, b in wider) and any(a > b for a, b in wider)
    assert Calibration.from_dict(json.loads(sure.dump())) == sure
    said = sure.apply(narrow(100, sn=30.0)).notes
    assert any("with probability 0.9 on average over objects" in note for note in said)


def test_corrected_intervals_of_other_objects_cover_and_the_rest_is_untouched(calibration: Calibration) -> None:
    inside = []
    for number in range(100, 115):
        raw = narrow(number, sn=30.0)
        found = calibration.apply(raw)
        assert found.provenance.calibration == "calibrated" and found.provenance.calibration_sha256 == calibration.digest
        source = on_source(raw, 0)
        inside.append([((p.truth >= p.quantiles[0.05]) & (p.truth <= p.quantiles[0.95]))[0][source].mean() for p in (raw, found)])
        assert np.array_equal(found.std, raw.std) and np.array_equal(found.samples, raw.samples)
        assert (found.quantiles[0.05] <= found.quantiles[0.16]).all()
        assert found.catalog["flux_q95"][0] > raw.catalog["flux_q95"][0]
    raw, corrected = np.mean(inside, axis=0)
    assert raw < 0.72 and 0.85 < corrected < 0.95


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("data_scale", 0.2, "pixels of 0.2"),
        ("correlated", 1.0, "correlated noise"),
        ("psf_fwhm", 0.8, "PSF of 0.8"),
        ("sn", 500.0, "S/N 500"),
    ],
)
def test_data_unlike_the_simulations_stay_uncalibrated_and_say_why(
    calibration: Calibration, column: str, value: float, reason: str
) -> None:
    raw = narrow(200, **{"sn": 30.0, column: value})
    found = calibration.apply(raw)
    assert found.provenance == raw.provenance and np.array_equal(found.quantiles[0.05], raw.quantiles[0.05])
    assert reason in found.notes[-1]
    own = calibration.apply(narrow(3, sn=30.0))
    assert "one of the simulations" in own.notes[-1]


def test_another_run_and_too_few_objects_are_refused(calibration: Calibration, tmp_path) -> None:
    calibration.check_run(RUN)
    for name, value in (("weights", "v"), ("method", "n"), ("draws", 32), ("target_fwhm", 0.3)):
        with pytest.raises(ConfigError, match=name):
            calibration.check_run(replace(RUN, **{name: value}))
    with pytest.raises(DiffinvError, match="too few"):
        fit([narrow(1, sn=30.0)], (35.0,), RUN, "one")
    with pytest.raises(ConfigError, match="2 kinds"):
        fit([narrow(n, sn=30.0, data_scale=0.1 * (1 + n % 2)) for n in range(4)], (35.0,), RUN, "two")
    with pytest.raises(DiffinvError, match="truth"):
        fit([replace(narrow(1), truth=None)], (35.0,), RUN, "none")


def threefold(number: int) -> Product:
    """A product of three bands that say the same."""
    base = narrow(number, sn=20.0 + number)
    thrice = lambda a: np.concatenate([a] * 3)
    return replace(
        base,
        bands=("g", "r", "i"),
        mean=thrice(base.mean),
        std=thrice(base.std),
        quality=thrice(base.quality),
        quantiles={p: thrice(v) for p, v in base.quantiles.items()},
        samples=np.concatenate([base.samples] * 3, 1),
        exposures=tuple(replace(e, band=band) for e in base.exposures for band in "gri"),
        catalog={k: thrice(v) for k, v in base.catalog.items()},
        truth=thrice(base.truth),
    )


def test_bands_of_one_object_are_one_object_of_the_fit(calibration: Calibration) -> None:
    found = fit(map(threefold, range(30)), (15.0,), RUN, "30 simulations")
    assert found.factors == calibration.factors
    with pytest.raises(DiffinvError, match="2 simulations, too few"):
        fit(map(threefold, range(2)), (15.0,), RUN, "2 simulations")  # six bands are not three objects


def test_an_exposure_with_a_broad_psf_beside_a_sharp_one_is_refused(calibration: Calibration) -> None:
    raw = narrow(200, sn=30.0)
    blurred = replace(raw.exposures[0], psf_scale=3 * raw.exposures[0].psf_scale)
    found = calibration.apply(replace(raw, exposures=(*raw.exposures, blurred)))
    assert "an exposure with a PSF of" in found.notes[-1] and found.provenance == raw.provenance


def test_intervals_stay_nested_whatever_the_factors(calibration: Calibration) -> None:
    """A 68 % factor that is far larger than that of 90 % widens both."""
    factors = tuple(replace(f, factor=3.0 if f.level == 0.68 else 1.0) for f in calibration.factors)
    raw = narrow(200, sn=30.0)
    found = replace(calibration, factors=factors).apply(raw)
    for low, high in ((0.05, 0.16), (0.84, 0.95)):
        assert (found.quantiles[low] <= found.quantiles[high]).all()
        for name in MEASURED:
            assert found.catalog[f"{name}_q{round(100 * low):02d}"][0] <= found.catalog[f"{name}_q{round(100 * high):02d}"][0]
    assert np.allclose(found.quantiles[0.16], raw.quantiles[0.5] + 3 * (raw.quantiles[0.16] - raw.quantiles[0.5]), atol=1e-4)
