"""Calibration: factors for intervals from simulations, where they hold, and products that are corrected by them.

A calibration is fitted on products of simulated observations whose truth is known (`fit`), stored as JSON, and applied to
products of the same prior, sampler, number of draws and resolution (`check_run`) whose data look like the simulations: pixel
scale, kind of noise, PSF and S/N (`apply`). Elsewhere it is refused, and the product says why it stays uncalibrated.
Factors are of quantity and S/N of the data, which are known without the truth; see `diffinv.uncertainty.widening`.
Invariant: a product whose input was among the simulations of the fit is never called calibrated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.data.products import Product
from diffinv.data.psf import half_area_diameter
from diffinv.engine.measure import measure
from diffinv.uncertainty.finding import Record
from diffinv.uncertainty.widening import fewest_objects, needed_factor, smallest_factor, stretched

LEVELS = {0.9: (0.05, 0.95), 0.68: (0.16, 0.84)}
MEASURED = ("flux", "size", "e1", "e2")
ON, OFF = "pixels on source", "pixels off source"
ON_SOURCE, SOURCE_SIGMAS = 0.05, 3.0  # of the brightest data pixel; of the noise
PSF_MARGIN = 0.05  # of the FWHM, beyond those of the simulations


@dataclass(frozen=True)
class RunRegime(Record):
    """What a whole run shares. weights: SHA-256 of the prior. method: sampler and guidance with their settings.
    target_fwhm: arcsec."""

    weights: str
    method: str
    draws: int
    target_fwhm: float


@dataclass(frozen=True)
class DataRegime(Record):
    """What the data of the simulations were like. data_scale: arcsec a pixel. correlated: 1 if their noise was. psf_fwhm: arcsec,
    least and largest. signal_to_noise: likewise."""

    data_scale: float
    correlated: int
    psf_fwhm: tuple[float, float]
    signal_to_noise: tuple[float, float]


@dataclass(frozen=True)
class Factor(Record):
    """Of one quantity, nominal level and bin of S/N. before: coverage of the intervals as they were. objects: of the fit."""

    quantity: str
    level: float
    signal_to_noise: tuple[float, float]
    factor: float
    before: float
    objects: int


@dataclass(frozen=True)
class Calibration(Record):
    """Factors and where they hold. source: how the simulations were made. inputs: hashes of their files. delta: probability with
    which this fit may break its promise; None for a promise on average over fits."""

    run: RunRegime
    data: DataRegime
    factors: tuple[Factor, ...]
    source: str
    inputs: tuple[str, ...]
    delta: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        plain = super().from_dict(values)
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in values["data"].items()}
        factors = tuple(Factor(**{**f, "signal_to_noise": tuple(f["signal_to_noise"])}) for f in values["factors"])
        return replace(plain, run=RunRegime(**values["run"]), data=DataRegime(**data), factors=factors)

    def dump(self) -> bytes:
        """As a JSON file."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()

    @property
    def _promise(self) -> str:
        return "on average" if self.delta is None else f"with probability {1 - self.delta:g} on average"

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.dump()).hexdigest()

    def check_run(self, run: RunRegime) -> None:
        """Refuse another prior, method, number of draws or resolution.

        Raises: ConfigError with what differs.
        """
        pairs = ((f.name, getattr(self.run, f.name), getattr(run, f.name)) for f in dataclasses.fields(RunRegime))
        differ = [f"{name} {mine!r}, here {here!r}" for name, mine, here in pairs if mine != here]
        if differ:
            raise ConfigError(
                f"calibration: was made for another run ({'; '.join(differ)}); "
                "run `diffinv calibrate` with the configuration of this one."
            )

    def refusal(self, row: dict[str, float], broadest: float = 0.0) -> str | None:
        """Why data are unlike the simulations, from a row of the catalogue and the broadest PSF, arcsec; None if they are not."""
        data = self.data
        (sharp, wide), (faint, bright) = data.psf_fwhm, data.signal_to_noise
        if not math.isclose(row["data_scale"], data.data_scale, rel_tol=1e-3):
            return f"pixels of {row['data_scale']:.4g}″, simulated {data.data_scale:.4g}″"
        if int(row["correlated"]) != data.correlated:
            return "correlated noise, simulated white" if not data.correlated else "white noise, simulated correlated"
        if not sharp * (1 - PSF_MARGIN) <= row["psf_fwhm"] <= wide * (1 + PSF_MARGIN):
            return f"PSF of {row['psf_fwhm']:.3g}″, simulated {sharp:.3g} to {wide:.3g}″"
        if broadest > wide * (1 + PSF_MARGIN):
            return f"an exposure with a PSF of {broadest:.3g}″, simulated {sharp:.3g} to {wide:.3g}″"
        if not faint <= row["sn"] <= bright:
            return f"S/N {row['sn']:.3g}, simulated {faint:.3g} to {bright:.3g}"
        if self._missing(row["sn"]):
            return f"S/N {row['sn']:.3g}, with too few simulations for {', '.join(self._missing(row['sn']))}"
        return None

    def _missing(self, sn: float) -> list[str]:
        return [name for name in (ON, OFF, *MEASURED) if any(self._find(name, level, sn) is None for level in LEVELS)]

    def _find(self, quantity: str, level: float, sn: float) -> float | None:
        for f in self.factors:
            if f.quantity == quantity and f.level == level and f.signal_to_noise[0] <= sn < f.signal_to_noise[1]:
                return f.factor
        return None

    def apply(self, product: Product) -> Product:
        """The product with its intervals stretched, or as it is with a note that says why."""
        rows = [{k: float(product.catalog[k][b]) for k in _NEEDED} for b in range(len(product.bands))]
        refused = []
        for b, row in enumerate(rows):
            seen = [half_area_diameter(e.psf) * e.psf_scale for e in product.exposures_of(b)]
            if (reason := self.refusal(row, max(seen, default=0.0))) is not None:
                refused.append(f"band {product.bands[b]}: {reason}")
        if product.provenance.input_sha256[:16] in self.inputs:
            refused = ["the input is one of the simulations of the fit"]
        if refused:
            return replace(product, notes=(*product.notes, f"not calibrated: {'; '.join(refused)}"))
        table = {
            (q, p, b): self._find(q, p, row["sn"]) for q in (ON, OFF, *MEASURED) for p in LEVELS for b, row in enumerate(rows)
        }
        quantiles, columns = _stretched_maps(product, table), _stretched_columns(product, table)
        largest = max(table[ON, 0.9, b] for b in range(len(rows)))
        source = replace(
            product.provenance, calibration="calibrated", calibration_sha256=self.digest, calibration_factor=float(largest)
        )
        said = [
            f"band {name}: 90 % intervals × " + ", ".join(f"{table[q, 0.9, b]:.3g} ({q})" for q in (ON, OFF, *MEASURED))
            for b, name in enumerate(product.bands)
        ]
        notes = (
            *product.notes,
            f"calibrated on {self.source}, {self._promise} over objects like those; ERR and SAMPLES are not",
            *said,
        )
        return replace(product, quantiles=quantiles, catalog=columns, provenance=source, notes=notes)


