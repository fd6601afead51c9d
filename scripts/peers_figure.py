"""The figure of scripts/bench_peers: every method's distance from the exact posterior, from the tables peers and peers_joint."""

from __future__ import annotations

import json
import math
from pathlib import Path

from peer_methods import LIBRARIES

COLOURS = dict(zip(LIBRARIES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
MARKERS = {"inpainting": "o", "blur": "s", "signals": "D"}
# A panel's title, its ticks, of which the first and the last are its limits, and its scale.
PANELS = {
    "mean error": ("B1: error of the mean\n[posterior std]", (0.02, 0.1, 1.0, 10.0, 20.0), "log"),
    "std ratio": ("B1: std, draws / exact", (0.2, 0.5, 1.0, 2.0, 5.0), "log"),
    "coverage 90": ("B1: mass in 90 % intervals", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "linear"),
    "joint": ("B1b: joint HPD-90 coverage", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "linear"),
}


def _values(out: Path) -> tuple[dict[tuple[str, str], dict[str, dict[str, float]]], dict[str, float]]:
    """(library, method) → panel → marker → value, in the order of the tables; and panel → value of exact draws."""
    methods: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    exact: dict[str, list[float]] = {panel: [] for panel in PANELS}
    for row in json.loads((out / "peers.json").read_text())["rows"]:
        for panel in ("mean error", "std ratio", "coverage 90"):
            if row["library"]:
                at = methods.setdefault((row["library"], row["method"]), {name: {} for name in PANELS})
                at[panel][row["problem"]] = row[panel]
            else:
                exact[panel].append(row[panel])
    for row in json.loads((out / "peers_joint.json").read_text())["rows"]:
        value = float(row["joint coverage"].split()[0])
        if row["library"]:
            methods[row["library"], row["method"]]["joint"]["signals"] = value
        else:
            exact["joint"].append(value)
    return methods, {panel: sum(values) / len(values) for panel, values in exact.items()}


def draw_figure(out: Path) -> None:
    """Writes `out`/peers.png; a value beyond a panel is drawn as a triangle on its edge."""
    from matplotlib.figure import Figure

    methods, exact = _values(out)
    figure = Figure(figsize=(12.5, 0.235 * len(methods) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (panel, (title, ticks, scale)) in zip(axes, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.axvline(exact[panel], color="0.4", linewidth=1, label="exact draws")
        for height, ((library, _), values) in enumerate(methods.items()):
            for problem, value in values[panel].items():
                place = min(max(value, ticks[0]), ticks[-1]) if math.isfinite(value) else ticks[-1]
                marker = MARKERS[problem] if place == value else "<" if place == ticks[0] else ">"
                filled = COLOURS[library] if problem != "blur" else "none"
                axis.plot(place, height, marker, color=COLOURS[library], markerfacecolor=filled, markersize=5, clip_on=False)
        axis.set_xscale(scale)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlim(ticks[0], ticks[-1])
        axis.tick_params(labelsize=7.5)
        axis.grid(axis="both", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(methods)), [f"{library}: {method}" for library, method in methods])
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    for label, (library, _) in zip(axes[0].get_yticklabels(), methods, strict=True):
        label.set_color(COLOURS[library])
    figure.supxlabel("grey line: exact draws; ● inpainting, □ blur, ◆ signals; ◂ ▸ beyond the panel", fontsize=8)
    figure.savefig(out / "peers.png", dpi=130)
