"""The whole way through the command line: FITS in, products and a report out, whatever happens to single objects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS

import diffinv.engine.objects as objects
from diffinv.cli import main
from diffinv.data.fits import Plane, encode_fits, read_fits
from diffinv.data.products import Product, Quality, read_product
from diffinv.engine.mocks import sky_cards
from tests.small import FAST, band_planes, write_observation, write_prior


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


def products(out: Path) -> dict[str, Product]:
    found = [read_product(path) for path in sorted((out / "products").glob("*/*.fits"))]
    return {product.object_id: product for product in found}


def quarantined(out: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in (out / "quarantine").glob("*.json")]
    return {record["object_id"]: record["reason"] for record in records}


def test_a_file_becomes_a_product_and_a_report(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_observation(tmp_path / "galaxy.fits", bands=("g", "i"))
    out = tmp_path / "out"
    assert sample(source, out, prior, "--samples", "20") == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [p.name for p in printed][-1] == "report.html"
    assert all(p.is_file() for p in printed)
    product = products(out)["galaxy"]
    assert product.bands == ("g", "i")
    assert product.mean.shape == (2, 16, 16)
    assert product.unit == "nJy"
    assert set(product.quantiles) == {0.05, 0.16, 0.5, 0.84, 0.95}
    assert product.samples.shape == (20, 2, 16, 16)
    assert np.allclose(product.mean, product.samples.mean(0), rtol=1e-4, atol=1e-4 * product.mean.max())
    assert product.provenance.calibration == "uncalibrated"
    assert product.information.shape == product.mean.shape
    percentiles = ("", "_std", "_q05", "_q16", "_q50", "_q84", "_q95")
    measured = [name + suffix for name in ("flux", "size", "e1", "e2") for suffix in percentiles]
    judged = [
        "sn",
        "psf_fwhm",
        "data_scale",
        "noise_std",
        "correlated",
        "chi2_draw",
        "chi2_p",
        "pit_shape_p",
        "pit_width_p",
        "features",
        "features_flagged",
    ]
    assert list(product.catalog) == ["band", *measured, "chi2", *judged]
    record = json.loads((out / "run.json").read_text())
    assert record["configuration"]["sampler"]["samples"] == 20


def test_output_has_the_sky_of_the_input(tmp_path: Path, prior: Path) -> None:
    source = write_observation(tmp_path / "galaxy.fits")
    sample(source, tmp_path / "out", prior)
    product = products(tmp_path / "out")["galaxy"]
    native = product.exposures[0].grid
    assert product.grid.pixel_scale == pytest.approx(0.1)
    for fine, coarse in (((-0.5, -0.5), (-0.5, -0.5)), ((15.5, 15.5), (7.5, 7.5)), ((0.5, 0.5), (0.0, 0.0))):
        assert np.allclose(product.grid.pixel_to_world(*fine), native.pixel_to_world(*coarse), atol=1e-9)


def test_too_few_draws_for_a_quantile_leave_it_out_and_say_so(tmp_path: Path, prior: Path) -> None:
    sample(
        write_observation(tmp_path / "galaxy.fits"), tmp_path / "out", prior, "--samples", "6", "--set", "output.samples=false"
    )
    product = products(tmp_path / "out")["galaxy"]
    assert set(product.quantiles) == {0.16, 0.5, 0.84}
    assert any("0.05, 0.95 not written: 6 draws" in note for note in product.notes)
    assert product.samples is None


def test_a_second_run_does_only_the_rest(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_observation(folder / "a.fits", seed=1)
    assert sample(folder, out, prior) == 0
    (first,) = (out / "products").glob("*/*.fits")
    stamp = first.stat().st_mtime_ns
    write_observation(folder / "b.fits", seed=2)
    assert sample(folder, out, prior) == 0
    assert "2 products (1 were already there)" in capsys.readouterr().err
    assert first.stat().st_mtime_ns == stamp
    first.write_bytes(first.read_bytes()[:-3000])
    assert sample(folder, out, prior) == 0
    assert set(products(out)) == {"a", "b"}


def test_a_changed_input_is_another_product(tmp_path: Path, prior: Path) -> None:
    source, out = tmp_path / "a.fits", tmp_path / "out"
    for seed in (1, 2):
        write_observation(source, seed=seed)
        sample(source, out, prior)
    assert len(list((out / "products").glob("*/*.fits"))) == 2


def test_another_configuration_in_the_same_place_is_refused_with_the_difference(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_observation(tmp_path / "a.fits"), tmp_path / "out"
    assert sample(source, out, prior) == 0
    capsys.readouterr()
    assert sample(source, out, prior, "--seed", "7") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "configuration.sampler.seed: 0 → 7" in line
    assert "--new-run" in line
    other = tmp_path / "weights" / prior.name
    other.parent.mkdir()
    write_prior(other, bands=("i",))
    assert sample(source, out, other) == 2
    assert "weights_sha256" in capsys.readouterr().err
    assert sample(source, out, prior, "--seed", "7", "--new-run") == 0
    assert len(list((out / "products").glob("*/*.fits"))) == 2
    assert "1 objects" in (out / "report.html").read_text()  # that of the run that there is


def test_the_device_is_not_part_of_the_run(tmp_path: Path, prior: Path) -> None:
    source, out = write_observation(tmp_path / "a.fits"), tmp_path / "out"
    assert sample(source, out, prior) == 0
    assert sample(source, out, prior, "--device", "cpu", "--set", "sampler.max_batch=3") == 0
    assert len(list((out / "products").glob("*/*.fits"))) == 1


def test_a_broken_object_is_set_aside_and_its_neighbours_are_unchanged(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    good = write_observation(folder / "good.fits", seed=3)
    (folder / "cut.fits").write_bytes(good.read_bytes()[:4000])
    (folder / "empty.fits").write_bytes(b"")
    (folder / "page.fits").write_text("<html>404</html>")
    write_observation(folder / "nopsf.fits").write_bytes(
        encode_fits([Plane("PRIMARY", None, {}), *band_planes("i", 1, np.random.default_rng(0))[:2]])
    )
    assert sample(folder, tmp_path / "out", prior) == 4
    assert set(quarantined(tmp_path / "out")) == {"cut", "empty", "page", "nopsf"}
    lines = capsys.readouterr().err.splitlines()
    for name, cause in (("cut", "cut.fits"), ("empty", "empty"), ("page", "HTML"), ("nopsf", "PSF")):
        (line,) = [text for text in lines if f"object '{name}'" in text]
        assert cause in line
    assert "Quarantined" in (tmp_path / "out" / "report.html").read_text()
    assert sample(good, tmp_path / "alone", prior) == 0
    both = [products(tmp_path / name)["good"].samples for name in ("out", "alone")]
    assert np.array_equal(*both)


def test_a_single_broken_file_is_exit_2_with_one_line_and_its_mending_lifts_the_quarantine(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.fits", tmp_path / "out"
    source.write_bytes(write_observation(source).read_bytes()[:4000])
    assert sample(source, out, prior) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.fits" in line]
    assert len(lines) == 1
    write_observation(source)
    assert sample(source, out, prior) == 0
    assert not quarantined(out)


def test_hostile_names_stay_inside_the_output(tmp_path: Path, prior: Path) -> None:
    write_observation(tmp_path / "in" / "x.fits")
    names = ["../../escape", "/etc/x", "ünï cødé", "n" * 4000, "a;rm -rf"]
    rows = "\n".join(f'"{name}",in/x.fits' for name in names)
    (tmp_path / "list.csv").write_text(f"object_id,path\n{rows}\n", encoding="utf-8")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert sample(tmp_path / "list.csv", tmp_path / "deep" / "out", prior) == 0
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(tmp_path / "deep" / "out") for p in written)
    assert set(products(tmp_path / "deep" / "out")) == set(names)


def test_out_of_memory_halves_the_batch_and_gives_the_same_draws(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_observation(tmp_path / "a.fits")
    assert sample(source, tmp_path / "plenty", prior) == 0
    real, seen = objects.reconstruct, []

    def scarce(*arguments, max_batch: int, **options):
        seen.append(max_batch)
        if max_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, max_batch=max_batch, **options)

    monkeypatch.setattr(objects, "reconstruct", scarce)
    assert sample(source, tmp_path / "scarce", prior, "--set", "sampler.max_batch=8") == 0
    assert seen == [8, 4, 2]
    assert "out of memory; going on with 2 rows" in capsys.readouterr().err
    plenty, few = (products(tmp_path / name)["a"].samples for name in ("plenty", "scarce"))
    assert np.allclose(plenty, few, rtol=1e-3, atol=1e-4 * np.abs(plenty).max())


def test_a_batch_of_one_that_does_not_fit_is_quarantined(tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(objects, "reconstruct", nothing)
    write_observation(tmp_path / "in" / "a.fits")
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 4
    assert quarantined(tmp_path / "out")["a"].startswith("MemoryError")


def test_a_run_in_which_everything_fails_stops_early(tmp_path: Path, prior: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(25):
        (tmp_path / "in" / f"{number:02d}.fits").write_bytes(b"")
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 3
    assert len(quarantined(tmp_path / "out")) == 20


def test_a_dry_run_samples_nothing(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_observation(tmp_path / "a.fits")
    assert sample(source, tmp_path / "out", prior, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out == f"a\t{source}\tto do\n"
    assert re.fullmatch(r"diffinv: 1 to do, about \d+ s with 1 at once on this cpu \(\d+ s each\), and \S+ GiB of .*\n", said.err)
    assert not products(tmp_path / "out")
    sample(source, tmp_path / "out", prior)
    capsys.readouterr()
    sample(source, tmp_path / "out", prior, "--dry-run")
    assert capsys.readouterr().out == f"a\t{source}\tdone\n"


def test_bad_pixels_are_masked_flagged_and_never_nan(tmp_path: Path, prior: Path) -> None:
    planes = band_planes("i", 1, np.random.default_rng(0))
    planes[0].data[2:4, 2:4] = np.nan
    planes[1].data[6, 6] = -1.0
    source = tmp_path / "a.fits"
    source.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *planes]))
    assert sample(source, tmp_path / "out", prior) == 0
    product = products(tmp_path / "out")["a"]
    assert np.isfinite(product.mean).all() and np.isfinite(product.std).all()
    unseen = (product.quality[0] & Quality.EXTRAPOLATED) != 0
    expected = np.zeros((16, 16), dtype=bool)
    expected[4:8, 4:8] = expected[12:14, 12:14] = True
    assert np.array_equal(unseen, expected)
    assert np.isnan(product.exposures[0].image).sum() == 5


def test_a_wider_target_psf_smooths_and_keeps_the_flux_and_a_sharper_one_is_refused(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_observation(tmp_path / "a.fits")
    extra = ("--set", "output.margin=8")
    sample(source, tmp_path / "sharp", prior, *extra)
    sample(source, tmp_path / "wide", prior, *extra, "--set", "output.target_psf=0.4")
    sharp, wide = (products(tmp_path / name)["a"] for name in ("sharp", "wide"))
    spectrum = lambda p: np.abs(np.fft.fft2(p.samples)).mean((0, 1))
    assert spectrum(wide)[8, 8] < 0.1 * spectrum(sharp)[8, 8]
    assert spectrum(wide)[0, 0] == pytest.approx(spectrum(sharp)[0, 0], rel=0.1)
    assert wide.provenance.target_fwhm == 0.4
    capsys.readouterr()
    assert sample(source, tmp_path / "no", prior, "--set", "output.target_psf=0.1") == 2
    assert "0.1″ is sharper" in capsys.readouterr().err


def test_a_field_larger_than_the_prior_is_covered_whole(tmp_path: Path, prior: Path) -> None:
    rng = np.random.default_rng(0)
    planes = band_planes("i", 1, rng)
    cards = {**sky_cards((13, 11), 0.2), "BAND": "i", "BUNIT": "nJy"}
    image, variance = (Plane(n, rng.standard_normal((13, 11)).astype(np.float32) ** 2, cards) for n in ("SCI", "VAR"))
    source = tmp_path / "a.fits"
    source.write_bytes(encode_fits([Plane("PRIMARY", None, {}), image, variance, planes[2]]))
    assert sample(source, tmp_path / "out", prior) == 0
    assert products(tmp_path / "out")["a"].mean.shape == (1, 26, 22)


def test_a_prior_with_named_bands_answers_them_together_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = write_prior(tmp_path / "gi.safetensors", bands=("g", "i"))
    assert sample(write_observation(tmp_path / "a.fits", bands=("i", "g")), tmp_path / "out", prior) == 0
    product = products(tmp_path / "out")["a"]
    assert product.bands == ("g", "i")
    assert [e.band for e in product.exposures] == ["i", "g"]
    capsys.readouterr()
    assert sample(write_observation(tmp_path / "b.fits", bands=("z",)), tmp_path / "other", prior) == 2
    assert "band z: the prior tiny knows only g, i" in capsys.readouterr().err


def test_simulated_observations_go_through_with_their_truth(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mocks.yaml"
    config.write_text("simulate:\n  survey: euclid_vis\n  bands: [IE]\n  count: 2\n  seed: 3\n  psf_size: 25\n")
    assert main(["simulate", "--config", str(config), "--out", str(tmp_path / "in")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    again = tmp_path / "again"
    main(["simulate", "--config", str(config), "--out", str(again), "--set", "simulate.count=1"])
    assert (again / paths[0].name).read_bytes() == paths[0].read_bytes()
    assert b"updated" not in paths[0].read_bytes()  # no time of writing in any checksum
    capsys.readouterr()
    extra = ("--samples", "2", "--set", "sampler.steps=2", "--set", "sampler.guidance.iterations=1")
    assert sample(paths[0], tmp_path / "out", prior, *extra) == 0
    (product,) = products(tmp_path / "out").values()
    (truth,) = read_fits(paths[0]).named("TRUTH")
    assert np.array_equal(product.truth[0], truth.data)
    assert "flux error" in (tmp_path / "out" / "report.html").read_text()
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("simulate.bands=q", "has no band 'q'"),
        ("simulate.flux_ratios=[1, 2]", "2 values for 1 bands"),
        ("simulate.cosmos=nowhere", "simulate.cosmos"),
        ("simulate.survey=sdss", "expected 'lsst'"),
    ],
)
def test_impossible_simulations_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    config = tmp_path / "mocks.yaml"
    config.write_text("simulate: {survey: hsc_wide, bands: [i]}\n")
    assert main(["simulate", "--config", str(config), "--out", str(tmp_path / "in"), "--set", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_real_sky_gives_five_bands_over_the_whole_field(tmp_path: Path, prior: Path, data_folder: Path) -> None:
    source, psf = data_folder / "ground_space" / "Cut_HSC.fits", data_folder / "ground_space" / "PSF_HSC.fits"
    quick = ("--samples", "2", "--set", "sampler.steps=2", "--set", "sampler.guidance.iterations=1", "--set", f"input.psf={psf}")
    assert sample(source, tmp_path / "out", prior, *quick) == 0
    (product,) = products(tmp_path / "out").values()
    assert product.mean.shape == (5, 84, 84)
    assert product.grid.celestial


def test_a_distorted_image_gives_a_product_that_anybody_opens(tmp_path: Path, prior: Path) -> None:
    """LSST's visit images have SIP, which a cube of planes cannot have."""
    source = write_observation(tmp_path / "a.fits")
    sip = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-4, "B_1_1": -1e-4}
    bent = [
        Plane(p.name, p.data, {**p.header, **(sip if "CTYPE1" in p.header else {})}, p.extver) for p in read_fits(source).planes
    ]
    source.write_bytes(encode_fits(bent))
    assert sample(source, tmp_path / "out", prior) == 0
    (path,) = (tmp_path / "out" / "products").glob("*/*.fits")
    with fits.open(source) as data, fits.open(path) as hdus:
        native, found, residual = WCS(data["SCI"].header), WCS(hdus["SCI"].header).celestial, WCS(hdus["RESID"].header)
    for column, row in ((0.0, 0.0), (7.0, 3.0)):
        sky = native.pixel_to_world_values(column, row)
        np.testing.assert_allclose(residual.pixel_to_world_values(column, row), sky, rtol=1e-10)
        np.testing.assert_allclose(found.world_to_pixel_values(*sky), (2 * column + 0.5, 2 * row + 0.5), atol=0.1)
