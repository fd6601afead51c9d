"""Products: one FITS file an object, written whole or not at all, and read back as the same record.

Extensions: SCI (posterior mean), ERR (standard deviation), DQ (bits of `Quality`), Q05 … Q95, INFO, SAMPLES, a RESID, a PSF_IN
and a DATA an exposure, PSF_OUT, CATALOG. Images are cubes (band, y, x); each has its own WCS. Fluxes are in BUNIT per output
pixel; ZEROPNT is the magnitude of one BUNIT where it is known (ZPNT1, ZPNT2, … where the bands of a cube differ).
Object names are percent-encoded, so that no name can lead out of the output directory.
A product may be as large as its samples: it is read whole if it has at most `MAX_PIXELS` pixels or as many as the file has
bytes. One beyond `MAX_PIXELS` is written without compression, so that every product that was written can be read.
Invariant: a pixel whose mean or standard deviation is not finite has NODATA set. FLAGS, in the primary header, names the bits
that any pixel has, so that what is doubtful is found without reading an image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.fits import MAX_PIXELS, Cards, FitsFile, Plane, Table, Value, decode_fits, encode_fits, read_fits
from diffinv.data.grids import SkyGrid

LEVELS = (0.05, 0.16, 0.50, 0.84, 0.95)
LONGEST_NAME = 100
_PRIMARY = {
    "DIVERS": ("version", "diffinv version"),
    "CFGHASH": ("config_hash", "hash of the configuration"),
    "PRIORID": ("prior", "name of the prior"),
    "WSHA": ("weights_sha256", "SHA-256 of the weights"),
    "SAMPLER": ("sampler", "sampler and guidance"),
    "CALIBR": ("calibration", "calibrated | uncalibrated"),
    "NSAMP": ("draws", "posterior draws"),
    "NFE": ("network_calls", "network calls a draw"),
    "SEED": ("seed", "of this object"),
    "INSHA": ("input_sha256", "SHA-256 of the input"),
    "CHI2": ("chi2", "reduced, of the posterior mean"),
    "TPSFFWHM": ("target_fwhm", "arcsec, 0: none"),
    "PRODKEY": ("key", "identifies object, input, run"),
    "CALSHA": ("calibration_sha256", "SHA-256 of the calibration"),
    "CALFAC": ("calibration_factor", "of 90 % intervals on the source"),
}


class Quality(IntFlag):
    """Bits of DQ."""

    NODATA = 1
    SATURATED = 2
    EXTRAPOLATED = 4
    PRIOR_DRIVEN = 8
    CHI2_BAD = 16


@dataclass(frozen=True)
class Provenance:
    """Where a product comes from; one primary card a field.

    chi2 may be NaN when there are no data (no card then). calibration_sha256, calibration_factor: of the file by which
    intervals were stretched, "" and 1 where none was.
    """

    version: str
    config_hash: str
    prior: str
    weights_sha256: str
    sampler: str
    calibration: str
    draws: int
    network_calls: float
    seed: int
    input_sha256: str
    chi2: float
    target_fwhm: float
    key: str
    calibration_sha256: str = ""
    calibration_factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Exposure:
    """What was measured in one band, and what the answer leaves of it.

    band, instrument: names. residual: (h, w) whitened residual of the posterior mean, 0 where bad, on the native `grid`.
    psf: (S, T) stamp as used. psf_scale: arcsec a stamp pixel. image: (h, w) the data, NaN where bad, in the unit
    per native pixel; or None. noise_std: median σ of a good pixel, NaN if unknown. weights: of the product's bands in it, if it
    is a mixture of them; () of its own band alone.
    """

    band: str
    instrument: str
    residual: np.ndarray
    grid: SkyGrid
    psf: np.ndarray
    psf_scale: float
    image: np.ndarray | None = None
    noise_std: float = float("nan")
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Product:
    """The answer for one object.

    object_id: any text. bands: names of the planes. unit: BUNIT, per output pixel ("" if unknown). grid: of the planes.
    mean, std: (C, H, W) in `unit`. quality: (C, H, W) bits. quantiles: level → (C, H, W); those that the draws cannot hold are
    not written. information: (C, H, W) data-informativeness, or None. samples: (M, C, H, W), or None.
    exposures: residuals and PSFs. target_psf: (S, S), on output pixels. catalog: column → rows. notes: for the history.
    truth: (C, H, W) in `unit`, of a simulation, or None. zeropoint: magnitude of one unit, one a band (None where unknown), or
    None if no band has one.
    """

    object_id: str
    bands: tuple[str, ...]
    unit: str
    grid: SkyGrid
    mean: np.ndarray
    std: np.ndarray
    quality: np.ndarray
    provenance: Provenance
    quantiles: Mapping[float, np.ndarray] = field(default_factory=dict)
    information: np.ndarray | None = None
    samples: np.ndarray | None = None
    exposures: tuple[Exposure, ...] = ()
    target_psf: np.ndarray | None = None
    catalog: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    truth: np.ndarray | None = None
    zeropoint: tuple[float | None, ...] | None = None

    def exposures_of(self, b: int) -> list[Exposure]:
        """Those that see band number b: its own, and mixtures that it is part of."""
        return [e for e in self.exposures if (e.weights[b] != 0 if e.weights else e.band == self.bands[b])]


def holds_quantile(level: float, draws: int) -> bool:
    """Whether position (M + 1)p lies among M draws: 19 for 5 % and 95 %, 6 for 16 % and 84 %."""
    return min(level, 1 - level) * (draws + 1) >= 1 - 1e-9


def safe_id(object_id: str) -> str:
    """A file name for any text: percent-encoded UTF-8 of [A-Za-z0-9_.-], no leading dot, long ones cut and closed with a hash.

    Raises: DiffinvError if it is empty.
    """
    if not object_id:
        raise DiffinvError("object_id is empty; give every object a name.")
    encoded = _encode(object_id)
    if len(encoded) <= LONGEST_NAME:
        return encoded
    digest = hashlib.sha256(object_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{encoded[: LONGEST_NAME - 17]}-{digest}"


def _encode(text: str) -> str:
    encoded = quote(text, safe="", errors="surrogatepass").replace("~", "%7E")
    return f"%2E{encoded[1:]}" if encoded.startswith(".") else encoded


def product_path(out: str | Path, object_id: str, key: str) -> Path:
    """`out/products/<hh>/<safe_id>-<key>.fits`, hh the first two digits of the key.

    Raises: DiffinvError if the key is not hexadecimal, or a symbolic link leads out of `out`.
    """
    if len(key) < 2 or any(c not in "0123456789abcdef" for c in key):
        raise DiffinvError(f"product key must be lower-case hexadecimal, got {key!r}.")
    path = Path(out) / "products" / key[:2] / f"{safe_id(object_id)}-{key}.fits"
    if not path.parent.resolve().is_relative_to(Path(out).resolve()):
        raise DiffinvError(f"{path.parent}: a symbolic link leads out of {out}; remove it.")
    return path


def write_product(path: str | Path, product: Product) -> None:
    """Write a product whole or not at all.

    Raises: DiffinvError if its parts do not fit together, or the file read back differs; OSError if the disk refuses.
    """
    parts = _parts(product)
    if _claimed(parts) > MAX_PIXELS:
        parts = [replace(p, compress=False) if isinstance(p, Plane) else p for p in parts]
    write_atomically(path, encode_fits(parts), verify=read_product)


def _claimed(parts: Sequence[Plane | Table]) -> int:
    """Pixels of the planes and bytes of the tables."""
    planes = sum(p.data.size for p in parts if isinstance(p, Plane) and p.data is not None)
    return planes + sum(np.asarray(c).nbytes for p in parts if isinstance(p, Table) for c in p.columns.values())


def _parts(product: Product) -> list[Plane | Table]:
    shape = (len(product.bands), *product.grid.shape)
    if product.zeropoint is not None and len(product.zeropoint) != len(product.bands):
        raise DiffinvError(f"product {product.object_id!r}: {len(product.zeropoint)} zero points, not {len(product.bands)}.")
    cubes = {"mean": product.mean, "std": product.std, "quality": product.quality, "information": product.information}
    cubes["truth"] = product.truth
    for name, cube in {**cubes, **{f"quantile {p:g}": q for p, q in product.quantiles.items()}}.items():
        if cube is not None and cube.shape != shape:
            raise DiffinvError(f"product {product.object_id!r}: {name} is {cube.shape} but bands and grid say {shape}.")
    if product.samples is not None and product.samples.shape != (product.provenance.draws, *shape):
        expected = (product.provenance.draws, *shape)
        raise DiffinvError(f"product {product.object_id!r}: samples are {product.samples.shape}, not {expected}.")
    cards = {**product.grid.image_cards(("BAND",)), **_band_cards(product.bands)}
    flux = {**cards, **_flux_cards(product)}
    broken = ~(np.isfinite(product.mean) & np.isfinite(product.std))
    quality = np.where(broken, product.quality | Quality.NODATA, product.quality).astype(np.int32)
    parts: list[Plane | Table] = [_primary(product, quality)]
    parts += [Plane("SCI", _single(product.mean), flux), Plane("ERR", _single(product.std), flux)]
    parts.append(Plane("DQ", quality, {**cards, **{f"DQBIT{k}": bit.name for k, bit in enumerate(Quality)}}))
    for level, cube in sorted(product.quantiles.items()):
        if holds_quantile(level, product.provenance.draws):
            parts.append(Plane(f"Q{round(100 * level):02d}", _single(cube), flux))
    if product.information is not None:
        parts.append(Plane("INFO", _single(product.information), cards))
    if product.samples is not None:
        draw_cards = {**product.grid.image_cards(("BAND", "DRAW")), **_band_cards(product.bands), **_flux_cards(product)}
        parts.append(Plane("SAMPLES", _single(product.samples), draw_cards, compress=True))
    if product.truth is not None:
        parts.append(Plane("TRUTH", _single(product.truth), flux))
    parts += _exposure_parts(product)
    if product.catalog:
        parts.append(Table("CATALOG", product.catalog, {}))
    return parts


def _exposure_parts(product: Product) -> list[Plane]:
    parts = []
    for number, exposure in enumerate(product.exposures, start=1):
        cards: dict[str, Value] = {"BAND": _ascii(exposure.band)}
        cards |= {"INSTRUME": _ascii(exposure.instrument)} if exposure.instrument else {}
        cards |= {"NOISESTD": float(exposure.noise_std)} if np.isfinite(exposure.noise_std) else {}
        cards |= {f"WEIGHT{k}": float(weight) for k, weight in enumerate(exposure.weights, start=1)}
        stamp = SkyGrid.linear(exposure.psf.shape, exposure.psf_scale)
        parts.append(Plane("RESID", _single(exposure.residual), {**exposure.grid.image_cards(), **cards}, number))
        parts.append(Plane("PSF_IN", _single(exposure.psf), {**stamp.image_cards(), **cards}, number))
        if exposure.image is not None:
            flux = {**exposure.grid.image_cards(), **cards, **_flux_cards(product, exposure.band)}
            parts.append(Plane("DATA", _single(exposure.image), flux, number))
    if product.target_psf is not None:
        stamp = SkyGrid.linear(product.target_psf.shape, product.grid.pixel_scale)
        parts.append(Plane("PSF_OUT", _single(product.target_psf), stamp.image_cards()))
    return parts


def _primary(product: Product, quality: np.ndarray) -> Plane:
    cards: dict[str, Value] = {"OBJID": _encode(product.object_id)}
    cards["FLAGS"] = ",".join(bit.name for bit in Quality if (quality & bit).any())
    for card, (name, _) in _PRIMARY.items():
        value = getattr(product.provenance, name)
        if not (isinstance(value, float) and not np.isfinite(value)):
            cards[card] = _ascii(value) if isinstance(value, str) else value
    comments = {"OBJID": "percent-encoded", "FLAGS": "bits of DQ in any pixel"}
    comments |= {card: comment for card, (_, comment) in _PRIMARY.items()}
    dropped = [f"{p:g}" for p in sorted(product.quantiles) if not holds_quantile(p, product.provenance.draws)]
    notes = product.notes
    if dropped:
        notes += (f"quantiles {', '.join(dropped)} not written: {product.provenance.draws} draws cannot hold them",)
    return Plane("PRIMARY", None, cards, history=notes, comments=comments)


def _band_cards(bands: tuple[str, ...]) -> dict[str, Value]:
    cards: dict[str, Value] = {f"BAND{k}": _ascii(name) for k, name in enumerate(bands, start=1)}
    return {"BAND": _ascii(bands[0]), **cards} if len(bands) == 1 else cards


def _flux_cards(product: Product, band: str | None = None) -> dict[str, Value]:
    """Unit and zero point of a cube of all bands (and of a mixture of them), or of an image of one."""
    cards: dict[str, Value] = {"BUNIT": product.unit} if product.unit else {}
    known = dict(zip(product.bands, product.zeropoint or (None,) * len(product.bands), strict=True))
    points = list(known.values()) if band not in known else [known[band]]
    if len(set(points)) == 1:
        return cards if points[0] is None else {**cards, "ZEROPNT": float(points[0])}
    return cards | {f"ZPNT{k}": float(point) for k, point in enumerate(points, start=1) if point is not None}


def _ascii(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _single(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def read_product(path: str | Path) -> Product:
    """A product as it was written (arrays in float32).

    Raises: InputError if the file is damaged, or is not a whole product.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return _whole(path, read_fits(path, max_pixels=max(MAX_PIXELS, size)))


