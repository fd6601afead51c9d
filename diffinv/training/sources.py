"""Sources: what a training draws its batches from.

Invariant: row k of a batch depends on `index[k]` and on stream k alone, never on its batch-mates. Measured and simulated data
depend on the index alone: an image has one operator and one noise realisation for the whole training, as on the sky. With
fresh noise at each look a network would average the noise away, and its self-supervised loss would say nothing of real data.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import CleanBatch, MeasuredBatch

_SPLIT = 0x5917  # any constant: who is held out must not follow the seed of the training


class Source(abc.ABC):
    """Images or measurements by number."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def batch(self, index: Tensor, rng: Rng) -> Batched:
        """The rows `index` (B,), repeats allowed, as a batch of B on the device of `rng`, which has B streams."""


@dataclass(frozen=True, eq=False)
class CleanImages(Source):
    """Views of clean images.

    Arguments: images: (N, C, H, W) in memory, in the unit of the prior. views: augmentation (x, rng) → x.
    """

    images: Tensor
    views: Callable[[Tensor, Rng], Tensor]

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, index: Tensor, rng: Rng) -> CleanBatch:
        return CleanBatch(self.views(self.images[index].float().to(rng.keys.device), rng))


@dataclass(frozen=True, eq=False)
class Measured(Source):
    """Measurements in memory; what all rows share (operator, noise level) stays shared.

    Arguments: data: N rows.
    """

    data: MeasuredBatch

    def __len__(self) -> int:
        return self.data.batch

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        chosen, rows = self.data.select(index), len(index)
        return MeasuredBatch(
            _full(chosen.observation, rows),
            None if chosen.x is None else chosen.x.expand(rows, *chosen.x.shape[1:]),
            None if chosen.second is None else _full(chosen.second, rows),
        ).to(rng.keys.device)


def _full(observation: Observation, rows: int) -> Observation:
    """With a datum for every row: losses draw their random numbers like y."""
    return replace(observation, y=observation.y.expand(rows, *observation.y.shape[1:]))


@dataclass(frozen=True, eq=False)
class Simulated(Source):
    """Simulated measurements, made anew when asked for and the same every time.

    The streams given to `observe` are keyed by (seed, number of the image); those of the training do not reach it.

    Arguments: images: (N, C, H, W) in memory, the unit that `observe` expects. observe: (x, rng) → measurements of x (B, C, H, W)
    in float32, random in `rng` alone. seed: of the simulated survey, not of the training.
    """

    images: Tensor
    observe: Callable[[Tensor, Rng], MeasuredBatch]
    seed: int

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        device = rng.keys.device
        return self.observe(self.images[index].float().to(device), Rng.for_draws(self.seed, index, 1).to(device))


@dataclass(frozen=True, eq=False)
class Subset(Source):
    """Some rows of a source, which keep what they are: their measurements do not change by the choice.

    Arguments: source. rows: (n,) int64.
    """

    source: Source
    rows: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    def batch(self, index: Tensor, rng: Rng) -> Batched:
        return self.source.batch(self.rows[index], rng)


def split(source: Source, held_out: float) -> tuple[Subset, Subset]:
    """(train, validation): a row is held out by a hash of its number, so that a source that grows keeps its split.

    Arguments: held_out: the expected share of the second part, in (0, 1).
    Raises: DiffinvError for another share, and where a part would be empty.
    """
    if not 0 < held_out < 1:
        raise DiffinvError(f"split: held_out is {held_out}; give the share to hold out, between 0 and 1.")
    numbers = torch.arange(len(source))
    hashed = Rng.for_draws(_SPLIT, numbers, 1).uniform(torch.zeros(len(source), 1, dtype=torch.float64))[:, 0]
    out = hashed < held_out
    if bool(out.all()) or not bool(out.any()):
        raise DiffinvError(
            f"split: a share of {held_out} of {len(source)} rows leaves a part empty; give more rows or another share."
        )
    return Subset(source, numbers[~out]), Subset(source, numbers[out])
