"""Measurements from arrays on disk, a batch at a time, with the operator and the noise that a configuration gives them.

A datum is good where the mask says so, it is finite, and its variance, where one is given, is finite and > 0. What is not
good is 0 in y and has no weight.
Invariant: a row's measurement depends on its number alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import InputError
from diffinv.core.rng import Rng
from diffinv.data.rows import Rows
from diffinv.likelihood import Observation
from diffinv.losses.base import MeasuredBatch
from diffinv.noise.base import Noise
from diffinv.operators.base import LinearOperator
from diffinv.reconstructors.units import observation_in_units
from diffinv.training.sources import Source

_CHUNK = 256  # rows read at once when all are looked at


@dataclass(frozen=True, eq=False)
class Fields(Batched):
    """Some rows of a data set, in the unit of the data.

    Arguments: y: (B, C, …), 0 where not good. good: (B, C, …), or None if all are. variance: (1|B, C, …), or None.
    mask: (1|B, …) as it was given, or None. psf: (1|B, 1|C, kh, kw), or None. x: (B, C, H, W), or None. uv: (1|B, M, 2), or
    None.
    """

    y: Tensor
    good: Tensor | None
    variance: Tensor | None
    mask: Tensor | None
    psf: Tensor | None
    x: Tensor | None
    uv: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the data of a row."""
        return tuple(self.y.shape[1:])


@dataclass(frozen=True)
class Columns:
    """Names of the arrays, None for what there is not.

    pairs: whether data are complex, as pairs or as complex numbers. axes: of a row's data, without channels and pairs.
    """

    y: str
    x: str | None = None
    second: str | None = None
    variance: str | None = None
    mask: str | None = None
    psf: str | None = None
    uv: str | None = None
    pairs: bool = False
    axes: int = 2


