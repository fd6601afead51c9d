"""Products come back as they were written, hold what FORMATS promises, and appear whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.grids import SkyGrid, output_grid
from diffinv.data.products import (
    LEVELS,
    LONGEST_NAME,
    Exposure,
    Product,
    Provenance,
    Quality,
    holds_quantile,
    product_path,
    read_product,
    safe_id,
    write_atomically,
    write_product,
)

KEY = "ab12cd34ef56ab12"
NATIVE = SkyGrid.from_header(
    {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.2, "CRVAL2": 2.2, "CRPIX1": 11.0, "CRPIX2": 9.0}
    | {"CD1_1": -4.6e-5, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 4.6e-5},
    (20, 25),
)
GRID = NATIVE.rescaled(1.656, (34, 42))
PROVENANCE = Provenance(
    version="0.1.0", config_hash="c0ffee", prior="galaxies-64", weights_sha256="5" * 64, sampler="ancestral + moment matching",
    calibration="uncalibrated", draws=32, network_calls=120.5, seed=2**62 + 1, input_sha256="f" * 64, chi2=1.03,
    target_fwhm=0.2, key=KEY,
)  # fmt: skip
HOSTILE = [
    "../../etc/passwd",
    "/etc/x",
    "a\0b",
    "x" * 4096,
    "é" * 500,
    "星系 7",
    ".hidden",
    "..",
    "~root",
    "a/b\\c:d*?\n",
    "\ud800",
    "CON",
    "a b",
]


def _product(object_id: str = "galaxy 1", **changes) -> Product:
    rng = np.random.default_rng(0)
    shape = (2, *GRID.shape)
    exposure = Exposure(
        "g", "CAM", rng.normal(size=NATIVE.shape), NATIVE, rng.random((15, 17)), 0.08, rng.normal(size=NATIVE.shape)
    )
    product = Product(
        object_id=object_id,
        bands=("g", "r"),
        unit="nJy",
        grid=GRID,
        mean=rng.normal(size=shape),
        std=rng.random(shape),
        quality=rng.integers(0, 32, shape),
        provenance=PROVENANCE,
        quantiles={p: rng.normal(size=shape) for p in LEVELS},
        information=rng.random(shape),
        samples=rng.normal(size=(32, *shape)),
        exposures=(exposure, replace(exposure, band="VIS", instrument="", image=None, noise_std=0.25, weights=(0.0, 1.0))),
        target_psf=rng.random((9, 9)),
        catalog={"flux": np.array([1.0, 2.0]), "flux_q": rng.random((2, 5)), "band": np.array(["g", "r"])},
        notes=("noise estimated from the sky",),
    )
    return replace(product, **changes)


def _same(a: object, b: object) -> None:
    np.testing.assert_allclose(np.asarray(b, dtype=np.float64), np.asarray(a, dtype=np.float64), rtol=1e-6, atol=1e-7)


def test_a_product_comes_back_as_written(tmp_path: Path) -> None:
    product, path = _product(), tmp_path / "p.fits"
    write_product(path, product)
    read = read_product(path)
    for name in ("object_id", "bands", "unit", "provenance", "notes"):
        assert getattr(read, name) == getattr(product, name)
    for name in ("mean", "std", "quality", "information", "samples", "target_psf"):
        _same(getattr(product, name), getattr(read, name))
    assert list(read.quantiles) == list(LEVELS)
    for level in LEVELS:
        _same(product.quantiles[level], read.quantiles[level])
    for written, found in zip(product.exposures, read.exposures, strict=True):
        assert (found.band, found.instrument, found.weights) == (written.band, written.instrument, written.weights)
        assert found.noise_std == pytest.approx(written.noise_std, nan_ok=True)
        assert found.psf_scale == pytest.approx(written.psf_scale)
        _same(written.residual, found.residual)
        _same(written.psf, found.psf)
        assert (found.image is None) == (written.image is None)
    _same(product.exposures[0].image, read.exposures[0].image)
    for column, values in product.catalog.items():
        np.testing.assert_array_equal(read.catalog[column], values)


def test_a_minimal_product_comes_back(tmp_path: Path) -> None:
    product = _product(unit="", quantiles={}, information=None, samples=None, exposures=(), target_psf=None, catalog={}, notes=())
    product = replace(product, provenance=replace(PROVENANCE, chi2=float("nan"), prior="wörd"))
    write_product(tmp_path / "p.fits", product)
    read = read_product(tmp_path / "p.fits")
    assert read.unit == ""
    assert read.samples is None
    assert np.isnan(read.provenance.chi2)
    assert read.provenance.prior == "w?rd"


def test_every_image_has_its_own_wcs_and_the_same_sky(tmp_path: Path) -> None:
    """Positions agree with the input's grid to 1e-3 pixels in every extension, as another reader sees them."""
    write_product(tmp_path / "p.fits", _product())
    native = WCS(fits.Header(dict(NATIVE.cards)))
    sky = native.pixel_to_world(7.0, 5.0)
    with fits.open(tmp_path / "p.fits") as hdus:
        names = [hdu.name for hdu in hdus]
        assert names[:9] == ["PRIMARY", "SCI", "ERR", "DQ", "Q05", "Q16", "Q50", "Q84", "Q95"]
        assert names[9:] == ["INFO", "SAMPLES", "RESID", "PSF_IN", "DATA", "RESID", "PSF_IN", "PSF_OUT", "CATALOG"]
        for hdu in hdus[1:-1]:
            wcs = WCS(hdu.header)
            if hdu.name.startswith("PSF"):
                assert hdu.header["CUNIT1"] == "arcsec"
                continue
            expected = (7.0, 5.0) if hdu.name in ("RESID", "DATA") else (7.5 * 1.656 - 0.5, 5.5 * 1.656 - 0.5)
            np.testing.assert_allclose(wcs.celestial.world_to_pixel(sky), expected, atol=1e-3)
        assert hdus["SCI"].header["BUNIT"] == hdus["SAMPLES"].header["BUNIT"] == "nJy"
        assert hdus["SCI"].header["BAND2"] == "r"
        assert hdus["DQ"].header["DQBIT3"] == "PRIOR_DRIVEN"
        assert isinstance(hdus["SAMPLES"], fits.CompImageHDU)


