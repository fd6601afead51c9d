"""Pixels of a synthetic remnant by Sherpa, in an interpreter of its own (Sherpa, astropy, scipy; not this package).

    python scripts/unmix_sherpa.py FOLDER SPECTRA.npz FOUND.npz

SPECTRA has `counts` (N, K) and `labels` (C,), the bin of each channel of 9774.pi or −1. Sherpa reads the response, folds and
groups; the plasma is a user model that knows nothing of `diffinv.spectral`. Each spectrum is fitted from the best of 5 × 5 starts
with the Cash statistic and Nelder–Mead. FOUND gets `theta` (N, 2): kT in keV and z, and `seconds` a pixel.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
from pathlib import Path

import numpy as np
from astropy.io import fits
from scipy.special import erf, k0e
from sherpa.astro import ui

TEMPERATURES, REDSHIFTS = np.geomspace(0.75, 4.0, 5), np.linspace(-0.026, 0.026, 5)
LOW, HIGH = (0.6, -0.033), (5.0, 0.033)
MASSES = {"Ne": 20.180, "Mg": 24.305, "Si": 28.085, "S": 32.06, "Ar": 39.95, "Ca": 40.078, "Fe": 55.845}  # atomic mass units
ABUNDANCES = {"Ne": 1, "Mg": 1, "Si": 3, "S": 3, "Ar": 3, "Ca": 3, "Fe": 1}
KEV_A_UNIT, LIGHT, TURBULENCE, COLUMN = 931494.1, 299792.458, 1000.0, 0.7


class Remnant:
    """Photons of an absorbed plasma a bin; parameters kT, z, norm."""

    def __init__(self, folder: Path) -> None:
        with fits.open(folder / "xsect_tbabs_wilm.fits") as file:
            self.energy, self.sigma = (file[1].data[c].astype(float) for c in ("ENERGY", "SIGMA"))
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
        return norm * photons * np.exp(-COLUMN * np.interp(middle, self.energy, self.sigma))


def start(folder: Path, labels: np.ndarray) -> None:
    """Data set 1 with the response of 9774, its channels grouped as `labels` say, and the model."""
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
    ui.load_user_model(Remnant(folder), "plasma")
    ui.add_user_pars("plasma", ["kT", "z", "norm"], [1.5, 0.0, 1.0], [*LOW, 0.0], [*HIGH, 1e10])
    ui.set_source(1, ui.get_model_component("plasma"))


def fit(counts: np.ndarray, labels: np.ndarray, shapes: dict[tuple[float, float], np.ndarray]) -> tuple[float, float]:
    """kT and z of one spectrum."""
    first = np.flatnonzero((labels >= 0) & np.append(True, labels[1:] != labels[:-1]))
    values = np.zeros(len(labels))
    values[first] = counts
    ui.get_data(1).counts = values
    plasma = ui.get_model_component("plasma")

    def cash(shape: np.ndarray) -> float:
        return -float((counts * np.log(shape / shape.sum())).sum())

    kT, z = min(shapes, key=lambda place: cash(shapes[place]))
    plasma.kT, plasma.z, plasma.norm = kT, z, max(counts.sum(), 1) / shapes[kT, z].sum()
    ui.fit(1)
    return plasma.kT.val, plasma.z.val


def main(folder: Path, spectra: Path, out: Path) -> None:
    with np.load(spectra) as file:
        counts, labels = file["counts"], file["labels"]
    start(folder, labels)
    plasma, shapes = ui.get_model_component("plasma"), {}
    for kT in TEMPERATURES:
        for z in REDSHIFTS:
            plasma.kT, plasma.z, plasma.norm = kT, z, 1.0
            shapes[kT, z] = ui.get_data(1).apply_filter(ui.get_model(1)(*ui.get_data(1).get_indep()), groupfunc=np.sum)
    begun = time.process_time()
    theta = [fit(row, labels, shapes) for row in counts]
    np.savez(out, theta=np.array(theta), seconds=(time.process_time() - begun) / len(counts))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
