"""X-ray responses: effective area (ARF) and redistribution matrix (RMF) as OGIP FITS files.

A row of an RMF keeps only the channels that it reaches, as N_GRP groups of N_CHAN consecutive channels from F_CHAN on, their
values one after the other in MATRIX. Channels are counted from TLMIN of the F_CHAN column, which is the first channel of
EBOUNDS; where the two differ, the file is refused, as nobody can say which one is meant. A first energy of zero, which a
power law cannot have, is raised to 1e-3 of that bin's upper edge.
Invariant: ARF, RMF and spectrum are joined only if their grids and channels are the same.

References: The calibration requirements for spectral analysis, George et al., 1998 (OGIP CAL/GEN/92-002, 92-002a).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.fits import FitsFile, Table, read_fits
from diffinv.data.guard import readable
from diffinv.spectral.absorption import Absorption
from diffinv.spectral.base import Grid
from diffinv.spectral.lines import LineTable
from diffinv.spectral.response import Binning, Response


@dataclass(frozen=True, eq=False)
class Arf:
    """Effective area. area: cm², (E,)."""

    path: Path
    grid: Grid
    area: np.ndarray


@dataclass(frozen=True, eq=False)
class Rmf:
    """Redistribution. matrix: probability of channel c for a photon of bin e, sparse (E, C). has_area: it is cm² instead.

    channel: numbers, (C,). low, high: nominal bounds of the channels, keV, (C,).
    """

    path: Path
    grid: Grid
    matrix: sparse.csr_array
    channel: np.ndarray
    low: np.ndarray
    high: np.ndarray
    has_area: bool


def read_arf(path: str | Path) -> Arf:
    """An ARF.

    Raises: InputError if it is no ARF, or has a negative or non-finite area.
    """
    with readable(path, "an ARF"):
        file = read_fits(path)
        table = find_table(file, ("SPECRESP",), ("ENERG_LO", "ENERG_HI", "SPECRESP"), "an ARF")
        area = table.columns["SPECRESP"].astype(np.float64)
        if not (np.isfinite(area) & (area >= 0)).all():
            raise InputError(
                f"{path}: SPECRESP is negative or not finite in {int((~(area >= 0)).sum())} bins; make the ARF again."
            )
        return Arf(file.path, _grid(file.path, table), area)


def read_rmf(path: str | Path) -> Rmf:
    """An RMF, its matrix unpacked.

    Raises: InputError if it is no RMF, its groups leave the channels of EBOUNDS, or its channels are counted in two ways.
    """
    with readable(path, "an RMF"):
        file = read_fits(path)
        wanted = ("ENERG_LO", "ENERG_HI", "N_GRP", "F_CHAN", "N_CHAN", "MATRIX")
        table = find_table(file, ("MATRIX", "SPECRESP MATRIX"), wanted, "an RMF")
        bounds = find_table(file, ("EBOUNDS",), ("CHANNEL", "E_MIN", "E_MAX"), "an RMF")
        check_unit(file.path, bounds, "E_MIN", "keV")
        channel = _channels(bounds)
        first = int(column_card(table, "F_CHAN", "TLMIN", channel[0]))
        if first != channel[0] or (np.diff(channel) != 1).any():
            raise InputError(
                f"{path}: F_CHAN counts from TLMIN = {first}, but EBOUNDS has channels {channel[0]}–{channel[-1]}, "
                f"{len(channel)} of them; correct TLMIN or EBOUNDS."
            )
        matrix = _unpacked(file.path, table.columns, first, len(channel))
        low, high = (bounds.columns[c].astype(np.float64) for c in ("E_MIN", "E_MAX"))
        has_area = table.name == "SPECRESP MATRIX" or str(table.header.get("HDUCLAS3", "")).strip() == "FULL"
        return Rmf(file.path, _grid(file.path, table), matrix, channel, np.minimum(low, high), np.maximum(low, high), has_area)


def _channels(bounds: Table) -> np.ndarray:
    """Numbers of the channels. Some files of ACIS have damaged ones; then TLMIN to TLMAX of the column count the rows."""
    channel = bounds.columns["CHANNEL"].astype(np.int64)
    low, high = (int(column_card(bounds, "CHANNEL", k, -1)) for k in ("TLMIN", "TLMAX"))
    if (np.diff(channel) != 1).any() and low >= 0 and high - low + 1 == len(channel):
        return np.arange(low, high + 1)
    return channel


def _unpacked(path: Path, columns: dict[str, np.ndarray], first: int, channels: int) -> sparse.csr_array:
    indices, values, ends = [], [], [0]
    for groups, starts, counts, row in zip(*(columns[c] for c in ("N_GRP", "F_CHAN", "N_CHAN", "MATRIX")), strict=True):
        spans = zip(np.atleast_1d(starts)[:groups], np.atleast_1d(counts)[:groups], strict=True)
        place = np.concatenate([np.arange(s - first, s - first + n, dtype=np.int64) for s, n in spans] or [np.empty(0, np.int64)])
        energy = len(ends) - 1
        if len(place) > np.size(row) or (place < 0).any() or (place >= channels).any():
            raise InputError(
                f"{path}: row {energy} of MATRIX has {len(place)} channels in its groups, {np.size(row)} values, and {channels} "
                f"channels counted from {first}; the groups do not fit, make the RMF again."
            )
        indices.append(place)
        values.append(np.atleast_1d(row)[: len(place)].astype(np.float64))
        ends.append(ends[-1] + len(place))
    data, index = np.concatenate(values), np.concatenate(indices)
    if not (np.isfinite(data) & (data >= 0)).all():
        raise InputError(f"{path}: MATRIX has values that are negative or not finite; make the RMF again.")
    return sparse.csr_array((data, index, np.array(ends)), shape=(len(ends) - 1, channels))


def join(rmf: Rmf, arf: Arf | None, binning: Binning | None = None) -> Response:
    """One response in float64, its channels binned.

    Arguments: rmf. arf: None if the RMF has the area already. binning: of the channels, or None to keep all.
    Raises: InputError if the energy grids differ, or the area is there twice or not at all.
    """
    if rmf.has_area == (arf is not None):
        cause = "already has the effective area; leave the ARF out" if rmf.has_area else "has no effective area; give the ARF"
        raise InputError(f"{rmf.path}: {cause}.")
    binning = binning or Binning(np.arange(len(rmf.channel)))
    area = np.ones(len(rmf.grid)) if arf is None else arf.area
    if arf is not None:
        try:
            arf.grid.check_equal(rmf.grid, str(arf.path), str(rmf.path))
        except DiffinvError as error:
            raise InputError(str(error)) from error
    if len(binning.labels) != len(rmf.channel):
        raise InputError(f"{rmf.path}: has {len(rmf.channel)} channels, but the binning is of {len(binning.labels)}.")
    keep = np.flatnonzero(binning.labels >= 0)
    gather = sparse.csr_array((np.ones(len(keep)), (keep, binning.labels[keep])), shape=(len(rmf.channel), len(binning)))
    matrix = (sparse.diags_array(area) @ rmf.matrix @ gather).toarray()
    low, high = binning.bounds(rmf.low, rmf.high)
    return Response(rmf.grid, torch.from_numpy(matrix), torch.from_numpy(low), torch.from_numpy(high))


def read_absorption(path: str | Path, grid: Grid, *, unit: float) -> Absorption:
    """Absorption on a grid from a table of cross-sections a hydrogen atom.

    Arguments: path: table with columns ENERGY in keV and SIGMA. grid. unit: of SIGMA in cm² (tables of tbabs: 1e-22).
    Raises: InputError if the file is no such table, does not cover the grid, or has cross-sections that no gas has.
    """
    with readable(path, "a table of cross-sections"):
        file = read_fits(path)
        table = next((t for t in file.tables if {"ENERGY", "SIGMA"} <= set(t.columns)), None)
        if table is None:
            raise InputError(f"{path}: no table with columns ENERGY and SIGMA; give cross-sections, for instance those of tbabs.")
        check_unit(file.path, table, "ENERGY", "keV")
        energy, sigma = (torch.from_numpy(table.columns[c].astype(np.float64)) for c in ("ENERGY", "SIGMA"))
        sigma = sigma * unit
        if not bool(((sigma > 0) & (sigma < 1e-15)).all()):
            raise InputError(
                f"{path}: cross-sections of {float(sigma.min()):.3g}–{float(sigma.max()):.3g} cm²; check their unit."
            )
        return Absorption.tabulated(grid, energy, sigma)


def read_lines(path: str | Path) -> LineTable:
    """A line list: CSV with columns energy_keV, element, strength, kT_peak_keV, sigma_log10_kT; lines with # are comments.

    Raises: InputError if a column is missing or a value cannot be read.
    """
    path = Path(path)
    try:
        rows = [r.split(",") for r in path.read_text(encoding="utf-8").splitlines() if r.strip() and not r.startswith("#")]
        columns = dict(zip([name.strip() for name in rows[0]], zip(*rows[1:], strict=True), strict=True))
        numbers = [
            torch.tensor([float(v) for v in columns[name]], dtype=torch.float64)
            for name in ("energy_keV", "strength", "kT_peak_keV", "sigma_log10_kT")
        ]
        return LineTable(numbers[0], tuple(e.strip() for e in columns["element"]), *numbers[1:])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{path}: no line list ({error}); give CSV with energy_keV, element, strength, kT_peak_keV, sigma_log10_kT."
        ) from error


def find_table(file: FitsFile, names: tuple[str, ...], columns: tuple[str, ...], what: str) -> Table:
    """The table with one of the EXTNAMEs, or with HDUCLAS of that kind, that has the columns.

    Raises: InputError that names the file, the table and the columns that are missing.
    """
    classes = {"MATRIX": "RSP_MATRIX"}
    found = [t for t in file.tables if t.name in names]
    found = found or [t for t in file.tables if str(t.header.get("HDUCLAS2", "")).strip() in {classes.get(n, n) for n in names}]
    if not found:
        there = ", ".join(t.name or "a table without name" for t in file.tables) or "no table"
        raise InputError(f"{file.path}: not {what}: it has {there}, but no {' or '.join(names)}.")
    missing = [c for c in columns if c not in found[0].columns]
    if missing:
        raise InputError(f"{file.path}: {found[0].name} lacks {', '.join(missing)}; it has {', '.join(found[0].columns)}.")
    return found[0]


def column_card(table: Table, column: str, keyword: str, default: object) -> object:
    """A header value of a column (TLMIN4 of the fourth), or the default."""
    number = list(table.columns).index(column) + 1
    return table.header.get(f"{keyword}{number}", default)


def check_unit(path: Path, table: Table, column: str, unit: str) -> None:
    """Raise InputError if a column says that it has another unit."""
    given = str(column_card(table, column, "TUNIT", unit)).strip()
    if given.lower() != unit.lower():
        raise InputError(f"{path}: {column} is in {given}; expected {unit}.")


def _grid(path: Path, table: Table) -> Grid:
    check_unit(path, table, "ENERG_LO", "keV")
    low, high = (table.columns[c].astype(np.float64) for c in ("ENERG_LO", "ENERG_HI"))
    if len(low) < 1 or (np.abs(low[1:] - high[:-1]) > 1e-6 * high[:-1]).any():
        raise InputError(f"{path}: the energy bins of {table.name} do not touch; give ENERG_LO of a bin = ENERG_HI of the last.")
    edges = np.append(low, high[-1])
    edges[0] = max(edges[0], 1e-3 * edges[1])
    return Grid(torch.from_numpy(edges), "keV")
