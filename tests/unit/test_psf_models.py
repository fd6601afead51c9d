"""PSF models at a place: PSFEx against GalSim's reader, grids against their stamps, and how a place is found or refused."""

from __future__ import annotations

from pathlib import Path

import galsim
import numpy as np
import pytest
from astropy.io import fits
from galsim.des import DES_PSFEx

from diffinv.core.checks import InputError
from diffinv.data.catalog import Cut
from diffinv.data.fits import Plane, decode_fits, encode_fits, read_fits
from diffinv.data.given import read_bands
from diffinv.data.layouts import InputOptions
from diffinv.data.mosaics import read_cut
from diffinv.data.observation import Band, read_observation
from diffinv.data.psf import gaussian_stamp
from diffinv.data.psf_models import PsfModel, models_of

SIZE = 33
WIDE, HIGH = 2000, 4000  # of the image that the models are of
TAN = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CD1_1": -5.6e-5, "CD2_2": 5.6e-5}


def stamp(width: float) -> np.ndarray:
    return gaussian_stamp(width, SIZE)


def write_psfex(path: Path, **cards: object) -> Path:
    """Degree 2: wider towards the right and the top; two stamp pixels an image pixel."""
    wider = [stamp(6.5) - stamp(6.0), stamp(9.0), stamp(7.0) - stamp(6.0), stamp(8.0), stamp(5.0)]
    return _psfex(
        path, [stamp(6.0), *(w * t for w, t in zip((2, 0.1, 1, 0.2, 0.1), wider, strict=True))], **{"POLDEG1": 2} | cards
    )


def _psfex(path: Path, terms: list[np.ndarray], **cards: object) -> Path:
    mask = np.array(terms, dtype=np.float32)
    column = fits.Column("PSF_MASK", f"{mask.size}E", dim=f"({SIZE},{SIZE},{len(mask)})", array=mask[None])
    table = fits.BinTableHDU.from_columns([column], name="PSF_DATA")
    known = {"POLNAXIS": 2, "POLGRP1": 1, "POLNAME1": "X_IMAGE", "POLZERO1": 1000.5, "POLSCAL1": float(WIDE), "POLNGRP": 1}
    known |= {"POLGRP2": 1, "POLNAME2": "Y_IMAGE", "POLZERO2": 2000.5, "POLSCAL2": float(HIGH), "PSF_SAMP": 0.5}
    table.header.update(known | {"PSFNAXIS": 3, "PSFAXIS1": SIZE, "PSFAXIS2": SIZE, "PSFAXIS3": len(mask)} | cards)
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)
    return path


def write_grid(path: Path, kind: str) -> Path:
    """Three columns and two rows whose PSF is wider from place to place."""
    cube = np.array([stamp(5 + 0.5 * k) for k in range(6)])
    x, y = (0, 1000, 2000), (0, 4000)
    cards: dict[str, object] = {"NXPSFS": 3, "NYPSFS": 2}
    if kind == "numbered":
        cards |= {f"IPSFX{k + 1:02d}": v for k, v in enumerate(x)} | {f"JPSFY{k + 1:02d}": v for k, v in enumerate(y)}
    elif kind == "listed":
        cards |= {"IPSFXA5": "0 1000", "IPSFXB5": "2000", "JPSFYA5": "0 4000"}
    else:
        places = [(b - 1, a - 1) for b in y for a in x]
        cards = {f"DET_YX{k}": str(tuple(map(float, place))) for k, place in enumerate(places)} | {"OVERSAMP": 4}
    path.write_bytes(encode_fits([Plane("PRIMARY", cube, cards)]))
    return path


def model(path: Path) -> PsfModel:
    (found,) = models_of(read_fits(path))
    return found


def test_a_psfex_model_is_that_of_galsim(tmp_path: Path) -> None:
    path = write_psfex(tmp_path / "a.psf")
    ours, theirs = model(path), DES_PSFEx(str(path))
    assert ours.oversample == 1 / theirs.sample_scale == 2
    for x, y in ((1000.5, 2000.5), (1.0, 1.0), (1990.0, 350.5)):
        expected = theirs.getPSFArray(galsim.PositionD(x, y))
        np.testing.assert_allclose(ours.at(x, y), expected, rtol=0, atol=1e-6 * expected.max())
    assert np.abs(ours.at(100.0, 100.0) - ours.at(1900.0, 3900.0)).max() > 0.1 * ours.at(100.0, 100.0).max()


