"""Squares of survey mosaics, read without reading the mosaics: a small FITS file in memory, made of the bytes inside the square.

A mosaic is a FITS file with one image of two axes and a celestial WCS: the HDU of `input.hdu`, else SCI or IMAGE, else its first
image. Its companions (`VAR`, `VARIANCE`, `ERR`, `DQ`, `MASK`, `WHT`, of the same shape) are cut with it, a `PSF` comes whole. The
primary header's cards stand in the image's header if that does not have them, and `MAGZERO` stands for `ZEROPNT`.
The square's middle is within half a pixel of the position. What lies beyond the mosaic's edge is NaN, which has no weight; in
integer images it is their BLANK. The WCS is the mosaic's own, its reference pixel moved; LTV1 and LTV2 say by how much, so that a
model of the mosaic's PSF is taken where the object is.
Checksums are of whole mosaics and are not looked at. Compressed mosaics would have to be unpacked whole for every object, and
are refused.
Invariant: a pixel of the square is the mosaic's pixel at the same place on the sky, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.catalog import Cut
from diffinv.data.fits import FitsFile, Value, decode_fits
from diffinv.data.grids import SkyGrid
from diffinv.data.headers import Header, read_headers
from diffinv.data.layouts import InputOptions

_CUT_TOO, _WHOLE = ("VAR", "VARIANCE", "ERR", "DQ", "MASK", "WHT"), ("PSF", "NOISECOR")
_BLOCK, _CARD = 2880, 80
_STRUCTURE = (
    "SIMPLE",
    "XTENSION",
    "BITPIX",
    "NAXIS",
    "NAXIS1",
    "NAXIS2",
    "NAXIS3",
    "EXTEND",
    "PCOUNT",
    "GCOUNT",
    "GROUPS",
    "END",
)
_NAMES = ("EXTNAME", "EXTVER", "INHERIT", "CHECKSUM", "DATASUM", "CRPIX1", "CRPIX2")
_REPLACED = (*_STRUCTURE, *_NAMES, "COMMENT", "HISTORY", "CONTINUE", "")
_TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}


@dataclass(frozen=True)
class _Square:
    """Pixels of a mosaic from (row, column) on, which may reach beyond its edges."""

    row: int
    column: int
    height: int
    width: int


def read_cut(cut: Cut, options: InputOptions) -> FitsFile:
    """The square of every mosaic as `SCI` (EXTVER 1, 2, …) with its companions, as one FITS file; the hash is of its bytes.

    Raises: InputError if a mosaic cannot be read or the square is not on it.
    """
    angle, blocks = cut.arcsec, [_header({"SIMPLE": True, "BITPIX": 8, "NAXIS": 0, "EXTEND": True})]
    for number, path in enumerate(cut.mosaics, start=1):
        block, scale = _band(path, cut, number, angle, options)
        angle = cut.pixels * scale if angle is None else angle
        blocks += block
    return decode_fits(cut.mosaics[0], b"".join(blocks), max_pixels=options.max_pixels)


def _band(path: Path, cut: Cut, number: int, angle: float | None, options: InputOptions) -> tuple[list[bytes], float]:
    """The HDUs of one mosaic's square, and the side of its pixels in arcsec."""
    headers = _open(path)
    image = _image(path, headers, options.hdu)
    cards = {**headers[0].cards, **image.cards}
    shape = _shape(image)
    try:
        grid = SkyGrid.from_header(cards, shape)
        if not grid.celestial:
            raise InputError("no celestial WCS, so that a position has no pixel; give mosaics with one.")
        side = cut.pixels if angle is None else max(1, round(angle / grid.pixel_scale))
        row, column = (float(c) for c in grid.world_to_pixel(cut.ra, cut.dec))
        square = _square(row, column, side, shape, cut)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if side**2 > options.max_pixels:
        raise InputError(f"{path}: a square of {side}² pixels is over max_pixels = {options.max_pixels}; cut a smaller one.")
    blocks = [_hdu(path, image, headers[0], ("SCI", number), square)]
    for header in headers:
        name = header.name.upper()
        if header is image or _version(header) != _version(image):
            continue
        if name in _CUT_TOO and _shape(header) == shape:
            blocks.append(_hdu(path, header, header, (name, number), square))
        elif name in _WHOLE:
            blocks.append(_hdu(path, header, header, (name, number), _Square(0, 0, *_stamp_shape(path, header))))
    return blocks, grid.pixel_scale


def _open(path: Path) -> list[Header]:
    try:
        if not path.is_file():
            what = "a directory, a device or a pipe" if path.exists() else "no such file"
            raise InputError(f"{path}: cannot be read ({what}); check fits_file_paths.")
        with open(path, "rb") as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise InputError(f"{path}: a gzipped mosaic would be unpacked for every object; gunzip it once.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({error}); check fits_file_paths.") from error
    return read_headers(path)


def _image(path: Path, headers: Sequence[Header], hdu: int | str | None) -> Header:
    """The HDU that is cut."""
    if any(header.cards.get("ZIMAGE") for header in headers):
        raise InputError(f"{path}: a tile-compressed mosaic; unpack it once (funpack).")
    images = [h for h in headers if h.cards.get("XTENSION", "IMAGE") == "IMAGE" and len(_shape(h)) == 2]
    if isinstance(hdu, int):
        images = [h for h in images if hdu < len(headers) and h is headers[hdu]]
    elif hdu is not None:
        images = [h for h in images if h.name.upper() == hdu.upper()]
    named = [h for h in images if h.name.upper() in ("SCI", "IMAGE")]
    others = [h for h in images if h.name.upper() not in (*_CUT_TOO, "PSF")]
    found = images if hdu is not None else named or others
    if not found:
        raise InputError(f"{path}: no image of two axes{'' if hdu is None else f' at input.hdu = {hdu}'}; it cannot be cut.")
    return found[0]


