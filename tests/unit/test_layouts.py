"""Layouts of FITS files: no image, flag, variance or exposure that a file holds is left out without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.fits import Plane, Table, encode_fits
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import Band, read_observation
from diffinv.data.psf import gaussian_stamp

SHAPE = (32, 36)
PSF = gaussian_stamp(3.5, 25)
CARDS = {"BUNIT": "nJy", "PIXSCALE": 0.2, "BAND": "i"}


def _image(seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    image = np.random.default_rng(seed).normal(size=shape)
    image[shape[0] // 2 - 3 : shape[0] // 2 + 3, shape[1] // 2 - 3 : shape[1] // 2 + 3] += 30
    return image


def _write(path: Path, *planes: Plane) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *planes]))
    return path


def _says(band: Band, text: str) -> bool:
    return any(text in note for note in band.notes)


def _variance(value: float) -> np.ndarray:
    return np.full(SHAPE, value)


def _first_column(bit: int = 1) -> np.ndarray:
    return np.where(np.arange(SHAPE[1]) == 0, bit, 0).astype(np.int32)[None].repeat(SHAPE[0], 0)


@pytest.mark.parametrize("hdu", [None, 0, "PRIMARY"])
@pytest.mark.parametrize(("noise", "name"), [(4.0, "VAR"), (4.0, "VARIANCE"), (2.0, "ERR")])
def test_an_image_in_the_primary_hdu_keeps_its_companions(tmp_path: Path, name: str, noise: float, hdu: int | str | None) -> None:
    parts = [Plane("PRIMARY", _image(), CARDS), Plane(name, _variance(noise), {}), Plane("DQ", _first_column(), {})]
    path = tmp_path / "a.fits"
    path.write_bytes(encode_fits([*parts, Plane("PSF", PSF, {})]))
    band = read_observation(path, InputOptions(hdu=hdu)).bands[0]
    assert not band.noise_estimated
    assert np.all(band.variance == 4)
    assert not band.good[:, 0].any()
    assert band.good[:, 1:].all()
    path.write_bytes(encode_fits([parts[0], Plane(name, np.ones((5, 5)), {}), Plane("PSF", PSF, {})]))
    with pytest.raises(InputError, match=rf"{name},1 is \(5, 5\).*give planes of one shape"):
        read_observation(path, InputOptions(hdu=hdu))


def _two_exposures(path: Path, name: str = "SCI", *changes: Plane) -> Path:
    """Image, variance, flags and PSF of two exposures; HDU numbers 1 to 4 and 5 to 8."""
    planes = []
    for k in (1, 2):
        planes += [Plane(name, _image(k), CARDS, k), Plane("VAR", _variance(k), {}, k), Plane("DQ", _first_column(k % 2), {}, k)]
        planes += [Plane("PSF", PSF, {"PSFNORM": 1 - k / 100}, k)]
    return _write(path, *planes, *changes)


@pytest.mark.parametrize(("hdu", "versions"), [("sci", [1, 2]), (1, [1]), (5, [2])])
def test_a_chosen_hdu_keeps_the_companions_of_its_extver(tmp_path: Path, hdu: int | str, versions: list[int]) -> None:
    bands = read_observation(_two_exposures(tmp_path / "a.fits"), InputOptions(hdu=hdu)).bands
    assert [b.variance[0, 0] for b in bands] == versions
    assert [bool(b.good[0, 0]) for b in bands] == [version == 2 for version in versions]
    assert [b.psf.norm for b in bands] == [1 - version / 100 for version in versions]
    for band, version in zip(bands, versions, strict=True):
        np.testing.assert_array_equal(band.image, _image(version))
        assert _says(band, f"SCI,{version} is read with VAR,{version}, DQ,{version}, PSF,{version}")


def test_a_chosen_hdu_without_its_own_companion_is_refused(tmp_path: Path) -> None:
    path = _two_exposures(tmp_path / "a.fits", "SCI", Plane("SCI", _image(3), CARDS, 3))
    with pytest.raises(InputError, match=r"VAR has EXTVER \[1, 2\] but SCI has \[3\]"):
        read_observation(path, InputOptions(hdu=9))
    path = _write(tmp_path / "b.fits", Plane("SCI", _image(), CARDS), *(Plane("VAR", _variance(1.0), {}) for _ in range(2)))
    with pytest.raises(InputError, match=r"VAR has EXTVER \[1, 1\] but SCI has \[1\]"):
        read_observation(path, InputOptions())


def test_a_mask_without_a_variance_is_kept(tmp_path: Path) -> None:
    for name in ("IMAGE", "SCI"):
        mask = Plane("MASK", _first_column(), {"MP_BAD": 0})
        path = _write(tmp_path / "a.fits", Plane(name, _image(), CARDS), mask, Plane("PSF", PSF, {}))
        band = read_observation(path, InputOptions()).bands[0]
        assert band.noise_estimated
        assert not band.good[:, 0].any()
        assert band.good[:, 1:].all()
    bare = _write(tmp_path / "b.fits", Plane("SCI", _image(), CARDS), Plane("MASK", _first_column(), {}), Plane("PSF", PSF, {}))
    with pytest.raises(InputError, match="no MP_"):
        read_observation(bare, InputOptions())


def test_a_weight_of_zero_is_no_datum(tmp_path: Path) -> None:
    """Of drizzled images, beside flags and alone; what else a weight says is not used."""
    weight = np.full(SHAPE, 700.0)
    weight[-1], weight[0, 5] = 0, np.nan
    parts = [Plane("SCI", _image(), CARDS), Plane("WHT", weight, {}), Plane("PSF", PSF, {})]
    for more in ([], [Plane("DQ", _first_column(), {})]):
        band = read_observation(_write(tmp_path / "a.fits", *parts, *more), InputOptions()).bands[0]
        assert not band.good[-1].any() and not band.good[0, 5]
        assert np.count_nonzero(~band.good) == SHAPE[1] + 1 + (SHAPE[0] - 1 if more else 0)
        assert band.noise_estimated
        assert _says(band, f"{SHAPE[1] + 1} pixels have no weight in WHT")


@pytest.mark.parametrize(
    ("cards", "name"),
    [
        ({"FILTER": "F150W2", "PUPIL": "F162M"}, "F162M"),
        ({"FILTER": "F200W", "PUPIL": "CLEAR"}, "F200W"),
        ({"FILTER": "F150W2", "PUPIL": "F162M", "BAND": "F182M"}, "F182M"),
        ({"FILTER": "CLEAR", "PUPIL": "F090W"}, "F090W"),
        ({"FILTER1": "CLEAR1L", "FILTER2": "F814W"}, "F814W"),
    ],
)
def test_of_two_filter_wheels_the_one_that_decides_names_the_band(tmp_path: Path, cards: dict[str, str], name: str) -> None:
    path = _write(tmp_path / "a.fits", Plane("SCI", _image(), {"BUNIT": "nJy", "PIXSCALE": 0.2} | cards), Plane("PSF", PSF, {}))
    assert read_observation(path, InputOptions()).bands[0].name == name


@pytest.mark.parametrize(
    "cards",
    [{"FILTER": "F322W2", "PUPIL": "GRISMR"}, {"FILTER": "GR150R", "PUPIL": "F115W"}, {"FILTER1": "G800L", "FILTER2": "CLEAR2L"}],
)
def test_spectra_of_a_grism_are_refused(tmp_path: Path, cards: dict[str, str]) -> None:
    path = _write(tmp_path / "a.fits", Plane("SCI", _image(), {"BUNIT": "nJy", "PIXSCALE": 0.2} | cards), Plane("PSF", PSF, {}))
    with pytest.raises(InputError, match="a grism: sources are spectra there"):
        read_observation(path, InputOptions())


def test_every_exposure_called_image_is_read(tmp_path: Path) -> None:
    bands = read_observation(_two_exposures(tmp_path / "a.fits", "IMAGE"), InputOptions()).bands
    assert [(b.name, b.variance[0, 0], bool(b.good[0, 0])) for b in bands] == [("i", 1, False), ("i", 2, True)]
    mixed = _two_exposures(tmp_path / "b.fits", "IMAGE", Plane("SCI", _image(), CARDS))
    with pytest.raises(InputError, match="both SCI and IMAGE; say which one to read with input.hdu"):
        read_observation(mixed, InputOptions())


def test_images_of_one_shape_are_not_dropped(tmp_path: Path) -> None:
    psf = _write(tmp_path / "psf.fits", Plane("PSF", PSF, {}))
    path = _write(tmp_path / "a.fits", Plane("A", _image(0), CARDS), Plane("B", _image(1), CARDS))
    with pytest.raises(InputError, match="HDUs 1 A, 2 B hold images of one shape; choose with input.hdu"):
        read_observation(path, InputOptions(psf=(psf,)))
    band = read_observation(path, InputOptions(psf=(psf,), hdu=2)).bands[0]
    np.testing.assert_array_equal(band.image, _image(1))


def test_hdu_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    table = Table("T", {"a": np.arange(3)}, {})
    parts = [Plane("PRIMARY", None, {}), table, Plane("A", _image(0), CARDS), table, Plane("B", _image(1), CARDS)]
    path, psf = tmp_path / "a.fits", _write(tmp_path / "psf.fits", Plane("PSF", PSF, {}))
    path.write_bytes(encode_fits(parts))
    for number, seed in ((2, 0), (4, 1)):
        band = read_observation(path, InputOptions(psf=(psf,), hdu=number)).bands[0]
        np.testing.assert_array_equal(band.image, _image(seed))
    for number in (0, 1, 3, 5, -1):
        with pytest.raises(InputError, match=f"input.hdu = {number}: no such image; the file has 2 A, 4 B"):
            read_observation(path, InputOptions(psf=(psf,), hdu=number))


def test_a_named_hdu_is_taken(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.fits", Plane("SCI", _image(0), CARDS), Plane("OTHER", _image(1), CARDS))
    psf = _write(tmp_path / "psf.fits", Plane("PSF", PSF, {}))
    for hdu in ("other", 2):
        np.testing.assert_array_equal(read_observation(path, InputOptions(psf=(psf,), hdu=hdu)).bands[0].image, _image(1))
    with pytest.raises(InputError, match="1 SCI, 2 OTHER"):
        read_observation(path, InputOptions(psf=(psf,), hdu=7))


@pytest.mark.parametrize("first", [0, 1])
def test_bands_of_a_cube_count_from_where_the_file_does(tmp_path: Path, first: int) -> None:
    """The Legacy Surveys' cutouts have BAND0, …; ours have BAND1, …"""
    names = {f"BAND{first + k}": name for k, name in enumerate("grz")}
    cards = {key: value for key, value in CARDS.items() if key != "BAND"}
    cube, noise = np.stack([_image(k) for k in range(3)]), Plane("VAR", np.ones((3, *SHAPE)), {})
    psf = Plane("PSF", np.stack([PSF] * 3), {})
    path = _write(tmp_path / "a.fits", Plane("SCI", cube, {**cards, **names}), noise, psf)
    assert [band.name for band in read_observation(path, InputOptions()).bands] == ["g", "r", "z"]
    del names[f"BAND{first + 1}"]
    _write(path, Plane("SCI", cube, {**cards, **names}), noise, psf)
    with pytest.raises(InputError, match=f"BAND{first + 1} is missing"):
        read_observation(path, InputOptions())
