"""Table models: the table at its nodes, straight between them, photons kept on any grid, redshift as a shift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.fits import Plane, Table, encode_fits
from diffinv.data.table_models import read_table_model
from diffinv.spectral.base import Grid, Parameter
from diffinv.spectral.table import TableModel

EDGES = np.geomspace(0.3, 10.0, 41)
KT, ABUND = np.array([0.5, 1.0, 2.0, 4.0]), np.array([0.0, 1.0, 3.0])
RNG = np.random.default_rng(0)
SPECTRA = RNG.uniform(0.5, 1.5, (4, 3, 40))
ADDED = RNG.uniform(0.0, 0.2, (4, 3, 40))
Z = Parameter("z", "", -0.1, 0.5)


def write(path: Path, *, order: np.ndarray | None = None, added: bool = False, drop: int = 0, **cards: object) -> Path:
    rows = 3 if added else 2
    values = np.zeros((rows, 4))
    values[0], values[1, :3] = KT, ABUND
    parameters = {
        "NAME": np.array(["kT", "abund", "scale"])[:rows],
        "METHOD": np.array([1, 0, 0], np.int32)[:rows],
        "MINIMUM": np.array([0.5, 0.0, 0.0])[:rows],
        "MAXIMUM": np.array([4.0, 3.0, 5.0])[:rows],
        "NUMBVALS": np.array([4, 3, 0], np.int32)[:rows],
        "VALUE": values,
    }
    order = np.arange(12)[drop:] if order is None else order
    nodes = np.stack(np.meshgrid(KT, ABUND, indexing="ij"), -1).reshape(12, 2)[order]
    spectra = {"PARAMVAL": nodes, "INTPSPEC": SPECTRA.reshape(12, 40)[order]}
    if added:
        spectra["ADDSP001"] = ADDED.reshape(12, 40)[order]
    parts = [
        Plane("PRIMARY", None, {"ADDMODL": True, "REDSHIFT": False, "HDUCLAS1": "XSPEC TABLE MODEL", **cards}),
        Table("PARAMETERS", parameters, {"NINTPARM": 2, "NADDPARM": rows - 2}),
        Table("ENERGIES", {"ENERG_LO": EDGES[:-1], "ENERG_HI": EDGES[1:]}, {}),
        Table("SPECTRA", spectra, {}),
    ]
    path.write_bytes(encode_fits(parts))
    return path


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_table_is_reproduced_at_its_nodes_whatever_the_order_of_rows(tmp_path: Path) -> None:
    for order in (np.arange(12), RNG.permutation(12)):
        table = read_table_model(write(tmp_path / "a.fits", order=order))
        model = TableModel(table.grid, table)
        assert model.names == ("kT", "abund")
        nodes = rows(*((k, a) for k in KT for a in ABUND))
        np.testing.assert_allclose(model(nodes).reshape(4, 3, 40), SPECTRA, rtol=1e-12)


def test_between_nodes_weights_run_in_the_logarithm_where_the_file_says_so(tmp_path: Path) -> None:
    table = read_table_model(write(tmp_path / "a.fits"))
    found = TableModel(table.grid, table)(rows((2**0.5, 2.5)))[0]
    corners = 0.5 * 0.25 * (SPECTRA[1, 1] + SPECTRA[2, 1]) + 0.5 * 0.75 * (SPECTRA[1, 2] + SPECTRA[2, 2])
    np.testing.assert_allclose(found, corners, rtol=1e-12)


def test_added_parameters_scale_their_own_spectra(tmp_path: Path) -> None:
    table = read_table_model(write(tmp_path / "a.fits", added=True))
    model = TableModel(table.grid, table)
    assert model.names == ("kT", "abund", "scale")
    np.testing.assert_allclose(model(rows((2.0, 1.0, 2.5)))[0], SPECTRA[2, 1] + 2.5 * ADDED[2, 1], rtol=1e-12)


def test_rebinning_keeps_photons_and_redshift_moves_them(tmp_path: Path) -> None:
    table = read_table_model(write(tmp_path / "a.fits"))
    coarse = Grid.of(np.append(EDGES[::7], EDGES[-1]) if EDGES[::7][-1] < EDGES[-1] else EDGES[::7])
    found = TableModel(coarse, table)(rows((1.0, 1.0)))[0]
    sums = np.add.reduceat(SPECTRA[1, 1], np.arange(0, 40, 7))
    np.testing.assert_allclose(found, sums, rtol=1e-12)
    shifted = read_table_model(write(tmp_path / "b.fits", REDSHIFT=True), redshift=Z)
    z = 0.25
    inside = Grid.of(EDGES[5:30] / (1 + z))
    moved = TableModel(inside, shifted)(rows((1.0, 1.0, z)))[0]
    np.testing.assert_allclose(moved, SPECTRA[1, 1, 5:29] / (1 + z), rtol=1e-12)


def test_factors_are_averaged_not_summed(tmp_path: Path) -> None:
    table = read_table_model(write(tmp_path / "a.fits", ADDMODL=False))
    pair = Grid.of(EDGES[[4, 6]])
    width = np.diff(EDGES)[4:6]
    found = TableModel(pair, table)(rows((4.0, 0.0)))
    assert float(found) == pytest.approx((SPECTRA[3, 0, 4:6] * width).sum() / width.sum(), rel=1e-12)
    np.testing.assert_allclose(TableModel(table.grid, table)(rows((4.0, 0.0)))[0], SPECTRA[3, 0], rtol=1e-11)


def test_derivatives_are_finite_differences(tmp_path: Path) -> None:
    table = read_table_model(write(tmp_path / "a.fits", REDSHIFT=True, added=True), redshift=Z)
    model = TableModel(Grid.of(np.linspace(1.0, 5.0, 20)), table)
    theta = rows((1.3, 0.7, 2.0, 0.1), (3.0, 2.0, 0.5, 0.31))
    jacobian = model.jacobian(theta)
    for number in range(4):
        shift = torch.zeros_like(theta)
        shift[:, number] = 1e-7
        central = (model(theta + shift) - model(theta - shift)) / 2e-7
        torch.testing.assert_close(jacobian[..., number], central, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.fits"
    with pytest.raises(InputError, match=r"a.fits: SPECTRA has 11 of 12 nodes in 11 rows"):
        read_table_model(write(path, drop=1))
    with pytest.raises(InputError, match="the table has a redshift; give its range"):
        read_table_model(write(path, REDSHIFT=True))
    with pytest.raises(InputError, match="has no redshift"):
        read_table_model(write(path), redshift=Z)
    table = read_table_model(path)
    with pytest.raises(DiffinvError, match=r"the table has 40 bins of 0.3–10 keV, .* 1 bins of 0.2–5 keV"):
        TableModel(Grid.of([0.2, 5.0]), table)
    shifted = read_table_model(write(path, REDSHIFT=True), redshift=Z)
    with pytest.raises(DiffinvError, match=r"0.4–9 keV at z = -0.1 to 0.5"):
        TableModel(Grid.of([0.4, 9.0]), shifted)
    SPECTRA[0, 0, 5], kept = np.nan, SPECTRA[0, 0, 5]
    write(path)
    SPECTRA[0, 0, 5] = kept
    with pytest.raises(InputError, match="a.fits: SPECTRA has values that are not finite"):
        read_table_model(path)
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {})]))
    with pytest.raises(InputError, match="a.fits: not a table model: it has no table"):
        read_table_model(path)