def test_a_grid_without_sky_coordinates_comes_back_off_centre(tmp_path: Path) -> None:
    grid = output_grid(SkyGrid.linear((20, 25), 0.1656), 0.1)
    assert grid.shape == GRID.shape
    write_product(tmp_path / "p.fits", _product(grid=grid))
    read = read_product(tmp_path / "p.fits").grid
    assert not read.celestial
    np.testing.assert_allclose(read.affine_to(grid).offset, [0, 0], atol=1e-9)


def test_provenance_stands_in_the_primary_header_and_checksums_hold(tmp_path: Path) -> None:
    write_product(tmp_path / "p.fits", _product())
    with fits.open(tmp_path / "p.fits", checksum=True, disable_image_compression=True) as hdus:
        header = hdus[0].header
        cards = [
            "DIVERS",
            "CFGHASH",
            "PRIORID",
            "WSHA",
            "SAMPLER",
            "CALIBR",
            "NSAMP",
            "NFE",
            "SEED",
            "OBJID",
            "INSHA",
            "CHI2",
            "TPSFFWHM",
        ]
        assert all(card in header for card in cards)
        assert header.comments["TPSFFWHM"].startswith("arcsec")
        assert all((hdu.verify_checksum(), hdu.verify_datasum()) == (1, 1) for hdu in hdus)


@pytest.mark.parametrize(("draws", "written"), [(32, 5), (19, 5), (18, 3), (6, 3), (5, 1)])
def test_quantiles_need_draws(tmp_path: Path, draws: int, written: int) -> None:
    product = _product(provenance=replace(PROVENANCE, draws=draws), samples=None)
    write_product(tmp_path / "p.fits", product)
    read = read_product(tmp_path / "p.fits")
    assert len(read.quantiles) == written
    assert any("cannot hold" in note for note in read.notes) == (written < 5)
    assert sum(holds_quantile(p, draws) for p in LEVELS) == written


