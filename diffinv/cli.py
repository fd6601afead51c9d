"""The command line: `diffinv sample | train | unmix | simulate | evaluate | calibrate | inspect | report | status | merge`.

Heavy libraries are imported by the commands, after parsing. Exit codes: 0 all done, 2 usage or configuration, 3 partly done,
4 some objects quarantined, 74 disk, 130 and 143 interrupted. Invariant: an error that a user can mend is one line a problem
on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffinv import __version__
from diffinv.commands import add_calibrate, add_evaluate, add_unmix, run_calibrate, run_unmix

if TYPE_CHECKING:
    from diffinv.config import Loaded, Override
    from diffinv.data.catalog import Entry
    from diffinv.engine.campaign import Outcome
    from diffinv.engine.mocks import Mocks
    from diffinv.priors.store import Prior
    from diffinv.sections.sample import SampleConfig

DONE, USAGE, STOPPED, QUARANTINED, DISK, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 74, 130, 143


_KEPT = {
    "sample": "finished products are kept, the same command does the rest.",
    "train": "the last checkpoint is kept, --resume does the rest.",
}


class _Terminated(BaseException):
    """SIGTERM, as an exception."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    _share_cores()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _guarded(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _share_cores() -> None:
    """Let threads that wait for others sleep soon, unless the user has said how they shall wait.

    GNU OpenMP, with which torch may run, spins 300,000 times by default. Beside any other work on the same cores the threads of a
    parallel loop then burn the time of the one that they wait for: maps of a 64 × 64 cube on two cores took 48 s alone and 697 s
    beside one busy process, with 3,000 spins 50 s and 133 s. It is read when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _guarded(args: argparse.Namespace) -> int:
    from diffinv.core.checks import DiffinvError

    try:
        return args.run(args)
    except DiffinvError as error:
        for line in str(error).splitlines():
            print(f"diffinv: {line}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"diffinv: {place}{error.strerror or error}; no partial product was left.", file=sys.stderr)
        return DISK
    except (KeyboardInterrupt, _Terminated) as stop:
        print(f"diffinv: interrupted; {_KEPT.get(args.command, _KEPT['sample'])}", file=sys.stderr)
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffinv", description="Posterior samples of images from measured data.")
    parser.add_argument("--version", action="version", version=f"diffinv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sample(commands)
    _add_train(commands)
    _add_inspect(commands)
    simulate = commands.add_parser("simulate", help="mock observations with truth")
    simulate.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML with a section `simulate`")
    simulate.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_set(simulate)
    simulate.set_defaults(run=_simulate)
    unmix = add_unmix(commands)
    _add_set(unmix)
    unmix.set_defaults(run=_unmix)
    add_evaluate(commands)
    calibrate = add_calibrate(commands)
    _add_set(calibrate)
    calibrate.set_defaults(run=_calibrate)
    report = commands.add_parser("report", help="make report.html again from the products of a run")
    report.add_argument("directory", type=Path, metavar="DIR", help="the --out of `diffinv sample`")
    report.set_defaults(run=_report)
    status = commands.add_parser("status", help="how far a run is: exit code 0 all done, 3 partly, 4 some quarantined")
    status.add_argument("directory", type=Path, metavar="DIR", help="the --out of `diffinv sample`")
    status.set_defaults(run=_status)
    merge = commands.add_parser("merge", help="one table, catalog.ecsv and .parquet, of the products of a run")
    merge.add_argument("directory", type=Path, metavar="DIR", help="the --out of `diffinv sample`")
    merge.set_defaults(run=_merge)
    return parser


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = commands.add_parser("sample", help="posterior products for a FITS file, a directory or a catalogue")
    help_text = "FITS file, directory, or catalogue (.csv, .ecsv, .fits, .parquet, .hdf5)"
    sample.add_argument("input", type=Path, metavar="INPUT", help=help_text)
    sample.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_configuration(sample)
    sample.add_argument("--samples", metavar="N", help="posterior draws an object (sampler.samples)")
    sample.add_argument("--seed", metavar="S", help="of the run (sampler.seed)")
    sample.add_argument("--workers", type=_count, metavar="N", help="processes, each with its share of the cores (default: none)")
    help_text = "an object may take; then its process is ended and another tries again (at least one worker)"
    sample.add_argument("--timeout", type=_seconds, metavar="SECONDS", help=help_text)
    help_text = "local: this process, or --workers; parsl: tasks of ranges of objects, where --site says"
    sample.add_argument("--engine", choices=("local", "parsl"), default="local", help=help_text)
    sample.add_argument("--site", type=Path, metavar="FILE", help="YAML; see configs/sites")
    sample.add_argument("--shard", default="0/1", metavar="i/n", help="part i (from 0) of n; auto: of a Slurm array or torchrun")
    sample.add_argument("--pack", type=_count, metavar="N", help="products of N objects in one file (default: a file an object)")
    help_text = "stop when more of the objects have failed, and at least 20 have ended (default 0.05)"
    sample.add_argument("--max-failed", type=_share, default=0.05, metavar="SHARE", help=help_text)
    sample.add_argument("--calibration", type=Path, metavar="FILE", help="of `diffinv calibrate`, for data like its simulations")
    sample.add_argument("--new-run", action="store_true", help="go on in DIR although its configuration was another")
    sample.add_argument("--dry-run", action="store_true", help="check everything, list the objects, sample nothing")
    sample.set_defaults(run=_sample)


def _share(text: str) -> float:
    return _number(text, 0, 1, "a number from 0 to 1")


def _seconds(text: str) -> float:
    return _number(text, 1e-3, 1e9, "seconds, a number > 0")


def _count(text: str) -> int:
    value = _number(text, 1, 4096, "a whole number from 1")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(value)


def _number(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("train", help="a network that reconstructs, a prior, or emulators of spectra")
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML; see configs/train.yaml")
    train.add_argument("--out", type=Path, metavar="DIR", help="checkpoint, log and result (default: out/NAME of FILE)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR, as if nothing had happened")
    train.add_argument("--new-run", action="store_true", help="with --resume: go on although the configuration was another")
    _add_set(train)
    train.set_defaults(run=_train)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="what would be read from a file, and what sampling it would cost")
    inspect.add_argument("file", type=Path, metavar="FILE")
    _add_configuration(inspect)
    inspect.set_defaults(run=_inspect)


def _add_configuration(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    command.add_argument("--prior", metavar="NAME|FILE", help="shipped name or .safetensors file (prior.name)")
    command.add_argument("--device", metavar="auto|cpu|cuda")
    command.add_argument("--dtype", metavar="float32|bfloat16", help="arithmetic of the network")
    _add_set(command)


def _add_set(command: argparse.ArgumentParser) -> None:
    help_text = "override a key, for example --set input.noise_std=0.1; may be repeated"
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def _overrides(args: argparse.Namespace) -> list[Override]:
    """`--set` in order, then the options that are short for a key."""
    from diffinv.config import Override, parse_set

    short = {"prior": "prior.name", "samples": "sampler.samples", "seed": "sampler.seed", "device": "device", "dtype": "dtype"}
    given = {name: value for name, value in vars(args).items() if name in short and value is not None}
    return [*map(parse_set, args.set), *(Override(f"--{name}", short[name], value) for name, value in given.items())]


def _load_sample_config(args: argparse.Namespace) -> Loaded[SampleConfig]:
    from diffinv.config import load
    from diffinv.sections.sample import SampleConfig

    return load(SampleConfig, args.config, _overrides(args))


def _prior(config: SampleConfig, device: str) -> Prior:
    import torch

    from diffinv.priors.store import load_prior

    return load_prior(config.prior.name, device=device, dtype=getattr(torch, config.dtype))


def _device(config: SampleConfig) -> str:
    from diffinv.engine.devices import choose_device

    return choose_device(config.device, config.dtype)


def _sample(args: argparse.Namespace) -> int:
    return _sample_with(args, _load_sample_config(args))


def _calibrate(args: argparse.Namespace) -> int:
    sample = lambda arguments, loaded: _sample_with(_parser().parse_args(["sample", *arguments]), loaded)
    return run_calibrate(args, _overrides(args), _mocks, sample)


def _sample_with(args: argparse.Namespace, loaded: Loaded[SampleConfig]) -> int:
    from diffinv.assembly.sampling import choose_crew, execute, make_plan, print_plan
    from diffinv.data.catalog import find_objects
    from diffinv.engine.calibration import load_calibration
    from diffinv.engine.devices import own_device
    from diffinv.engine.pool import Recipe
    from diffinv.engine.run import Run, prepare
    from diffinv.engine.shards import parse_shard

    shard, crew = parse_shard(args.shard, os.environ), choose_crew(args.engine, args.site, args.workers, args.timeout)
    entries = shard.select(find_objects(args.input))
    prepare(args.out)
    config = loaded.config
    device = _device(config) if crew.site is None else config.device
    prior = _prior(config, own_device(device) if crew.alone else "cpu")
    calibration = None if args.calibration is None else load_calibration(args.calibration)
    plan = make_plan(loaded, prior, crew, calibration=calibration, pack=args.pack)
    run = Run(args.out, prior, plan, new_run=args.new_run)
    if args.dry_run:
        print_plan(run, entries, crew)
        return DONE
    recipe = Recipe(args.out, config.prior.name, device, config.dtype, plan)
    return _finish(args, entries, execute(crew, run, recipe, entries, shard, max_failed=args.max_failed))


def _finish(args: argparse.Namespace, entries: Sequence[Entry], outcome: Outcome) -> int:
    from diffinv.report.html import write_report

    for path in outcome.products:
        print(path)
    if outcome.products or outcome.quarantined:
        print(write_report(args.out))
    print(f"diffinv: {outcome.summary()}", file=sys.stderr)
    if outcome.stopped:
        return STOPPED
    if outcome.quarantined:
        return USAGE if args.input in {entry.path for entry in entries if entry.where is None} else QUARANTINED
    return DONE


def _train(args: argparse.Namespace) -> int:
    from diffinv.assembly.training import train

    out = args.out if args.out is not None else Path("out") / args.config.stem
    say = lambda line: print(f"diffinv: {line}", file=sys.stderr, flush=True)
    path = train(args.config, _overrides(args), out, resume=args.resume, new_run=args.new_run, say=say)
    from diffinv.engine.learn import is_main_process

    if is_main_process():
        print(path)
    return DONE


def _inspect(args: argparse.Namespace) -> int:
    loaded = _load_sample_config(args)
    from diffinv.assembly.sampling import input_options, sampling_method
    from diffinv.engine.inspect import describe

    config, prior = loaded.config, _prior(loaded.config, _device(loaded.config))
    method = sampling_method(loaded, prior)
    text = describe(
        args.file,
        input_options(config),
        prior,
        method,
        draws=config.sampler.samples,
        max_batch=config.sampler.max_batch,
        margin=config.output.margin,
        target_fwhm=config.output.target_psf,
    )
    print(text)
    return DONE


def _simulate(args: argparse.Namespace) -> int:
    from diffinv.config import load
    from diffinv.sections.sample import SimulateConfig

    loaded = load(SimulateConfig, args.config, _overrides(args))
    section = loaded.config.simulate
    mocks = _mocks()(**{name: getattr(section, name) for name in type(section).model_fields})
    for path in mocks.write(args.out):
        print(path)
    return DONE


def _unmix(args: argparse.Namespace) -> int:
    return run_unmix(args, _overrides(args))


def _mocks() -> type[Mocks]:
    """The class of simulated sets.

    Raises: ConfigError if GalSim is not installed.
    """
    from diffinv.core.checks import ConfigError

    try:
        from diffinv.engine.mocks import Mocks
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "galsim":
            raise
        raise ConfigError("simulate: GalSim is not installed; pip install 'diffinv[simulate]'.") from error
    return Mocks


def _report(args: argparse.Namespace) -> int:
    from diffinv.report.html import write_report

    print(write_report(args.directory))
    return DONE


def _status(args: argparse.Namespace) -> int:
    from diffinv.engine.survey import read_status

    status = read_status(args.directory)
    print(status)
    if not status.complete:
        return STOPPED
    return QUARANTINED if status.quarantined else DONE


def _merge(args: argparse.Namespace) -> int:
    from diffinv.engine.survey import merge

    paths, damaged = merge(args.directory)
    for line in damaged:
        print(f"diffinv: {line}", file=sys.stderr)
    for path in paths:
        print(path)
    return STOPPED if damaged else DONE
