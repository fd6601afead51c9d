"""Event lists of X-ray telescopes: photons one by one, into cubes of counts with a celestial WCS, and back.

A Chandra level-2 list (EVT2) has a row an event: TIME, sky pixels X and Y, channel PI and ENERGY in eV. The projection of X and Y
stands in the header cards of these two columns (TCTYPn, TCRVLn, TCRPXn, TCDLTn), good time intervals in GTI tables, one a CCD.
Sky pixel X has its centre at the integer; image pixel i (from 0) covers X in [x₀ + i s, x₀ + (i + 1) s), so that
CRPIX = (TCRPX − x₀)/s + ½ and CDELT = s · TCDLT.
Invariant: an event inside the window, the channels and the good time is counted once, one outside never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube
from diffinv.data.fits import MAX_PIXELS, Cards, FitsFile, Plane, Table, celestial_cards, encode_fits, read_fits
from diffinv.data.guard import readable
from diffinv.data.ogip import check_counts
from diffinv.data.response_files import Rmf, column_card
from diffinv.spectral.response import Binning

_SKY = {"TCTYP": "CTYPE", "TCRVL": "CRVAL", "TCUNI": "CUNIT"}
_FIRST, _LAST = 0.5, 8192.5  # sky pixels of ACIS


@dataclass(frozen=True, eq=False)
class Window:
    """Image pixels on sky pixels: x0, y0 are the outer edges of the first one. step: sky pixels a pixel. size: (H, W)."""

    x0: float
    y0: float
    step: float
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Events:
    """Events in good time. x, y: sky pixels, (N,). channel: PI, (N,). sky: celestial cards of sky pixels. exposure: s."""

    path: Path
    x: np.ndarray
    y: np.ndarray
    channel: np.ndarray
    sky: Cards
    exposure: float


def read_events(path: str | Path, file: FitsFile | None = None) -> Events:
    """An EVT2 file. Arguments: path. file: what it holds, if it has been read.

    Raises: InputError if it lacks the columns, their WCS, or an exposure.
    """
    with readable(path, "an event list"):
        file = read_fits(path) if file is None else file
        table = next((t for t in file.tables if t.name == "EVENTS"), None)
        if table is None:
            raise InputError(f"{path}: no table EVENTS; give an event list (EVT2).")
        columns = {name.upper(): values for name, values in table.columns.items()}
        missing = [c for c in ("X", "Y", "PI") if c not in columns]
        if missing:
            raise InputError(f"{path}: EVENTS lacks {', '.join(missing)}; it has {', '.join(columns)}.")
        exposure = float(table.header.get("EXPOSURE", math.nan))
        if not exposure > 0:
            raise InputError(f"{path}: EXPOSURE is {exposure:g}; give seconds > 0.")
        x, y = (columns[c].astype(np.float64) for c in "XY")
        good = _in_good_time(columns, [t for t in file.tables if t.name == "GTI"]) & np.isfinite(x) & np.isfinite(y)
        return Events(file.path, x[good], y[good], columns["PI"].astype(np.int64)[good], _sky_cards(file.path, table), exposure)


def bin_events(events: Events, rmf: Rmf, binning: Binning, window: Window) -> Cube:
    """A cube of counts.

    Arguments: events. rmf: whose channels PI counts. binning: of these channels. window: the image.
    Returns: counts in float64, their channels in keV, with a celestial WCS.
    Raises: InputError if no event is in the window and the channels, or binning and response differ.
    """
    if len(binning.labels) != len(rmf.channel):
        raise InputError(f"{rmf.path}: has {len(rmf.channel)} channels, but the binning is of {len(binning.labels)}.")
    if len(binning) * math.prod(window.size) > MAX_PIXELS:
        raise InputError(
            f"{events.path}: {len(binning)} channels of {window.size} pixels are over {MAX_PIXELS} values; a smaller region, "
            "larger pixels or wider channels will do."
        )
    row = np.floor((events.y - window.y0) / window.step).astype(np.int64)
    column = np.floor((events.x - window.x0) / window.step).astype(np.int64)
    place = events.channel - rmf.channel[0]
    known = (place >= 0) & (place < len(rmf.channel))
    label = np.where(known, binning.labels[np.where(known, place, 0)], -1)
    (height, width), depth = window.size, len(binning)
    inside = (label >= 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if not inside.any():
        raise InputError(f"{events.path}: none of its {len(inside)} events is in {describe(window)} and the chosen channels.")
    flat = np.ravel_multi_index((label[inside], row[inside], column[inside]), (depth, height, width))
    counts = np.bincount(flat, minlength=depth * height * width).reshape(depth, height, width).astype(np.float64)
    low, high = binning.bounds(rmf.low, rmf.high)
    wcs = window_wcs(events.sky, window)
    return Cube(counts, None, np.ones(counts.shape, bool), low, high, "keV", "count", "", wcs, events.exposure)


def describe(window: Window) -> str:
    """`x 4000.5–4064.5, y 4000.5–4064.5`, in sky pixels."""
    height, width = (n * window.step for n in window.size)
    return f"x {window.x0:g}–{window.x0 + width:g}, y {window.y0:g}–{window.y0 + height:g}"


def covering(events: Events, step: float) -> Window:
    """The window of pixels of `step` sky pixels that holds every event; edges are at half sky pixels.

    Raises: InputError if there is no event.
    """
    if not len(events.x):
        raise InputError(f"{events.path}: no events in good time.")
    x0, y0 = (math.floor(float(v.min()) + 0.5) - 0.5 for v in (events.x, events.y))
    size = tuple(math.floor((float(v.max()) - start) / step) + 1 for v, start in ((events.y, y0), (events.x, x0)))
    return Window(x0, y0, step, size)


def window_wcs(sky: Cards, window: Window) -> Cards:
    """Celestial cards of the image from those of sky pixels."""
    cards = dict(sky)
    for axis, start in ((1, window.x0), (2, window.y0)):
        cards[f"CRPIX{axis}"] = (float(sky[f"CRPIX{axis}"]) - start) / window.step + 0.5
        cards[f"CDELT{axis}"] = float(sky[f"CDELT{axis}"]) * window.step
    return celestial_cards(cards) or {}


def encode_events(counts: np.ndarray, rmf: Rmf, window: Window, sky: Cards, *, exposure: float, seed: int) -> bytes:
    """An EVT2-shaped file whose events fill a cube of counts: positions within a pixel, energies and times are random.

    Arguments: counts: (C, H, W), whole, in the channels of the response. rmf. window: of the cube. sky: cards of sky pixels
        (CTYPEi, CRVALi, CRPIXi, CDELTi). exposure: s. seed.
    Raises: InputError if counts are not whole, or not in the response's channels.
    """
    if counts.shape != (len(rmf.channel), *window.size):
        raise InputError(f"counts {counts.shape} are not in the {len(rmf.channel)} channels and the pixels {window.size}.")
    rng = np.random.default_rng([seed, 8])
    number = check_counts("events", counts).astype(np.int64)
    channel, row, column = (np.repeat(i, number.ravel()) for i in (a.ravel() for a in np.indices(counts.shape)))
    x, y = (_within(rng, start + i * window.step, window.step) for start, i in ((window.x0, column), (window.y0, row)))
    energy = 1e3 * (rmf.low[channel] + rng.uniform(size=len(channel)) * (rmf.high - rmf.low)[channel])
    time = np.sort(rng.uniform(0.0, exposure, len(channel)))
    order = rng.permutation(len(channel))
    columns = {"time": time, "ccd_id": np.full(len(time), 7, np.int16), "x": x[order], "y": y[order]}
    columns |= {"energy": energy[order].astype(np.float32), "pi": (channel + rmf.channel[0])[order].astype(np.int32)}
    cards: dict[str, object] = {"EXPOSURE": exposure, "TELESCOP": "CHANDRA", "INSTRUME": "ACIS", "OBS_MODE": "SIMULATED"}
    for card, image in (*_SKY.items(), ("TCRPX", "CRPIX"), ("TCDLT", "CDELT")):
        cards |= {f"{card}{2 + axis}": sky[f"{image}{axis}"] for axis in (1, 2) if f"{image}{axis}" in sky}
    cards |= {f"{card}{n}": value for n in (3, 4) for card, value in (("TLMIN", _FIRST), ("TLMAX", _LAST))}
    cards |= {"TUNIT1": "s", "TUNIT3": "pixel", "TUNIT4": "pixel", "TUNIT5": "eV", "TUNIT6": "chan"}
    interval = {"START": np.array([0.0]), "STOP": np.array([exposure])}
    gti = Table("GTI", interval, {"CCD_ID": 7})
    return encode_fits([Plane("PRIMARY", None, {}), Table("EVENTS", columns, cards), gti])


def _within(rng: np.random.Generator, start: np.ndarray, step: float) -> np.ndarray:
    """Single-precision numbers spread evenly over [start, start + step), never at its upper end."""
    value = (start + rng.uniform(size=len(start)) * step).astype(np.float32)
    end = np.nextafter((start + step).astype(np.float32), np.float32(-np.inf))
    return np.clip(value, start.astype(np.float32), end)


def _in_good_time(columns: dict[str, np.ndarray], tables: list[Table]) -> np.ndarray:
    """True for events in an interval of their CCD, or of any where tables or events name none; all, without intervals."""
    count = len(columns["X"])
    if "TIME" not in columns or not tables:
        return np.ones(count, bool)
    good = np.zeros(count, bool)
    for table in tables:
        own = np.ones(count, bool)
        if "CCD_ID" in table.header and "CCD_ID" in columns:
            own = columns["CCD_ID"] == table.header["CCD_ID"]
        for start, stop in zip(table.columns["START"], table.columns["STOP"], strict=True):
            good |= own & (columns["TIME"] >= start) & (columns["TIME"] <= stop)
    return good


def _sky_cards(path: Path, table: Table) -> Cards:
    names = {name.upper(): name for name in table.columns}
    cards: dict[str, object] = {}
    for axis, column in ((1, "X"), (2, "Y")):
        for card, image in (*_SKY.items(), ("TCRPX", "CRPIX"), ("TCDLT", "CDELT")):
            value = column_card(table, names[column], card, None)
            if value is not None:
                cards[f"{image}{axis}"] = value
    wanted = [f"{k}{axis}" for k in ("CTYPE", "CRVAL", "CRPIX", "CDELT") for axis in (1, 2)]
    missing = [k for k in wanted if k not in cards]
    if missing:
        raise InputError(f"{path}: columns X and Y have no projection ({', '.join(missing)} of TCTYP, TCRVL, TCRPX, TCDLT).")
    for axis in (1, 2):
        cards.setdefault(f"CUNIT{axis}", "deg")
    frame = {k: table.header[k] for k in ("RADESYS", "RADECSYS", "EQUINOX") if k in table.header}
    return cards | frame
