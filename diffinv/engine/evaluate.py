"""How good the products of a run are: from themselves alone, and against the truth where it is known.

Products are read one at a time; of each band a row of numbers is kept, and tables over objects are made of the rows.
With draws stored, ranks of the truth among them test whole distributions; without them intervals alone are judged.
Groups are made from the data alone: by their S/N, and on and off the source that is found in them.
Invariant: the same products, truths and bins give the same evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.data.null_space import error_maps
from diffinv.data.products import Product, Quality
from diffinv.data.psf import FWHM_TO_SIGMA
from diffinv.engine.calibration import MEASURED, on_source
from diffinv.engine.measure import measure
from diffinv.uncertainty.coverage import hit_table, order
from diffinv.uncertainty.metrics import aperture_flux, crps, psnr, ring_correlation, ssim
from diffinv.uncertainty.prior_driven import Rule, high_pass, prior_driven
from diffinv.uncertainty.ranks import ranks
from diffinv.uncertainty.spread_skill import spread_error_tables
from diffinv.uncertainty.tarp import distance_ranks, references_near

APERTURE, RING = 1.5, (1.25, 2.5)  # arcsec; cycles an arcsec
LEVEL, FEWEST_DRAWS = 0.9, 19
HAS = 0.5  # of a feature's own height, that the truth must have along it to count as having it
OWN = ("features", "features_flagged", "psf_fwhm", "pit_shape_p", "pit_width_p")
Row = dict[str, object]


@dataclass(frozen=True, eq=False)
class Case:
    """One band of one object. row: its numbers. tables: name → (1, M + 1), what relabelling tests need; empty without draws."""

    row: Row
    tables: Mapping[str, Tensor]


def cases_of(product: Product, truth: np.ndarray | None, seed: int) -> list[Case]:
    """A case a band. truth: (C, H, W) on the product's grid, in its unit; None if nobody knows it."""
    found = []
    for b in range(len(product.bands)):
        row, tables = without_truth(product, b), {}
        if truth is not None:
            plane = torch.from_numpy(np.asarray(truth[b], np.float64))[None, None]
            row |= against_truth(product, b, plane) | intervals(product, b, plane) | error_parts(product, b, plane)
            if product.samples is not None and len(product.samples) >= 4:
                rng = Rng.for_draws(seed ^ product.provenance.seed, [b], 1)
                extra, tables = draws_against_truth(product, b, plane, rng)
                row |= extra
        found.append(Case(row, tables))
    return found


def without_truth(product: Product, b: int) -> Row:
    """What a product says of itself: fit, flags, information and calibration."""
    source, quality, table = on_source(product, b), product.quality[b], product.catalog
    row: Row = {"object_id": product.object_id, "band": product.bands[b]}
    row |= {name: float(table[name][b]) if name in table else math.nan for name in ("sn", "chi2", "chi2_draw", "chi2_p")}
    row |= {name: float(table[name][b]) if name in table else math.nan for name in OWN}
    driven = (quality & Quality.PRIOR_DRIVEN) != 0
    row |= {"chi2_bad": int(bool((quality & Quality.CHI2_BAD).any())), "prior_driven": float(driven.mean())}
    row["prior_driven_on_source"] = float(driven[source].mean()) if source.any() else math.nan
    informed = product.information
    row["information_on_source"] = float(informed[b][source].mean()) if informed is not None and source.any() else math.nan
    row["calibrated"] = int(product.provenance.calibration == "calibrated")
    row["factor"] = product.provenance.calibration_factor
    row["posterior_draws"] = product.provenance.draws
    return row


def against_truth(product: Product, b: int, truth: Tensor) -> Row:
    """Fidelity of the posterior mean: PSNR, SSIM, flux in 1.5″, ellipticity, size, and correlation at 1.25–2.5 cycles/″."""
    scale = product.grid.pixel_scale
    mean = torch.from_numpy(np.asarray(product.mean[b], np.float64))[None, None]
    radius = min(APERTURE / scale, min(truth.shape[-2:]) / 2)
    flux, true_flux = (float(aperture_flux(x[0, 0], radius)) for x in (mean, truth))
    shape, true = ({k: float(v[0, 0]) for k, v in measure(x, scale).items()} for x in (mean, truth))
    low, high = (f * scale for f in RING)
    return {
        "PSNR": float(psnr(mean, truth)),
        "SSIM": float(ssim(mean, truth)) if min(truth.shape[-2:]) >= 11 else math.nan,
        "flux_error": 100 * (flux / true_flux - 1) if true_flux else math.nan,
        "e_error": math.hypot(shape["e1"] - true["e1"], shape["e2"] - true["e2"]),
        "size_error": 100 * (shape["size"] / true["size"] - 1),
        "hf_xcorr": float(ring_correlation(mean, truth, low, high)) if low < 0.5 else math.nan,
    }


def intervals(product: Product, b: int, truth: Tensor) -> Row:
    """Share of pixels on and off the source inside their 90 % interval, and 1 or 0 for each measurement; NaN without one."""
    names = ("on", "off", *MEASURED)
    if 0.05 not in product.quantiles:
        return {f"inside_{name}": math.nan for name in names}
    x, source = truth[0, 0].numpy(), on_source(product, b)
    inside = (x >= product.quantiles[0.05][b]) & (x <= product.quantiles[0.95][b])
    row: Row = {"inside_on": float(inside[source].mean()) if source.any() else math.nan}
    row["inside_off"] = float(inside[~source].mean()) if (~source).any() else math.nan
    for name, value in measure(truth, product.grid.pixel_scale).items():
        low, high, true = (float(v) for v in (product.catalog[f"{name}_q05"][b], product.catalog[f"{name}_q95"][b], value[0, 0]))
        row[f"inside_{name}"] = math.nan if math.isnan(low + high + true) else float(low <= true <= high)
    peak2 = data_peak(product, b) ** 2
    error, spread = (product.mean[b] - x) ** 2 / peak2, product.std[b] ** 2 * (1 + 1 / product.provenance.draws) / peak2
    return row | ({"error2_on": float(error[source].mean()), "spread2_on": float(spread[source].mean())} if source.any() else {})


