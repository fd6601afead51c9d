"""`report.html` from the products of a run alone: one page, no network, nothing but escaped text from catalogues.

A content policy in the page forbids every request, so that a product's text can neither fetch nor run anything.
Invariant: the same products give the same page, byte for byte.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.found import find_products
from diffinv.data.null_space import error_maps
from diffinv.data.products import Exposure, Product, Quality
from diffinv.report.charts import CSS as CHARTS
from diffinv.report.figures import BRIGHTNESS, SIGNED, SPREAD, Linear, Scale, colour_bar, png, shared_stretch, spread_scale
from diffinv.report.gallery import CSS as GALLERY
from diffinv.report.gallery import SCRIPT as LATE
from diffinv.report.gallery import render_gallery
from diffinv.report.panels import render_evaluation
from diffinv.report.style import CSS, SCRIPT

MOST_WHOLE, MOST_SMALL = 40, 2000  # objects
MOST_SAMPLES = 8
ON_SOURCE = 0.05  # of the truth's peak
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(directory: Path) -> Path:
    """Make `report.html` in the output directory of a run from its products and its quarantine.

    Arguments: directory: the --out of `diffinv sample`.
    Returns: the path of the page.
    Raises: InputError if the directory holds neither products nor quarantined objects.
    """
    directory = Path(directory)
    unread: list[str] = []
    latest = {found.object_id: found.place for found in find_products(directory, unread)}
    places = sorted(latest.values(), key=lambda place: place.name)
    broken = _quarantined(directory) + [(Path(line.partition(":")[0]).name, line) for line in unread]
    if not places and not broken:
        raise InputError(f"{directory}: no products in it; run `diffinv sample` with this --out first.")
    products = []
    for place in places[:MOST_WHOLE]:
        try:
            products.append(place.read())
        except DiffinvError as error:
            broken.append((place.name, str(error)))
    products.sort(key=lambda product: (product.object_id, product.provenance.key))
    evaluation = _evaluation(directory / "evaluation.json")
    gallery, damaged = render_gallery(places[MOST_WHOLE : MOST_WHOLE + MOST_SMALL], escape)
    page = render_page(products, broken + damaged, total=len(places), evaluation=evaluation, gallery=gallery)
    target = directory / "report.html"
    write_atomically(target, page.encode("utf-8", "backslashreplace"))
    return target


def _evaluation(path: Path) -> str:
    """Panels of what `diffinv evaluate` has found, or nothing where it was not run."""
    if not path.is_file():
        return ""
    try:
        return render_evaluation(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"<p class='warn'>{escape(path.name)} cannot be shown ({escape(error)}); run diffinv evaluate again.</p>"


def _quarantined(directory: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted((directory / "quarantine").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append((str(record["object_id"]), str(record["reason"])))
        except (ValueError, KeyError, TypeError, OSError) as error:
            found.append((path.name, f"its record cannot be read ({error})"))
    return found


def render_page(
    products: Sequence[Product],
    broken: Sequence[tuple[str, str]] = (),
    *,
    total: int | None = None,
    evaluation: str = "",
    gallery: str = "",
) -> str:
    """The page as text.

    Arguments: broken: (object, reason) of what has no product. total: products that there are, None for those given.
        evaluation, gallery: panels, and objects that are not shown whole, as HTML.
    """
    whole = total is None or total <= MOST_WHOLE
    shown = f"{len(products)} objects" if whole else f"{total} objects, {len(products)} of them whole"
    body = [f"<h1>Posterior report</h1><p class='sub'>{shown} · {len(broken)} quarantined</p>", _warning(products), evaluation]
    body.append("<button id='pause' type='button'>Hold the samples</button>")
    body += [*map(render_object, products), gallery]
    if broken:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(reason)}</td></tr>" for name, reason in broken)
        table = f"<div class='scroll'><table><tr><th>object</th><th>reason</th></tr>{rows}</table></div>"
        body.append(f"<section class='card'><h2>Quarantined</h2>{table}</section>")
    head = f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'><title>Posterior report</title>"
    script = f"<script>{SCRIPT}{LATE if gallery else ''}</script>"
    style = f"<style>{CSS}{CHARTS}{GALLERY}</style>"
    return f"<!doctype html><html lang='en'><head>{head}{style}</head><body>{''.join(body)}{script}</body></html>\n"


def escape(text: object) -> str:
    """Text for HTML; control characters, which no font shows, become visible."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return html.escape(plain, quote=True)


