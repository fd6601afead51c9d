"""What `diffinv evaluate` and `diffinv calibrate` are made of: truths from files, simulations, the fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diffinv.core.checks import ConfigError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.catalog import find_objects
from diffinv.data.fits import Plane, read_fits
from diffinv.data.found import find_products
from diffinv.data.products import Product
from diffinv.engine.calibration import Calibration, fit, regime_of
from diffinv.engine.evaluation import Evaluation, Truths, evaluate
from diffinv.engine.objects import find_truth
from diffinv.sections.calibrate import CalibrateConfig

FEWEST_DRAWS = 19


def truths_of(source: Path | None, objects: set[str]) -> Truths:
    """Where truths come from: the products themselves, or the TRUTH planes of a file or of a folder's files, by object name.

    A run of one object takes the only truth whatever its name. objects: names of those of the run.
    Raises: InputError if the source cannot be read or has none of the objects; later, if planes are not on the product's grid.
    """
    if source is None:
        return lambda product: product.truth
    paths = {entry.object_id: entry.path for entry in find_objects(source)}
    if len(paths) == len(objects) == 1:
        paths = dict(zip(objects, paths.values(), strict=True))
    if objects and not objects & paths.keys():
        raise InputError(
            f"{source}: has none of the {len(objects)} objects of the run, which are {_some(objects)}; it has "
            f"{_some(paths)}: give truths the names of the observations."
        )

    def truth(product: Product) -> np.ndarray | None:
        path = paths.get(product.object_id)
        return product.truth if path is None else _read_truth(path, product)

    return truth


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(map(repr, first[:3])) + (", …" if len(first) > 3 else "")


def _read_truth(path: Path, product: Product) -> np.ndarray:
    file = read_fits(path)
    planes: list[Plane] = list(file.named("TRUTH")) or [p for p in file.planes if p.data is not None and p.data.ndim == 2]
    fwhm = product.provenance.target_fwhm
    named = [p for p in planes if "BAND" in p.header]
    if not named and len(planes) >= len(product.bands):
        named = [Plane(p.name, p.data, {**p.header, "BAND": b}) for p, b in zip(planes, product.bands, strict=False)]
    found = find_truth(named, product.bands, product.grid, fwhm, fwhm)
    if found is None:
        shape = "×".join(map(str, product.grid.shape))
        raise InputError(
            f"{path}: no truth for bands {', '.join(product.bands)} of {product.object_id!r} with {shape} pixels of "
            f"{product.grid.pixel_scale:.4g}″ and a PSF of {fwhm:g}″; bring it to the product's grid (TPSFFWHM says its PSF)."
        )
    return found


def evaluate_run(out: Path, truth: Path | None, bins: Sequence[float]) -> tuple[Evaluation, list[Path]]:
    """Evaluate a run and write what was found: the evaluation and the files.

    Raises: ConfigError for bins that do not ascend; InputError without products, or for a truth that does not fit.
    """
    check_bins("--bins", bins)
    objects = {found.object_id for found in find_products(out, [])}
    found = evaluate(out, truths_of(truth, objects), bins)
    return found, list(found.write(out))


def check_bins(where: str, bins: Sequence[float]) -> None:
    """Raise ConfigError unless edges ascend."""
    if any(b <= a for a, b in zip(bins, bins[1:], strict=False)):
        raise ConfigError(f"{where}: edges of S/N must ascend, got {', '.join(f'{b:g}' for b in bins)}.")


def check_calibrate(config: CalibrateConfig) -> None:
    """Refuse what could only fail after hours. Raises: ConfigError."""
    check_bins("calibrate.signal_to_noise", config.calibrate.signal_to_noise)
    if config.input.mixing:
        raise ConfigError("input.mixing: simulations have no truth in the bands that others are mixed of; leave it out.")
    if config.sampler.samples < FEWEST_DRAWS:
        raise ConfigError(f"sampler.samples: 90 % intervals need at least {FEWEST_DRAWS} draws, got {config.sampler.samples}.")


def check_simulations(out: Path, config: CalibrateConfig) -> None:
    """Write down of what kind the simulations of a folder are, so that none of another kind go with them.

    Raises: ConfigError if those that are there were made otherwise.
    """
    path, made = out / "simulate.json", config.simulate.model_dump(mode="json", exclude={"count"})
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    before = json.loads(path.read_text(encoding="utf-8"))
    differ = [f"{name} {before.get(name)!r}, here {value!r}" for name, value in made.items() if before.get(name) != value]
    if differ:
        raise ConfigError(f"simulate: {out} holds other simulations ({'; '.join(differ)}); give another --out.")


def fit_run(out: Path, config: CalibrateConfig) -> tuple[Calibration, Path]:
    """Factors from the products in `out/run`, written to `out/calibration.json`.

    Raises: InputError if the run has no products; DiffinvError if there are too few.
    """
    damaged: list[str] = []
    places = list({found.object_id: found.place for found in find_products(out / "run", damaged)}.values())  # the newest of each
    if not places:
        raise InputError(f"{out / 'run'}: no products to calibrate on; see its quarantine.")
    record = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))
    target = places[0].read().provenance.target_fwhm
    simulated = config.simulate
    source = f"{len(places)} simulations, {simulated.survey} {'+'.join(simulated.bands)}, seed {simulated.seed}"
    regime, section = regime_of(record, target), config.calibrate
    found = fit((place.read() for place in places), section.signal_to_noise, regime, source, delta=section.delta)
    path = out / "calibration.json"
    write_atomically(path, found.dump())
    return found, path


def factor_lines(found: Calibration) -> list[str]:
    """The factors of 90 % intervals, a line a quantity and bin."""
    return [
        f"S/N {f.signal_to_noise[0]:g} – {f.signal_to_noise[1]:g}, {f.quantity}: held {f.before:.3f} at {f.level:g}, "
        f"factor {f.factor:.3f} ({f.objects} objects)"
        for f in found.factors
    ]
