"""Figure of denoised images without truth: data, denoised images in one stretch, and what was taken away, in units of σ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from real_stamps import Stamps


def chosen(stamps: Stamps, count: int) -> list[int]:
    """Images at evenly spaced ranks of brightness in the aperture, so that nobody picks them."""
    order = stamps.y[..., stamps.aperture].sum(-1)[:, 0].argsort()
    ranks = (np.arange(count) + 0.5) / count * len(order)
    return [int(order[int(rank)]) for rank in ranks]


def denoised_figure(
    path: Path, stamps: Stamps, found: dict[str, dict[str, np.ndarray]], shown: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    """Rows: images from faint to bright. Columns: data, denoised by `shown[0]`, residual y − f of `shown[1]`."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    names, residuals = shown
    rows, columns = chosen(stamps, 4), 1 + len(names) + len(residuals)
    figure = Figure(figsize=(1.9 * columns + 0.6, 1.98 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        y = stamps.y[row, 0].numpy()
        images = [y, *(found[name]["image"][row] for name in names)]
        top = float(np.arcsinh(np.percentile(y, 99.8)))
        for axis, image in zip(line, images, strict=False):
            brightness = axis.imshow(np.arcsinh(image), cmap="gray", vmin=-1.5, vmax=top, origin="lower", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        for axis, name in zip(line[1 + len(names) :], residuals, strict=True):
            shade = axis.imshow(
                y - found[name]["image"][row], cmap="RdBu_r", vmin=-4, vmax=4, origin="lower", interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
        ticks = [v for v in (0, 1, 3, 10, 30, 100) if np.arcsinh(v) <= top]
        bar = figure.colorbar(brightness, ax=list(line[: 1 + len(names)]), shrink=0.9, pad=0.01, aspect=14)
        bar.set_ticks([float(np.arcsinh(v)) for v in ticks], labels=[str(v) for v in ticks])
        bar.ax.tick_params(labelsize=7)
        bar = figure.colorbar(shade, ax=list(line[1 + len(names) :]), shrink=0.9, pad=0.01, aspect=14)
        bar.ax.tick_params(labelsize=7)
        line[0].set_ylabel(f"image {row}", fontsize=9)
    for axis, title in zip(axes[0], ["data", *names, *(f"residual of {name}" for name in residuals)], strict=True):
        axis.set_title(title.replace(", ", ",\n"), fontsize=9)
    figure.suptitle(f"{stamps.name}, held out; flux in σ of a pixel, asinh; residual (y − f)/σ", fontsize=10)
    figure.savefig(path, dpi=110)
