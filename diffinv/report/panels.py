"""What `diffinv evaluate` found, as panels of the report: coverage, spread, ranks, χ², information, null space, flags, tests.

The panels are made of `evaluation.json` alone. Invariant: a number that the file does not have is not drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from diffinv.report.charts import COLOURS, Axes

FRACTIONS = [(v / 100, f"{v / 100:g}") for v in (0, 25, 50, 75, 100)]
P_BINS = 10


def render_evaluation(found: Mapping) -> str:
    """A card with all panels. found: the content of `evaluation.json`."""
    rows = found["rows"]
    charts = [
        _coverage(found["coverage"]),
        _spread(found["spread"]),
        *(_ranks(f) for f in found["findings"] if f["record"] == "RankFinding"),
        _p_values(rows, "chi2_p", "predictive χ²"),
        _p_values(rows, "pit_shape_p", "held-out PIT, shape"),
        _p_values(rows, "pit_width_p", "held-out PIT, width"),
        _scatter(rows, "information_on_source", "data-informativeness on the source, nats a pixel"),
        _scatter(rows, "error_null_share", "share of the squared error in the null space"),
        _scatter(rows, "prior_driven_on_source", "share of the source flagged PRIOR_DRIVEN"),
    ]
    head = f"<h2>Evaluation</h2><p class='sub'>{len(rows)} bands of objects, {int(found['with_truth'])} with truth</p>"
    body = f"<div class='charts'>{''.join(c for c in charts if c)}</div>"
    tables = [_table("flags", found["flags"]), _table("coverage of 90 % intervals", found["coverage"])]
    tables += [
        _table("spread over error, pixels on source", found["spread"]),
        _table("tests", _plain_findings(found["findings"])),
    ]
    return f"<section class='card'>{head}{body}{''.join(tables)}</section>"


def _number(value: object) -> float:
    return math.nan if value is None else float(value)


def _coverage(table: Sequence[Mapping]) -> str:
    """Dots of every quantity beside each other, bin by bin."""
    if not table:
        return ""
    bins, names = _unique(table, "bin"), _unique(table, "quantity")
    ticks = [(v, f"{v:.2f}") for v in (0.6, 0.7, 0.8, 0.9, 1.0)]
    places = [(k + 0.5, name) for k, name in enumerate(bins)]
    axes = Axes("coverage of 90 % intervals ± s.e., aim 0.85–0.95", (0, len(bins)), (0.55, 1.02), places, ticks)
    parts = [axes.band((0, len(bins)), (0.85, 0.85), (0.95, 0.95)), axes.level(0.9)]
    for shade, name in enumerate(names):
        mine = [row for row in table if row["quantity"] == name]
        xs = [bins.index(row["bin"]) + (shade + 1) / (len(names) + 1) for row in mine]
        parts.append(axes.points(xs, [_number(r["coverage"]) for r in mine], [_number(r["error"]) for r in mine], shade % 6))
    key = " ".join(f"<span style='color:{COLOURS[k % 6]}'>●</span> {html.escape(n)}" for k, n in enumerate(names))
    return axes.draw(*parts).replace("</figure>", f"<p class='key'>{key}</p></figure>")


def _spread(table: Sequence[Mapping]) -> str:
    if not table:
        return ""
    bins, ticks = _unique(table, "bin"), [(v, f"{v:g}") for v in (0.5, 1, 1.5, 2)]
    places = [(k + 0.5, name) for k, name in enumerate(bins)]
    axes = Axes("spread over error of the source's pixels ± s.e., aim 0.9–1.1", (0, len(bins)), (0.3, 2.1), places, ticks)
    values, errors = ([_number(row[name]) for row in table] for name in ("ratio", "error"))
    band = axes.band((0, len(bins)), (0.9, 0.9), (1.1, 1.1))
    return axes.draw(band, axes.level(1.0), axes.points([x for x, _ in places], values, errors))


def _ranks(finding: Mapping) -> str:
    """ECDF of the ranks less the diagonal, with the envelope of uniform ranks."""
    x = finding["levels"]
    curves = [[value - level for value, level in zip(finding[name], x, strict=True)] for name in ("ecdf", "low", "high")]
    reach = max(0.05, *(abs(v) for curve in curves for v in curve)) * 1.1
    ticks = [(v, f"{v:+.2f}") for v in (-reach / 1.1, 0, reach / 1.1)]
    title = f"ranks of the truth's {finding['quantity']}: ECDF − diagonal, p = {finding['p_value']:.3g}"
    axes = Axes(title, (0, 1), (-reach, reach), FRACTIONS, ticks, "level")
    return axes.draw(axes.band(x, curves[1], curves[2]), axes.level(0.0), axes.curve(x, curves[0]))


def _p_values(rows: Sequence[Mapping], name: str, test: str) -> str:
    p = [_number(row.get(name)) for row in rows]
    p = [v for v in p if math.isfinite(v)]
    if not p:
        return ""
    counts = [sum(min(int(v * P_BINS), P_BINS - 1) == k for v in p) for k in range(P_BINS)]
    top = max(*counts, 2 * len(p) / P_BINS)
    axes = Axes(f"{test}: p-values of all objects, uniform if the model holds", (0, 1), (0, top), FRACTIONS, [(top, f"{top:g}")])
    return axes.draw(axes.bars([k / P_BINS for k in range(P_BINS + 1)], counts), axes.level(len(p) / P_BINS))


def _scatter(rows: Sequence[Mapping], name: str, title: str) -> str:
    """Against the S/N of the data, on a logarithmic axis."""
    pairs = [(_number(row["sn"]), _number(row.get(name))) for row in rows]
    pairs = [(math.log10(sn), y) for sn, y in pairs if sn > 0 and math.isfinite(y)]
    if not pairs:
        return ""
    xs, ys = zip(*pairs, strict=True)
    low, high = math.floor(min(xs)), math.ceil(max(xs) + 1e-9)
    top = max(*ys, 1e-9) * 1.08 if len(ys) > 1 else max(ys[0], 1e-9) * 1.08
    floor = min(0.0, min(ys))
    ticks = [(v, f"{v:.2g}") for v in (floor, (floor + top) / 2, top)]
    axes = Axes(title, (low, high), (floor, top), [(v, f"{10**v:g}") for v in range(low, high + 1)], ticks, "S/N of the data")
    return axes.draw(axes.points(xs, ys))


def _plain_findings(findings: Sequence[Mapping]) -> list[dict]:
    return [
        {
            "test": f["diagnostic"],
            "of": f["quantity"],
            "statistic": f["statistic"],
            "null 95 %": " … ".join(f"{_number(v):.3g}" for v in f["band"]),
            "p": f["p_value"],
            "objects": f["objects"],
            "draws": f["draws"],
        }
        for f in findings
    ]


def _unique(table: Sequence[Mapping], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in table))


def _table(title: str, rows: Sequence[Mapping]) -> str:
    if not rows:
        return ""
    cell = lambda v: "–" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(row.get(n)))}</td>" for n in names) + "</tr>" for row in rows)
    return f"<p class='band'>{html.escape(title)}</p><div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
