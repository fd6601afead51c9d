"""Catalogues of every format name the same objects, and squares of mosaics are the mosaics' own pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.table import Table as AstropyTable

from diffinv.cli import main
from diffinv.core.checks import InputError
from diffinv.data.catalog import Cut, Entry, Row, find_objects
from diffinv.data.fits import Plane, Table, encode_fits, read_fits
from diffinv.data.inputs import input_digest, read_input
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import observe
from diffinv.data.parquet import encode_parquet
from diffinv.data.products import read_product
from diffinv.engine.mocks import sky_cards
from tests.small import FAST, blob, write_observation, write_prior

MOSAIC = (70, 90)
ROW, COLUMN = 30, 41  # where the object of the catalogues is


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def write_mosaic(
    path: Path, band: str, *, scale: float = 0.2, seed: int = 0, primary: bool = False, **cards: object
) -> np.ndarray:
    """A field of noise of std 1 with a galaxy at (ROW, COLUMN), its variance and its PSF; the zero point is Euclid's keyword."""
    rng, shape = np.random.default_rng(seed), MOSAIC
    image = rng.standard_normal(shape).astype(np.float32)
    image[ROW - 4 : ROW + 5, COLUMN - 4 : COLUMN + 5] += blob(9, 4.0, 100.0)
    header = {**sky_cards(shape, scale), "FILTER": band, "BUNIT": "nJy", "MAGZERO": 31.4}
    parts = (
        [Plane("PRIMARY", image, header)] if primary else [Plane("PRIMARY", None, {"FILTER": band}), Plane("SCI", image, header)]
    )
    parts += [Plane("VAR", np.ones(shape, np.float32), {}), Plane("PSF", blob(15, 3.0).astype(np.float32), {"PSFNORM": 1.0})]
    path.write_bytes(encode_fits(parts))
    return image


def position(path: Path, row: float = ROW, column: float = COLUMN) -> tuple[float, float]:
    """RA and Dec of a pixel, by astropy alone."""
    from astropy.io import fits
    from astropy.wcs import WCS

    with fits.open(path) as hdus:
        header = next(hdu.header for hdu in hdus if hdu.is_image and hdu.data is not None)
    ra, dec = WCS(header).pixel_to_world_values(column, row)
    return float(ra), float(dec)


COLUMNS = {"object_id": np.array(["7", "b ünï", "c,d"]), "path": np.array(["x.fits", "y.fits", "sub/z.fits"])}
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda p: AstropyTable(COLUMNS).write(p, format="ascii.csv"),
    "space.ecsv": lambda p: AstropyTable(COLUMNS).write(p, format="ascii.ecsv"),
    "comma.ecsv": lambda p: AstropyTable(COLUMNS).write(p, format="ascii.ecsv", delimiter=","),
    "a.fits": lambda p: p.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Table("LIST", ascii_columns(), {})])),
    "a.parquet": lambda p: p.write_bytes(encode_parquet({**COLUMNS, "spare": np.ones(3)})),
    "numbers.parquet": lambda p: p.write_bytes(encode_parquet({**COLUMNS, "object_id": np.array([7, 8, 9])})),
}


def ascii_columns() -> dict[str, np.ndarray]:
    return {**COLUMNS, "object_id": np.array(["7", "b", "c,d"])}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_names_the_same_objects(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    names = {"a.fits": ["7", "b", "c,d"], "numbers.parquet": ["7", "8", "9"]}.get(name, list(COLUMNS["object_id"]))
    expected = [Entry(n, tmp_path / p) for n, p in zip(names, COLUMNS["path"])]
    assert find_objects(tmp_path / name) == expected


def test_a_fits_image_is_an_observation_and_no_catalogue(tmp_path: Path) -> None:
    path = write_observation(tmp_path / "a.fits")
    assert find_objects(path) == [Entry("a", path)]


@pytest.mark.parametrize("leaf", ["dataset/Norder=1/Dir=0/Npix={}.parquet", "Norder=1/Dir=0/Npix={}/part0.parquet"])
def test_the_leaves_of_a_hats_catalogue_are_one_list(tmp_path: Path, leaf: str) -> None:
    for number in range(2):
        path = tmp_path / leaf.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "_healpix_29": np.arange(2),
            "id": np.array([f"{number}a", f"{number}b"]),
            "path": np.array(["/x.fits", "/y.fits"]),
        }
        path.write_bytes(encode_parquet(columns))
    assert [entry.object_id for entry in find_objects(tmp_path)] == ["0a", "0b", "1a", "1b"]