@dataclass(frozen=True, eq=False)
class MeasuredRows(Source):
    """Measurements of a data set.

    Arguments: rows. columns: which of its arrays are what. operator, noise: of some rows, in the unit of the data.
    Raises: InputError, when made, where arrays are missing or do not fit each other; when read, for a row without a good datum.
    """

    rows: Rows
    columns: Columns
    operator: Callable[[Fields], LinearOperator]
    noise: Callable[[Fields], Noise]

    def __post_init__(self) -> None:
        shape = self.rows.column(self.columns.y).shape
        if shape[:1] == (0,):
            raise InputError(f"{self.rows.path}: array {self.columns.y!r} has no rows; give one measurement or more.")
        wanted = self._inner(self.columns.y)
        if len(shape) - 1 not in (wanted, wanted + 1):
            raise InputError(
                f"{self.rows.path}: array {self.columns.y!r} has shape {shape}; give (rows, [channels,] …) with {wanted} axes of "
                "data a row."
            )
        c = self.columns
        for name in (c.x, c.second, c.variance, c.mask, c.psf, c.uv):
            if name is not None:
                self._check_shape(name, shape)

    def _check_shape(self, name: str, data: tuple[int, ...]) -> None:
        """Whether an array fits data of all rows of shape `data`."""
        shape = self.rows.column(name).shape
        if not self._shared(name) and shape[0] != data[0]:
            raise InputError(
                f"{self.rows.path}: array {name!r} has shape {shape}, but there are {data[0]} rows; give one entry a row, or one "
                "for all without the first axis."
            )
        start = len(data) - self._inner(self.columns.y)
        field = data[start : start + self.columns.axes]
        if (
            (name in (self.columns.variance, self.columns.mask) and shape[-self.columns.axes :] != field)
            or (name == self.columns.second and shape != data)
            or (name == self.columns.uv and (len(shape) > 3 or shape[-2:] != (*field, 2)))
        ):
            raise InputError(f"{self.rows.path}: array {name!r} has shape {shape}, which does not fit data of {data}; cut it.")

    def __len__(self) -> int:
        return self.rows.column(self.columns.y).shape[0]

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        first, second = self.fields(index), None
        operator = self._operator(first)
        observation = Observation(first.y, operator, self.noise(first))
        if self.columns.second is not None:
            other = self.fields(index, self.columns.second)
            second = Observation(other.y, operator, self.noise(other))
        return MeasuredBatch(observation, first.x, second).to(rng.keys.device)

    def _operator(self, fields: Fields) -> LinearOperator:
        """The operator, once data and true images are known to fit it."""
        operator = self.operator(fields)
        for name, given, wanted in (
            (self.columns.y, fields.y, operator.out_shape),
            (self.columns.x, fields.x, operator.in_shape),
        ):
            if given is not None and tuple(given.shape[1:]) != tuple(wanted):
                raise InputError(
                    f"{self.rows.path}: array {name!r} holds {tuple(given.shape[1:])} a row, but {type(operator).__name__} takes "
                    f"images {tuple(operator.in_shape)} to data {tuple(operator.out_shape)}; look at the operator's section."
                )
        return operator

    def fields(self, index: Tensor, exposure: str | None = None) -> Fields:
        """The rows `index` (B,) of the data, or of another exposure."""
        name = self.columns.y if exposure is None else exposure
        number = index.cpu().numpy()
        y = self._values(name, number)
        variance = self._optional(self.columns.variance, number)
        mask = self._optional(self.columns.mask, number)
        good = _good(y, variance, mask)
        empty = ~good.reshape(len(good), -1).any(1)
        if empty.any():
            raise InputError(
                f"{self.rows.path}: row {number[empty][0]} of {name!r} has no good datum (masked, not finite, or variance ≤ 0); "
                "leave it out."
            )
        with np.errstate(over="ignore"):
            y = np.where(good, y, 0).astype(np.float32)
        return Fields(
            torch.from_numpy(y),
            None if good.all() else torch.from_numpy(good),
            None if variance is None else torch.from_numpy(np.array(np.broadcast_to(variance, good.shape), np.float64)),
            None if mask is None else torch.from_numpy(mask != 0),
            self._psf(number),
            self._truth(number),
            self._baselines(number),
        )

    def usable(self) -> Tensor:
        """Numbers of the rows that have a good datum: (n,), int64."""
        found = []
        for number in np.array_split(np.arange(len(self)), max(1, len(self) // _CHUNK)):
            y = self._values(self.columns.y, number)
            variance, mask = (self._optional(name, number) for name in (self.columns.variance, self.columns.mask))
            found.append(number[_good(y, variance, mask).reshape(len(number), -1).any(1)])
        return torch.from_numpy(np.concatenate(found))

    def _inner(self, name: str) -> int:
        """Axes of a row's data without channels."""
        complex_numbers = self.rows.column(name).dtype.kind == "c"
        return self.columns.axes + (self.columns.pairs and not complex_numbers)

    def _shared(self, name: str) -> bool:
        """Whether an array has no rows: a PSF, baselines, a mask or a variance for all of them."""
        axes = len(self.rows.column(name).shape)
        fields, stamps = (self.columns.mask, self.columns.variance), (self.columns.psf, self.columns.uv)
        return (name in fields and axes == self.columns.axes) or (name in stamps and axes == 2)

    def _values(self, name: str, number: np.ndarray) -> np.ndarray:
        """(B, C, …), complex numbers as trailing pairs."""
        values = self.rows.read(name, number)
        if values.ndim - 1 == self._inner(name):
            values = values[:, None]
        return np.stack([values.real, values.imag], -1) if values.dtype.kind == "c" else values

    def _optional(self, name: str | None, number: np.ndarray) -> np.ndarray | None:
        """A mask or a variance, (1|B, 1|C, …) on the axes of the data."""
        if name is None:
            return None
        values = self.rows.whole(name)[None] if self._shared(name) else self.rows.read(name, number)
        values = values[:, None] if values.ndim == 1 + self.columns.axes else values
        return values[..., None] if self.columns.pairs else values

    def _psf(self, number: np.ndarray) -> Tensor | None:
        name = self.columns.psf
        if name is None:
            return None
        stamps = self.rows.whole(name)[None] if self._shared(name) else self.rows.read(name, number)
        stamps = stamps[:, None] if stamps.ndim == 3 else stamps
        check_kernels(f"{self.rows.path}: array {name!r}", stamps)
        return torch.from_numpy(stamps.astype(np.float32))

    def _baselines(self, number: np.ndarray) -> Tensor | None:
        name = self.columns.uv
        if name is None:
            return None
        uv = self.rows.whole(name)[None] if self._shared(name) else self.rows.read(name, number)
        if not np.isfinite(uv).all():
            raise InputError(
                f"{self.rows.path}: array {name!r} has NaN or infinite values; give 0 where there is no baseline, and mask it."
            )
        return torch.from_numpy(uv.astype(np.float32))

    def _truth(self, number: np.ndarray) -> Tensor | None:
        if self.columns.x is None:
            return None
        x = self.rows.read(self.columns.x, number)
        x = x[:, None] if x.ndim == 3 else x
        if not np.isfinite(x).all():
            raise InputError(f"{self.rows.path}: array {self.columns.x!r} has NaN or infinite values; true images have none.")
        return torch.from_numpy(x.astype(np.float32))


def _good(y: np.ndarray, variance: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
    """Where data are finite, of a finite variance > 0 and not masked."""
    good = np.isfinite(y)
    if variance is not None:
        good &= np.isfinite(variance) & (variance > 0)
    if mask is not None:
        good &= (mask != 0) & np.isfinite(mask)
    return good


def check_kernels(owner: str, stamps: np.ndarray) -> None:
    """Raise InputError unless PSFs (…, kh, kw) are finite, of odd size, and of a sum between 0 and 1."""
    if not 2 <= stamps.ndim <= 4 or any(n % 2 == 0 for n in stamps.shape[-2:]):
        raise InputError(f"{owner}: PSFs must be stamps of odd size with the source at the centre, got {stamps.shape}; pad them.")
    sums = stamps.sum((-2, -1), dtype=np.float64)
    if not np.isfinite(sums).all() or not ((sums > 0) & (sums <= 1.01)).all():
        bad = sums[~(np.isfinite(sums) & (sums > 0) & (sums <= 1.01))].flat[0]
        raise InputError(f"{owner}: a PSF sums to {bad:.4g}; divide each by its sum (1, or less for light outside the stamp).")


@dataclass(frozen=True, eq=False)
class Rescaled(Source):
    """A source of measurements in units of `scale`: x/s, y/s, and the noise of y/s.

    Arguments: source: of `MeasuredBatch`. scale: s > 0, in the unit of the image.
    """

    source: Source
    scale: float

    def __len__(self) -> int:
        return len(self.source)

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        return self.source.chunks(size)

    def number(self, row: int) -> int:
        return self.source.number(row)

    def batch(self, index: Tensor, rng: Rng) -> MeasuredBatch:
        batch = self.source.batch(index, rng)
        scale = torch.tensor([self.scale], dtype=torch.float64, device=rng.keys.device)
        return replace(
            batch,
            observation=observation_in_units(batch.observation, scale),
            x=None if batch.x is None else batch.x / self.scale,
            second=None if batch.second is None else observation_in_units(batch.second, scale),
        )