def test_no_pixel_without_a_number_is_marked_good(tmp_path: Path) -> None:
    product = _product(quality=np.zeros((2, *GRID.shape), dtype=int))
    product.mean[0, 1, 2], product.std[1, 3, 4] = np.nan, np.inf
    write_product(tmp_path / "p.fits", product)
    quality = read_product(tmp_path / "p.fits").quality
    assert quality[0, 1, 2] == quality[1, 3, 4] == Quality.NODATA
    assert np.count_nonzero(quality) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": np.zeros((2, 3, 4))}, "std is"),
        ({"quantiles": {0.5: np.zeros((3, *GRID.shape))}}, "quantile 0.5"),
        ({"samples": np.zeros((3, 2, *GRID.shape))}, "samples are"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DiffinvError, match=message):
        write_product(tmp_path / "p.fits", _product(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("object_id", HOSTILE)
def test_hostile_names_stay_inside_and_come_back(tmp_path: Path, object_id: str) -> None:
    path = product_path(tmp_path / "out", object_id, KEY)
    assert path.parent == tmp_path / "out" / "products" / "ab"
    assert len(path.name.encode()) < 150
    write_product(path, _product(object_id, samples=None, exposures=(), catalog={}))
    assert path.is_file()
    assert read_product(path).object_id == object_id


def test_safe_names_are_distinct() -> None:
    names = [*HOSTILE, "x" * 4097, "a%2Fb", "a/b", "a_b", "%2E.", ".A"]
    assert len({safe_id(name) for name in names}) == len(names)
    assert max(len(safe_id(name)) for name in names) <= LONGEST_NAME
    assert safe_id("SDSS_J1234-5.6") == "SDSS_J1234-5.6"
    with pytest.raises(DiffinvError, match="empty"):
        safe_id("")


def test_links_that_lead_out_and_odd_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "products").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "products" / "ab")
    with pytest.raises(DiffinvError, match="leads out"):
        product_path(tmp_path / "out", "a", KEY)
    with pytest.raises(DiffinvError, match="hexadecimal"):
        product_path(tmp_path / "out", "a", "../x")


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.fits"
    write_product(path, _product())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_product(path, _product("other"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.fits"]


def test_the_name_appears_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies just before the rename has changed nothing that a reader sees."""
    path = tmp_path / "p.fits"
    write_atomically(path, b"old")

    def die(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"new"
        assert Path(source).parent == path.parent
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["p.fits"]


def test_a_file_that_fails_its_check_is_never_named(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise InputError(f"{path}: damaged")

    with pytest.raises(InputError):
        write_atomically(tmp_path / "p.fits", b"x", verify=refuse)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_strangers_are_not_products(tmp_path: Path) -> None:
    path = tmp_path / "p.fits"
    write_product(path, _product())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(InputError, match="checksum"):
        read_product(path)
    path.write_bytes(encode_fits([Plane("PRIMARY", np.zeros((3, 3)), {})]))
    with pytest.raises(InputError, match="not a diffinv product"):
        read_product(path)


def _small(**changes) -> Product:
    return _product(samples=None, quantiles={}, notes=(), **changes)


@pytest.mark.parametrize("compressible", [True, False])
def test_a_product_beyond_the_pixel_limit_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, compressible: bool
) -> None:
    """The limit is 1000 pixels, or one a byte; long rows of equal draws would be packed into fewer bytes than pixels."""
    monkeypatch.setattr("diffinv.data.products.MAX_PIXELS", 1000)
    shape = (2, 8, 800)
    draws = np.zeros((32, *shape)) if compressible else np.random.default_rng(0).normal(size=(32, *shape))
    planes = {"mean": np.zeros(shape), "std": np.ones(shape), "quality": np.zeros(shape, dtype=np.int32), "samples": draws}
    product = _product(grid=SkyGrid.linear(shape[1:], 0.1), quantiles={}, information=None, exposures=(), **planes)
    write_product(tmp_path / "p.fits", product)
    _same(draws, read_product(tmp_path / "p.fits").samples)


def test_samples_within_the_pixel_limit_are_compressed(tmp_path: Path) -> None:
    write_product(tmp_path / "p.fits", _product(samples=np.zeros((32, 2, *GRID.shape))))
    assert (tmp_path / "p.fits").stat().st_size < 32 * 2 * GRID.shape[0] * GRID.shape[1] * 4


def test_zero_points_are_written_beside_every_flux(tmp_path: Path) -> None:
    path, truth = tmp_path / "p.fits", np.ones((2, *GRID.shape))
    write_product(path, _product(truth=truth, zeropoint=(27.0, 27.0)))
    assert read_product(path).zeropoint == (27.0, 27.0)
    with fits.open(path) as hdus:
        named = {hdu.name for hdu in hdus if "ZEROPNT" in hdu.header}
        assert named == {"SCI", "ERR", "Q05", "Q16", "Q50", "Q84", "Q95", "SAMPLES", "TRUTH", "DATA"}
        assert all(hdu.header["ZEROPNT"] == 27 for hdu in hdus if hdu.name in named)
    write_product(path, _product(zeropoint=(27.0, None)))
    assert read_product(path).zeropoint == (27.0, None)
    with fits.open(path) as hdus:
        assert "ZEROPNT" not in hdus["SCI"].header
        assert hdus["SCI"].header["ZPNT1"] == hdus["DATA"].header["ZEROPNT"] == 27
    write_product(path, _product())
    assert read_product(path).zeropoint is None
    with pytest.raises(DiffinvError, match="1 zero points, not 2"):
        write_product(path, _product(zeropoint=(27.0,)))


REQUIRED = [
    *[(0, card) for card in ("DIVERS", "CFGHASH", "PRIORID", "WSHA", "SAMPLER", "CALIBR", "NSAMP", "NFE", "SEED", "INSHA")],
    *[(0, card) for card in ("OBJID", "TPSFFWHM", "PRODKEY")],
    *[("SCI", card) for card in ("BAND1", "BAND2")],
    ("RESID", "BAND"),
    ("PSF_IN", "CDELT1"),
]


@pytest.mark.parametrize("value", [None, True])
@pytest.mark.parametrize(("hdu", "card"), REQUIRED)
def test_a_product_without_a_card_is_refused_in_one_line(tmp_path: Path, hdu: int | str, card: str, value: object) -> None:
    path = tmp_path / "p.fits"
    write_product(path, _small())
    with fits.open(path) as hdus:
        if value is None:
            del hdus[hdu].header[card]
        else:
            hdus[hdu].header[card] = value
        hdus.writeto(tmp_path / "q.fits", checksum=True)
    with pytest.raises(InputError, match=rf"q\.fits: not a (whole|diffinv) product.*{card}") as caught:
        read_product(tmp_path / "q.fits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SCI", "ERR", "DQ", "PSF_IN"])
def test_a_product_without_a_plane_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.fits"
    write_product(path, _small())
    for change in ("drop", "empty", "row", "version"):
        with fits.open(path) as hdus:
            if change == "drop":
                del hdus[name]
            elif change == "version":
                hdus[name].ver = 7
            else:
                hdus[name].data = None if change == "empty" else np.zeros(5, dtype=np.int32)
            hdus.writeto(tmp_path / "q.fits", checksum=True, overwrite=True)
        with pytest.raises(InputError, match=rf"q\.fits: not a (whole|diffinv) product.*{name}") as caught:
            read_product(tmp_path / "q.fits")
        assert "\n" not in str(caught.value)


def test_flags_that_are_no_integers_and_a_wrong_number_of_draws_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.fits"
    write_product(path, _product())
    for name, data in (("DQ", np.zeros((2, *GRID.shape))), ("SAMPLES", np.zeros((3, 2, *GRID.shape), dtype=np.float32))):
        with fits.open(path) as hdus:
            hdus[name].data = data
            hdus.writeto(tmp_path / "q.fits", checksum=True, overwrite=True)
        with pytest.raises(InputError, match=f"not a whole product: {name}.*expected"):
            read_product(tmp_path / "q.fits")
