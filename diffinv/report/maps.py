"""The page of `diffinv unmix`: maps of parameters with their errors, amplitudes, checks, and corner plots of a few pixels.

Images come from the product alone; corner plots, whose covariances the product does not hold, are given.
Invariant: the same product and corners give the same page, byte for byte; it fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from diffinv.data.atomic import write_atomically
from diffinv.data.fits import read_fits
from diffinv.data.parameter_maps import BITS
from diffinv.report.charts import CSS as CHARTS
from diffinv.report.figures import SIGNED, SPREAD, Linear, colour_bar, png
from diffinv.report.html import POLICY, escape
from diffinv.report.style import CSS

VALUES = "viridis"
CELL, GAP, MARGIN = 130, 12, 46
_STYLE = """
.corner { max-width: 640px; } .corner svg { width: 100%; height: auto; font-size: 10px; } .corner text { fill: var(--soft); }
.corner rect { fill: none; stroke: var(--line); } .corner polyline { fill: none; stroke: #4c78b8; stroke-width: 1.4; }
.corner polyline.outer { stroke: #9db6d8; }
"""


class CornerCurves(Protocol):
    """Curves of one pixel, see `diffinv.unmixing.corners`."""

    names: tuple[str, ...]
    values: np.ndarray
    density: np.ndarray
    regions: Mapping[tuple[int, int], tuple[np.ndarray, ...]]


def write_maps_report(product: Path, corners: Sequence[tuple[str, CornerCurves]]) -> Path:
    """Make the page beside the product, NAME-maps.html.

    Arguments: product: written by `diffinv unmix`. corners: titles and curves.
    """
    target = product.with_suffix(".html")
    write_atomically(target, render_maps(product, corners).encode("utf-8", "backslashreplace"))
    return target


def render_maps(product: Path, corners: Sequence[tuple[str, CornerCurves]]) -> str:
    """The page as text."""
    file = read_fits(product)
    body = [f"<h1>Parameter maps</h1><p class='sub'>{escape(product.name)}</p>"]
    for mean, std in zip(file.named("MEAN"), file.named("STD"), strict=True):
        name = f"{mean.header['COMPNAME']} · {mean.header['PARAM']}"
        body.append(_card(name, str(mean.header.get("BUNIT", "")), mean.data, std.data))
    for mean, std in zip(file.named("AMP"), file.named("AMP_STD"), strict=True):
        body.append(_card(f"{mean.header['COMPNAME']} · amplitude", str(mean.header.get("BUNIT", "")), mean.data, std.data))
    body.append(_checks(file.named("FLAG")[0].data, file.named("CHI2Z")[0].data))
    if corners:
        plots = "".join(draw_corner(title, curves) for title, curves in corners)
        heading = "<h2>Pixels</h2><p class='sub'>densities, and regions of 68.3 % and 95.4 % of pairs</p>"
        body.append(f"<section class='card'>{heading}<div class='charts'>{plots}</div></section>")
    head = f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'><title>Parameter maps</title>"
    head += f"<style>{CSS}{CHARTS}{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _span(image: np.ndarray, low: float = 0.5, high: float = 99.5) -> Linear:
    """Between percentiles of what is finite."""
    values = image[np.isfinite(image)]
    ends = np.percentile(values, [low, high]) if values.size else (0.0, 1.0)
    return Linear(float(ends[0]), float(ends[1]) if ends[1] > ends[0] else float(ends[0]) + 1.0)


def _card(name: str, unit: str, mean: np.ndarray, std: np.ndarray) -> str:
    shown = _figure("mean", unit, mean, _span(mean), VALUES) + _figure("σ", unit, std, _span(std), SPREAD)
    return f"<section class='card'><h2>{escape(name)}</h2><div class='row'>{shown}</div></section>"


def _checks(flag: np.ndarray, misfit: np.ndarray) -> str:
    shares = [(text, float(((flag & bit) > 0).mean())) for bit, text in BITS.items()]
    badges = "".join(f"<span class='badge bad'>{t.lower()} <b>{share:.1%} of pixels</b></span>" for t, share in shares if share)
    shown = _figure("flagged", "", (flag > 0).astype(float), Linear(0.0, 1.0), SPREAD)
    shown += _figure("predictive check", "σ", misfit, Linear(-5.0, 5.0), SIGNED)
    return f"<section class='card'><h2>Checks</h2><div class='badges'>{badges}</div><div class='row'>{shown}</div></section>"


def _figure(title: str, unit: str, image: np.ndarray, scale: Linear, colours: str) -> str:
    ticks = "".join(f"<span>{scale.value(f):.3g}</span>" for f in (0.0, 0.5, 1.0))
    bar = f"<img class='bar' src='{colour_bar(colours)}' alt=''><div class='ticks'>{ticks}</div>"
    frame = f"<div class='frame'><img src='{png(image, scale, colours)}' alt='{escape(title)}'></div>"
    return f"<figure><figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>{frame}{bar}</figure>"


def draw_corner(title: str, curves: CornerCurves) -> str:
    """A corner plot as inline SVG: densities on the diagonal, regions of pairs below it."""
    count = len(curves.names)
    size = MARGIN + count * (CELL + GAP) + MARGIN
    limits = [(float(v.min()), float(v.max())) for v in curves.values]
    parts = []
    for row in range(count):
        for column in range(row + 1):
            left, top = MARGIN + column * (CELL + GAP), GAP + row * (CELL + GAP)
            parts.append(f"<rect x='{left}' y='{top}' width='{CELL}' height='{CELL}'/>")
            if row == column:
                span = (0.0, 1.05 * float(curves.density[row].max()))
                parts.append(_line(curves.values[row], curves.density[row], limits[row], span, (left, top), ""))
            else:
                for k, region in enumerate(curves.regions[column, row]):
                    name = "outer" if k else ""
                    parts.append(_line(region[:, 0], region[:, 1], limits[column], limits[row], (left, top), name))
            if row == count - 1:
                parts += _labels(curves.names[column], limits[column], left, top + CELL)
    svg = f"<svg viewBox='0 0 {size} {size}' role='img'>{''.join(parts)}</svg>"
    return f"<figure class='chart corner'><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _line(
    x: np.ndarray, y: np.ndarray, across: tuple[float, float], up: tuple[float, float], corner: tuple[int, int], name: str
) -> str:
    px = corner[0] + CELL * (x - across[0]) / (across[1] - across[0])
    py = corner[1] + CELL * (1 - (y - up[0]) / (up[1] - up[0]))
    places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
    return f"<polyline class='{name}' points='{places}'/>"


def _labels(name: str, limits: tuple[float, float], left: int, base: int) -> list[str]:
    inner = [limits[0] + f * (limits[1] - limits[0]) for f in (0.15, 0.5, 0.85)]
    places = [left + f * CELL for f in (0.15, 0.5, 0.85)]
    found = [f"<text x='{x:.0f}' y='{base + 14}' text-anchor='middle'>{v:.4g}</text>" for x, v in zip(places, inner, strict=True)]
    return [*found, f"<text x='{left + CELL / 2:.0f}' y='{base + 30}' text-anchor='middle'>{escape(name)}</text>"]