@pytest.mark.parametrize("kind", ["numbered", "listed", "stpsf"])
def test_a_grid_is_its_stamps_and_bilinear_between(tmp_path: Path, kind: str) -> None:
    found = model(write_grid(tmp_path / "a.fits", kind))
    assert found.oversample == 4
    for k, (x, y) in enumerate([(x, y) for y in (0, 4000) for x in (0, 1000, 2000)]):
        np.testing.assert_allclose(found.at(x, y), stamp(5 + 0.5 * k))
    quarter = 0.75 * stamp(5.5) + 0.25 * stamp(6.0)
    np.testing.assert_allclose(found.at(1250, 0), quarter)
    np.testing.assert_allclose(found.at(1250, 2000), 0.5 * quarter + 0.5 * (0.75 * stamp(7.0) + 0.25 * stamp(7.5)))
    np.testing.assert_allclose(found.at(2100, 4100), stamp(7.5))  # beyond the last place, that one


def test_two_detectors_in_a_grid_meet_in_a_seam(tmp_path: Path) -> None:
    """Rows at 0, 2000, 2000, 4000: the PSF jumps at the seam, and what stands after the last place is no place."""
    cube = np.array([stamp(5 + 0.5 * k) for k in range(8)])
    places = {"IPSFX01": 0, "IPSFX02": 1000, "IPSFX03": 9999, "JPSFY01": 0, "JPSFY02": 2000, "JPSFY03": 2000, "JPSFY04": 4000}
    cards = {"NXPSFS": 2, "NYPSFS": 4} | places
    (tmp_path / "a.fits").write_bytes(encode_fits([Plane("PRIMARY", cube, cards)]))
    found = model(tmp_path / "a.fits")
    np.testing.assert_allclose(found.at(0, 1999.999), stamp(6.0), atol=1e-6)
    np.testing.assert_allclose(found.at(0, 2000), stamp(7.0))
    np.testing.assert_allclose(found.at(1000, 3000), 0.5 * stamp(7.5) + 0.5 * stamp(8.5))
    (tmp_path / "b.fits").write_bytes(encode_fits([Plane("PRIMARY", cube, cards | {"JPSFY02": 0})]))
    with pytest.raises(InputError, match="do not make a grid"):
        model(tmp_path / "b.fits")
    image = write_image(tmp_path / "image.fits", LTV1=-100.0, LTV2=-200.0)
    with pytest.raises(InputError, match=r"of two detectors in one frame.*psf_position"):
        read_observation(image, InputOptions(psf=(tmp_path / "a.fits",)))


def test_the_library_of_a_camera_is_read(data_folder: Path) -> None:
    """Of Hubble's WFC3/UVIS in F814W: 7 × 8 places on two detectors; the PSF is 0.07″ to 0.09″ wide, pixel included."""
    path = data_folder / "hst" / "empirical_psfs_f814w.fits"
    if not path.is_file():
        pytest.skip("needs hst/empirical_psfs_f814w.fits")
    found = model(path)
    assert found.span == ((0, 4096), (0, 4096))
    for place in ((0, 0), (2048, 1000), (2048, 2000), (4000, 2040), (4096, 4096)):
        stamp_here = found.at(*place)
        middle = np.unravel_index(stamp_here.argmax(), stamp_here.shape)
        assert max(abs(m - 50) for m in middle) <= 1
        assert stamp_here.sum() == pytest.approx(found.at(2048, 682).sum(), rel=0.01)
        assert 0.065 < 0.04 / found.oversample * np.sqrt(4 / np.pi * (stamp_here > stamp_here.max() / 2).sum()) < 0.095
    jump = np.abs(found.at(2048, 2047.99) - found.at(2048, 2048)).max()
    assert jump > 5 * np.abs(found.at(2048, 2047.99) - found.at(2048, 2047)).max()


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ({"POLNAME2": "MAG_AUTO"}, "depends on X_IMAGE, MAG_AUTO"),
        ({"POLGRP2": 2}, "polynomials of their own"),
        ({"POLDEG1": 3}, "6 terms do not make a polynomial of degree 3"),
        ({"PSF_SAMP": 0.0}, "must be > 0"),
        ({"POLZERO1": "x"}, "POLZERO1 is 'x'"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(tmp_path: Path, cards: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        models_of(read_fits(write_psfex(tmp_path / "a.psf", **cards)))


def test_a_grid_with_a_place_missing_is_refused(tmp_path: Path) -> None:
    (plane,) = read_fits(write_grid(tmp_path / "a.fits", "numbered")).planes
    lacking = {k: v for k, v in plane.header.items() if k != "JPSFY01"}
    for name, cards in (("b", {**plane.header, "IPSFX02": 0}), ("c", lacking)):
        (tmp_path / f"{name}.fits").write_bytes(encode_fits([Plane("PRIMARY", plane.data, cards)]))
    with pytest.raises(InputError, match="do not make a grid"):
        model(tmp_path / "b.fits")
    with pytest.raises(InputError, match="JPSFY.* hold 1 places for 2"):
        model(tmp_path / "c.fits")


def test_a_model_that_is_no_numbers_is_refused(tmp_path: Path) -> None:
    plane = read_fits(write_grid(tmp_path / "a.fits", "stpsf")).planes[0]
    (tmp_path / "b.fits").write_bytes(encode_fits([Plane("PRIMARY", plane.data, {**plane.header, "DET_YX2": "(1.2.3, 4)"})]))
    with pytest.raises(InputError, match=r"DET_YX2 is '\(1.2.3, 4\)'"):
        model(tmp_path / "b.fits")
    column = fits.Column("PSF_MASK", "PE()", array=np.array([np.ones(3), np.ones(4)], dtype=object))
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns([column], name="PSF_DATA")]).writeto(tmp_path / "c.psf")
    with pytest.raises(InputError, match="PSF"):
        model(tmp_path / "c.psf")


