"""Coverage of 90 % intervals by S/N, raw and corrected, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

NOMINAL, ASKED = 0.9, (0.85, 0.95)


def draw_coverage(path: Path, title: str, tables: Mapping[str, Sequence[dict]]) -> None:
    """A panel a quantity; rows of each table as `Evaluation.coverage` has them.

    The first, of products as they are, has bars of 1.96 standard errors between objects; the others are cross-fitted, and theirs
    would not measure their scatter.
    """
    first = next(iter(tables.values()))
    quantities = list(dict.fromkeys(row["quantity"] for row in first))
    bins = list(dict.fromkeys(row["bin"] for row in first))
    figure = Figure(figsize=(2.3 * len(quantities), 3.2), layout="constrained")
    for axis, quantity in zip(figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0], quantities, strict=True):
        axis.axhspan(*ASKED, color="0.92")
        axis.axhline(NOMINAL, color="0.6", lw=0.8)
        for number, (label, rows) in enumerate(tables.items()):
            here = [row for row in rows if row["quantity"] == quantity and row["bin"] in bins]
            places = [bins.index(row["bin"]) + 0.2 * (number - (len(tables) - 1) / 2) for row in here]
            bars = [1.96 * row["error"] for row in here] if rows is first else None
            axis.errorbar(places, [row["coverage"] for row in here], bars, fmt="o", ms=4, lw=1.2, color=f"C{number}", label=label)
        axis.set_title(quantity, fontsize=9)
        axis.set_xticks(range(len(bins)), [b.removeprefix("S/N ") for b in bins], rotation=60, fontsize=7)
        axis.set_xlabel("S/N of the data")
    figure.axes[0].set(ylabel="coverage of 90 % intervals", ylim=(None, 1.02))
    figure.axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