def _warning(products: Sequence[Product]) -> str:
    loose = sum(p.provenance.calibration != "calibrated" for p in products)
    if not loose:
        return ""
    which = "These intervals are" if loose == len(products) else f"The intervals of {loose} of {len(products)} objects are"
    return (
        f"<p class='warn'>{which} NOT CALIBRATED. The spread of the samples is what prior, noise model and sampler say; nobody "
        "has checked on simulations like these data how often the truth lies inside.</p>"
    )


def render_object(product: Product) -> str:
    """The card of one object."""
    area = product.grid.pixel_scale**2
    mean, spread = product.mean / area, product.std / area
    stretch, spreads = shared_stretch(list(mean), list(spread)), spread_scale(list(spread))
    rows = [_band_row(product, k, stretch, spreads) for k in range(len(product.bands))]
    parts = [f"<h2>{escape(product.object_id)}</h2>", _badges(product), *rows, _fluxes(product), _notes(product)]
    return f"<section class='card'>{''.join(parts)}</section>"


@dataclass(frozen=True)
class _Badge:
    name: str
    value: str
    mood: str = ""

    def __str__(self) -> str:
        return f"<span class='badge {self.mood}'>{escape(self.name)} <b>{escape(self.value)}</b></span>"


def _badges(product: Product) -> str:
    source = product.provenance
    bad_fit = bool((product.quality & Quality.CHI2_BAD).any())
    calibrated = source.calibration == "calibrated"
    badges = [
        _Badge("", source.calibration, "good" if calibrated else "bad"),
        _Badge("χ²/datum", f"{source.chi2:.3f}" if np.isfinite(source.chi2) else "no data", "bad" if bad_fit else ""),
        _Badge("prior", source.prior),
        _Badge("", source.sampler),
        _Badge("draws", str(source.draws)),
        _Badge("network calls a draw", f"{source.network_calls:.0f}"),
        _Badge("pixel", f"{product.grid.pixel_scale:.4g}″"),
        _Badge("PSF", f"{source.target_fwhm:.3g}″ FWHM" if source.target_fwhm else "none (fully deconvolved)"),
    ]
    for bit in (Quality.NODATA, Quality.SATURATED, Quality.EXTRAPOLATED, Quality.PRIOR_DRIVEN):
        share = float(((product.quality & bit) != 0).mean())
        if share:
            badges.append(_Badge(bit.name.lower().replace("_", " "), f"{share:.1%} of pixels", "bad"))
    return f"<div class='badges'>{''.join(map(str, badges))}</div>"


def _band_row(product: Product, k: int, stretch: Scale, spreads: Scale) -> str:
    name, area = product.bands[k], product.grid.pixel_scale**2
    exposures = product.exposures_of(k)
    unit = f"{product.unit or 'unit'}/arcsec²"
    figures = [_data_figure(e, stretch, unit) for e in exposures if e.image is not None]
    figures.append(_figure("posterior mean", unit, [png(product.mean[k] / area, stretch, BRIGHTNESS)], stretch, BRIGHTNESS))
    figures.append(_figure("posterior std", unit, [png(product.std[k] / area, spreads, SPREAD)], spreads, SPREAD))
    if product.samples is not None:
        draws = product.samples[:MOST_SAMPLES, k] / area
        figures.append(_figure("samples", unit, [png(d, stretch, BRIGHTNESS) for d in draws], stretch, BRIGHTNESS, blink=True))
    if product.truth is not None:
        figures.append(_figure("truth", unit, [png(product.truth[k] / area, stretch, BRIGHTNESS)], stretch, BRIGHTNESS))
        figures += _errors(product, k, unit)
    sigmas = Linear(-4.0, 4.0)
    for e in exposures:
        residual = e.residual if e.image is None else np.where(np.isfinite(e.image), e.residual, np.nan)
        figures.append(_figure(_titled("residual", e), "σ", [png(residual, sigmas, SIGNED)], sigmas, SIGNED))
    comparison = _comparison(product, k)
    heading = f"<p class='band'>band {escape(name)}{' · ' + comparison if comparison else ''}</p>"
    return f"{heading}<div class='row'>{''.join(figures)}</div>"