def decode_product(path: Path, payload: bytes) -> Product:
    """A product from its bytes. path: what errors name.

    Raises: InputError as `read_product`.
    """
    return _whole(path, decode_fits(path, payload, max_pixels=max(MAX_PIXELS, len(payload))))


def _whole(path: str | Path, file: FitsFile) -> Product:
    there = {(p.name, p.extver) for p in file.planes if p.data is not None}
    if "OBJID" not in file.primary or not {("SCI", 1), ("ERR", 1), ("DQ", 1)} <= there:
        raise InputError(f"{path}: not a diffinv product (OBJID, SCI, ERR or DQ is missing).")
    try:
        return _product(file)
    except DiffinvError as error:
        raise InputError(f"{path}: not a whole product: {error}") from error


def _product(file: FitsFile) -> Product:
    planes = {(p.name, p.extver): p for p in file.planes if p.data is not None}
    sci, provenance = _plane(planes, "SCI", axes=3), _provenance(file.primary)
    shape, levels = sci.data.shape, {p: f"Q{round(100 * p):02d}" for p in LEVELS}
    cubes = {n: _plane(planes, n, shape=shape).data for n in ("ERR", "DQ", "INFO", "TRUTH", *levels.values()) if (n, 1) in planes}
    if cubes["DQ"].dtype.kind not in "iu":
        raise InputError(f"DQ holds {cubes['DQ'].dtype}; expected integers.")
    draws = (provenance.draws, *shape)
    tables = [t for t in file.tables if t.name == "CATALOG"]
    return Product(
        object_id=unquote(_card(file.primary, "OBJID", str), errors="surrogatepass"),
        bands=tuple(_card(sci.header, f"BAND{k + 1}", str) for k in range(shape[0])),
        unit=str(sci.header.get("BUNIT", "")),
        grid=_grid(sci),
        mean=sci.data,
        std=cubes["ERR"],
        quality=cubes["DQ"],
        provenance=provenance,
        quantiles={p: cubes[name] for p, name in levels.items() if name in cubes},
        information=cubes.get("INFO"),
        samples=_plane(planes, "SAMPLES", shape=draws).data if ("SAMPLES", 1) in planes else None,
        exposures=tuple(_exposure(planes, p.extver, shape[0]) for p in file.named("RESID")),
        target_psf=_plane(planes, "PSF_OUT", axes=2).data if ("PSF_OUT", 1) in planes else None,
        catalog=tables[0].columns if tables else {},
        notes=file.planes[0].history,
        truth=cubes.get("TRUTH"),
        zeropoint=_zeropoint(sci.header, shape[0]),
    )


