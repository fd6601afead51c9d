"""How long a training lasts, how fast it learns, and when it looks at itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffinv.core.checks import DiffinvError

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast.

    Arguments:
        steps: optimizer updates. batch_size: images an update and process. learning_rate: peak, reached after `warmup` steps,
            then a cosine to `final_rate` of it at the last step, or at `deadline` seconds of wall time if that is sooner.
        clip: largest norm of the weights' gradient; the multipliers' is not clipped.
        multiplier_rate, multiplier_momentum: of the gradient ascent on `Loss.multipliers`. A multiplier m of unit [m] has a
            gradient in [loss]/[m] and so a rate in [m]²/[loss]: (data unit)² for UNSURE. There is no default. The two play a
            game: with rate/(1 − momentum) too high against the learning rate they circle for ever, as the log shows.
        validate_every: steps between two looks at the held-out data. patience: looks without progress after which it stops.
        parts: in which a batch is passed one after the other, their gradients added, for less memory; divides batch_size.
        compiler: of the network, as torch.compile names its backends ("inductor" is the usual one), or "no".
        precision: of the networks in training ("no" is that of the weights); averages and validation keep that of the weights.
        trackers: names of trackers known to accelerate, or trackers, beside the JSON lines of the log.
    Raises: DiffinvError for a number out of its range (NaN is out of all) or an unknown precision.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    final_rate: float = 0.02
    ema_decay: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 500
    log_every: int = 100
    deadline: float = math.inf
    multiplier_rate: float | None = None
    multiplier_momentum: float = 0.9
    validate_every: int = 500
    patience: int = 10
    parts: int = 1
    compiler: str = "no"
    precision: Precision = "no"
    trackers: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "save_every", "log_every", "validate_every", "patience", "parts"):
            if getattr(self, name) < 1:
                raise DiffinvError(f"TrainingPlan: {name} is {getattr(self, name)}; give 1 or more.")
        if self.batch_size % self.parts:
            raise DiffinvError(f"TrainingPlan: parts is {self.parts}, which does not divide batch_size {self.batch_size}.")
        for name in ("learning_rate", "clip", "deadline"):
            if not getattr(self, name) > 0:
                raise DiffinvError(f"TrainingPlan: {name} is {getattr(self, name)}; give a number > 0.")
        for name in ("ema_decay", "multiplier_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise DiffinvError(f"TrainingPlan: {name} is {getattr(self, name)}; give a number from 0 to below 1.")
        if not 0 <= self.final_rate <= 1:
            raise DiffinvError(f"TrainingPlan: final_rate is {self.final_rate}; give a share, from 0 to 1.")
        if self.precision not in get_args(Precision):
            raise DiffinvError(f"TrainingPlan: precision {self.precision!r}; give one of {', '.join(get_args(Precision))}.")
        if self.multiplier_rate is not None and not self.multiplier_rate > 0:
            raise DiffinvError(f"TrainingPlan: multiplier_rate is {self.multiplier_rate}; the ascent wants a positive rate.")

    def rate(self, step: int, elapsed: float) -> float:
        """Learning rate at a step: linear warm-up, then cosine decay in the larger of the two fractions done."""
        done = min(1.0, max(step / self.steps, elapsed / self.deadline))
        cosine = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine
