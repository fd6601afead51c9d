"""Training of a diffusion prior from start to file: from clean images, from noisy ones, or from any measurements by EM.

Images are learnt in units of one scale of the data set.
Invariant: `run.json` says what decides the weights; a folder never holds two trainings.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.core.rng import Rng
from diffinv.data.atomic import write_atomically
from diffinv.data.locks import only_one_in
from diffinv.engine.learn import is_main_process
from diffinv.engine.levels import evenly, fingerprint, prior_scale, take
from diffinv.engine.run import differences
from diffinv.losses.ambient import AmbientSure, BelowNoise
from diffinv.losses.base import CleanBatch, Loss
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.losses.identifiability import identifiability
from diffinv.operators.groups import Group
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import Preconditioned
from diffinv.priors.store import PriorCard, build_denoiser, save_prior
from diffinv.reconstructors.designs import initialise
from diffinv.schedules import LogNormal
from diffinv.training.augment import AsTheyAre, GroupViews
from diffinv.training.em import EmPlan, ExpectationMaximisation
from diffinv.training.expectation import EStep, PositiveFit, PosteriorMean
from diffinv.training.gaussian import GaussianFit
from diffinv.training.loop import Trainer
from diffinv.training.measured import Rescaled
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Certain, Mixture, Source, split

RESULT, RECORD = "prior.safetensors", "run.json"
_SOME = 2048  # rows of which small things are made: the Gaussian start, the map of variances
_ROWS = 256  # read together
_ELEMENTS = 0x1DE


@dataclass(frozen=True, eq=False)
class Images(Source):
    """Measurements that are the images, in views.

    Raises: InputError where a datum is masked: a clean image has none.
    """

    source: Source
    views: Callable[[Tensor, Rng], Tensor]

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, index: Tensor, rng: Rng) -> Batched:
        found = self.source.batch(index, rng)
        bad = ~found.good.flatten(1).all(1)
        if bool(bad.any()):
            row = self.source.number(int(index[bad.cpu()][0]))
            raise InputError(f"data: row {row} has bad pixels, and clean images have none; mend them, or learn by em.")
        return CleanBatch(self.views(found.data.y, rng))


@dataclass(frozen=True, eq=False)
class Setting:
    """What every way of learning is given: everything in units of the images' scale."""

    model: Preconditioned
    source: Source
    held_out: Source | None
    more: tuple[Source, int] | None
    plan: TrainingPlan
    schedule: LogNormal
    sigma_data: float
    folder: Path
    say: Callable[[str], None]

    @property
    def clean(self) -> DenoisingScoreMatching:
        return DenoisingScoreMatching(self.schedule, self.sigma_data)


class Learning(abc.ABC):
    """A way to a prior."""

    @abc.abstractmethod
    def train(self, setting: Setting) -> tuple[Denoiser, Tensor]:
        """The averaged denoiser, and the variance of the images a pixel (1, C, H, W), as far as the data tell."""


@dataclass(frozen=True)
class FromClean(Learning):
    """Denoising score matching. views: groups under which images are as likely as they are."""

    views: Group | None

    def train(self, setting: Setting) -> tuple[Denoiser, Tensor]:
        views = AsTheyAre() if self.views is None else GroupViews(self.views)
        source = Images(setting.source, views)
        held = None if setting.held_out is None else Images(setting.held_out, AsTheyAre())
        for part in (Images(setting.source, AsTheyAre()), held):
            _look_at_all(part, lambda batch: None)
        average = Trainer(setting.model, setting.clean, source, setting.plan, setting.folder, held).run(resume=True)
        return average, _some(source).var(0, keepdim=True)


@dataclass(frozen=True)
class FromNoisy(Learning):
    """A loss on noisy images. loss: (schedule, σ_d) → loss."""

    loss: Callable[[LogNormal, float], Loss]

    def train(self, setting: Setting) -> tuple[Denoiser, Tensor]:
        loss, source = self.loss(setting.schedule, setting.sigma_data), _mixed(setting)
        for part in (setting.source, setting.held_out):
            _look_at_all(part, loss.check)
        average = Trainer(setting.model, loss, source, setting.plan, setting.folder, setting.held_out).run(resume=True)
        return average, _less_noise(setting.source)


