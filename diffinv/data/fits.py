"""FITS in and out as plain records. The only file that imports astropy.

A file is untrusted until it has been read: its size, the pixels that its headers claim, the bytes that it unpacks to and
its checksums are checked before a pixel is decoded, and whatever astropy raises on a broken file becomes one `InputError`
that names the file, the cause and the remedy. astropy's warnings are kept as notes and never printed.
Invariant: every array leaves this module as a plain, native-endian numpy array with BZERO and BSCALE applied.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from astropy.io import ascii, fits
from astropy.table import QTable
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS

from diffinv.core.checks import InputError
from diffinv.data.checksums import check_sums
from diffinv.data.warned import warned

Value = str | int | float | bool
Cards = Mapping[str, Value]

MAX_PIXELS = 2**26
MAX_HDUS = 1000
_BLOCK = 2880
_SLACK = 2**24  # bytes of headers and tables that a file may have beyond its pixels
_WCS_CARD = re.compile(
    r"(WCSAXES|CRPIX\d|CRVAL\d|CDELT\d|CTYPE\d|CUNIT\d|CROTA\d|PC\d_\d|CD\d_\d|PV\d_\d+"
    r"|LONPOLE|LATPOLE|RADESYS|RADECSYS|EQUINOX|[AB]P?_(ORDER|\d_\d))"
)
_CONTINUED = "  "  # starts a HISTORY card that goes on from the one before
_ESCAPED = re.compile(r"\\(?:u[0-9a-f]{4}|x[0-9a-f]{2})")


@dataclass(frozen=True, eq=False)
class Plane:
    """One image HDU.

    name, extver: EXTNAME (upper case) and EXTVER. data: native-endian array, or None. header: keyword → value.
    history: HISTORY lines. compress: write it tile-compressed (GZIP_2, lossless). comments: of cards, when writing.
    hdu: number in the file that it was read from, 0 for the primary HDU.
    """

    name: str
    data: np.ndarray | None
    header: Cards
    extver: int = 1
    history: tuple[str, ...] = ()
    compress: bool = False
    comments: Mapping[str, str] = field(default_factory=dict)
    hdu: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """One table HDU: column name → native-endian array of N rows. hdu: number in the file that it was read from."""

    name: str
    columns: Mapping[str, np.ndarray]
    header: Cards
    extver: int = 1
    hdu: int = 0


@dataclass(frozen=True, eq=False)
class FitsFile:
    """What a FITS file holds. sha256: of the bytes on disk. notes: what astropy had to say."""

    path: Path
    sha256: str
    planes: tuple[Plane, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]

    def named(self, name: str) -> list[Plane]:
        """The planes called `name` that hold data, by EXTVER."""
        return sorted((p for p in self.planes if p.name == name and p.data is not None), key=lambda p: p.extver)

    @property
    def primary(self) -> Cards:
        return self.planes[0].header if self.planes else {}


def read_fits(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> FitsFile:
    """A FITS file, plain or gzipped, as records.

    Arguments:
        path: the file; a symbolic link is followed.
        max_pixels: most pixels that its images may have together, compressed ones counted as unpacked.
    Returns: the file's planes and tables.
    Raises: InputError if it is missing, empty, truncated, not FITS, too large, or fails its checksum.
    """
    path = Path(path)
    return decode_fits(path, _read_bytes(path, 8 * max_pixels + _SLACK), max_pixels=max_pixels)


def decode_fits(path: Path, stored: bytes, *, max_pixels: int = MAX_PIXELS) -> FitsFile:
    """A FITS file, plain or gzipped, from its bytes.

    Arguments: path: what errors name. stored, max_pixels: as of `read_fits`.
    Raises: InputError as `read_fits`.
    """
    raw = _unpack(path, stored, 8 * max_pixels + _SLACK)
    _check_magic(path, raw)
    with warned("always") as caught:
        try:
            _check_structure(path, raw, max_pixels)
            planes, tables = _decode(raw)
        except InputError:
            raise
        except Exception as error:  # a hostile file can make the reader raise anything
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{path}: damaged FITS file ({cause}); fetch or write it again.") from error
    own = [w.message for w in caught if issubclass(w.category, AstropyWarning)]  # another thread's are not this file's
    notes = tuple(dict.fromkeys(" ".join(str(message).split()) for message in own))
    return FitsFile(path, hashlib.sha256(stored).hexdigest(), planes, tables, notes)


def read_table(path: str | Path, hdu: int = 1) -> np.ndarray:
    """A FITS table as a structured array (N,) with native byte order.

    Arguments: path: the FITS file. hdu: number of the extension that holds the table.
    Returns: a structured array (N,).
    Raises: InputError as `read_fits`, or if that extension is no table with columns.
    """
    file = read_fits(path)
    columns = next((t.columns for t in file.tables if t.hdu == hdu), {})
    if not columns:
        known = ", ".join(f"{t.hdu} {t.name}" for t in file.tables)
        raise InputError(f"{path}: HDU {hdu} is no table with columns; the file's tables are: {known or 'none'}.")
    rows = len(next(iter(columns.values())))
    table = np.empty(rows, dtype=[(name, data.dtype, data.shape[1:]) for name, data in columns.items()])
    for name, data in columns.items():
        table[name] = data
    return table


def read_images(path: str | Path) -> list[np.ndarray]:
    """Every image extension of a FITS file, in order, as native-endian arrays.

    Arguments: path: the FITS file.
    Returns: one array per extension that holds an image; extensions without data are left out.
    Raises: InputError as `read_fits`, or if no extension holds an image.
    """
    images = [plane.data for plane in read_fits(path).planes if plane.data is not None]
    if not images:
        raise InputError(f"{path}: no HDU holds an image; give a file of images.")
    return images


def encode_fits(parts: Sequence[Plane | Table]) -> bytes:
    """The bytes of a FITS file with CHECKSUM and DATASUM in every HDU; without compression, the same parts are the same bytes.

    Arguments: parts: HDUs in order; the first is a `Plane` and becomes the primary HDU.
    """
    with warned("ignore"):
        hdus = fits.HDUList([_hdu(part, first=number == 0) for number, part in enumerate(parts)])
        compressed = any(isinstance(hdu, fits.CompImageHDU) for hdu in hdus)
        if not compressed:
            for hdu in hdus:
                hdu.add_checksum(when="of this HDU")
        buffer = io.BytesIO()
        hdus.writeto(buffer, checksum=compressed)
    return buffer.getvalue()


def encode_ecsv(columns: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a table as enhanced CSV."""
    stream = io.StringIO()
    ascii.write(QTable(dict(columns)), stream, format="ecsv")
    return stream.getvalue().encode("utf-8", "backslashreplace")


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            what = "a directory or a device" if path.exists() else "missing"
            raise InputError(f"{path}: {what}; give a FITS file.")
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path}: the file is empty; fetch or write it again.")
        if size > limit:
            raise InputError(f"{path}: {size} bytes, more than max_pixels allows ({limit}); cut the image, or raise max_pixels.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path!s}: cannot be read ({error}); check the path and its permissions.") from error


