"""The figure of `bench_poisson`: rank distributions of the default and of two controls, and one posterior beside NUTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# sup |F − uniform| √T of each of four independent statistics stays below it with probability 95 % in all.
KS_BOUND = 1.59
# Half-width of the interval of 90 % of a Gaussian, in its standard deviation.
NINETY = 1.645


def draw_ranks(axis: Axes, found: Mapping) -> None:
    """Distribution function of the ranks of the truth less that of uniform ones; grey: `KS_BOUND`/√T."""
    bound = KS_BOUND / found["trials"] ** 0.5
    axis.axhspan(-bound, bound, color="0.88", lw=0)
    axis.axhline(0, color="0.5", lw=0.6)
    for key, values in found["curves"].items():
        axis.plot([(r + 1) / len(values) for r in range(len(values))], values, lw=1.1, label=key)
    axis.margins(x=0)


def draw_histogram(axis: Axes, found: Mapping, bins: int = 16) -> None:
    """Ranks of every statistic in 16 bins over their expected number; grey: 99 % of a bin if ranks are uniform."""
    width = 2.576 * (bins / found["trials"]) ** 0.5
    axis.axhspan(1 - width, 1 + width, color="0.88", lw=0)
    axis.axhline(1, color="0.5", lw=0.6)
    for values in found["curves"].values():
        size = len(values) // bins
        ends = [0.0, *(values[size * (b + 1) - 1] + (b + 1) / bins for b in range(bins))]
        heights = [bins * (after - before) for before, after in zip(ends[:-1], ends[1:], strict=True)]
        axis.stairs(heights, [b / bins for b in range(bins + 1)], lw=1.0, baseline=None)
    axis.margins(x=0)


def draw_posterior(axis: Axes, found: Mapping, truth: Mapping) -> None:
    """Mean ± 1.645 std of every pixel of the first data set: NUTS in black, ours beside it."""
    for values, shift, colour, label in ((truth, -0.14, "black", "NUTS"), (found, 0.14, "tab:red", "ours")):
        pixels, reach = [p + shift for p in range(len(values["mean"][0]))], [NINETY * std for std in values["std"][0]]
        axis.errorbar(pixels, values["mean"][0], reach, fmt=".", ms=4, lw=1.2, color=colour, label=label)
    axis.set_xlabel("pixel", fontsize=7)


def draw_figure(path: Path, names: Sequence[str], first: Mapping, second: Mapping, *, lines: Sequence[str]) -> None:
    """A problem a column; the default's histogram, the rank distributions of `lines`, the default beside NUTS."""
    default = lines[0]
    figure = Figure(figsize=(max(5.0, 1.9 * len(names)), 9.0), layout="constrained")
    axes = figure.subplots(2 + len(lines), len(names), squeeze=False)
    for column, name in enumerate(names):
        draw_histogram(axes[0, column], first[name, default])
        for axis, title in zip(axes[1:-1, column], lines, strict=True):
            draw_ranks(axis, first[name, title])
            axis.set_ylim(-0.12, 0.12)
        draw_posterior(axes[-1, column], second[name, default], second[name, "NUTS"])
        axes[0, column].set_ylim(0, 2)
        axes[-2, column].set_xlabel("rank / 64", fontsize=7)
        axes[0, column].set_title(name.replace(", ", "\n"), fontsize=8)
    for axis in axes[:-1, 1:].flat:
        axis.set_yticklabels([])
    for axis in axes[:-2].flat:
        axis.set_xticklabels([])
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    short = [title.split(" (")[0].split(", 64")[0].replace(", ", ",\n") for title in lines]
    labels = ["ranks ÷ expected\n" + short[0], *("ECDF − uniform\n" + title for title in short), "pixel value, 90 %"]
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=7)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4)
    figure.legend(*axes[-1, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
