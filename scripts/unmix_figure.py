"""Maps of benchmark B6: the truth, blocks of 2 × 2 pixels, what is reported, its error and the error in units of σ."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from unmix_cubes import Case
from unmix_methods import METHODS, Problem

from diffinv.spectral.base import LIGHT_SPEED

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOCKS, OURS = "2×2 binning", "ours: Gaussian field"
SPEED = LIGHT_SPEED / 1000  # a unit of redshift in 1000 km/s
LABELS = {"thermal.kT": ("kT, keV", 1.0), "thermal.z": ("velocity, 1000 km/s", SPEED), "synchrotron.Gamma": ("Γ", 1.0)}


def draw(path: Path, case: Case, problem: Problem, truth: Tensor) -> None:
    """One row a parameter. truth: θ (N, P)."""
    axes, names = problem.mixture.coordinates, problem.mixture.names
    blocks, ours = METHODS[BLOCKS](problem), METHODS[OURS](problem)
    away = (ours.u - axes.unit(truth)) / ours.std
    figure, grid = plt.subplots(len(names), 5, figsize=(17, 3.2 * len(names)), layout="constrained", squeeze=False)
    for row, (line, name) in enumerate(zip(grid, names, strict=True)):
        label, unit = LABELS[name]
        image = lambda values, row=row, unit=unit: (unit * values[:, row]).reshape(problem.shape)
        true, found = image(truth), image(axes.physical(ours.u))
        low, high = true.quantile(torch.tensor([0.01, 0.99]).to(true)).tolist()
        width = image(axes.physical(ours.u + ours.std) - axes.physical(ours.u - ours.std)) / 2
        shown = {"truth": true, BLOCKS: image(axes.physical(blocks.u)), "posterior mean": found}
        for ax, (title, values) in zip(line, shown.items(), strict=False):
            picture = ax.imshow(values, origin="lower", vmin=low, vmax=high)
            ax.set_title(f"{title}: {label}", fontsize=9)
        figure.colorbar(picture, ax=line[:3].tolist(), shrink=0.8)
        sigma = line[3].imshow(width, origin="lower", cmap="magma")
        line[3].set_title("posterior σ", fontsize=9)
        figure.colorbar(sigma, ax=line[3], shrink=0.8)
        error = line[4].imshow(away[:, row].reshape(problem.shape), origin="lower", vmin=-3, vmax=3, cmap="RdBu_r")
        line[4].set_title("(mean − truth)/σ", fontsize=9)
        figure.colorbar(error, ax=line[4], shrink=0.8)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle(f"{case.level} counts in the median pixel, seed {case.seed}", fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)
