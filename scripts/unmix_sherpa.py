"""Pixels of synthetic remnants by Sherpa, in an interpreter of its own (Sherpa, astropy, scipy; not this package).

    python scripts/unmix_sherpa.py FOLDER SPECTRA.npz FOUND.npz

SPECTRA has `counts` (N, K), `labels` (C,), the bin of each channel of 9774.pi or −1, and `components`, 1 (thermal) or 2 (with
synchrotron). Sherpa reads the response, folds and groups; the spectra are user models that know nothing of `diffinv.spectral`.
Each spectrum is fitted from the likeliest of a grid of starts with the Cash statistic and Nelder–Mead. FOUND gets `theta` (N, 2)
or (N, 3): kT in keV, z and Γ; `synchrotron` (N,): counts of that component; `cash` (N,): 2 Σ m − n ln m;
`seconds` a pixel; and Sherpa's `version`.
"""

from __future__ import annotations

import csv
import itertools
import logging
import sys
import time
from pathlib import Path

import numpy as np
import sherpa
from astropy.io import fits
from scipy.special import erf, k0e
from sherpa.astro import ui

TEMPERATURES, REDSHIFTS = np.geomspace(0.75, 4.0, 5), np.linspace(-0.026, 0.026, 5)
INDICES, SHARES = np.linspace(2.0, 3.0, 4), (0.2, 0.5, 0.8)  # shares: of the counts that are synchrotron
BOX = {"kT": (0.6, 5.0), "z": (-0.033, 0.033), "Gamma": (1.8, 3.2)}
MASSES = {"Ne": 20.180, "Mg": 24.305, "Si": 28.085, "S": 32.06, "Ar": 39.95, "Ca": 40.078, "Fe": 55.845}  # atomic mass units
ABUNDANCES = {"Ne": 1, "Mg": 1, "Si": 3, "S": 3, "Ar": 3, "Ca": 3, "Fe": 1}
KEV_A_UNIT, LIGHT, TURBULENCE, COLUMN = 931494.1, 299792.458, 1000.0, 0.7


class Absorption:
    """exp(−n_H σ) at the middles of bins."""

    def __init__(self, folder: Path) -> None:
        with fits.open(folder / "xsect_tbabs_wilm.fits") as file:
            self.energy, self.sigma = (file[1].data[c].astype(float) for c in ("ENERGY", "SIGMA"))

    def __call__(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.exp(-COLUMN * np.interp((low + high) / 2, self.energy, self.sigma))


class Plasma:
    """Photons of an absorbed plasma a bin; parameters kT, z, norm."""

    def __init__(self, folder: Path) -> None:
        self.absorption = Absorption(folder)
        with open(folder / "snr_lines.csv", encoding="utf-8") as file:
            self.lines = list(csv.DictReader(line for line in file if not line.startswith("#")))

    def __call__(self, parameters: list[float], low: np.ndarray, high: np.ndarray) -> np.ndarray:
        kT, z, norm = parameters
        middle, width = (low + high) / 2, high - low
        e = middle * (1 + z)
        gaunt = np.sqrt(3) / np.pi * k0e(e / kT / 2)
        photons = 3.6 / np.sqrt(kT) * gaunt * np.exp(-e / kT) / e * width * (1 + z)
        edges = np.append(low, high[-1])
        for line in self.lines:
            rest, element = float(line["energy_keV"]), line["element"]
            distance = np.log10(kT / float(line["kT_peak_keV"])) / float(line["sigma_log10_kT"])
            strength = (0.030 if rest > 6 else 0.017) * float(line["strength"]) * ABUNDANCES[element]
            centre = rest / (1 + z)
            spread = centre * np.sqrt((TURBULENCE / LIGHT) ** 2 + kT / (MASSES[element] * KEV_A_UNIT))
            near = slice(*np.searchsorted(edges, (centre - 9 * spread, centre + 9 * spread)) + np.array([-1, 1]))
            share = np.diff(erf((edges[near] - centre) / (np.sqrt(2) * spread))) / 2
            photons[near][: len(share)] += strength * np.exp(-(distance**2) / 2) * share
        return norm * photons * self.absorption(low, high)


class Power:
    """Photons of an absorbed power law a bin; parameters Γ, norm."""

    def __init__(self, folder: Path) -> None:
        self.absorption = Absorption(folder)

    def __call__(self, parameters: list[float], low: np.ndarray, high: np.ndarray) -> np.ndarray:
        gamma, norm = parameters
        return norm * (high ** (1 - gamma) - low ** (1 - gamma)) / (1 - gamma) * self.absorption(low, high)


def user_model(name: str, model: Plasma | Power, parameters: tuple[str, ...]) -> object:
    """The model as a component of Sherpa's, its parameters within the box, its norm positive."""
    ui.load_user_model(model, name)
    ends = [BOX[p] for p in parameters]
    low, high = zip(*ends, (0.0, 1e10), strict=True)
    ui.add_user_pars(name, [*parameters, "norm"], [*(sum(e) / 2 for e in ends), 1.0], list(low), list(high))
    return ui.get_model_component(name)


def prepare(folder: Path, labels: np.ndarray, components: int) -> list:
    """Data set 1 with the response of 9774, its channels grouped as `labels` say, and the model; returns its components."""
    logging.getLogger("sherpa").setLevel(logging.ERROR)
    ui.load_pha(1, str(folder / "9774.pi"))
    data = ui.get_data(1)
    for background in list(data.background_ids):
        data.delete_background(background)
    new = np.append(True, labels[1:] != labels[:-1])
    ui.set_grouping(1, np.where((labels < 0) | new, 1, -1))
    ui.set_quality(1, np.where(labels < 0, 2, 0))
    ui.group(1)
    ui.ignore_bad(1)
    ui.set_stat("cash")
    ui.set_method("neldermead")
    models = [user_model("plasma", Plasma(folder), ("kT", "z")), user_model("power", Power(folder), ("Gamma",))][:components]
    ui.set_source(1, models[0] if components == 1 else models[0] + models[1])
    return models


def folded() -> np.ndarray:
    """Counts of the model as it stands in the bins of the fit, (K,)."""
    data = ui.get_data(1)
    return data.apply_filter(ui.get_model(1)(*data.get_indep()), groupfunc=np.sum)


def alone(models: list, number: int, values: tuple[float, ...]) -> np.ndarray:
    """Counts of one component of norm 1 with these parameters, the others dark: (K,)."""
    for model in models:
        model.norm = 0.0
    for parameter, value in zip(models[number].pars, (*values, 1.0), strict=True):
        parameter.val = value
    return folded()


class Starts:
    """Every start of the grid with its spectrum: parameters and norms a count of each component."""

    def __init__(self, models: list) -> None:
        hot = {p: alone(models, 0, p) for p in itertools.product(TEMPERATURES, REDSHIFTS)}
        self.values: list[tuple[float, ...]] = []
        shapes = []
        if len(models) == 1:
            for theta, shape in hot.items():
                self.values.append((*theta, 1 / shape.sum()))
                shapes.append(shape / shape.sum())
        else:
            cold = {g: alone(models, 1, (g,)) for g in INDICES}
            for (theta, one), (gamma, other), share in itertools.product(hot.items(), cold.items(), SHARES):
                self.values.append((*theta, (1 - share) / one.sum(), gamma, share / other.sum()))
                shapes.append((1 - share) * one / one.sum() + share * other / other.sum())
        self.logs = np.log(np.array(shapes))

    def best(self, counts: np.ndarray) -> tuple[float, ...]:
        return self.values[int(np.argmax(self.logs @ counts))]


def fit(counts: np.ndarray, first: np.ndarray, models: list, starts: Starts) -> tuple[list[float], float, float]:
    """kT, z (and Γ) of one spectrum, the counts of its synchrotron, and Cash. first: each group's first channel."""
    ui.get_data(1).counts[first] = counts
    for parameter, value in zip([p for model in models for p in model.pars], starts.best(counts), strict=True):
        parameter.val = value * (max(counts.sum(), 1) if parameter.name == "norm" else 1)
    ui.fit(1)
    theta, cash = [p.val for model in models for p in model.pars if p.name != "norm"], ui.calc_stat(1)
    models[0].norm = 0.0
    return theta, float(folded().sum()), cash


def main(folder: Path, spectra: Path, out: Path) -> None:
    with np.load(spectra) as file:
        counts, labels, components = file["counts"], file["labels"], int(file["components"])
    models = prepare(folder, labels, components)
    starts = Starts(models)
    first = np.flatnonzero((labels >= 0) & np.append(True, labels[1:] != labels[:-1]))
    ui.get_data(1).counts = np.zeros(len(labels))
    begun = time.process_time()
    found = [fit(row, first, models, starts) for row in counts]
    seconds = (time.process_time() - begun) / len(counts)
    theta, synchrotron, cash = zip(*found, strict=True)
    np.savez(out, theta=theta, synchrotron=synchrotron, cash=cash, seconds=seconds, version=sherpa.__version__)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
