"""How every network of the self-supervised benchmark is trained."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from selfsup_problems import TRAINED, Problem, Recipe
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.reconstructors.base import Reconstructor
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Simulated

TRAINING, HELD_OUT, SURVEY_SEED, BATCH, RATE = 8192, 256, 4200, 32, 1e-3


def plan_of(steps: int, seed: int, rate: float | None) -> TrainingPlan:
    """rate: of the multipliers, or None."""
    return TrainingPlan(
        steps,
        BATCH,
        RATE,
        warmup=50,
        ema_decay=0.99,
        seed=seed,
        multiplier_rate=rate,
        multiplier_momentum=0.0,
        save_every=steps,
        log_every=50,
    )


def held_out(problem: Problem, images: Tensor, seed: int) -> MeasuredBatch:
    """Measurements of the images that no network was trained on."""
    held = Simulated(images[TRAINING:], problem.observe, SURVEY_SEED + 1)
    return held.batch(torch.arange(HELD_OUT), Rng.for_draws(seed, range(HELD_OUT), 1))


def used(model: Reconstructor, batch: MeasuredBatch) -> Tensor:
    """Reconstructions of a batch, in parts."""
    parts = [batch.select(slice(start, start + 64)).observation for start in range(0, batch.observation.batch, 64)]
    with torch.no_grad():
        return torch.cat([model(part) for part in parts])


@dataclass(frozen=True)
class Trained:
    """model: as it is to be used. start: of the multipliers, or None. seconds: of the training."""

    model: Reconstructor
    loss: Loss
    start: float | None
    seconds: float


def trained(problem: Problem, recipe: Recipe, images: Tensor, seed: int, steps: int, folder: Path) -> Trained:
    """A network of one row; `folder` is gone afterwards."""
    source = Simulated(images[:TRAINING], problem.observe, SURVEY_SEED)
    some = source.batch(torch.arange(HELD_OUT), Rng.for_draws(seed, range(HELD_OUT), 1))
    loss = recipe.loss(some.observation.y)
    start = float(loss.multipliers[0].detach().abs().max()) if loss.multipliers else None
    torch.manual_seed(seed)
    plan = plan_of(steps, seed, None if recipe.rate is None else recipe.rate * start)
    begin = time.perf_counter()
    model = Trainer(recipe.model(TRAINED), loss, source, plan, folder).run()
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(recipe.use(model), loss, start, seconds)
