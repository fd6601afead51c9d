"""The commands `evaluate`, `calibrate` and `unmix` of the command line; heavy libraries are imported when they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffinv.config import Loaded, Override
    from diffinv.sections.sample import SampleConfig

BINS = (30.0, 100.0, 300.0)
Sample = Callable[[list[str], "Loaded[SampleConfig]"], int]


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """`diffinv evaluate DIR [--truth PATH] [--bins S/N …]`."""
    command = commands.add_parser("evaluate", help="how good and how honest the products of a run are, with truth and without")
    command.add_argument("directory", type=Path, metavar="DIR", help="the --out of `diffinv sample`")
    help_text = "FITS file, or folder or catalogue of them, with planes TRUTH (default: the products' own, if they are simulated)"
    command.add_argument("--truth", type=Path, metavar="PATH", help=help_text)
    help_text = "edges of the bins of the data's S/N in tables, ascending (default 30 100 300)"
    command.add_argument("--bins", type=float, nargs="+", default=list(BINS), metavar="S/N", help=help_text)
    command.set_defaults(run=_evaluate)


def add_calibrate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """`diffinv calibrate --config FILE [--out DIR]`, less what it does; see `run_calibrate`."""
    command = commands.add_parser("calibrate", help="factors for intervals, from simulations of one kind of data")
    help_text = "YAML: the sections of `diffinv sample` with `simulate` and `calibrate`; see configs/calibrate.yaml"
    command.add_argument("--config", type=Path, required=True, metavar="FILE", help=help_text)
    command.add_argument("--out", type=Path, metavar="DIR", help="simulations, products, result (default: out/NAME of FILE)")
    command.add_argument("--workers", metavar="N", help="processes, as for `diffinv sample`")
    return command


def _evaluate(args: argparse.Namespace) -> int:
    from diffinv.assembly.trust import evaluate_run
    from diffinv.report.html import write_report

    found, paths = evaluate_run(args.directory, args.truth, args.bins)
    for line in [*found.summary(), *found.damaged]:
        print(f"diffinv: {line}", file=sys.stderr)
    for path in [*paths, write_report(args.directory)]:
        print(path)
    return 3 if found.damaged else 0


def run_calibrate(args: argparse.Namespace, overrides: list[Override], mocks: Callable, sample: Sample) -> int:
    """Simulate what is missing, sample what is missing, fit.

    Arguments: overrides: of `--set`. mocks: the class of simulated sets. sample: runs `diffinv sample` with these arguments and
    this configuration.
    """
    from diffinv.assembly.trust import check_calibrate, check_simulations, factor_lines, fit_run
    from diffinv.config import load
    from diffinv.sections.calibrate import CalibrateConfig

    loaded = load(CalibrateConfig, args.config, overrides)
    config, out = loaded.config, args.out or Path("out") / args.config.stem
    check_calibrate(config)
    check_simulations(out, config)
    section = config.simulate
    simulated = mocks()(**{name: getattr(section, name) for name in type(section).model_fields})
    observations = out / "observations"
    if len(list(observations.glob(f"mock-{section.seed}-*.fits"))) < section.count:
        for _ in simulated.write(observations):
            pass
    arguments = [str(observations), "--out", str(out / "run"), *(["--workers", args.workers] if args.workers else [])]
    code = sample(arguments, loaded)
    if code:
        return code
    found, path = fit_run(out, config)
    for line in factor_lines(found):
        print(f"diffinv: {line}", file=sys.stderr)
    print(path)
    return 0


def add_unmix(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """`diffinv unmix CUBE --config FILE --out DIR`, less what it does; see `run_unmix`."""
    command = commands.add_parser("unmix", help="maps of physical parameters with their errors, from a cube or an event list")
    command.add_argument("cube", type=Path, metavar="CUBE", help="FITS cube, X-ray event list, or array in .mat or .npz")
    command.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML; see configs/unmix.yaml")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    return command


def run_unmix(args: argparse.Namespace, overrides: list[Override]) -> int:
    """Write the maps of one cube and print their path."""
    from diffinv.config import load
    from diffinv.sections.unmix import UnmixConfig

    loaded = load(UnmixConfig, args.config, overrides)
    from diffinv.assembly.unmixing import unmix_file

    print(unmix_file(loaded, args.cube, args.out, lambda line: print(f"diffinv: {line}", file=sys.stderr, flush=True)))
    return 0