@dataclass(frozen=True)
class ByExpectation(Learning):
    """Laps of EM.

    Arguments: em, expect. start: a Gaussian fit to the data, the prior of the first E-step; None: positive fits instead of its
    draws. first_steps: updates by
    `AmbientSure` before it, whose D(y, σ_n) is then the first E-step. noisy: whether the data are noisy images
    without gaps, which teach the levels above their noise beside the draws, unless there are views or a reduced precision, which
    data do not go with: all levels then learn from draws alone. views: of draws.
    """

    em: EmPlan
    expect: EStep
    start: Callable[[Source], GaussianFit] | None
    first_steps: int
    noisy: bool
    views: Group | None

    def train(self, setting: Setting) -> tuple[Denoiser, Tensor]:
        if setting.held_out is None:
            raise ConfigError("data.held_out: em is scored on held-out measurements; give a share of 0.1 or so.")
        _tell_sight(setting, self.views)
        sure = AmbientSure(setting.schedule, setting.sigma_data)
        beside = self.noisy and self.views is None and setting.plan.precision == "no"
        start, steps = setting.model, (PositiveFit(), self.expect)
        if self.start is not None:
            fit = self.start(setting.source)
            rise = (fit.log_likelihood[-1] - fit.log_likelihood[0]) / min(_SOME, len(setting.source))
            setting.say(f"Gaussian start: the log-likelihood rose by {rise:.4g} a row in {len(fit.log_likelihood) - 1} laps")
            start, steps = fit.prior, (self.expect,)
        else:
            setting.say("first lap: positive images that fit the data")
        if self.first_steps:
            plan = replace(setting.plan, steps=self.first_steps)
            first = Trainer(setting.model, sure, setting.source, plan, setting.folder / "first", setting.held_out)
            start, steps = first.run(resume=True, more=True), (PosteriorMean(), self.expect)
            setting.model.load_state_dict(start.state_dict())
        em = ExpectationMaximisation(
            model=setting.model,
            source=setting.source,
            held_out=setting.held_out,
            start=start,
            expect=steps,
            loss=sure + BelowNoise(setting.schedule, setting.sigma_data) if beside else setting.clean,
            views=AsTheyAre() if self.views is None else GroupViews(self.views),
            plan=setting.plan,
            em=self.em,
            folder=setting.folder / "em",
            watch=sure if self.noisy else None,
            beside=beside,
            say=setting.say,
        )
        return em.run(resume=True), em.draws(self.em.laps - 1).var(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class PriorJob:
    """All of a training, in the unit of the data.

    Arguments: source: measurements. held_out: share. scale: in the image's unit, or None for `prior_scale`. more: clean images
    beside them, and how often each counts. card: with name and size to be filled in. schedule: of levels, in units of the
    scale. learning, plan. identity: the configuration. facts: what was found on the way.
    """

    source: Source
    held_out: float
    scale: float | None
    more: tuple[Source, int] | None
    card: PriorCard
    schedule: LogNormal
    learning: Learning
    plan: TrainingPlan
    identity: dict[str, Any]
    facts: dict[str, Any]


def learn_prior(job: PriorJob, out: Path, *, resume: bool, say: Callable[[str], None]) -> Path:
    """Train, and write the prior to `out`; returns its path.

    Raises: ConfigError if the folder holds a training and `resume` is not set, or another one, with the differences, or one
    that is at work. InputError for images that do not fit the card.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give --out the name of a folder.")
    with only_one_in(out) if is_main_process() else nullcontext():
        return _learn_prior(job, out, resume=resume, say=say)


def _learn_prior(job: PriorJob, out: Path, *, resume: bool, say: Callable[[str], None]) -> Path:
    main = is_main_process()
    tell = say if main else lambda line: None
    shape = tuple(take(job.source, torch.tensor([0])).observation.image_shape)
    card = _fitted(job.card, shape, out.name)
    scale = prior_scale(job.source) if job.scale is None else job.scale
    found = {**job.facts, "scale": scale, "sha256": fingerprint(job.source)}
    found |= {"sha256 of more": fingerprint(job.more[0])} if job.more is not None else {}
    record = {"configuration": job.identity, "found": found}
    if main:
        _claim(out, record, resume)
    train, held = split(job.source, job.held_out) if job.held_out else (job.source, None)
    tell(f"{len(train)} rows to learn from, {0 if held is None else len(held)} held out; images {shape}; scale {scale:.6g}")
    for key, value in job.facts.items():
        if key != "arrays":
            tell(f"{key}: {value}")
    model = build_denoiser(card)
    initialise(model, job.plan.seed)
    setting = Setting(
        model,
        Rescaled(train, scale),
        None if held is None else Rescaled(held, scale),
        None if job.more is None else (Rescaled(job.more[0], scale), job.more[1]),
        job.plan,
        job.schedule,
        card.sigma_data,
        out,
        tell,
    )
    average, variance = job.learning.train(setting)
    if main:
        text = f"{type(job.learning).__name__} on {len(train)} rows, {job.plan.steps} steps of {job.plan.batch_size}"
        save_prior(out / RESULT, average.cpu(), replace(card, training=text), variance=variance.cpu())
    return out / RESULT


def _fitted(card: PriorCard, shape: tuple[int, ...], name: str) -> PriorCard:
    """The card of images of this shape."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(f"data: images of {shape}; a prior has square fields, so cut them.")
    if len(card.bands) != shape[0]:
        raise InputError(f"data: images of {shape[0]} bands, but prior.bands names {', '.join(card.bands)}; name one a band.")
    return replace(card, name=name, size=shape[1])


def _claim(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Write the record, or compare it with the one that is there."""
    path, plain = out / RECORD, json.loads(json.dumps(record))
    if path.exists():
        if not resume:
            raise ConfigError(f"{out}: holds a training already; go on with --resume, or give another --out.")
        changes = differences(json.loads(path.read_text(encoding="utf-8")), plain)
        if changes:
            listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, old, new in changes)
            raise ConfigError(f"{out}: holds another training ({listed}); use another --out.")
    write_atomically(path, (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode())


def _mixed(setting: Setting) -> Source:
    """Noisy images, and clean ones beside them if there are any."""
    if setting.more is None:
        return setting.source
    clean, times = setting.more
    return Mixture((setting.source, Certain(Images(clean, AsTheyAre()))), (1, times))


def _look_at_all(source: Source | None, check: Callable[[Batched], None]) -> None:
    """Read and check every row, for a refusal now rather than when the row is drawn, hours later.

    Raises: as `check`, with the number of the row.
    """
    for rows in () if source is None else source.chunks(_ROWS):
        batch = source.batch(rows, Rng.for_draws(0, rows, 1))
        try:
            check(batch)
        except DiffinvError as error:
            _name(source, batch, rows, check)
            raise error


def _name(source: Source, batch: Batched, rows: Tensor, check: Callable[[Batched], None]) -> None:
    """Raise what `check` finds in the first row that it refuses."""
    for k, row in enumerate(rows):
        try:
            check(batch.select(slice(k, k + 1)))
        except DiffinvError as error:
            raise type(error)(f"data: row {source.number(int(row))}: {error}") from error


def _some(source: Source) -> Tensor:
    rows = evenly(len(source), _SOME)
    return torch.cat([source.batch(part, Rng.for_draws(0, part, 1)).x for part in rows.split(_ROWS)])


def _less_noise(source: Source) -> Tensor:
    """The variance of noisy images less that of their noise, at least 1 % of its mean."""
    data = take(source, evenly(len(source), _SOME)).observation
    variance = data.y.var(0, keepdim=True) - data.noise.variance(torch.zeros_like(data.y)).mean(0, keepdim=True)
    return variance.clamp_min(0.01 * float(variance.mean().clamp_min(torch.finfo(torch.float32).tiny)))


def _tell_sight(setting: Setting, group: Group | None) -> None:
    """What the data can teach, with the groups of the M-step."""
    batch = take(setting.source, evenly(len(setting.source), 16))
    if not batch.observation.quadratic:
        return
    found = identifiability(batch.observation, group, rng=Rng.for_draws(_ELEMENTS, [0], 1), signal=setting.sigma_data)
    setting.say(f"{found}; what is unseen stays that of the start")
