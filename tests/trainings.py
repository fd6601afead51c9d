"""Small trainings: noisy smooth fields seen through the identity, and a 3 × 3 filter that learns to clean them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.unsure import Unsure, White
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from diffinv.reconstructors.base import Reconstructor
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Simulated, Source, split

SIGMA = 0.5


def reset_accelerate() -> None:
    """accelerate keeps its state in the process; a test starts and leaves without it."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rows(folder: Path) -> list[dict]:
    """The log without its seconds."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


class Filter(Reconstructor):
    """f(y) = w ∗ y, w 3 × 3, which starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.conv.weight.data.zero_()[..., 1, 1] = 1.0

    def forward(self, observation: Observation) -> Tensor:
        return self.conv(observation.y)


def fields(count: int = 32) -> Tensor:
    """Fields of unit scale and a correlation of some pixels: (count, 1, 8, 8)."""
    white = Rng.for_draws(7, range(count), 1).normal(torch.zeros(count, 1, 8, 8))
    return 3 * nn.functional.avg_pool2d(nn.functional.pad(white, [2] * 4, mode="circular"), 5, 1)


def observe(x: Tensor, rng: Rng) -> MeasuredBatch:
    """Measurements of x with white noise."""
    noise = Gaussian(torch.full((1,), SIGMA))
    return MeasuredBatch(Observation(x + SIGMA * rng.normal(x), Identity(tuple(x.shape[1:])), noise), x)


def sources() -> tuple[Source, Source]:
    return split(Simulated(fields(), observe, seed=5), 0.25)


def unsure() -> Loss:
    return Unsure(White().start(0.0), White())


PLAN = TrainingPlan(
    8, 4, 2e-2, warmup=1, ema_decay=0.9, save_every=3, log_every=2, validate_every=2, multiplier_rate=1e-2, patience=10
)


def trainer(folder: Path, loss: Loss, plan: TrainingPlan = PLAN, *, validated: bool = True) -> Trainer:
    train, validation = sources()
    return Trainer(Filter(), loss, train, plan, folder, validation if validated else None)
