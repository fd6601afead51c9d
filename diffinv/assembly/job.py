"""From the sections of `diffinv train` to the objects that they name.

Each kind of section has one function; what a section cannot know alone (an array that another section needs) is checked here.
Invariant: no number is invented: what is `auto` is estimated, and noted in the facts of the job.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffinv.assembly.instruments import instrument, noise_model, white
from diffinv.assembly.losses import build_loss, groups_of, use_of
from diffinv.config import Loaded, Section
from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.data.fits_rows import open_fits_rows
from diffinv.data.layouts import InputOptions
from diffinv.data.rows import SUFFIXES, Column, Rows, in_memory, open_arrays
from diffinv.engine.learn import Inspection, Job
from diffinv.engine.levels import noise_std, take
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.unknown import UnknownLevel
from diffinv.reconstructors import designs
from diffinv.reconstructors.observed import diagonal
from diffinv.sections import terms as t
from diffinv.sections import train as s
from diffinv.training.measured import Columns, MeasuredRows
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Measured, Source, Subset

_COMPLEX = s.FourierOperator | s.VisibilitiesOperator


def build_job(loaded: Loaded[s.TrainConfig], folder: Path) -> Job:
    """The training that a configuration describes.

    Arguments: loaded. folder: where modules of `data.callable` are looked for, beside the working directory.
    Raises: ConfigError, a line for each thing that does not fit together; InputError for data that cannot be used.
    """
    config = loaded.config
    _check_together(loaded)
    source, unit, facts = measurements(loaded, folder)
    training = config.training
    multipliers = [term for term in config.loss if isinstance(term, t.UnsureLoss)]
    start = None if not multipliers or multipliers[0].start == "auto" else multipliers[0].start
    pairs = isinstance(config.operator, _COMPLEX)
    fields = {name: getattr(training, name) for name in type(training).model_fields}
    fields["deadline"] = float("inf") if training.deadline is None else training.deadline
    return Job(
        source=source,
        held_out=config.data.held_out,
        scale=None if config.data.scale == "auto" else config.data.scale,
        unit=unit,
        design=build_design(config.network),
        use=use_of(config.loss, pairs=pairs, diagonal=_diagonal(config, source), seed=training.seed),
        loss=lambda levels: build_loss(config.loss, levels, pairs=pairs),
        start=start,
        multipliers=bool(multipliers),
        groups=groups_of(config.loss),
        plan=TrainingPlan(**fields),
        inspection=_inspection(config),
        identity=config.identity(),
        facts=facts,
    )


def _diagonal(config: s.TrainConfig, source: Source) -> bool:
    """Whether each datum is of one pixel; looked at only where a loss hides data."""
    splits = any(isinstance(term, t.SplittingLoss) for term in config.loss)
    return splits and diagonal(take(source, torch.tensor([0])).observation.operator) is not None


def build_design(section: Section) -> designs.Design:
    """The design of a network section: the class registered under its kind, with its other keys."""
    classes = {
        s.BackProjectedNetwork: designs.BackProjectedDesign,
        s.UnrolledNetwork: designs.UnrolledDesign,
        s.BlindSpotNetwork: designs.BlindSpotDesign,
        s.ScoreNetwork: designs.ScoreDesign,
        s.BottleneckNetwork: designs.BottleneckDesign,
    }
    return classes[type(section)](**section.model_dump(exclude={"kind"}))


def _inspection(config: s.TrainConfig) -> Inspection:
    section = config.identifiability
    number = lambda value: None if value == "auto" else value
    return Inspection(
        section.least_seen,
        section.allow_unidentifiable,
        number(section.signal),
        number(section.noise_level),
        section.rows,
        section.elements,
        required=not any(isinstance(term, t.SupervisedLoss) for term in config.loss),
    )


def _check_together(loaded: Loaded[s.TrainConfig]) -> None:
    """Sections that need each other. Raises ConfigError with all that is missing."""
    config, data = loaded.config, loaded.config.data
    problems: list[str] = []

    def need(wrong: bool, key: str, text: str) -> None:
        if wrong:
            problems.append(f"{loaded.where(key)}: {text}")

    need((data.path is None) == (data.callable is None), "data", "give either data.path or data.callable.")
    if data.path is not None:
        need(config.operator is None, "operator", "operator is missing; it has no default ({kind: identity} for denoising).")
        need(
            config.noise is None, "noise", "noise is missing; it has no default ({kind: unknown} where no loss asks for a level)."
        )
    arrays = data.path is not None and data.path.suffix.lower() in SUFFIXES
    names = [type(term) for term in config.loss]
    if arrays:
        masked = isinstance(config.operator, s.MaskOperator | s.FourierOperator)
        need(
            masked and data.mask is None, "operator", f"{getattr(config.operator, 'kind', '')} wants data.mask, the array's name."
        )
        blur = isinstance(config.operator, s.ConvolutionOperator)
        need(blur and data.psf is None and config.operator.psf is None, "operator", "convolution wants data.psf or operator.psf.")
        from_data = isinstance(config.noise, s.GaussianNoise) and config.noise.std == "data"
        need(from_data and data.variance is None, "noise.std", "data wants data.variance, the array's name.")
        need(t.SupervisedLoss in names and data.x is None, "loss", "supervised wants data.x, the name of the true images.")
        need(t.Noise2NoiseLoss in names and data.second is None, "loss", "noise2noise wants data.second, a second exposure.")
    elif data.path is not None:
        for key in ("variance", "mask", "psf"):
            need(getattr(data, key) is not None, f"data.{key}", "FITS files say this themselves (VAR, ERR, DQ, MASK, PSF).")
    rate = config.training.multiplier_rate
    visibilities = isinstance(config.operator, s.VisibilitiesOperator)
    need(visibilities and data.uv is None, "operator", "visibilities wants data.uv, the name of the (u, v) in wavelengths.")
    need(
        visibilities and data.path is not None and not arrays,
        "data.path",
        f"visibilities are read from {', '.join(SUFFIXES)}, not from FITS files; write them into one.",
    )
    need(t.UnsureLoss in names and rate is None, "training", "unsure wants training.multiplier_rate; 0.015 is a start.")
    need(names.count(t.UnsureLoss) > 1, "loss", "one unsure is enough.")
    score = isinstance(config.network, s.ScoreNetwork)
    need(t.Noise2ScoreLoss in names and not score, "network", "noise2score wants a network of kind score, which gives a score.")
    need(t.RecorruptedLoss in names and t.SplittingLoss in names, "loss", "recorrupted and splitting do not go together.")
    if problems:
        raise ConfigError("\n".join(problems))


def measurements(loaded: Loaded[s.TrainConfig], folder: Path, *, leave_out: bool = False) -> tuple[Source, str, dict[str, Any]]:
    """The measurements, their unit, and what was found in them.

    leave_out: rows and files without a good datum are left out, and counted in what was found; else they are errors.
    """
    config, data = loaded.config, loaded.config.data
    unit, empty = "", []
    if data.callable is not None:
        made = _call(loaded.where("data.callable"), data.callable, folder)
        if isinstance(made, Source | MeasuredBatch):
            if config.operator is not None or config.noise is not None:
                raise ConfigError(f"{loaded.where('data.callable')}: brings its operator and noise; leave out both sections.")
            return (made if isinstance(made, Source) else Measured(made)), unit, {}
        if not isinstance(made, Mapping):
            raise ConfigError(
                f"{loaded.where('data.callable')}: returned {type(made).__name__}; return a Source, a MeasuredBatch, "
                "or arrays by name."
            )
        if config.operator is None or config.noise is None:
            raise ConfigError(f"{loaded.where('data.callable')}: returned plain arrays; give the sections operator and noise.")
        rows = Rows(Path(data.callable), _arrays(loaded.where("data.callable"), made))
    elif data.path.suffix.lower() in SUFFIXES:
        rows = open_arrays(data.path)
    else:
        extra = tuple(name for name in (data.x, data.second) if name is not None)
        hdu = int(data.y) if data.y is not None and data.y.isdigit() else data.y
        rows, unit = open_fits_rows(data.path, InputOptions(hdu=hdu), extra, empty=empty if leave_out else None)
    try:
        source, facts = _measured(config, rows, leave_out)
    except InputError:
        raise
    except DiffinvError as error:
        raise type(error)(f"{rows.path}: {error}") from error
    if empty:
        facts["left out"] = f"{len(empty)} files without a good pixel, {empty[0]} first"
    return source, unit, facts


def _measured(config: s.TrainConfig, rows: Rows, leave_out: bool) -> tuple[Source, dict[str, Any]]:
    data = config.data
    fits = "good" in rows.columns and data.path is not None and data.path.suffix.lower() not in SUFFIXES
    own = lambda name: name if name in rows.columns else None
    columns = Columns(
        y="y" if fits or data.y is None else data.y,
        x=data.x,
        second=data.second,
        variance=own("variance") if fits else data.variance,
        mask="good" if fits else data.mask,
        psf=own("psf") if fits else data.psf,
        uv=data.uv,
        pairs=isinstance(config.operator, _COMPLEX),
        axes=1 if isinstance(config.operator, s.VisibilitiesOperator) else 2,
    )
    if isinstance(config.operator, s.ConvolutionOperator) and config.operator.psf is None and columns.psf is None:
        raise InputError(f"{rows.path}: the data have no PSF; add PSF extensions, or give operator.psf.")
    source = MeasuredRows(rows, columns, instrument(config.operator), lambda f: UnknownLevel(f.good))
    facts: dict[str, Any] = {"arrays": {name: list(c.shape) for name, c in sorted(rows.columns.items())}}
    kept = source.usable() if leave_out else torch.arange(len(source))
    if not len(kept):
        raise InputError(f"{rows.path}: none of its {len(source)} rows has a good datum; look at masks and variances.")
    if len(kept) < len(source):
        facts["left out"] = f"{len(source) - len(kept)} rows without a good datum"
    chosen = lambda found: found if len(kept) == len(found) else Subset(found, kept)
    if isinstance(config.noise, s.GaussianNoise) and config.noise.std == "auto":
        std, method = noise_std(chosen(source))
        facts["noise"] = {"std": [float(v) for v in std], "from": method}
        model = white(std)
    elif isinstance(config.noise, s.GaussianNoise) and config.noise.std == "data" and columns.variance is None:
        raise InputError(f"{rows.path}: the data have no variance; add VAR or ERR extensions, or give noise.std.")
    else:
        model = noise_model(config.noise)
    return chosen(MeasuredRows(rows, columns, source.operator, model)), facts


def _arrays(where: str, made: Mapping[str, Any]) -> dict[str, Column]:
    """What a callable returned, as columns."""
    try:
        return {str(name): in_memory(np.asarray(a)) for name, a in made.items()}
    except ValueError as error:
        cause = " ".join(str(error).split())[:160]
        raise ConfigError(f"{where}: returned what is no array ({cause}); give rows of one shape.") from error


def _call(where: str, name: str, folder: Path) -> object:
    """What `module:function` returns."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ConfigError(f"{where}: expected module:function, got {name!r}.")
    for place in (str(Path.cwd()), str(folder.resolve())):
        if place not in sys.path:
            sys.path.insert(0, place)
    try:
        return getattr(importlib.import_module(module), function)()
    except DiffinvError:
        raise
    except (Exception, SystemExit) as error:  # anybody's code
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: {name} raised {type(error).__name__}: {cause}") from error