def _shape(header: Header) -> tuple[int, ...]:
    cards = header.cards
    return tuple(int(cards[f"NAXIS{k}"]) for k in range(int(cards["NAXIS"]), 0, -1))


def _version(header: Header) -> int:
    return int(header.cards.get("EXTVER", 1))


def _square(row: float, column: float, side: int, shape: tuple[int, ...], cut: Cut) -> _Square:
    """The square whose middle is next to a position.

    Raises: InputError if the position is not on the mosaic.
    """
    if not (-0.5 <= row <= shape[0] - 0.5 and -0.5 <= column <= shape[1] - 0.5):  # NaN: not on this side of the sky
        raise InputError(f"RA, Dec = {cut.ra:g}, {cut.dec:g} is not on the mosaic of {shape[0]} × {shape[1]} pixels; check both.")
    corner = (side - 1) / 2
    return _Square(round(row - corner), round(column - corner), side, side)


def _stamp_shape(path: Path, header: Header) -> tuple[int, ...]:
    """Of one stamp, which may be a cube of one plane."""
    *planes, height, width = _shape(header)
    if any(n != 1 for n in planes):
        raise InputError(f"{path}: {header.name} has {planes[0]} planes; a mosaic of one band has one.")
    return height, width


def _hdu(path: Path, header: Header, primary: Header, name: tuple[str, int], square: _Square) -> bytes:
    """One HDU of the cut file, with its name and version."""
    cards, shape = header.cards, _shape(header)[-2:]
    rows = range(max(square.row, 0), min(square.row + square.height, shape[0]))
    columns = range(max(square.column, 0), min(square.column + square.width, shape[1]))
    over = len(rows) * len(columns) < square.height * square.width
    pixels = np.full((square.height, square.width), _nothing(path, name[0], cards, over), _TYPES[int(cards["BITPIX"])])
    top, left = rows.start - square.row, columns.start - square.column
    pixels[top : top + len(rows), left : left + len(columns)] = _read(path, header, rows, columns, pixels.dtype)
    structure = {"XTENSION": "IMAGE", "BITPIX": int(cards["BITPIX"]), "NAXIS": 2, "NAXIS1": square.width, "NAXIS2": square.height}
    structure |= {"PCOUNT": 0, "GCOUNT": 1, "EXTNAME": name[0], "EXTVER": name[1]}
    for key, start in (("CRPIX1", square.column), ("CRPIX2", square.row)):
        if key in cards:
            structure[key] = float(cards[key]) - start
    known = {**primary.cards, **cards}
    for key, start in (("LTV1", square.column), ("LTV2", square.row)):
        before = known.get(key, 0.0)
        structure[key] = (float(before) if isinstance(before, (int, float)) else 0.0) - start
    if "MAGZERO" in known and "ZEROPNT" not in known:
        structure["ZEROPNT"] = known["MAGZERO"]
    data = pixels.tobytes()
    return _header(structure, header, primary) + data + bytes(-len(data) % _BLOCK)


def _nothing(path: Path, name: str, cards: Mapping[str, Value], over: bool) -> float | int:
    """What stands for no value in the type of the file; 0 in flags, as the image says it already. over: whether it is needed."""
    if int(cards["BITPIX"]) < 0:
        return np.nan
    if over and name == "SCI" and "BLANK" not in cards:
        raise InputError(f"{path}: the square reaches over the edge of an integer image without BLANK; cut a smaller one.")
    return int(cards.get("BLANK", 0)) if name == "SCI" else 0


def _read(path: Path, header: Header, rows: range, columns: range, dtype: np.dtype) -> np.ndarray:
    """Some pixels of an image, row by row."""
    width, found = _shape(header)[-1], np.empty((len(rows), len(columns)), dtype)
    with open(path, "rb") as stream:
        for k, row in enumerate(rows):
            stream.seek(header.start + (row * width + columns.start) * dtype.itemsize)
            found[k] = np.frombuffer(stream.read(len(columns) * dtype.itemsize), dtype)
    return found


def _header(structure: Mapping[str, Value], *headers: Header) -> bytes:
    """Cards of our own, then those of the headers, each keyword once."""
    cards, seen = [_card(key, value) for key, value in structure.items()], {*_REPLACED, *structure}
    for header in headers:
        found = [header.text[k : k + _CARD] for k in range(0, len(header.text), _CARD)]
        names = [card[:8].decode("ascii").rstrip() for card in found]
        cards += [card for card, name in zip(found, names) if name not in seen and card[8:10] == b"= "]
        seen |= set(names)
    text = b"".join([*cards, b"END".ljust(_CARD)])
    return text + b" " * (-len(text) % _BLOCK)


def _card(key: str, value: Value) -> bytes:
    shown = ("T" if value else "F") if isinstance(value, bool) else f"'{value:8}'" if isinstance(value, str) else repr(value)
    text = f"{key:8}= {shown:<20}" if isinstance(value, str) else f"{key:8}= {shown:>20}"
    return text.ljust(_CARD).encode("ascii")