CUTANA = "SourceID,RA,Dec,diameter_pixel,fits_file_paths\n"


@pytest.mark.parametrize("paths", ["\"['v.fits', 'y.fits']\"", '"[""v.fits"", ""y.fits""]"'], ids=["Python", "JSON"])
def test_a_cutana_catalogue_of_mosaics_runs_unchanged(tmp_path: Path, prior: Path, paths: str) -> None:
    images = {
        "VIS": write_mosaic(tmp_path / "v.fits", "VIS", primary=True),
        "NIR_Y": write_mosaic(tmp_path / "y.fits", "NIR_Y", seed=1),
    }
    places = {"middle": (ROW - 0.3, COLUMN - 0.3), "corner": (2, 3), "off": None}
    lines = []
    for name, place in places.items():
        ra, dec = (10.0, 80.0) if place is None else position(tmp_path / "v.fits", *place)
        lines.append(f"{name},{ra!r},{dec!r},8,{paths}\n")
    (tmp_path / "sources.csv").write_text(CUTANA + "".join(lines))
    out = tmp_path / "out"
    assert main(["sample", str(tmp_path / "sources.csv"), "--out", str(out), "--prior", str(prior), *FAST]) == 4
    products = {p.object_id: p for p in map(read_product, (out / "products").glob("*/*.fits"))}
    assert set(products) == {"middle", "corner"}
    assert "is not on the mosaic" in json.loads((out / "quarantine" / "off.json").read_text())["reason"]
    middle = products["middle"]
    assert middle.bands == ("VIS", "NIR_Y") and middle.zeropoint == (31.4, 31.4)
    for exposure in middle.exposures:
        np.testing.assert_array_equal(exposure.image, images[exposure.band][ROW - 4 : ROW + 4, COLUMN - 4 : COLUMN + 4])
        ra, dec = exposure.grid.pixel_to_world(np.array(4.0), np.array(4.0))
        assert (float(ra), float(dec)) == pytest.approx(position(tmp_path / "v.fits"), abs=1e-9)
    seen = np.isfinite(products["corner"].exposures[0].image)
    assert seen[2:, 1:].all() and not seen[:2].any() and not seen[:, :1].any()


def test_mosaics_of_other_pixels_are_cut_to_the_same_angle(tmp_path: Path) -> None:
    write_mosaic(tmp_path / "fine.fits", "VIS", scale=0.1)
    write_mosaic(tmp_path / "coarse.fits", "Y", scale=0.2)
    mosaics = (tmp_path / "fine.fits", tmp_path / "coarse.fits")
    middle = position(mosaics[0], *((n - 1) / 2 for n in MOSAIC))
    for size in ({"pixels": 24}, {"arcsec": 2.4}):
        file = read_input(Entry("a", mosaics[0], Cut(mosaics, *middle, **size)), InputOptions())
        assert [plane.data.shape for plane in file.named("SCI")] == [(24, 24), (12, 12)]


def test_a_square_has_the_psf_and_the_noise_correlation_of_its_mosaic(tmp_path: Path) -> None:
    path, correlation = tmp_path / "v.fits", blob(5, 2.0).astype(np.float32)
    write_mosaic(path, "VIS")
    planes = list(read_fits(path).planes)
    psf = next(p for p in planes if p.name == "PSF")
    others = [p for p in planes if p.name != "PSF"] + [Plane("NOISECOR", correlation / correlation.max(), {})]
    entry = Entry("a", path, Cut((path,), *position(path), 16))
    path.write_bytes(encode_fits([*others, Plane("PSF", psf.data[None], psf.header)]))
    found = read_input(entry, InputOptions())
    np.testing.assert_array_equal(found.named("NOISECOR")[0].data, correlation / correlation.max())
    np.testing.assert_array_equal(found.named("PSF")[0].data, psf.data)
    path.write_bytes(encode_fits([*others, Plane("PSF", np.stack([psf.data] * 2), psf.header)]))
    with pytest.raises(InputError, match="PSF has 2 planes"):
        read_input(entry, InputOptions())