def regime_of(record: dict[str, Any], target_fwhm: float) -> RunRegime:
    """The regime of a run from what `run.json` says of it."""
    sampling = record["configuration"]
    more = {"dtype": sampling["dtype"], "held_out": sampling["sampler"].get("held_out")}
    more |= {"mixing": mixing} if (mixing := sampling["input"].get("mixing")) else {}
    method = json.dumps({**record["method"], **more}, sort_keys=True)
    return RunRegime(record["weights_sha256"], method, sampling["sampler"]["samples"], target_fwhm)


_NEEDED = ("sn", "psf_fwhm", "data_scale", "correlated")


def load_calibration(path: Path) -> Calibration:
    """A calibration from its file. Raises: ConfigError if it is none."""
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: is no calibration ({cause}); make one with `diffinv calibrate`.") from error


def on_source(product: Product, b: int) -> np.ndarray:
    """Pixels of a source that is found in the data alone: (H, W) bool.

    A pixel counts where the data pixel at its centre exceeds a twentieth of the brightest one and 3 σ. The mean of the draws
    would be a finer map, but pixels that are chosen by the draws have another coverage than they, even if the draws are exact.
    """
    found = np.zeros(product.grid.shape, dtype=bool)
    for exposure in (e for e in product.exposures_of(b) if e.image is not None):
        noise = exposure.noise_std if exposure.noise_std > 0 else float(product.catalog["noise_std"][b])
        least = max(ON_SOURCE * float(np.nanmax(exposure.image)), SOURCE_SIGMAS * noise)
        affine = product.grid.affine_to(exposure.grid)
        centres = np.stack(np.meshgrid(*(np.arange(n) for n in product.grid.shape), indexing="ij"), -1)
        row, column = np.moveaxis(np.rint(centres @ affine.matrix.T + affine.offset).astype(int), -1, 0)
        inside = (row >= 0) & (row < exposure.image.shape[0]) & (column >= 0) & (column < exposure.image.shape[1])
        bright = np.nan_to_num(exposure.image) > least
        found |= inside & bright[row.clip(0, bright.shape[0] - 1), column.clip(0, bright.shape[1] - 1)]
    return found


def _stretched_maps(product: Product, table: dict) -> dict[float, np.ndarray]:
    found = dict(product.quantiles)
    source = np.stack([on_source(product, b) for b in range(len(product.bands))])
    middle = found[0.5]
    for level, (low, high) in LEVELS.items():
        factor = np.stack([np.where(on, table[ON, level, b], table[OFF, level, b]) for b, on in enumerate(source)])
        found[low], found[high] = stretched(found[low], middle, found[high], factor.astype(middle.dtype))
    # the wider holds the narrower, so that both keep what they promise
    found[0.05], found[0.95] = np.minimum(found[0.05], found[0.16]), np.maximum(found[0.95], found[0.84])
    return found


