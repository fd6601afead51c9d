"""Tables over the objects of a run, and the files they go to: `evaluation.json`, `evaluation.ecsv`, panels in `report.html`.

What is tested: ranks of the truth (SBC, ECDF envelope) for flux, size, ellipticity and a pixel of the source; TARP about a
reference from disjoint draws; coverage and spread–skill of the source's pixels by relabelling; and, without truth, how many
predictive χ² are extreme. Many tests are made: of twenty that see nothing, one fires at 5 %. Bands of one object are not
independent of each other: a test takes one of them, chosen at random, and errors of tables are those between objects.
Invariant: `evaluation.json` holds every number of the panels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom

from diffinv import __version__
from diffinv.core.checks import InputError
from diffinv.core.rng import Rng
from diffinv.data.atomic import write_atomically
from diffinv.data.fits import encode_ecsv
from diffinv.data.found import find_products
from diffinv.data.packs import Place
from diffinv.data.products import Product
from diffinv.engine import judge
from diffinv.engine.calibration import MEASURED
from diffinv.engine.evaluate import Case, Row, by_bin, cases_of
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import chance, exchange_test
from diffinv.uncertainty.ranks import UniformRanks, rank_findings

EXTREME = 0.05
EXTREMES = {"chi2_p": "predictive χ²", "pit_shape_p": "held-out PIT, shape", "pit_width_p": "held-out PIT, width"}
SEED = 0x5EED
NAMES = {"on": "pixels on source", "off": "pixels off source"}
Truths = Callable[[Product], np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """rows: one a band of an object. coverage, spread, flags: tables by S/N. findings: tests. damaged: files not read."""

    rows: tuple[Row, ...]
    coverage: tuple[Row, ...]
    spread: tuple[Row, ...]
    flags: tuple[Row, ...]
    findings: tuple[Finding, ...]
    damaged: tuple[str, ...]

    @property
    def with_truth(self) -> int:
        """Rows whose truth is known."""
        return sum("PSNR" in row for row in self.rows)

    def summary(self) -> list[str]:
        """Lines for a terminal."""
        lines = [f"{len(self.rows)} bands of objects, {self.with_truth} with truth"]
        calibrated = sum(int(row["calibrated"]) for row in self.rows)
        lines.append(f"calibrated {calibrated}, χ² flagged {sum(int(r['chi2_bad']) for r in self.rows)}")
        for name in ("PSNR", "SSIM", "hf_xcorr"):
            lines += _line(self.rows, name, np.mean, "mean")
        for name in ("flux_error", "e_error", "size_error"):
            lines += _line(self.rows, name, lambda v: np.median(np.abs(v)), "median |·|")
        whole = [r for r in self.coverage if r["bin"] == "all"]
        lines += [f"90 % intervals of {r['quantity']} hold {r['coverage']:.3f} ± {r['error']:.3f}" for r in whole]
        lines += [f"spread/error on source, {r['bin']}: {r['ratio']:.3f} ({r['objects']} objects)" for r in self.spread]
        return [*lines, *map(str, self.findings), *blind(self.rows)]

    def to_dict(self) -> dict[str, object]:
        """For `evaluation.json`; numbers that are not finite become null."""
        parts = {name: [_plain(row) for row in getattr(self, name)] for name in ("rows", "coverage", "spread", "flags")}
        found = [_plain(finding.to_dict()) for finding in self.findings]
        return {"diffinv": __version__, "with_truth": self.with_truth, **parts, "findings": found, "damaged": list(self.damaged)}

    def write(self, out: Path) -> tuple[Path, Path]:
        """`evaluation.json` and `evaluation.ecsv` in the directory of the run."""
        paths = out / "evaluation.json", out / "evaluation.ecsv"
        write_atomically(paths[0], (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = {name: np.array([row.get(name, math.nan) for row in self.rows]) for name in names}
        write_atomically(paths[1], encode_ecsv(columns))
        return paths


def _line(rows: Sequence[Row], name: str, reduce: Callable[[np.ndarray], float], word: str) -> list[str]:
    values = np.array([float(row[name]) for row in rows if name in row])
    values = values[np.isfinite(values)]
    return [f"{name}: {word} {reduce(values):.4g}"] if len(values) else []


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(out: Path, truths: Truths, edges: Sequence[float]) -> Evaluation:
    """Of all products of the run in a directory.

    Arguments: out: the --out of `diffinv sample`. truths: the truth (C, H, W) of a product on its grid and in its unit, or None.
    edges: of the bins of S/N, ascending.
    Raises: InputError if there is no product.
    """
    damaged: list[str] = []
    latest = {found.object_id: found.place for found in find_products(out, damaged)}
    if not latest:
        raise InputError(f"{out}: no products of a run in it; give the --out of `diffinv sample`.")
    cases = [case for name in sorted(latest) for case in _cases(latest[name], truths, damaged)]
    return assemble(cases, edges, tuple(damaged))


def _cases(place: Place, truths: Truths, damaged: list[str]) -> list[Case]:
    try:
        product = place.read()
    except InputError as error:
        damaged.append(str(error))
        return []
    return cases_of(product, truths(product), SEED)


def assemble(cases: Sequence[Case], edges: Sequence[float], damaged: tuple[str, ...] = ()) -> Evaluation:
    """Tables and tests from the rows of all objects."""
    rows = [case.row for case in cases]
    known = [row for row in rows if "inside_on" in row]
    tested = _one_band(cases)
    findings = [f for name, diagnostic in EXTREMES.items() for f in _extremes([c.row for c in tested], name, diagnostic)]
    findings += [*_rank_tests(tested), *_exchange_tests(tested)]
    tables = (coverage_table(known, edges), spread_table(known, edges), flag_table(rows, edges))
    return Evaluation(tuple(rows), *map(tuple, tables), tuple(findings), damaged)


def _one_band(cases: Sequence[Case]) -> list[Case]:
    """A band of each object, chosen at random."""
    bands: dict[object, list[Case]] = {}
    for case in cases:
        bands.setdefault(case.row["object_id"], []).append(case)
    chosen = Rng.for_draws(SEED, [300], 1).uniform(torch.empty(1, len(bands)))[0].tolist()
    return [each[int(u * len(each))] for u, each in zip(chosen, bands.values(), strict=True)]


def _by_object(rows: Sequence[Row], name: str) -> np.ndarray:
    """The mean over bands of each object that has a finite value."""
    values: dict[object, list[float]] = {}
    for row in rows:
        if math.isfinite(value := float(row[name])):
            values.setdefault(row["object_id"], []).append(value)
    return np.array([np.mean(each) for each in values.values()])


def coverage_table(rows: Sequence[Row], edges: Sequence[float]) -> Iterable[Row]:
    """Coverage of 90 % intervals by quantity and S/N, objects counting equally; its error is at least 1/objects, for where all
    intervals hold the scatter between objects would say 0."""
    for name in ("on", "off", *MEASURED):
        for label, here in by_bin(rows, edges):
            values = _by_object(here, f"inside_{name}")
            if len(values):
                scatter = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
                error = max(scatter, 1 / len(values))
                mean = float(values.mean())
                yield {"quantity": NAMES.get(name, name), "bin": label, "coverage": mean, "error": error, "objects": len(values)}


def spread_table(rows: Sequence[Row], edges: Sequence[float]) -> Iterable[Row]:
    """√(mean spread²/mean error²) of the source's pixels in units of each object's peak, by S/N; its error by delta method."""
    for label, here in by_bin([r for r in rows if "error2_on" in r], edges):
        spread, error = (_by_object(here, name) for name in ("spread2_on", "error2_on"))
        if error.sum() > 0:
            ratio = spread.sum() / error.sum()
            scatter = float(np.std(spread - ratio * error) * len(error) ** 0.5 / error.sum()) if len(error) > 1 else math.nan
            yield {"bin": label, "ratio": ratio**0.5, "error": scatter / (2 * ratio**0.5), "objects": len(error)}


def flag_table(rows: Sequence[Row], edges: Sequence[float]) -> Iterable[Row]:
    """Shares of objects and pixels that carry a flag, by S/N; with truth, of features that it has and has not."""
    for label, here in by_bin(rows, edges):
        p = np.array([float(row["chi2_p"]) for row in here])
        row: Row = {
            "bin": label,
            "objects": len({r["object_id"] for r in here}),
            "chi2_bad": float(np.mean([int(r["chi2_bad"]) for r in here])),
        }
        row["chi2_extreme"] = float(np.mean(p[np.isfinite(p)] <= EXTREME)) if np.isfinite(p).any() else math.nan
        driven = np.array([float(r["prior_driven_on_source"]) for r in here])
        row["prior_driven_on_source"] = float(np.nanmean(driven)) if np.isfinite(driven).any() else math.nan
        for kind in ("true", "false"):
            total = sum(int(r.get(f"features_{kind}", 0)) for r in here)
            flagged = sum(int(r.get(f"features_{kind}_flagged", 0)) for r in here)
            row |= {f"features_{kind}": total, f"{kind}_flagged": flagged / total if total else math.nan}
        yield row


def _extremes(rows: Sequence[Row], name: str, diagnostic: str) -> list[Finding]:
    """How many objects' data are extreme at 5 % among data sets of their draws, against Bin(N, q), q what that has by chance;
    nothing where no object can be."""
    known = [row for row in rows if math.isfinite(float(row[name]))]
    able = [row for row in known if extreme_by_chance(name, row) > 0]
    if not able:
        return []
    number, count = len(able), sum(float(row[name]) <= EXTREME for row in able)
    null = binom(number, float(np.mean([extreme_by_chance(name, row) for row in able])))
    band = (float(null.ppf(0.025)) / number, float(null.ppf(0.975)) / number)
    tail = float(null.sf(count - 1))
    return [Finding(diagnostic, "objects with p ≤ 0.05", count / number, band, tail, number, 1)]


def extreme_by_chance(name: str, row: Row) -> float:
    """The share of right models with p ≤ 0.05: of the predictive χ² 5 %; of the PIT less, for its replicates are the draws."""
    replicates = judge.REPLICATES if name == "chi2_p" else int(row["posterior_draws"])
    return chance(EXTREME, replicates, sides=1 if name == "pit_shape_p" else 2)


def blind(rows: Sequence[Row]) -> list[str]:
    """Lines on tests that were made but cannot fire, for want of draws."""
    lines = []
    for name, diagnostic in EXTREMES.items():
        known = [row for row in rows if math.isfinite(float(row[name]))]
        if known and not any(extreme_by_chance(name, row) for row in known):
            least = round((1 if name == "pit_shape_p" else 2) / EXTREME) - 1
            lines.append(f"{diagnostic} cannot be extreme with so few draws; give --samples {least} or more")
    return lines


def _rank_tests(cases: Sequence[Case]) -> list[Finding]:
    found: list[Finding] = []
    for k, name in enumerate((*MEASURED, "pixel")):
        ranks, draws = _ranks(cases, f"rank_{name}")
        if len(ranks) >= 2:
            found += rank_findings(ranks, draws, name, Rng.for_draws(SEED, [k], 1))
    ranks, draws = _ranks(cases, "rank_tarp")
    if len(ranks) >= 2:
        null = UniformRanks(len(ranks), draws // 2, 2, Rng.for_draws(SEED, [99], 1))
        found.append(null.kolmogorov(ranks).finding("TARP", "image, half of the draws", len(ranks), draws // 2))
    return found


def _ranks(cases: Sequence[Case], name: str) -> tuple[torch.Tensor, int]:
    """Ranks of all objects that have one, and the number of draws."""
    have = [c for c in cases if "draws" in c.row and math.isfinite(float(c.row[name]))]
    draws = int(have[0].row["draws"]) if have else 0
    return torch.tensor([int(c.row[name]) for c in have], dtype=torch.int64), draws


def _exchange_tests(cases: Sequence[Case]) -> list[Finding]:
    have = [case.tables for case in cases if case.tables]
    found = []
    for k, name in enumerate(have[0] if len(have) > 1 else ()):
        table = torch.cat([tables[name] for tables in have if name in tables])
        outcome = exchange_test(table, Rng.for_draws(SEED, [200 + k], 1))
        found.append(outcome.finding(name.partition(" on ")[0], "pixels on source", len(table), table.shape[1] - 1))
    return found
