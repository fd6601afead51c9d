"""What priors from behind one fixed blur know, by spatial frequency: the figure of `bench_priors --problem fixed`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import prior_fixed
from matplotlib.figure import Figure


def draw_bands(
    path: Path, runs: dict[str, dict], seeds: list[int], said: dict[str, list[float]], moved: dict[str, list[float]]
) -> None:
    """Predicted S/N, correlation with the truth and power of draws, by band. Hollow: no single measurement shows it (S/N < 1).

    Dotted: the power of the transformed galaxies themselves, `moved`.
    """
    middle = [(low + high) / 2 for low, high in pairwise(prior_fixed.EDGES)]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    signal, correlation, power = figure.subplots(1, 3, sharex=True)
    for axis in (signal, correlation, power):
        axis.axvspan(1, prior_fixed.EDGES[-1], color="0.93")
        axis.set_xlabel("spatial frequency / cut-off of the blur")
    colours = {method: f"C{k}" for k, method in enumerate(prior_fixed.METHODS)}
    for name, values in said.items():
        signal.semilogy(middle, np.maximum(values, 1e-2), marker="o", markersize=4, color=colours[f"EM, {name}"], label=name)
    signal.axhline(1, color="0.4", ls=":")
    signal.set_ylabel("predicted S/N of the band in a measurement")
    signal.legend(fontsize=8)
    for method in prior_fixed.METHODS:
        every = [runs[f"fixed, {method}, {s}"] for s in seeds if f"fixed, {method}, {s}" in runs]
        if not every:
            continue
        group = method.removeprefix("EM, ")
        known = np.array(said.get(group, said["no group"])) > (0 if method == prior_fixed.TWIN else 1)
        if group in moved and group != "no group":
            power.plot(middle, moved[group], ":", color=colours[method])
        for axis, key in ((correlation, "correlation"), (power, "power")):
            values = np.mean([run[key] for run in every], 0)
            dashed = method in (prior_fixed.TWIN, prior_fixed.START)
            axis.plot(middle, values, "--" if dashed else "-", color=colours[method], label=method)
            axis.plot(np.array(middle)[known], values[known], "o", color=colours[method], markersize=4)
            axis.plot(np.array(middle)[~known], values[~known], "o", color=colours[method], markersize=4, fillstyle="none")
    correlation.set_ylabel("correlation with the truth, without the mean galaxy")
    power.set(ylabel="power of draws / of the truth", yscale="log")
    power.axhline(1, color="0.4", ls=":")
    correlation.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