def _unpack(path: Path, stored: bytes, limit: int) -> bytes:
    if stored[:2] != b"\x1f\x8b":
        return stored
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as stream:
            raw = stream.read(limit + 1)
    except Exception as error:  # gzip raises OSError, EOFError or zlib.error
        raise InputError(f"{path}: damaged gzip stream ({error}); fetch or write it again.") from error
    if len(raw) > limit:
        raise InputError(
            f"{path}: unpacks to more than {limit} bytes (a gzip bomb?); raise max_pixels if the image is that large."
        )
    return raw


def _check_magic(path: Path, raw: bytes) -> None:
    if raw.startswith(b"SIMPLE  ="):
        return
    start = raw[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise InputError(f"{path}: an HTML or XML page, not FITS (a failed download?); fetch the file again.")
    raise InputError(f"{path}: not a FITS file (it starts with {raw[:8]!r}, not SIMPLE); give FITS, plain or gzipped.")


def _check_structure(path: Path, raw: bytes, max_pixels: int) -> None:
    """Sizes, extent and checksums of every HDU, from headers and bytes alone."""
    pixels, end = 0, 0
    with fits.open(io.BytesIO(raw), memmap=False, disable_image_compression=True) as hdus:
        for number, hdu in enumerate(hdus):
            pixels += _claimed_pixels(hdu.header)
            place = hdu.fileinfo()
            start, end = place["datLoc"], place["datLoc"] + place["datSpan"]
            if pixels > max_pixels:
                raise InputError(
                    f"{path}: HDU {number} claims {pixels} pixels, over max_pixels = {max_pixels}; cut it or raise max_pixels."
                )
            if number >= MAX_HDUS:
                raise InputError(f"{path}: more than {MAX_HDUS} HDUs; split the file.")
            if end > len(raw):
                raise InputError(f"{path}: truncated in HDU {number} ({len(raw)} of {end} bytes); fetch or write it again.")
            check_sums(path, number, hdu.header, raw[place["hdrLoc"] : start], raw[start:end])
    if any(raw[end:]):
        raise InputError(f"{path}: damaged after HDU {number} ({len(raw) - end} bytes that are no HDU); fetch or write it again.")


def _claimed_pixels(header: fits.Header) -> int:
    """Pixels of an image, plain or compressed; bytes of a table."""
    prefix = "Z" if header.get("ZIMAGE", False) else ""
    axes = int(header.get(f"{prefix}NAXIS", 0))
    sizes = [int(header[f"{prefix}NAXIS{k + 1}"]) for k in range(axes)]
    if any(n < 0 for n in sizes) or axes > 32:
        raise ValueError(f"axes {sizes[:5]} are impossible")
    return math.prod(sizes) if sizes else 0


def _decode(raw: bytes) -> tuple[tuple[Plane, ...], tuple[Table, ...]]:
    planes: list[Plane] = []
    tables: list[Table] = []
    with fits.open(io.BytesIO(raw), memmap=False) as hdus:
        for number, hdu in enumerate(hdus):
            name, cards = hdu.name.upper(), _cards(hdu.header)
            if isinstance(hdu, (fits.BinTableHDU, fits.TableHDU)) and not isinstance(hdu, fits.CompImageHDU):
                columns = {c: _native(hdu.data[c]) for c in hdu.columns.names} if hdu.data is not None else {}
                tables.append(Table(name, columns, cards, hdu.ver, number))
            elif hdu.is_image:
                data = None if hdu.data is None else _native(hdu.data)
                history = _unwrapped([str(line) for line in hdu.header.get("HISTORY", ())])
                planes.append(Plane(name, data, cards, hdu.ver, history, hdu=number))
    return tuple(planes), tuple(tables)


def _native(data: np.ndarray) -> np.ndarray:
    array = np.asarray(data)
    return array.astype(array.dtype.newbyteorder("=")) if array.dtype.kind != "O" else array


def _cards(header: fits.Header) -> dict[str, Value]:
    """Keyword → value of every readable card; a card that breaks the standard is left out."""
    cards: dict[str, Value] = {}
    for card in header.cards:
        try:
            keyword, value = card.keyword, card.value
        except fits.VerifyError:
            continue
        if keyword not in ("COMMENT", "HISTORY", "") and isinstance(value, (str, int, float, bool)):
            cards[keyword] = value
    return cards


def _hdu(part: Plane | Table, *, first: bool) -> fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU | fits.BinTableHDU:
    if isinstance(part, Table):
        hdu = fits.BinTableHDU.from_columns(fits.ColDefs([_column(name, data) for name, data in part.columns.items()]))
    else:
        # astropy swaps bytes in place, which a value that a broadcast array repeats does not survive
        data = None if part.data is None else np.ascontiguousarray(part.data)
        if first:
            hdu = fits.PrimaryHDU(data)
        elif part.compress:
            hdu = fits.CompImageHDU(data, compression_type="GZIP_2", quantize_level=0.0)
        else:
            hdu = fits.ImageHDU(data)
    hdu.header.update(part.header)
    if not first:
        hdu.name, hdu.ver = part.name, part.extver
    if isinstance(part, Plane):
        for keyword in part.comments.keys() & part.header.keys():
            hdu.header.comments[keyword] = part.comments[keyword]
        for note in part.history:
            for line in _wrapped(note):
                hdu.header["HISTORY"] = line
    return hdu


def _wrapped(note: str) -> list[str]:
    """A note as HISTORY cards: printable ASCII (others as Python escapes), cut between words, continuation lines indented."""
    ascii_note = note.encode("ascii", "backslashreplace").decode()
    return textwrap.wrap(ascii_note, 70, subsequent_indent=_CONTINUED, break_on_hyphens=False) or [""]


def _unwrapped(lines: Sequence[str]) -> tuple[str, ...]:
    """The notes that `_wrapped` cut; cards of other programs come back one by one."""
    notes: list[str] = []
    for line in lines:
        if line.startswith(_CONTINUED) and notes:
            notes[-1] += " " + line.removeprefix(_CONTINUED)
        else:
            notes.append(line)
    return tuple(_ESCAPED.sub(lambda match: chr(int(match[0][2:], 16)), note) for note in notes)


def _column(name: str, data: np.ndarray) -> fits.Column:
    array = np.asarray(data)
    if array.dtype.kind == "U":
        array = np.char.encode(array, "ascii", "backslashreplace")
    width = str(math.prod(array.shape[1:])) if array.ndim > 1 else ""
    formats = {"f8": "D", "f4": "E", "i8": "K", "i4": "J", "i2": "I", "u1": "B", "b1": "L"}
    code = f"{max(array.dtype.itemsize, 1)}A" if array.dtype.kind == "S" else width + formats[array.dtype.str[1:]]
    return fits.Column(name=name, format=code, array=array)


def celestial_cards(header: Cards) -> dict[str, Value] | None:
    """The celestial part of a header's WCS in normal form (PCi_j and CDELTi, degrees), or None if there is none.

    Raises: InputError if the WCS cannot be read, or has distortion tables.
    """
    if any(key.startswith(("CPDIS", "D2IM")) for key in header):
        raise InputError("the WCS has distortion tables (CPDIS, D2IM), which are not read; give a drizzled or rectified image.")
    with warned("ignore"):
        try:
            cards = fits.Header({k: v for k, v in header.items() if _WCS_CARD.fullmatch(k)})
            # astropy knows SIP of an image alone: of a cube, the first two axes
            wcs = WCS(cards, naxis=2) if "A_ORDER" in cards or "B_ORDER" in cards else WCS(cards)
            if not wcs.has_celestial:
                return None
            normal = wcs.celestial.to_header(relax=True)
        except Exception as error:  # wcslib reports each defect with a class of its own
            cause = " ".join(str(error).split())[:160]
            raise InputError(f"the WCS cannot be read ({cause}); correct it, or give pixel_scale.") from error
    return {k: normal[k] for k in normal if _WCS_CARD.fullmatch(k)}


def pixel_axes(cards: Cards) -> np.ndarray:
    """Degrees along the two world axes per pixel along x and y, (2, 2): the linear part of a normal-form WCS."""
    return _wcs(cards).pixel_scale_matrix


def pixel_to_icrs(cards: Cards, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right ascension and declination (ICRS, degrees) at 0-based pixel coordinates."""
    sky = _wcs(cards).pixel_to_world(x, y).icrs
    return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)


def icrs_to_pixel(cards: Cards, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0-based pixel coordinates of right ascension and declination (ICRS, degrees)."""
    from astropy.coordinates import SkyCoord

    x, y = _wcs(cards).world_to_pixel(SkyCoord(ra, dec, unit="deg", frame="icrs"))
    return np.asarray(x), np.asarray(y)


def _wcs(cards: Cards) -> WCS:
    return _wcs_of(tuple(cards.items()))


@lru_cache(maxsize=32)  # the planes of a file share theirs, and wcslib takes milliseconds
def _wcs_of(cards: tuple[tuple[str, Value], ...]) -> WCS:
    with warned("ignore"):
        return WCS(fits.Header(dict(cards)))
