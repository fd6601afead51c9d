"""Spectral models keep photons, shift and widen lines as physics says, and equal closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.spectral.absorption import Absorption
from diffinv.spectral.base import LIGHT_SPEED, Grid, Parameter, SpectralModel
from diffinv.spectral.combine import Fixed, Product, UserModel
from diffinv.spectral.continuum import BlackBody, Bremsstrahlung, PowerLaw
from diffinv.spectral.lines import GaussianLines, LineTable, Thermal, ThermalLines

GRID = Grid.of(np.linspace(0.3, 10.0, 971))
COARSE = Grid.of(np.geomspace(0.5, 8.0, 12))
NARROW = Parameter("width", "km/s", 1.0, 1e4)
SHIFT = Parameter("velocity", "km/s", -3e4, 3e4)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def line_table(*rows: tuple[float, str, float, float, float]) -> LineTable:
    energy, element, strength, peak, spread = zip(*rows, strict=True)
    return LineTable(column(*energy), element, column(*strength), column(*peak), column(*spread))


LINES = line_table((1.865, "Si", 3.0, 0.87, 0.28), (6.7, "Fe", 0.6, 5.4, 0.26), (2.461, "S", 1.0, 1.35, 0.28))


def mean_and_width(grid: Grid, photons: Tensor) -> tuple[Tensor, Tensor]:
    share = photons / photons.sum(1, keepdim=True)
    mean = share @ grid.middle
    return mean, ((share @ grid.middle**2) - mean**2).sqrt()


def test_power_law_is_its_integral_also_at_index_one() -> None:
    model, index = PowerLaw(COARSE), column(0.5, 1.0, 1.0 + 1e-7, 2.0, 3.7)
    values = model(index[:, None])
    low, high = COARSE.low, COARSE.high
    for row, gamma in zip(values, index.tolist(), strict=True):
        exact = torch.log(high / low) if abs(gamma - 1) < 1e-6 else (high ** (1 - gamma) - low ** (1 - gamma)) / (1 - gamma)
        torch.testing.assert_close(row, exact, rtol=1e-6 if abs(gamma - 1) < 1e-6 else 1e-13, atol=0)


def test_black_body_radiates_its_luminosity() -> None:
    """8.0525 ∫ E³/(kT⁴ (e^x − 1)) dE = 8.0525 π⁴/15 keV, which is 1e39 erg/s at 10 kpc: 8.356e-8 erg / 1.602e-9 erg/keV."""
    grid = Grid.of(np.geomspace(1e-3, 60.0, 4000))
    photons = BlackBody(grid, Parameter("kT", "keV", 0.1, 3.0))(column(0.5, 1.5)[:, None])
    energy = photons @ grid.middle
    torch.testing.assert_close(energy, column(1.0, 1.0) * 8.0525 * math.pi**4 / 15, rtol=1e-5, atol=0)
    kiloparsec, erg = 3.0856775814913673e21, 1.602176634e-9
    assert float(energy[0]) == pytest.approx(1e39 / (4 * math.pi * (10 * kiloparsec) ** 2) / erg, rel=3e-3)


def test_bremsstrahlung_is_the_formula_and_redshift_rescales_energy() -> None:
    kT, z = 1.7, 0.4
    middle = np.asarray(GRID.middle) * (1 + z)
    x = middle / kT
    gaunt = math.sqrt(3) / math.pi * np.exp(x / 2) * special.k0(x / 2)
    expected = 3.6 / math.sqrt(kT) * gaunt * np.exp(-x) / middle * np.asarray(GRID.width) * (1 + z)
    found = Bremsstrahlung(GRID)(column(kT, z)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    stretched = Grid(GRID.edges * (1 + z), "keV")
    torch.testing.assert_close(torch.from_numpy(found), Bremsstrahlung(stretched)(column(kT, 0.0)[None])[0], rtol=1e-12, atol=0)


def test_line_photons_do_not_depend_on_where_the_line_falls() -> None:
    model = ThermalLines(GRID, line_table((3.0, "Si", 2.0, 1.0, 0.3)))
    theta = torch.stack([column(1.0, 1.0, 1.0, 1.0), torch.linspace(-0.0331, 0.0329, 4, dtype=torch.float64)], 1)
    theta = torch.cat([theta, column(300.0, 1000.0, 10.0, 2500.0)[:, None], torch.ones(4, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(model(theta).sum(1), torch.full((4,), 0.017 * 2.0, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("element", "mass"), [("Si", 28.085), ("Fe", 55.845)])
def test_line_has_its_redshift_and_its_turbulent_and_thermal_width(element: str, mass: float) -> None:
    fine = Grid.of(np.linspace(1.9, 2.1, 20001))
    model = ThermalLines(fine, line_table((2.0, element, 1.0, 1.0, 0.3)))
    for kT, z, turbulence in ((0.7, 0.0, 1000.0), (4.0, 0.01, 100.0), (60.0, -0.02, 1.0)):
        mean, width = mean_and_width(fine, model(column(kT, z, turbulence, 1.0)[None]))
        thermal = kT * 1.602176634e-16 / (mass * 1.66053906660e-27)  # (m/s)², SI
        expected = 2.0 / (1 + z) * math.sqrt((turbulence * 1e3) ** 2 + thermal) / 299792458.0
        assert float(mean) == pytest.approx(2.0 / (1 + z), rel=1e-9)
        assert float(width) == pytest.approx(expected, rel=1e-4)


def test_line_emissivity_follows_temperature_abundance_and_energy() -> None:
    model = ThermalLines(GRID, LINES)
    assert model.names == ("kT", "z", "v_turb", "Si", "Fe", "S")
    at_peak = {"Si": 0.017 * 3.0 * 2, "Fe": 0.030 * 0.6 * 5, "S": 0.017 * 1.0}
    for element, kT, spread in (("Si", 0.87, 0.28), ("Fe", 5.4, 0.26), ("S", 1.35, 0.28)):
        abundances = [2.0 * (element == "Si"), 5.0 * (element == "Fe"), 1.0 * (element == "S")]
        theta = torch.stack([column(k, 0.0, 500.0, *abundances) for k in (kT, kT * 10**spread)])
        photons = model(theta).sum(1)
        assert photons.tolist() == pytest.approx([at_peak[element], at_peak[element] * math.exp(-0.5)], rel=1e-10)


def test_thermal_is_the_sum_of_its_parts() -> None:
    theta = column(1.2, 0.02, 800.0, 3.0, 1.0, 2.0)[None]
    parts = Bremsstrahlung(GRID)(theta[:, :2]) + ThermalLines(GRID, LINES)(theta)
    torch.testing.assert_close(Thermal(GRID, LINES)(theta), parts)


@pytest.mark.parametrize(("unit", "sign"), [("keV", -1), ("Angstrom", 1)])
def test_receding_lines_lose_energy_and_gain_wavelength(unit: str, sign: int) -> None:
    grid = Grid.of(np.linspace(5000.0, 5200.0, 4001), unit)
    model = GaussianLines(grid, column(5100.0), column(2.0), SHIFT, NARROW)
    values = model(column(3000.0, 150.0)[None])
    mean, width = mean_and_width(grid, values)
    expected = 5100.0 * (1 + 3000.0 / LIGHT_SPEED) ** sign
    assert float(values.sum()) == pytest.approx(2.0, rel=1e-12)
    assert float(mean) == pytest.approx(expected, rel=1e-9)
    assert float(width) == pytest.approx(expected * 150.0 / LIGHT_SPEED, rel=1e-4)


def test_lines_outside_the_grid_add_nothing() -> None:
    model = GaussianLines(COARSE, column(0.2, 20.0), column(1.0, 1.0), SHIFT, NARROW)
    assert float(model(column(0.0, 100.0)[None]).abs().max()) < 1e-14


def test_absorption_is_exponential_in_the_column_and_interpolates_a_power_law_exactly() -> None:
    energy = torch.from_numpy(np.geomspace(0.2, 20.0, 50))
    absorption = Absorption.tabulated(COARSE, energy, 2e-22 * energy**-3)
    expected = torch.exp(-column(0.0, 0.7, 3.0)[:, None] * 2 * COARSE.middle**-3)
    torch.testing.assert_close(absorption(column(0.0, 0.7, 3.0)[:, None]), expected, rtol=1e-12, atol=0)
    with pytest.raises(DiffinvError, match="do not cover the model's 11 bins of 0.5–8 keV"):
        Absorption.tabulated(COARSE, energy[20:], energy[20:])


def test_product_and_fixed_take_their_columns() -> None:
    absorption = Absorption(COARSE, COARSE.middle**-3)
    both = Product((PowerLaw(COARSE), absorption))
    theta = column(1.5, 0.3, 2.0, 0.1).reshape(2, 2)
    expected = PowerLaw(COARSE)(theta[:, :1]) * absorption(theta[:, 1:])
    torch.testing.assert_close(both(theta), expected)
    held = Fixed(both, (("Gamma", 1.5),))
    assert held.names == ("n_H",)
    torch.testing.assert_close(held(theta[:1, 1:]), expected[:1])


def test_a_user_function_is_a_model() -> None:
    own = (Parameter("slope", "", 0.0, 5.0),)
    user = UserModel(COARSE, own, lambda theta: torch.exp(-theta * COARSE.middle))
    torch.testing.assert_close(user(column(0.5)[None]), torch.exp(-0.5 * COARSE.middle)[None])
    with pytest.raises(ShapeError, match=r"the function gave \(1, 3\).*give \(1, 11\)"):
        UserModel(COARSE, own, lambda theta: theta.expand(-1, 3))(column(0.5)[None])


def models() -> list[tuple[SpectralModel, Tensor]]:
    return [
        (PowerLaw(COARSE), column(1.0, 2.3)[:, None]),
        (BlackBody(COARSE, Parameter("kT", "keV", 0.1, 3.0)), column(0.5, 1.3)[:, None]),
        (Thermal(GRID, LINES), torch.stack([column(0.8, 0.01, 900.0, 3, 1, 2), column(3.0, -0.03, 200.0, 1, 2, 0.5)])),
        (GaussianLines(GRID, column(2.0, 3.0), column(1.0, 0.5), SHIFT, NARROW), column(900, 5000, -2000, 3000).reshape(2, 2)),
        (Absorption(COARSE, COARSE.middle**-3), column(0.2, 1.0)[:, None]),
    ]


@pytest.mark.parametrize(("model", "theta"), models(), ids=lambda v: type(v).__name__)
def test_rows_are_independent_and_derivatives_are_finite_differences(model: SpectralModel, theta: Tensor) -> None:
    values, jacobian = model(theta), model.jacobian(theta)
    torch.testing.assert_close(model(theta[1:]), values[1:], rtol=1e-11, atol=1e-14 * float(values.max()))
    for number in range(theta.shape[1]):
        step = 1e-4 * theta[:, number].abs().clamp_min(1e-2)
        shift = torch.zeros_like(theta)
        shift[:, number] = step
        central = (model(theta + shift) - model(theta - shift)) / (2 * step[:, None])
        scale = float(central.abs().max())
        torch.testing.assert_close(jacobian[..., number], central, rtol=0, atol=2e-5 * scale)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, jacobian.sum(1), rtol=1e-9, atol=1e-9 * float(jacobian.abs().sum()))


def test_outside_marks_what_has_left_the_box() -> None:
    model = Bremsstrahlung(GRID)
    theta = torch.tensor([[0.6, 0.0], [0.59, 0.0], [1.0, 0.034], [math.nan, 0.0]])
    assert model.outside(theta).tolist() == [[False, False], [True, False], [False, True], [True, False]]


def test_errors_name_both_grids_both_names_or_the_shape() -> None:
    with pytest.raises(ShapeError, match=r"Bremsstrahlung expects θ \(B, 2\): kT, z; got \(3,\)"):
        Bremsstrahlung(GRID)(torch.ones(3))
    with pytest.raises(DiffinvError, match=r"PowerLaw has 970 bins.*Absorption 11 bins"):
        Product((PowerLaw(GRID), Absorption(COARSE, COARSE.middle)))
    edges = GRID.edges.clone()
    edges[3] *= 1.0001
    with pytest.raises(DiffinvError, match=r"differ at edge 3: .* keV"):
        Product((PowerLaw(GRID), Absorption(Grid(edges, "keV"), GRID.middle)))
    with pytest.raises(DiffinvError, match="more than one part has a parameter Gamma"):
        Product((PowerLaw(GRID), PowerLaw(GRID)))
    with pytest.raises(DiffinvError, match="no parameter nH; the model has Gamma"):
        Fixed(PowerLaw(GRID), (("nH", 1.0),))
    with pytest.raises(DiffinvError, match="photon energies; got .* Angstrom"):
        PowerLaw(Grid.of([1.0, 2.0], "Angstrom"))
    with pytest.raises(DiffinvError, match="positive and increasing"):
        Grid.of([1.0, 1.0, 2.0])
    with pytest.raises(DiffinvError, match="unknown elements Xx"):
        line_table((1.0, "Xx", 1.0, 1.0, 1.0))


def test_gaunt_factor_is_the_published_integral() -> None:
    """The Born Gaunt factor by an independent integral: K₀(a) = ∫₀^∞ exp(−a cosh t) dt."""
    grid = Grid.of([1.99, 2.01])
    found = float(Bremsstrahlung(grid)(column(0.8, 0.0)[None]))
    k0 = integrate.quad(lambda t: math.exp(-1.25 * math.cosh(t)), 0, 10)[0]
    expected = 3.6 * 0.8**-0.5 * math.sqrt(3) / math.pi * math.exp(1.25) * k0 * math.exp(-2.5) / 2.0 * 0.02
    assert found == pytest.approx(expected, rel=1e-10)