def _errors(product: Product, k: int, unit: str) -> list[str]:
    """The error of the mean: what the data could have corrected, and what is in the null space of the instrument."""
    maps = error_maps(product, k, product.truth[k])
    if maps is None:
        return []
    area, top = product.grid.pixel_scale**2, max(float(np.abs(m).max()) for m in maps)
    scale = Linear(-top / area, top / area) if top > 0 else Linear(-1.0, 1.0)
    titles = ("error the data see", "error in the null space")
    return [_figure(t, unit, [png(m / area, scale, SIGNED)], scale, SIGNED) for t, m in zip(titles, maps, strict=True)]


def _data_figure(exposure: Exposure, stretch: Scale, unit: str) -> str:
    image = exposure.image / exposure.grid.pixel_scale**2
    title = _titled("data", exposure)
    return _figure(title, unit, [png(image, stretch, BRIGHTNESS)], stretch, BRIGHTNESS)


def _titled(what: str, exposure: Exposure) -> str:
    """What is shown and of what: the instrument of data, and the band of a mixture."""
    parts = (what, exposure.instrument if what == "data" else "", exposure.band if exposure.weights else "")
    return " ".join(part for part in parts if part)


def _figure(title: str, unit: str, images: Sequence[str], scale: Scale, colours: str, *, blink: bool = False) -> str:
    shown = "".join(f"<img{' class=on' if n == 0 else ''} src='{image}' alt='{escape(title)}'>" for n, image in enumerate(images))
    count = " <span class='count'></span>" if blink else ""
    ticks = "".join(f"<span>{scale.value(f):.3g}</span>" for f in (0.0, 0.5, 1.0))
    bar = f"<img class='bar' src='{colour_bar(colours)}' alt=''><div class='ticks'>{ticks}</div>"
    frame = f"<div class='frame{' blink' if blink else ''}'>{shown}</div>"
    return f"<figure><figcaption>{escape(title)} <span>{escape(unit)}</span>{count}</figcaption>{frame}{bar}</figure>"


def _comparison(product: Product, k: int) -> str:
    """How the answer compares with the truth, where there is one: rms and coverage on the source."""
    if product.truth is None:
        return ""
    truth, mean = product.truth[k], product.mean[k]
    source = truth > ON_SOURCE * truth.max()
    rms = float(np.sqrt(np.mean((mean - truth) ** 2)) / truth.max()) if truth.max() > 0 else float("nan")
    text = f"rms error {rms:.2%} of the peak, flux error {mean.sum() / truth.sum() - 1:+.2%}"
    if 0.05 in product.quantiles and 0.95 in product.quantiles and source.any():
        inside = (truth >= product.quantiles[0.05][k]) & (truth <= product.quantiles[0.95][k])
        text += f", truth inside the 90 % interval at {inside[source].mean():.0%} of the source's pixels"
    return text


def _fluxes(product: Product) -> str:
    if not product.catalog:
        return ""
    names = [name for name in product.catalog if "_q" not in name]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    rows = zip(*(product.catalog[name] for name in names), strict=True)
    cells = ("".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in rows)
    flux = escape(product.unit or "the unit of the data")
    unit = f"<p class='sub'>flux of the field in {flux}; size, the σ of adaptive moments, in arcsec</p>"
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>{unit}"


def _cell(value: object) -> str:
    if isinstance(value, (bytes, np.bytes_)):
        return value.decode("utf-8", "replace")
    return f"{value:.5g}" if isinstance(value, (float, np.floating)) else str(value)


def _notes(product: Product) -> str:
    if not product.notes:
        return ""
    return f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in product.notes)}</ul>"
