"""Sources: what a training draws its batches from.

Invariant: row k of a batch depends on `index[k]` and on stream k alone, never on its batch-mates. Measured and simulated data
depend on the index alone: an image has one operator and one noise realisation for the whole training, as on the sky. With
fresh noise at each look a network would average the noise away, and its self-supervised loss would say nothing of real data.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from diffinv.core.batched import Batched, collate
from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import CleanBatch, MeasuredBatch
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.independent import over
from diffinv.operators.algebra import Identity
from diffinv.reconstructors.observed import require_identity

_PARTS = 0x4D17  # names the streams of a mixture's parts
_SPLIT = 0x5917  # any constant: who is held out must not follow the seed of the training


class Source(abc.ABC):
    """Images or measurements by number."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def batch(self, index: Tensor, rng: Rng) -> Batched:
        """The rows `index` (B,), repeats allowed, as a batch of B on the device of `rng`, which has B streams."""

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        """All rows once, in batches of at most `size` that can be had together."""
        return torch.arange(len(self)).split(size)

    def number(self, row: int) -> int:
        """What the user calls a row: its number in the data of which these are some."""
        return row


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
class Certain(Source):
    """Clean or simulated images as measurements whose noise is their rounding: σ = ε rms, ε of float32.

    They train every level of a loss that takes noisy images, beside measurements of any noise (`Mixture`).

    Arguments: source: of `CleanBatch`.
    """

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        x = self.source.batch(index, rng).x
        rms = x.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        noise = Gaussian(torch.finfo(torch.float32).eps * rms)
        return MeasuredBatch(Observation(x, Identity(tuple(x.shape[1:])), noise), x)


@dataclass(frozen=True, eq=False)
class Drawn(Source):
    """Measurements with an image for each that could be behind it.

    Arguments: source: of N `MeasuredBatch` rows. images: (L · N, *image), L for each row, one after the other. views:
    augmentation (x, rng) → x of the images, which then need not fit their data any more.
    """

    source: Source
    images: Tensor
    views: Callable[[Tensor, Rng], Tensor]

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        found = self.source.batch(index % len(self.source), rng)
        return replace(found, x=self.views(self.images[index].float().to(rng.keys.device), rng))


@dataclass(frozen=True, eq=False)
class Mixture(Source):
    """Rows of several sources of images seen directly, each with its own white or per-pixel Gaussian noise.

    Arguments: parts: of `MeasuredBatch`, A the identity. times: how often the rows of each part are counted, whole numbers:
    what a few good images are worth. A batch has no truths unless every part has.
    Raises: DiffinvError if parts and times are not of one length, or images of different shapes meet.
    """

    parts: tuple[Source, ...]
    times: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.times) or any(t < 1 for t in self.times):
            raise DiffinvError(f"Mixture: {len(self.parts)} parts and times {self.times}; give one whole number ≥ 1 a part.")

    def __len__(self) -> int:
        return sum(len(part) * times for part, times in zip(self.parts, self.times, strict=True))

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        found, places, start = [], [], 0
        for part, times in zip(self.parts, self.times, strict=True):
            stop = start + len(part) * times
            rows = ((index >= start) & (index < stop)).nonzero()[:, 0]
            if len(rows):
                # streams of their own: the loss draws its noise levels from those of the batch
                batch = part.batch((index[rows] - start) % len(part), rng.select(rows.to(rng.keys.device)).spawn(_PARTS))
                found.append(_per_pixel(batch))
                places.append(rows)
            start = stop
        if any(batch.x is None for batch in found):
            found = [replace(batch, x=None) for batch in found]
        if len({tuple(batch.observation.y.shape[1:]) for batch in found}) > 1:
            shapes = sorted({tuple(batch.observation.y.shape[1:]) for batch in found})
            raise DiffinvError(f"Mixture: its parts have images of the shapes {shapes}; cut them to one.")
        return collate(found).select(torch.cat(places).argsort())


@dataclass(frozen=True, eq=False)
class Surveys(Source):
    """Rows of several surveys, each with an instrument of its own: data of any shape, of images of one.

    For expectation maximisation, whose E-step takes the chunks. A batch is of one survey.

    Arguments: parts: of measurements.
    Raises: DiffinvError without parts, and from `batch` if rows of two meet.
    """

    parts: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise DiffinvError("Surveys: no parts; give one source a survey.")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, index: Tensor, rng: Rng) -> Batched:
        start = 0
        for part in self.parts:
            if bool(((index >= start) & (index < start + len(part))).all()):
                return part.batch(index - start, rng)
            start += len(part)
        raise DiffinvError(f"Surveys: rows {int(index.min())} to {int(index.max())} are of several surveys; take `chunks`.")

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        starts = accumulate(map(len, self.parts), initial=0)
        return tuple(start + rows for start, part in zip(starts, self.parts) for rows in part.chunks(size))


def _per_pixel(batch: MeasuredBatch) -> MeasuredBatch:
    """With a noise level a pixel, so that white and uneven noise fit in one batch."""
    data = batch.observation
    require_identity("Mixture", data)
    if not isinstance(data.noise, Gaussian) or data.noise.mask is not None:
        raise DiffinvError(
            f"Mixture: {type(data.noise).__name__} does not mix; its parts must have white or per-pixel Gaussian noise, unmasked."
        )
    std = over(data.noise.std, data.y).expand(data.y.shape)
    return MeasuredBatch(replace(data, noise=Gaussian(std)), batch.x)


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

    def number(self, row: int) -> int:
        return self.source.number(int(self.rows[row]))

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        parts = (torch.isin(self.rows, part).nonzero()[:, 0] for part in self.source.chunks(len(self.source)))
        return tuple(chunk for rows in parts if len(rows) for chunk in rows.split(size))


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