def test_a_grid_of_one_row_is_the_same_along_y(tmp_path: Path) -> None:
    cards = {"NXPSFS": 2, "NYPSFS": 1, "IPSFX01": 0, "IPSFX02": 1000, "JPSFY01": 500}
    (tmp_path / "a.fits").write_bytes(encode_fits([Plane("PRIMARY", np.array([stamp(5.0), stamp(6.0)]), cards)]))
    np.testing.assert_allclose(model(tmp_path / "a.fits").at(250, 3000), 0.75 * stamp(5.0) + 0.25 * stamp(6.0))


def write_image(path: Path, shape: tuple[int, int] = (40, 50), **cards: object) -> Path:
    image = np.random.default_rng(0).normal(size=shape)
    header = {"BUNIT": "nJy", "BAND": "i", "PIXSCALE": 0.2} | cards
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Plane("SCI", image, header), Plane("VAR", np.ones(shape), {})]))
    return path


def same(band: Band, stamp: np.ndarray) -> None:
    np.testing.assert_allclose(band.psf.stamp, stamp / stamp.sum(), atol=1e-7)


def test_the_model_is_taken_where_the_image_lies(tmp_path: Path) -> None:
    """By the configuration, by LTV, as cutouts of IRAF, HST and LSST have it, or in the middle of a whole image."""
    psf = write_psfex(tmp_path / "a.psf")
    image = write_image(tmp_path / "image.fits", LTV1=-1200.0, LTV2=-300.0)
    band = read_observation(image, InputOptions(psf=(psf,))).bands[0]
    same(band, model(psf).at(1225.5, 320.5))
    assert band.psf.oversample == 2
    assert any("PSF model taken at pixel (1225.5, 320.5)" in note for note in band.notes)
    same(read_observation(image, InputOptions(psf=(psf,), psf_position=(17.0, 18.0))).bands[0], model(psf).at(17.0, 18.0))
    fine = write_image(tmp_path / "fine.fits", LTV1=-1200.0, LTV2=-300.0, LTM1_1=2.0, LTM2_2=2.0)
    same(read_observation(fine, InputOptions(psf=(psf,))).bands[0], model(psf).at(1225.5 / 2, 320.5 / 2))
    whole = write_image(tmp_path / "whole.fits", (2100, 1100))
    same(read_observation(whole, InputOptions(psf=(psf,))).bands[0], model(psf).at(550.5, 1050.5))


def test_a_cutout_that_does_not_say_where_it_lies_is_refused(tmp_path: Path) -> None:
    psf, image = write_psfex(tmp_path / "a.psf"), write_image(tmp_path / "image.fits")
    with pytest.raises(InputError, match=r"image of 2000 pixels, this one has 50.*input.psf_position=\[x, y\]"):
        read_observation(image, InputOptions(psf=(psf,)))
    unmoved = write_image(tmp_path / "unmoved.fits", LTV1=0.0, LTV2=0.0)
    with pytest.raises(InputError, match="nothing says where in it"):
        read_observation(unmoved, InputOptions(psf=(psf,)))
    with pytest.raises(InputError, match=r"^\S*a.psf: the PSF model knows x from 0.5 to 2000.5, not 2500"):
        read_observation(image, InputOptions(psf=(psf,), psf_position=(2500.0, 1.0)))
    constant = _psfex(tmp_path / "b.psf", [stamp(6.0)], POLNAXIS=0)
    same(read_observation(image, InputOptions(psf=(constant,))).bands[0], stamp(6.0))


