"""Event lists: every event is counted once in its pixel and channel, and the sky stays where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from diffinv.core.checks import InputError
from diffinv.data.events import Window, bin_events, covering, encode_events, read_events
from diffinv.data.fits import Plane, Table, encode_fits
from diffinv.data.remnants import draw_scene, observe, read_remnant, remnant_binning
from diffinv.data.response_files import Rmf, read_rmf
from diffinv.spectral.base import Grid
from diffinv.spectral.response import Binning

SCALE = 0.492 / 3600
SKY = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 187.3, "CRVAL2": 12.4, "CRPIX1": 4096.5, "CRPIX2": 4096.5}
SKY |= {"CDELT1": -SCALE, "CDELT2": SCALE, "CUNIT1": "deg", "CUNIT2": "deg"}
WINDOW = Window(4000.5, 4010.5, 2.0, (5, 7))


def detector(channels: int = 6) -> Rmf:
    low = 0.0146 * np.arange(channels)
    return Rmf(Path("toy.rmf"), Grid.of([0.5, 1.0]), None, np.arange(1, channels + 1), low, low + 0.0146, False)


def counts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.5, (6, *WINDOW.size))


def write(path: Path, values: np.ndarray, **changes: object) -> Path:
    path.write_bytes(encode_events(values, detector(), WINDOW, SKY, exposure=500.0, seed=3, **changes))
    return path


ALL = Binning(np.arange(6))


def test_events_come_back_as_the_counts_they_were_made_of(tmp_path: Path) -> None:
    events = read_events(write(tmp_path / "a.fits", counts()))
    assert len(events.x) == counts().sum()
    cube = bin_events(events, detector(), ALL, WINDOW)
    np.testing.assert_array_equal(cube.data, counts())
    assert (cube.exposure, cube.bunit, cube.unit) == (500.0, "count", "keV")
    pairs = bin_events(events, detector(), Binning(np.array([-1, 0, 0, 1, 1, -1])), WINDOW)
    np.testing.assert_array_equal(pairs.data, counts()[1:5].reshape(2, 2, *WINDOW.size).sum(1))
    np.testing.assert_allclose(pairs.low, [0.0146, 0.0438])
    corner = bin_events(events, detector(), ALL, Window(4002.5, 4010.5, 4.0, (2, 3)))
    expected = counts()[:, :4, 1:7].reshape(6, 2, 2, 3, 2).sum((2, 4))
    np.testing.assert_array_equal(corner.data, expected)


def test_positions_fill_their_pixels_and_energies_their_channels(tmp_path: Path) -> None:
    values = np.zeros((6, *WINDOW.size), int)
    values[4, 2, 3] = 4000
    path = write(tmp_path / "a.fits", values)
    with fits.open(path) as file:
        table = file["EVENTS"].data
        for name, low, high in (("x", 4006.5, 4008.5), ("y", 4014.5, 4016.5), ("energy", 58.4, 73.0)):
            spread = (table[name].astype(float) - low) / (high - low)
            assert -1e-6 <= spread.min() < 0.01
            assert 0.99 < spread.max() <= 1 + 1e-6
            assert abs(spread.mean() - 0.5) < 4 / np.sqrt(12 * 4000)
        assert set(table["pi"].tolist()) == {5}
        assert table["time"].min() >= 0
        assert table["time"].max() <= 500
        assert abs(np.corrcoef(table["time"], table["x"])[0, 1]) < 4 / np.sqrt(4000)


def test_sky_of_the_image_is_that_of_the_event_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits", counts())
    cube = bin_events(read_events(path), detector(), ALL, WINDOW)
    image = WCS(fits.Header(dict(cube.wcs)))
    with fits.open(path) as file:
        header = file["EVENTS"].header
    assert [header[k] for k in ("TTYPE3", "TCTYP3", "TCRPX3", "TCTYP4")] == ["x", "RA---TAN", 4096.5, "DEC--TAN"]
    table = WCS(header, keysel=["pixel"], colsel=[3, 4])  # astropy's own reading of the columns' cards
    for column, row in ((0, 0), (6, 4)):
        x, y = 4000.5 + 2 * (column + 0.5), 4010.5 + 2 * (row + 0.5)
        np.testing.assert_allclose(image.wcs_pix2world(column, row, 0), table.wcs_pix2world(x, y, 1), rtol=0, atol=1e-10)


def test_bad_time_and_other_ccds_intervals_drop_events(tmp_path: Path) -> None:
    columns = {"time": np.array([1.0, 5.0, 9.0, 15.0]), "x": np.full(4, 4001.0), "y": np.full(4, 4011.0)}
    columns |= {"pi": np.ones(4, np.int32), "ccd_id": np.array([7, 7, 6, 7], np.int16)}
    cards = {"EXPOSURE": 10.0} | {f"{k}{n}": v for n, a in ((2, 1), (3, 2)) for k, v in projection(a).items()}
    gti = [
        Table("GTI", {"START": np.array([0.0, 14.0]), "STOP": np.array([4.0, 16.0])}, {"CCD_ID": 7}),
        Table("GTI", {"START": np.array([4.5]), "STOP": np.array([20.0])}, {"CCD_ID": 6}),
    ]
    path = tmp_path / "a.fits"
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Table("EVENTS", columns, cards), *gti]))
    assert len(read_events(path).x) == 3  # at 5 s only CCD 6 was in good time
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Table("EVENTS", columns, cards)]))
    assert len(read_events(path).x) == 4


def projection(axis: int) -> dict[str, object]:
    return {f"T{k}": SKY[f"{k2}{axis}"] for k, k2 in (("CTYP", "CTYPE"), ("CRVL", "CRVAL"), ("CRPX", "CRPIX"), ("CDLT", "CDELT"))}


def test_covering_window_holds_every_event(tmp_path: Path) -> None:
    events = read_events(write(tmp_path / "a.fits", counts()))
    for step in (1.0, 3.0):
        window = covering(events, step)
        assert bin_events(events, detector(), ALL, window).data.sum() == counts().sum()
        assert (window.x0, window.y0) == (4000.5, 4010.5)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits", counts())
    events = read_events(path)
    with pytest.raises(InputError, match=r"a.fits: none of its \d+ events is in x 0.5–14.5, y 0.5–10.5"):
        bin_events(events, detector(), ALL, replace(WINDOW, x0=0.5, y0=0.5))
    with pytest.raises(InputError, match=r"6 channels of \(5000, 7000\) pixels are over"):
        bin_events(events, detector(), ALL, replace(WINDOW, size=(5000, 7000)))
    with pytest.raises(InputError, match="toy.rmf: has 7 channels, but the binning is of 6"):
        bin_events(events, detector(7), ALL, WINDOW)
    with pytest.raises(InputError, match=r"events: \d+ values are no counts, the first is 0.5"):
        write(tmp_path / "b.fits", 0.5 * (counts() > 4))
    columns = {"x": np.ones(2), "y": np.ones(2)}

    def message(columns: dict, cards: dict) -> str:
        path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Table("EVENTS", columns, cards)]))
        with pytest.raises(InputError) as caught:
            read_events(path)
        return str(caught.value)

    assert "EVENTS lacks PI; it has X, Y" in message(columns, {"EXPOSURE": 1.0})
    assert "EXPOSURE is nan" in message(columns | {"pi": np.ones(2, np.int32)}, {})
    assert "have no projection (CTYPE1" in message(columns | {"pi": np.ones(2, np.int32)}, {"EXPOSURE": 1.0})
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {})]))
    with pytest.raises(InputError, match="no table EVENTS"):
        read_events(path)


def test_a_remnant_through_the_real_response_survives_the_event_list(data_folder: Path, tmp_path: Path) -> None:
    """Counts in all 1024 channels → events → the benchmark's 205 channels are the sums of the counts."""
    rmf = read_rmf(data_folder / "xray" / "9774.rmf")
    remnant = read_remnant(data_folder / "xray", binned=False)
    cube = observe(draw_scene(0, size=8), remnant, median=250.0, seed=1)
    window = Window(4064.5, 4064.5, 8.0, (8, 8))
    path = tmp_path / "evt2.fits"
    path.write_bytes(encode_events(cube.counts, rmf, window, SKY, exposure=75141.0, seed=0))
    binning = remnant_binning(rmf.low, rmf.high)
    back = bin_events(read_events(path), rmf, binning, window)
    np.testing.assert_array_equal(back.data, np.moveaxis(binning.sum(np.moveaxis(cube.counts, 0, -1)), -1, 0))
    assert back.data.shape == (205, 8, 8)
    assert back.exposure == 75141.0
