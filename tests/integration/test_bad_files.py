"""One bad file, one line: every fault of one input file ends in an InputError that names the file, or in a flag.

The good file passes, so that each fault is what stops the bad one.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import SkyObservation, read_observation
from diffinv.data.psf import gaussian_stamp

SHAPE = (32, 32)
PSF = gaussian_stamp(3.5, 25)
CARDS = {"BUNIT": "nJy", "PIXSCALE": 0.2, "BAND": "i"}


def _image() -> np.ndarray:
    image = np.random.default_rng(0).normal(size=SHAPE)
    image[14:18, 14:18] += 30 + np.arange(4)
    return image


def _planes(**changes: Plane | None) -> list[Plane]:
    planes = {
        "SCI": Plane("SCI", _image(), CARDS),
        "VAR": Plane("VAR", np.ones(SHAPE), {}),
        "PSF": Plane("PSF", PSF, {"PSFNORM": 1.0}),
    }
    return [plane for plane in {**planes, **changes}.values() if plane is not None]


def _bytes(**changes: Plane | None) -> bytes:
    return encode_fits([Plane("PRIMARY", None, {}), *_planes(**changes)])


def _two_bands(**second: object) -> bytes:
    cards = {**CARDS, "BAND": "r", **second}
    twin = [Plane("SCI", _image(), cards, 2), Plane("VAR", np.ones(SHAPE), {}, 2), Plane("PSF", PSF, {"PSFNORM": 1.0}, 2)]
    return encode_fits([Plane("PRIMARY", None, {}), *_planes(), *twin])


def _flipped() -> bytes:
    raw = bytearray(_bytes())
    raw[7000] ^= 16
    return bytes(raw)


def _half(value: float) -> np.ndarray:
    return np.where(np.arange(SHAPE[1]) < 18, value, 1.0) * _image()


def _psf(stamp: np.ndarray, **cards: float | str) -> bytes:
    return _bytes(PSF=Plane("PSF", stamp, cards))


def _sci(data: np.ndarray, **cards: float | str) -> bytes:
    return _bytes(SCI=Plane("SCI", data, {**CARDS, **cards}))


FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "text": (lambda: b"not a picture", "not a FITS file"),
    "truncated header": (lambda: _bytes()[:3000], "truncated|damaged"),
    "truncated data": (lambda: _bytes()[:9000], "truncated"),
    "flipped bit": (_flipped, "checksum"),
    "truncated gzip": (lambda: gzip.compress(_bytes())[:-200], "gzip"),
    "gzip bomb": (lambda: gzip.compress(bytes(40_000_000)), "gzip bomb"),
    "pixel bomb": (lambda: _sci(np.zeros((1100, 1100), dtype=np.uint8)), "max_pixels"),
    "no image": (lambda: encode_fits([Plane("PRIMARY", np.zeros(5), {})]), "no image"),
    "NaN": (lambda: _sci(np.full(SHAPE, np.nan)), "100% of the pixels are bad"),
    "infinite": (lambda: _sci(_half(np.inf)), "56% of the pixels are bad"),
    "DQ": (lambda: _bytes(DQ=Plane("DQ", np.ones(SHAPE, dtype=np.int32), {})), "100% of the pixels are bad"),
    "variance zero": (lambda: _bytes(VAR=Plane("VAR", np.zeros(SHAPE), {})), "100% of the pixels are bad"),
    "variance negative": (lambda: _bytes(VAR=Plane("VAR", -np.ones(SHAPE), {})), "100% of the pixels are bad"),
    "error negative": (lambda: _bytes(VAR=None, ERR=Plane("ERR", -np.ones(SHAPE), {})), "100% of the pixels are bad"),
    "variance shape": (lambda: _bytes(VAR=Plane("VAR", np.ones((5, 5)), {})), "planes of one shape"),
    "constant": (lambda: _sci(np.full(SHAPE, 7.0)), "constant"),
    "saturated": (lambda: _sci(np.abs(_image()) + 10, SATURATE=5.0), "bad"),
    "five axes": (lambda: _sci(np.zeros((2, 2, 2, 4, 4))), "axes"),
    "PSF missing": (lambda: _bytes(PSF=None), "input.psf=FILE"),
    "PSF NaN": (lambda: _psf(np.where(PSF > 0.01, np.nan, PSF)), "NaN"),
    "PSF negative": (lambda: _psf(-PSF), "positive"),
    "PSF off-centre": (lambda: _psf(np.roll(PSF, 2, 1)), "off-centre"),
    "PSF a delta": (lambda: _psf(np.pad([[1.0]], 12)), "below one"),
    "PSF too wide": (lambda: _psf(gaussian_stamp(60.0, 61)), "fills its stamp"),
    "PSF scale": (lambda: _psf(gaussian_stamp(20.0, 61)), "half of the image"),
    "PSF norm": (lambda: _psf(PSF, PSFNORM=7.0), "PSFNORM"),
    "PSF kind": (lambda: _psf(PSF, PSFKIND="guess"), "PSFKIND"),
    "unit mismatch": (lambda: _two_bands(BUNIT="adu"), "band i is in nJy but band r in adu"),
    "zero point mismatch": (lambda: _two_bands(BAND="i", ZEROPNT=27.0), "zero point mismatch"),
    "no pixel scale": (lambda: _bytes(SCI=Plane("SCI", _image(), {"BUNIT": "nJy"})), "PIXSCALE"),
    "extra VAR": (lambda: _bytes(V2=Plane("VAR", np.ones(SHAPE), {}, 2)), "EXTVER"),
}


def _read(path: Path, raw: bytes, options: InputOptions | None = None) -> SkyObservation:
    path.write_bytes(raw)
    return read_observation(path, options or InputOptions(max_pixels=10**6))


def test_the_good_file_passes(tmp_path: Path) -> None:
    for raw in (_bytes(), gzip.compress(_bytes()), _two_bands()):
        observation = _read(tmp_path / "good.fits", raw)
        assert all(b.good.all() and not b.noise_estimated for b in observation.bands)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(tmp_path: Path, fault: str, capfd: pytest.CaptureFixture) -> None:
    make, message = FAULTS[fault]
    path = tmp_path / "bad object.fits"
    with pytest.raises(InputError, match=message) as caught:
        _read(path, make())
    text = str(caught.value)
    assert text.count(str(path)) == 1
    assert "\n" not in text
    assert capfd.readouterr() == ("", "")


def test_missing_files_folders_and_dead_links_are_named(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link.fits")
    for name in ("absent.fits", "link.fits", "."):
        with pytest.raises(InputError, match="give a FITS file"):
            read_observation(tmp_path / name, InputOptions())
    with pytest.raises(InputError, match="FITS file|cannot be read"):
        read_observation("a\0b", InputOptions())


def test_a_fault_of_a_second_file_names_that_file(tmp_path: Path) -> None:
    other = tmp_path / "psf.fits"
    other.write_bytes(b"<html>")
    with pytest.raises(InputError, match="HTML") as caught:
        _read(tmp_path / "a.fits", _bytes(PSF=None), InputOptions(psf=(other,)))
    assert str(caught.value).startswith(str(other))
    other.write_bytes(encode_fits([Plane("PRIMARY", np.stack([PSF, PSF]), {})]))
    with pytest.raises(InputError, match="2 PSFs for 1 bands"):
        _read(tmp_path / "a.fits", _bytes(PSF=None), InputOptions(psf=(other,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": ("g", "r")}, "names 2 bands"),
        ({"bands": ("g",)}, "the file says i but input.bands says g"),
        ({"unit": "Jy"}, "BUNIT is nJy but input.unit says Jy"),
        ({"pixel_scale": -1.0}, "> 0 arcsec"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"noise_std": (1.0, 2.0)}, "2 values"),
        ({"noise_std": 1.0, "variance": Path("x.fits")}, "both"),
        ({"hdu": "WHAT"}, "no such image"),
    ],
)
def test_options_that_contradict_the_file_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _read(tmp_path / "a.fits", _bytes(), InputOptions(**options))
    assert str(tmp_path / "a.fits") in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        (lambda: _psf(PSF * 3), "scaled from a sum of 3"),
        (lambda: _psf(gaussian_stamp(3.5, 26)), "even size"),
        (lambda: _bytes(VAR=None), "noise estimated from the sky"),
        (lambda: _sci(np.where(_image() > 20, np.nan, _image())), "16 bad pixels"),
        (lambda: _sci(np.where(_image() > 20, 60.0, _image())), "16 saturated pixels"),
        (lambda: _bytes(SCI=Plane("SCI", _image(), {"PIXSCALE": 0.2, "BAND": "i"})), "no BUNIT"),
    ],
)
def test_what_can_be_mended_is_noted(tmp_path: Path, raw: Callable[[], bytes], note: str) -> None:
    band = _read(tmp_path / "a.fits", raw()).bands[0]
    assert any(note in text for text in band.notes)
    assert np.isfinite(band.image[band.good]).all()
    assert (band.variance[band.good] > 0).all()