def _plane(
    planes: Mapping[tuple[str, int], Plane],
    name: str,
    extver: int = 1,
    *,
    axes: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Plane:
    """A plane that must be there with this number of axes, or this shape."""
    if (name, extver) not in planes:
        raise InputError(f"{name},{extver} is missing; write the product again.")
    found = planes[name, extver].data.shape
    if len(found) != (len(found) if axes is None else axes) or (shape is not None and found != shape):
        raise InputError(f"{name},{extver} is {found}; expected {f'{axes} axes' if shape is None else shape}.")
    return planes[name, extver]


def _card(cards: Cards, key: str, kind: type[str] | type[int] | type[float]) -> str | int | float:
    """A card that must be there with this type; an integer is a float too."""
    value = cards.get(key)
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise InputError(f"{key} is {'missing' if value is None else repr(value)}; expected {kind.__name__}.")
    return value


def _provenance(cards: Cards) -> Provenance:
    kinds = {"draws": int, "seed": int, "network_calls": float, "chi2": float, "target_fwhm": float, "calibration_factor": float}
    known = {"CHI2": float("nan"), "CALSHA": "", "CALFAC": 1.0, **cards}
    return Provenance(**{name: _card(known, card, kinds.get(name, str)) for card, (name, _) in _PRIMARY.items()})


def _exposure(planes: Mapping[tuple[str, int], Plane], number: int, bands: int) -> Exposure:
    residual, psf = (_plane(planes, name, number, axes=2) for name in ("RESID", "PSF_IN"))
    scale = float(_card(psf.header, "CDELT1", float))
    band, instrument = _card(residual.header, "BAND", str), str(residual.header.get("INSTRUME", ""))
    image = _plane(planes, "DATA", number, shape=residual.data.shape).data if ("DATA", number) in planes else None
    noise = float(_card({"NOISESTD": float("nan"), **residual.header}, "NOISESTD", float))
    mixed = "WEIGHT1" in residual.header
    weights = tuple(float(_card(residual.header, f"WEIGHT{k + 1}", float)) for k in range(bands if mixed else 0))
    return Exposure(band, instrument, residual.data, _grid(residual), psf.data, scale, image, noise, weights)


def _zeropoint(cards: Cards, bands: int) -> tuple[float | None, ...] | None:
    keys = ["ZEROPNT" if "ZEROPNT" in cards else f"ZPNT{k + 1}" for k in range(bands)]
    found = tuple(float(_card(cards, key, float)) if key in cards else None for key in keys)
    return None if all(point is None for point in found) else found


def _grid(plane: Plane) -> SkyGrid:
    return SkyGrid.from_header(plane.header, plane.data.shape[-2:])
