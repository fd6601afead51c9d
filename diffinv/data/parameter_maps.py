"""Maps of parameters as one FITS file that opens in ds9 as it is.

For each parameter of each component the images MEAN, STD, Q05 and Q95 (EXTVER counts the pairs; COMPNAME, PARAM and BUNIT say
which), for each component AMP and AMP_STD, summed over the channels, and FLAG (bits: 1 NODATA, 2 EXTRAPOLATED, 4 UNCONVERGED,
8 CHI2_BAD, 16 FAINT), CHI2Z, the fitted cube FIT and the whitened residuals RESID, with the celestial WCS of the cube in every
image.
Invariant: what is not known is NaN or flagged, never a number that looks like an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffinv.data.cubes import Cube
from diffinv.data.fits import Plane, Table, encode_fits

_SUMMED = {"BUNIT": "summed over the channels"}
BITS = {1: "NODATA", 2: "EXTRAPOLATED", 4: "UNCONVERGED", 8: "CHI2_BAD", 16: "FAINT"}


@dataclass(frozen=True, eq=False)
class ParameterImages:
    """One parameter of one component, each image (H, W) in `unit`."""

    component: str
    parameter: str
    unit: str
    images: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class AmplitudeImages:
    """Amplitude of one component, (H, W)."""

    component: str
    unit: str
    mean: np.ndarray
    std: np.ndarray


def encode_parameter_maps(
    cube: Cube,
    parameters: list[ParameterImages],
    amplitudes: list[AmplitudeImages],
    checks: Mapping[str, np.ndarray],
    cards: Mapping[str, object],
    history: tuple[str, ...],
) -> bytes:
    """The file's bytes. checks: FLAG and CHI2Z (H, W), FIT and RESID (K, H, W). cards: of the primary header."""
    planes: list[Plane | Table] = [Plane("PRIMARY", None, dict(cards), history=history)]
    for number, entry in enumerate(parameters, start=1):
        names = {"COMPNAME": entry.component, "PARAM": entry.parameter, "BUNIT": entry.unit}
        planes += [Plane(n, image.astype(np.float32), {**cube.wcs, **names}, extver=number) for n, image in entry.images.items()]
    for number, entry in enumerate(amplitudes, start=1):
        names = {"COMPNAME": entry.component, "PARAM": "amplitude", "BUNIT": entry.unit}
        for name, image in (("AMP", entry.mean), ("AMP_STD", entry.std)):
            planes.append(Plane(name, image.astype(np.float32), {**cube.wcs, **names}, extver=number, comments=_SUMMED))
    meaning = {f"BIT{bit}": text for bit, text in BITS.items()}
    for name, image in checks.items():
        own = meaning if name == "FLAG" else {"BUNIT": cube.bunit} if name == "FIT" else {}
        values = image.astype(np.uint8 if name == "FLAG" else np.float32)
        planes.append(Plane(name, values, {**cube.wcs, **own}))
    columns = {"CHANNEL": np.arange(len(cube.low), dtype=np.int32), "E_MIN": cube.low, "E_MAX": cube.high}
    return encode_fits([*planes, Table("EBOUNDS", columns, {"AXISUNIT": cube.unit})])