def test_one_file_a_band(tmp_path: Path) -> None:
    """A model and a stamp."""
    image = np.random.default_rng(0).normal(size=(2, 40, 50))
    cards = {"BUNIT": "nJy", "BAND1": "g", "BAND2": "i", "PIXSCALE": 0.2, "LTV1": -1.0, "LTV2": -2.0}
    path = tmp_path / "cube.fits"
    path.write_bytes(encode_fits([Plane("PRIMARY", image, cards), Plane("VAR", np.ones((2, 40, 50)), {})]))
    plain = tmp_path / "psf.fits"
    plain.write_bytes(encode_fits([Plane("PRIMARY", stamp(3.0), {})]))
    psf = write_psfex(tmp_path / "a.psf")
    first, second = read_observation(path, InputOptions(psf=(psf, plain))).bands
    same(first, model(psf).at(26.5, 22.5))
    same(second, stamp(3.0))
    assert (first.psf.oversample, second.psf.oversample) == (2, 1)
    with pytest.raises(InputError, match="1 PSFs for 2 bands; give one a band, as EXTVER, as a cube or as a list of files"):
        read_observation(path, InputOptions(psf=(psf,)))


def test_a_square_of_a_mosaic_has_the_psf_of_its_place(tmp_path: Path) -> None:
    mosaic, psf = tmp_path / "mosaic.fits", write_psfex(tmp_path / "a.psf")
    image = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    cards = {"BUNIT": "nJy", "BAND": "i", **TAN, "CRPIX1": 200.0, "CRPIX2": 100.0}
    mosaic.write_bytes(
        encode_fits([Plane("PRIMARY", None, {}), Plane("SCI", image, cards), Plane("VAR", np.ones_like(image), {})])
    )
    cut = read_cut(Cut((mosaic,), 150.0, 2.0, 31, None), InputOptions())
    (band,) = read_bands(cut, InputOptions(psf=(psf,)))
    np.testing.assert_allclose(band.psf, model(psf).at(200.0, 100.0))
    again = cut.named("SCI")[0]
    assert (again.header["LTV1"], again.header["LTV2"]) == (-184.0, -84.0)
    assert decode_fits(mosaic, mosaic.read_bytes()).named("SCI")[0].data[84, 184] == again.data[0, 0]


def test_psfs_that_name_bands_go_to_these(tmp_path: Path) -> None:
    """In whatever order they are given; a PSF of another band is refused, one that names none is taken in its turn."""
    cards = {"BUNIT": "nJy", "BAND1": "HSC-G", "BAND2": "i", "PIXSCALE": 0.2}
    path = tmp_path / "cube.fits"
    image = np.random.default_rng(0).normal(size=(2, 40, 50))
    path.write_bytes(encode_fits([Plane("PRIMARY", image, cards), Plane("VAR", np.ones((2, 40, 50)), {})]))

    def named(name: str, width: float, **cards: object) -> Path:
        (tmp_path / name).write_bytes(encode_fits([Plane("PRIMARY", stamp(width), cards)]))
        return tmp_path / name

    g, i, r = named("g.fits", 3.0, BAND="g"), named("i.fits", 4.0, FILTER="I"), named("r.fits", 5.0, BAND="r")
    plain = named("plain.fits", 6.0)
    for given in ((g, i), (i, g)):
        first, second = read_observation(path, InputOptions(psf=given)).bands
        same(first, stamp(3.0))
        same(second, stamp(4.0))
    same(read_observation(path, InputOptions(psf=(g, plain))).bands[1], stamp(6.0))
    with pytest.raises(InputError, match=r"^\S*r.fits: the PSF is of band r, not of i; give the PSF of i"):
        read_observation(path, InputOptions(psf=(g, r)))
    with pytest.raises(InputError, match=r"i.fits: the PSF is of band I, not of HSC-G"):
        read_observation(path, InputOptions(psf=(i, plain)))


def test_a_grid_of_other_pixels_than_the_images_is_refused(tmp_path: Path) -> None:
    plane = read_fits(write_grid(tmp_path / "a.fits", "stpsf")).planes[0]
    image = write_image(tmp_path / "image.fits")
    options = InputOptions(psf=(tmp_path / "b.fits",), psf_position=(500.0, 500.0))
    for field, refused in ((6.6, False), (3.2, True)):
        cards = {**plane.header, "FOV": field, "FOVPIXEL": 33}
        (tmp_path / "b.fits").write_bytes(encode_fits([Plane("PRIMARY", plane.data, cards)]))
        if refused:
            with pytest.raises(InputError, match="pixels of 0.09697″ but the image's are 0.2″"):
                read_observation(image, options)
        else:
            read_observation(image, options)
