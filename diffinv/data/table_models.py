"""Table models of X-ray astronomy (FITS `atable` and `mtable`) as spectral models.

PARAMETERS has a row a parameter: the first NINTPARM are interpolated, the NADDPARM others add a spectrum of their own.
ENERGIES has the bins; SPECTRA has a row a node, found by its PARAMVAL, in whatever order.
Invariant: every node of the grid of parameters is in the file once.

References: The file format for XSPEC table models, Arnaud, 1995 (OGIP/92-009).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffinv.core.checks import InputError
from diffinv.data.fits import Table, read_fits
from diffinv.data.guard import readable
from diffinv.data.response_files import check_unit, find_table
from diffinv.spectral.base import Grid, Parameter
from diffinv.spectral.table import Axis, SpectralTable


def read_table_model(path: str | Path, *, redshift: Parameter | None = None) -> SpectralTable:
    """A table model.

    Arguments: path. redshift: its box, needed where the file says REDSHIFT = T.
    Raises: InputError if tables or columns are missing, nodes are missing or twice there, or redshift and file disagree.
    """
    with readable(path, "a table model"):
        file = read_fits(path)
        parameters = find_table(
            file, ("PARAMETERS",), ("NAME", "METHOD", "MINIMUM", "MAXIMUM", "NUMBVALS", "VALUE"), "a table model"
        )
        energies = find_table(file, ("ENERGIES",), ("ENERG_LO", "ENERG_HI"), "a table model")
        spectra = find_table(file, ("SPECTRA",), ("PARAMVAL", "INTPSPEC"), "a table model")
        check_unit(file.path, energies, "ENERG_LO", "keV")
        if bool(file.primary.get("REDSHIFT", False)) != (redshift is not None):
            has = "has a redshift; give its range" if redshift is None else "has no redshift (REDSHIFT = F); leave its range out"
            raise InputError(f"{path}: the table {has}.")
        count = int(parameters.header.get("NINTPARM", len(parameters.columns["NAME"])))
        own = [_parameter(parameters, i) for i in range(len(parameters.columns["NAME"]))]
        axes = tuple(Axis(own[i], *_nodes(parameters, i)) for i in range(count))
        grid = _grid(energies)
        table = _spectra(spectra, axes, len(own) - count, len(grid))
        return SpectralTable(grid, axes, table, bool(file.primary.get("ADDMODL", True)), tuple(own[count:]), redshift)


def _parameter(table: Table, row: int) -> Parameter:
    unit = str(table.columns["UNITS"][row]).strip() if "UNITS" in table.columns else ""
    low, high = (float(table.columns[c][row]) for c in ("MINIMUM", "MAXIMUM"))
    return Parameter(str(table.columns["NAME"][row]).strip(), unit, low, high)


def _nodes(table: Table, row: int) -> tuple[torch.Tensor, bool]:
    count = int(table.columns["NUMBVALS"][row])
    values = np.atleast_1d(table.columns["VALUE"][row])[:count].astype(np.float64)
    return torch.from_numpy(values), bool(table.columns["METHOD"][row] == 1)


def _grid(table: Table) -> Grid:
    low, high = (table.columns[c].astype(np.float64) for c in ("ENERG_LO", "ENERG_HI"))
    if (np.abs(low[1:] - high[:-1]) > 1e-5 * high[:-1]).any():
        raise InputError("the energy bins of ENERGIES do not touch; give ENERG_LO of a bin = ENERG_HI of the last.")
    return Grid.of(np.append(low, high[-1]))


def _spectra(table: Table, axes: tuple[Axis, ...], added: int, bins: int) -> torch.Tensor:
    """(1 + K, n₁, …, E)."""
    values = np.asarray(table.columns["PARAMVAL"], np.float64).reshape(len(table.columns["PARAMVAL"]), -1)[:, : len(axes)]
    place = []
    for axis, column in zip(axes, values.T, strict=True):
        nodes = axis.nodes.numpy()
        nearest = np.abs(column[:, None] - nodes).argmin(1)
        off = np.abs(column - nodes[nearest]) > 1e-5 * np.abs(nodes).max()
        if off.any():
            raise InputError(f"SPECTRA has {axis.parameter.name} = {column[off][0]:g}, which is no node of PARAMETERS.")
        place.append(nearest)
    shape = tuple(len(a.nodes) for a in axes)
    flat = np.ravel_multi_index(place, shape)
    if len(flat) != np.prod(shape) or len(np.unique(flat)) != len(flat):
        raise InputError(
            f"SPECTRA has {len(np.unique(flat))} of {np.prod(shape)} nodes in {len(flat)} rows; give each node once."
        )
    names = ["INTPSPEC", *(f"ADDSP{k + 1:03d}" for k in range(added))]
    result = np.empty((len(names), len(flat), bins))
    for number, name in enumerate(names):
        if name not in table.columns or table.columns[name].shape != (len(flat), bins):
            raise InputError(f"SPECTRA needs a column {name} of {bins} values a row.")
        result[number, flat] = table.columns[name]
    if not np.isfinite(result).all():
        raise InputError("SPECTRA has values that are not finite; make the table again.")
    return torch.from_numpy(result.reshape(len(names), *shape, bins))
