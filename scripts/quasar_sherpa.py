"""3C 273 by Sherpa, in an interpreter of its own: prints the fit of `quasar_spectrum` as JSON.

    python scripts/quasar_sherpa.py FOLDER

Sherpa reads PHA, background, ARF and RMF, folds, minimises its own W statistic and takes the covariance; the absorption is a user
model on the same table of cross-sections, since the XSPEC models are not part of Sherpa's own.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import sherpa
from astropy.io import fits
from sherpa.astro import ui

ENERGIES = (0.5, 7.0)


def main(folder: Path) -> dict:
    logging.getLogger("sherpa").setLevel(logging.ERROR)
    with fits.open(folder / "xsect_tbabs_wilm.fits") as file:
        energy, sigma = (file[1].data[c].astype(float) for c in ("ENERGY", "SIGMA"))

    def absorb(parameters: list[float], low: np.ndarray, high: np.ndarray | None = None) -> np.ndarray:
        middle = low if high is None else (low + high) / 2
        return np.exp(-parameters[0] * np.interp(middle, energy, sigma))

    ui.load_pha(str(folder / "3c273.pi"))
    ui.ungroup()
    ui.notice(*ENERGIES)
    ui.set_stat("wstat")
    ui.set_method("neldermead")
    ui.load_user_model(absorb, "gas")
    ui.add_user_pars("gas", ["n_H"], [0.05], [-1.0], [10.0])
    power = ui.powlaw1d.power
    ui.set_source(ui.get_model_component("gas") * power)
    power.gamma, power.ampl = 2.0, 2e-4
    ui.fit()
    ui.set_covar_opt("sigma", 1)
    ui.covar()
    errors = ui.get_covar_results()
    values = dict(zip(errors.parnames, zip(errors.parvals, errors.parmaxes, strict=True), strict=True))
    norm, norm_error = values["power.ampl"]
    fit = [values["power.gamma"], values["gas.n_H"], (float(np.log(norm)), norm_error / norm)]
    found = ui.get_fit_results()
    return {"version": sherpa.__version__, "fit": fit, "statistic": found.statval, "channels": found.numpoints}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