def data_peak(product: Product, b: int) -> float:
    """The brightest data pixel as flux per pixel of the product, the unit in which objects of all fluxes weigh alike."""
    images = [e for e in product.exposures_of(b) if e.image is not None]
    peaks = [float(np.nanmax(e.image)) * (product.grid.pixel_scale / e.grid.pixel_scale) ** 2 for e in images]
    return max([p for p in peaks if p > 0], default=1.0)


def error_parts(product: Product, b: int, truth: Tensor) -> Row:
    """Share of the squared error of the mean that lies in the null space of the instrument: what no data could have corrected."""
    maps = error_maps(product, b, truth[0, 0].numpy())
    if maps is None:
        return {"error_null_share": math.nan}
    error = np.asarray(product.mean[b], np.float64) - truth[0, 0].numpy()
    return {"error_null_share": float((maps[1] ** 2).sum() / (error**2).sum())}


def draws_against_truth(product: Product, b: int, truth: Tensor, rng: Rng) -> tuple[Row, dict[str, Tensor]]:
    """Ranks of the truth among the draws, CRPS, features with and without the truth; and tables for relabelling tests."""
    samples = torch.from_numpy(np.asarray(product.samples[:, b : b + 1], np.float64))[None]
    scale, source = product.grid.pixel_scale, torch.from_numpy(on_source(product, b))
    peak = data_peak(product, b)
    row: Row = {"draws": samples.shape[1]}
    true, drawn = measure(truth, scale), measure(samples[0], scale)
    for k, name in enumerate(MEASURED):
        values = drawn[name][None, :, 0]
        known = bool(values.isfinite().all() and true[name].isfinite().all())
        row[f"rank_{name}"] = int(ranks(true[name][:, 0], values, rng.spawn(k))) if known else math.nan
    row["rank_tarp"] = tarp_rank(truth, samples, rng.spawn(12))
    row |= features_of(product, b, truth, samples[0, :, 0])
    if not bool(source.any()):
        return row | {"rank_pixel": math.nan, "crps": math.nan}, {}
    place = source.flatten().nonzero()[:, 0]
    pick = place[int(float(rng.spawn(10).uniform(torch.empty(1, 1))) * len(place)) % len(place)]
    row["rank_pixel"] = int(ranks(truth.flatten()[pick][None], samples.flatten(2)[:, :, pick], rng.spawn(11)))
    row["crps"] = float(crps(samples, truth)[0, 0][source].mean() / peak)
    mask = source[None, None]
    spread, error = spread_error_tables(truth / peak, samples / peak, mask)
    tables = {"spread–skill on source": error - spread}
    if samples.shape[1] >= FEWEST_DRAWS:
        hits, count = hit_table(truth, samples, order(samples.shape[1], LEVEL), rng.spawn(13), mask)
        tables["coverage on source"] = hits / count[:, None]
    return row, tables


def tarp_rank(truth: Tensor, samples: Tensor, rng: Rng) -> int:
    """Rank among the first half of the draws, about a reference near the mean of the second: disjoint draws, as it must be."""
    half = samples.shape[1] // 2
    tested, other = samples[:, :half], samples[:, half:]
    centre = other.mean(1)
    radius = (other - centre[:, None]).flatten(2).norm(dim=2).mean(1)
    return int(distance_ranks(truth, tested, references_near(centre, radius, rng.spawn(0)), rng.spawn(1)))


def features_of(product: Product, b: int, truth: Tensor, samples: Tensor) -> Row:
    """Features of the mean finer than the PSF with S/N > 3: how many the truth has and has not, and how many are flagged."""
    row: Row = {f"features_{kind}{flag}": 0 for kind in ("true", "false") for flag in ("", "_flagged")}
    fwhm = float(product.catalog["psf_fwhm"][b]) if "psf_fwhm" in product.catalog else math.nan
    if not fwhm > 0:
        return row
    rule = Rule(smooth=fwhm * FWHM_TO_SIGMA / product.grid.pixel_scale)
    labels, features = prior_driven(samples, samples.mean(0), lambda x: x, rule)
    mean, true = high_pass(samples.mean(0), rule.smooth), high_pass(truth[0, 0], rule.smooth)
    driven = torch.from_numpy((product.quality[b] & Quality.PRIOR_DRIVEN) != 0)
    for feature in features:
        if feature.signal_to_noise <= rule.signal_to_noise:
            continue
        mask = labels == feature.label
        has = float((mean * true)[mask].sum() / mean[mask].pow(2).sum()) >= HAS
        kind = "true" if has else "false"
        row[f"features_{kind}"] += 1
        row[f"features_{kind}_flagged"] += int(float(driven[mask].double().mean()) > 0.5)
    return row


def by_bin(rows: Sequence[Row], edges: Sequence[float]) -> Iterable[tuple[str, list[Row]]]:
    """Rows by S/N of the data, the empty bins left out, and all of them at the end."""
    limits = (0.0, *edges, math.inf)
    for low, high in zip(limits, limits[1:], strict=False):
        here = [r for r in rows if low <= float(r["sn"]) < high]
        if here:
            yield (f"S/N {low:g} – {high:g}" if high < math.inf else f"S/N > {low:g}"), here
    yield "all", list(rows)
