"""From the sections of a prior's configuration to its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from diffinv.assembly.job import measurements
from diffinv.assembly.losses import build_group
from diffinv.config import Loaded, Section
from diffinv.core.checks import ConfigError, UnsupportedError
from diffinv.engine.draws import Method
from diffinv.engine.levels import evenly, take
from diffinv.engine.prior import ByExpectation, FromClean, FromNoisy, Learning, PriorJob
from diffinv.guidance.base import Gmres
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.likelihood import Observation
from diffinv.losses.ambient import Ambient, AmbientSure, white_level
from diffinv.losses.base import MeasuredBatch
from diffinv.losses.topping import direct, floor
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.groups import Group
from diffinv.priors.store import PriorCard
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogNormal, LogUniform
from diffinv.sections import prior as p
from diffinv.sections import train as s
from diffinv.training.em import EmPlan
from diffinv.training.expectation import EStep, GuidedDraw, ReverseFromData
from diffinv.training.gaussian import GaussianFit, fourier_em, low_rank_em
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Source

_SOME = 2048


def build_prior_job(loaded: Loaded[p.PriorConfig], folder: Path) -> PriorJob:
    """The training that a configuration describes.

    Arguments: as `build_job`. Raises: ConfigError, a line for each thing that does not fit together; InputError for data that
    cannot be used.
    """
    config = loaded.config
    _check_together(loaded)
    source, facts = _data(loaded, config.data, config.operator, config.noise, folder)
    more = None
    if config.more is not None:
        more = (_data(loaded, config.more.data, None, None, folder)[0], config.more.times)
    fields = {name: getattr(config.training, name) for name in type(config.training).model_fields}
    fields["deadline"] = float("inf") if config.training.deadline is None else config.training.deadline
    section = config.prior
    sizes = {name: getattr(section, name) for name in ("bands", "pixel_scale", "target_fwhm", "widths", "blocks")}
    levels = {"sigma_min": section.sigma_min, "sigma_max": section.sigma_max}
    return PriorJob(
        source=source,
        held_out=config.data.held_out,
        scale=None if config.data.scale == "auto" else config.data.scale,
        more=more,
        card=PriorCard(name="", size=0, sigma_data=1.0, training="", **sizes, **levels),
        schedule=LogNormal(section.levels.mean, section.levels.std),
        learning=_learning(config, source),
        plan=TrainingPlan(**fields),
        identity=config.identity(),
        facts=facts,
    )


def _data(
    loaded: Loaded[p.PriorConfig], data: s.DataSection, operator: Section | None, noise: Section | None, folder: Path
) -> tuple[Source, dict]:
    """A source of measurements; images without an operator and noise are seen as they are, with noise of unknown level."""
    operator = s.IdentityOperator(kind="identity") if operator is None else operator
    noise = s.UnknownNoise(kind="unknown") if noise is None else noise
    sections = SimpleNamespace(data=data, operator=operator, noise=noise)
    source, _, facts = measurements(Loaded(sections, loaded.places), folder, leave_out=True)
    return source, facts


def _check_together(loaded: Loaded[p.PriorConfig]) -> None:
    """Sections that need each other. Raises ConfigError with all that is missing."""
    config, problems = loaded.config, []
    clean, em = isinstance(config.learning, p.CleanLearning), isinstance(config.learning, p.EmLearning)
    noisy = not clean and not em
    need = lambda wrong, key, text: problems.append(f"{loaded.where(key)}: {text}") if wrong else None
    need(config.data.path is None, "data", "data.path is missing; give a folder of FITS files, or arrays.")
    for key in ("operator", "noise"):
        given = getattr(config, key) is not None
        need(clean and given, key, "clean images have none; leave it out, or learn by gsure or em.")
        need(not clean and not given, key, f"{key} is missing; it has no default.")
    seen = isinstance(config.operator, s.IdentityOperator)
    need(noisy and not seen, "learning.kind", "ambient and gsure learn from noisy images; use em for other operators.")
    need(em and not seen and config.learning.first_steps > 0, "learning.first_steps", "is for noisy images, operator identity.")
    both = em and config.learning.start == "positive" and config.learning.first_steps > 0
    need(both, "learning.first_steps", "makes the first draws itself; set it to 0, or give another start.")
    need(config.more is not None and not noisy, "more", "images beside the data are for ambient and gsure.")
    if problems:
        raise ConfigError("\n".join(problems))


def _learning(config: p.PriorConfig, source: Source) -> Learning:
    section = config.learning
    if isinstance(section, p.CleanLearning):
        return FromClean(_views(section.views))
    if isinstance(section, p.AmbientLearning):
        return FromNoisy(lambda schedule, size: Ambient(schedule, size, section.power))
    if isinstance(section, p.GsureLearning):
        return FromNoisy(AmbientSure)
    start = {
        "fourier": _fourier(section.start_laps),
        "low_rank": _low_rank(section.rank, section.start_laps),
        "positive": None,
    }[section.start]
    noisy, white = _kind(source) if isinstance(config.operator, s.IdentityOperator) else (False, False)
    if section.first_steps and not white:
        raise ConfigError(
            "learning.first_steps: the noise is not white, or has gaps, so that D(y, σ_n) is no first draw; set it to 0."
        )
    return ByExpectation(
        em=EmPlan(section.laps, section.chunk, section.replay),
        expect=_expectation(config.prior, section, white),
        start=start,
        first_steps=section.first_steps,
        noisy=noisy,
        views=_views(section.views),
    )


def _expectation(prior: p.PriorSection, section: p.EmLearning, exact: bool) -> EStep:
    """Exact where the data are images with white noise; otherwise the guided sampler of `diffinv sample`."""
    if exact:
        return ReverseFromData(StochasticMultistep(), section.levels, prior.sigma_min)
    default = Method()
    solver = Gmres(section.iterations, default.guidance.solver.tol, default.guidance.solver.inner)
    schedule = LogUniform(prior.sigma_min, prior.sigma_max)
    return GuidedDraw(default.sampler, MomentMatching(solver), schedule, section.levels, solver.products)


def _kind(source: Source) -> tuple[bool, bool]:
    """Of noisy images: whether every pixel is seen with Gaussian noise of known covariance, and whether that is white, each row's
    at a level of its own. Looks at all rows: one with a gap would stop a training hours later."""
    white = True
    for rows in torch.arange(len(source)).split(_SOME):
        try:
            data = direct("em", take(source, rows))
            floor(data.noise, data.y)
        except UnsupportedError:
            return False, False
        white = white and _white(data)
    return True, white


def _white(data: Observation) -> bool:
    try:
        white_level("em", data)
    except UnsupportedError:
        return False
    return True


def _views(sections: Sequence[Section]) -> Group | None:
    return build_group(sections) if sections else None


def _fourier(laps: int):
    def fit(source: Source) -> GaussianFit:
        return fourier_em([_even(take(source, evenly(len(source), _SOME)))], laps=laps, mean_image=True)

    return fit


def _even(batch: MeasuredBatch) -> Observation:
    """With one noise level a row and channel in place of one a pixel, its rms over good data, and 0 for bad ones among good:
    what a start can do with a spectrum; the E-steps have the noise as it is. A channel that is bad altogether stays masked."""
    data, good = batch.data, batch.good
    if not isinstance(data.noise, Gaussian):
        return data
    variance = data.noise.variance(torch.zeros_like(data.y)).where(good, 0.0)
    level = variance.flatten(2).sum(2) / good.flatten(2).sum(2).clamp_min(1)
    seen = good.flatten(2).any(2)[..., None, None].expand(good.shape)
    return replace(data, noise=Gaussian(level.sqrt().clamp_min(torch.finfo(level.dtype).tiny), None if seen.all() else seen))


def _low_rank(rank: int, laps: int):
    def fit(source: Source) -> GaussianFit:
        rows = evenly(len(source), _SOME)
        fewer = min(rank, len(rows) - 1, take(source, torch.tensor([0])).observation.y[0].numel() - 1)
        return low_rank_em([take(source, rows).observation], rank=fewer, laps=laps)

    return fit