def _stretched_columns(product: Product, table: dict) -> dict[str, np.ndarray]:
    columns = {name: np.array(column) for name, column in product.catalog.items()}
    for name in MEASURED:
        middle = columns[f"{name}_q50"]
        for level, (low, high) in LEVELS.items():
            factor = np.array([table[name, level, b] for b in range(len(middle))])
            keys = f"{name}_q{round(100 * low):02d}", f"{name}_q{round(100 * high):02d}"
            columns[keys[0]], columns[keys[1]] = stretched(columns[keys[0]], middle, columns[keys[1]], factor)
        columns[f"{name}_q05"] = np.minimum(columns[f"{name}_q05"], columns[f"{name}_q16"])
        columns[f"{name}_q95"] = np.maximum(columns[f"{name}_q95"], columns[f"{name}_q84"])
    return columns


@dataclass(frozen=True)
class _Case:
    """One band of simulated object `number`: its S/N and what its intervals of each (quantity, level) needed, (n,)."""

    number: int
    row: dict[str, float]
    needed: dict[tuple[str, float], Tensor]


def needed_factors(product: Product) -> list[dict[tuple[str, float], Tensor]]:
    """r of pixels and measurements of every band, by (quantity, level): (n,), without what cannot be measured.

    Raises: DiffinvError for a product without truth or without its 90 % planes.
    """
    if product.truth is None or 0.05 not in product.quantiles:
        raise DiffinvError(f"{product.object_id}: a calibration needs a truth and at least 19 draws.")
    true = measure(torch.from_numpy(product.truth)[None], product.grid.pixel_scale)
    found = []
    for b in range(len(product.bands)):
        source, cases = on_source(product, b), {}
        for level, (low, high) in LEVELS.items():
            planes = (torch.from_numpy(np.asarray(v[b], np.float64)) for v in (product.truth, *_three(product, low, high)))
            r = needed_factor(*planes)
            cases |= {(ON, level): r[torch.from_numpy(source)], (OFF, level): r[torch.from_numpy(~source)]}
            for name in MEASURED:
                ends = (product.catalog[f"{name}_q{round(100 * p):02d}"][b] for p in (low, 0.5, high))
                value = needed_factor(true[name][0, b].double(), *(torch.tensor(float(e), dtype=torch.float64) for e in ends))
                cases[name, level] = value.reshape(1) if not value.isnan() else value.new_empty(0)
        found.append(cases)
    return found


def _three(product: Product, low: float, high: float) -> tuple[np.ndarray, ...]:
    return product.quantiles[low], product.quantiles[0.5], product.quantiles[high]


def fit(
    products: Iterable[Product], edges: tuple[float, ...], run: RunRegime, source: str, *, delta: float | None = None
) -> Calibration:
    """Factors from products of simulations.

    Arguments: products: with truth, one at a time. edges: of the bins of S/N, ascending. run, source: for the record. delta: as
    in `smallest_factor`, for each factor by itself.
    Raises: ConfigError for simulations of more than one pixel scale or kind of noise; DiffinvError if no bin has objects enough.
    """
    cases, inputs = [], []
    for number, product in enumerate(products):
        inputs.append(product.provenance.input_sha256[:16])
        for b, needed in enumerate(needed_factors(product)):
            cases.append(_Case(number, {k: float(product.catalog[k][b]) for k in _NEEDED}, needed))
    kinds = {(round(c.row["data_scale"], 4), int(c.row["correlated"])) for c in cases}
    if len(kinds) != 1:
        raise ConfigError(
            f"calibrate: simulations of {len(kinds)} kinds of data (pixel scale, noise); make one calibration each."
        )
    limits = (0.0, *edges, math.inf)
    bins = list(zip(limits, limits[1:], strict=False))
    factors = tuple(f for bin in bins for f in _bin_factors(bin, cases, delta))
    if not factors:
        fewest = fewest_objects(0.1, delta)
        raise DiffinvError(f"calibrate: {len(inputs)} simulations, too few in every bin of S/N; {fewest} are needed.")
    ranges = {k: (min(c.row[k] for c in cases), max(c.row[k] for c in cases)) for k in ("psf_fwhm", "sn")}
    ((scale, correlated),) = kinds
    data = DataRegime(scale, correlated, ranges["psf_fwhm"], ranges["sn"])
    return Calibration(run, data, factors, source, tuple(sorted(inputs)), delta)


def _bin_factors(bin: tuple[float, float], cases: list[_Case], delta: float | None) -> list[Factor]:
    """Of every quantity and level that has objects enough in a bin of S/N; bands of one object are one loss."""
    here, found = [c for c in cases if bin[0] <= c.row["sn"] < bin[1]], []
    for level in LEVELS:
        for quantity in (ON, OFF, *MEASURED):
            bands: dict[int, list[Tensor]] = {}
            for case in here:
                if case.needed[quantity, level].numel():
                    bands.setdefault(case.number, []).append(case.needed[quantity, level])
            needed = [torch.cat(parts) for parts in bands.values()]
            if len(needed) >= fewest_objects(1 - level, delta):
                before = float(np.mean([float((r <= 1).double().mean()) for r in needed]))
                factor = smallest_factor(needed, round(1 - level, 6), delta)
                found.append(Factor(quantity, level, bin, factor, before, len(needed)))
    return found