def test_the_hash_of_a_square_is_of_its_own_pixels(tmp_path: Path) -> None:
    path = tmp_path / "v.fits"
    image = write_mosaic(path, "VIS")
    entry = Entry("a", path, Cut((path,), *position(path), 8))
    before = input_digest(entry, InputOptions())
    assert observe(entry, InputOptions()).sha256 == before
    offset = path.read_bytes().index(image.astype(">f4").tobytes())
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1  # the corner, which is in no square; a whole file would fail its checksum
    path.write_bytes(raw)
    assert input_digest(entry, InputOptions()) == before
    raw[offset + 4 * (ROW * MOSAIC[1] + COLUMN)] ^= 1
    path.write_bytes(raw)
    assert input_digest(entry, InputOptions()) != before
    with pytest.raises(InputError, match="checksum"):
        read_fits(path)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint8, np.float64])
def test_squares_of_integer_images_have_their_values(tmp_path: Path, kind: type) -> None:
    image = np.arange(np.prod(MOSAIC)).reshape(MOSAIC).astype(kind)
    path = tmp_path / "m.fits"
    scaled = {"BSCALE": 0.5, "BZERO": 3.0} if kind is np.int16 else {}
    path.write_bytes(encode_fits([Plane("PRIMARY", image, {**sky_cards(MOSAIC, 0.2), **scaled})]))
    whole = read_fits(path).planes[0].data
    inside, edge = (Entry("a", path, Cut((path,), *position(path, *place), 6)) for place in ((20.2, 30.4), (0, 0)))
    np.testing.assert_array_equal(read_input(inside, InputOptions()).named("SCI")[0].data, whole[18:24, 28:34])
    if np.issubdtype(kind, np.integer):
        with pytest.raises(InputError, match="without BLANK"):
            read_input(edge, InputOptions())


MOSAIC_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "a directory"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:9000]), "damaged"),
    "HTML": (lambda p: p.write_text("<html>"), "damaged"),
    "gzipped": (lambda p: p.write_bytes(__import__("gzip").compress(p.read_bytes())), "gunzip"),
    "no WCS": (lambda p: p.write_bytes(encode_fits([Plane("PRIMARY", np.zeros(MOSAIC), {"PIXSCALE": 0.2})])), "no celestial WCS"),
    "a cube": (lambda p: p.write_bytes(encode_fits([Plane("PRIMARY", np.zeros((2, 9, 9)), {})])), "no image of two axes"),
    "compressed": (
        lambda p: p.write_bytes(
            encode_fits([Plane("PRIMARY", None, {}), Plane("SCI", np.zeros((64, 64), np.float32), {}, compress=True)])
        ),
        "funpack",
    ),
}


@pytest.mark.parametrize("fault", MOSAIC_FAULTS)
def test_a_bad_mosaic_is_one_line_that_names_it(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m.fits"
    write_mosaic(path, "VIS")
    cut = Cut((path,), *position(path), 8)
    spoil, message = MOSAIC_FAULTS[fault]
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        observe(Entry("a", path, cut), InputOptions())
    assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)


def test_a_square_over_max_pixels_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.fits"
    write_mosaic(path, "VIS")
    with pytest.raises(InputError, match="max_pixels"):
        read_input(Entry("a", path, Cut((path,), *position(path), 10**9)), InputOptions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("object_id,colour\na,b\n", "it has object_id, colour"),
        ("object_id,path\na,\n,b\nc,x\n", "line 2: path is empty; line 3: object_id is empty"),
        ("object_id,path\na,x\na,y\n", "more than once: 'a'"),
        (
            f'{CUTANA}a,400,0,8,"[\'m.fits\']"\nb,x,0,8,m\nc,1,1,7.5,m\nd,1,1,-8,m\ne,1,1,8,[]\nf,1,1,8,"[oops"\n',
            "line 2: RA, Dec",
        ),
        ("SourceID,RA,Dec,fits_file_paths\na,1,1,m\n", "needs the columns"),
    ],
)
def test_bad_rows_are_listed_and_nothing_is_made(
    tmp_path: Path, prior: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert main(["sample", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out"), "--prior", str(prior)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(tmp_path / "list.csv") in line
    assert text.count("\n") < 7 or all(f"line {n}: " in line for n in range(2, 8))
    assert not (tmp_path / "out").exists()


def test_at_most_twenty_bad_rows_are_shown(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("object_id,path\n" + ",x\n" * 23)
    with pytest.raises(InputError, match="line 21: object_id is empty and 3 more"):
        find_objects(tmp_path / "list.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.ecsv", "a.parquet"])
def test_a_broken_catalogue_is_one_line_and_an_empty_one_no_object(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=str(path)):
        find_objects(path)
    path.write_bytes(encode_parquet({n: c[:0] for n, c in COLUMNS.items()}) if name == "a.parquet" else b"")
    assert find_objects(path) == []


def write_rows(path: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Two objects in two bands as the MultimodalUniverse stores them; object 1 has a pixel of no weight and one masked."""
    rng = np.random.default_rng(3)
    arrays = {
        "object_id": np.array([b"b1-5", b"b1-6"]),
        "image_array": (rng.standard_normal((2, 2, 8, 8)) + blob(8, 4.0, 100.0)).astype(np.float32),
        "image_band": np.array([[b"des-g", b"des-r"]] * 2),
        "image_ivar": np.full((2, 2, 8, 8), 4.0, np.float32),
        "image_mask": np.ones((2, 8, 8), bool),
        "image_psf_fwhm": np.array([[0.6, 0.7]] * 2),
        "image_scale": np.full((2, 2), 0.2, np.float32),
    }
    arrays["image_ivar"][1, 0, 2, 3], arrays["image_mask"][1, 4, 5] = 0.0, False
    arrays = {name: a for name, a in {**arrays, **changes}.items() if a is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return arrays


def test_rows_of_the_multimodal_universe_are_observations(tmp_path: Path, prior: Path) -> None:
    arrays = write_rows(tmp_path / "in" / "healpix=7" / "001-of-001.hdf5")
    entries = find_objects(tmp_path / "in")
    assert [entry.object_id for entry in entries] == ["b1-5", "b1-6"] and entries[1].where == Row(1)
    found = observe(entries[1], InputOptions(unit="nJy"))
    assert [band.name for band in found.bands] == ["des-g", "des-r"]
    for number, band in enumerate(found.bands):
        np.testing.assert_array_equal(band.image, arrays["image_array"][1, number])
        assert np.unique(band.variance[band.good]) == 0.25
        assert not band.good[4, 5] and band.good[2, 3] == (number == 1)
        offset = np.arange(len(band.psf.stamp)) - len(band.psf.stamp) // 2
        sigma = np.sqrt((band.psf.stamp.sum(0) * offset**2).sum())
        assert 0.2 * 2.3548 * sigma == pytest.approx((0.6, 0.7)[number], rel=0.02)
    assert any("Gaussian of image_psf_fwhm" in note for note in found.notes)
    assert input_digest(entries[0], InputOptions()) != input_digest(replace(entries[0], where=Row(1)), InputOptions())
    out = tmp_path / "out"
    assert main(["sample", str(tmp_path / "in"), "--out", str(out), "--prior", str(prior), "--set", "input.unit=nJy", *FAST]) == 0
    assert {read_product(p).object_id for p in (out / "products").glob("*/*.fits")} == {"b1-5", "b1-6"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_array": None}, "holds no array 'image_array'"),
        ({"image_array": np.zeros((2, 8, 8))}, "expected \\(objects, bands, height, width\\)"),
        ({"image_psf_fwhm": np.zeros((2, 2))}, "must be > 0 arcsec"),
        ({"image_psf_fwhm": None}, "no PSF"),
        ({"image_scale": None}, "pixel scale None"),
        ({"image_ivar": np.ones((1, 2, 8, 8))}, "has 1 rows"),
        ({"image_mask": np.ones((2, 3, 3), bool)}, "planes of one shape"),
    ],
)
def test_bad_image_rows_are_one_line(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    path = tmp_path / "a.hdf5"
    write_rows(path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        observe(find_objects(path)[1], InputOptions(unit="nJy"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
