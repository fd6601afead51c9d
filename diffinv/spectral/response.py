"""What an X-ray instrument makes of a spectrum: counts = exposure · Σ_e photons_e · area_e · redistribution_ek.

Invariant: binning channels before or after folding is the same, since both are sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.spectral.base import Grid, Parameter, SpectralModel


@dataclass(frozen=True, eq=False)
class Binning:
    """Channels into bins. labels: number of each channel's bin, (C,), or −1 for a channel that is left out.

    Raises: DiffinvError if no channel is kept, or a bin has none.
    """

    labels: np.ndarray

    def __post_init__(self) -> None:
        kept = np.unique(self.labels[self.labels >= 0])
        if not len(kept) or kept[-1] != len(kept) - 1:
            raise DiffinvError(f"Binning: {len(kept)} bins have channels; give bins 0, 1, … with at least one channel each.")

    @classmethod
    def window(cls, low: np.ndarray, high: np.ndarray, first: float, last: float, by: int = 1) -> Binning:
        """The channels that overlap [first, last], `by` at a time.

        Arguments: low, high: bounds of the channels, (C,). first, last: in the same unit. by: channels a bin.
        Raises: DiffinvError if no channel overlaps, or their number is no multiple of `by`.
        """
        inside = (high > first) & (low < last)
        count = int(inside.sum())
        if not count or count % by:
            raise DiffinvError(
                f"Binning: {count} channels overlap {first:g}–{last:g} keV (the channels span {low.min():g}–{high.max():g}), "
                f"in bins of {by}; choose a range with a multiple of {by} channels."
            )
        labels = np.full(len(low), -1)
        labels[inside] = np.arange(count) // by
        return cls(labels)

    def __len__(self) -> int:
        return int(self.labels.max()) + 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """(…, C) → (…, K): sums over the channels of each bin."""
        if values.shape[-1] != len(self.labels):
            raise ShapeError(f"Binning: {values.shape[-1]} channels, but the binning is of {len(self.labels)}.")
        result = np.zeros((*values.shape[:-1], len(self)), dtype=np.result_type(values, values.dtype))
        keep = self.labels >= 0
        np.add.at(result, (..., self.labels[keep]), values[..., keep])
        return result

    def bounds(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest bound of each bin's channels: (K,), (K,)."""
        bins = [self.labels == k for k in range(len(self))]
        return np.array([low[b].min() for b in bins]), np.array([high[b].max() for b in bins])


@dataclass(frozen=True, eq=False)
class Response:
    """Effective area and redistribution of one instrument.

    Arguments:
        grid: of the photons, E bins in keV. matrix: cm², (E, K), area times the probability of channel k.
        low, high: nominal bounds of the channels, keV, (K,).
    Raises: ShapeError if these do not agree.
    """

    grid: Grid
    matrix: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        if self.matrix.shape != (len(self.grid), len(self.low)) or self.low.shape != self.high.shape:
            raise ShapeError(
                f"Response: matrix {tuple(self.matrix.shape)} for {self.grid.describe()} and channels "
                f"{tuple(self.low.shape)}, {tuple(self.high.shape)}."
            )

    def fold(self, photons: Tensor) -> Tensor:
        """Counts s⁻¹ a channel: (…, E) photons cm⁻² s⁻¹ a bin → (…, K)."""
        return photons @ self.matrix


@dataclass(frozen=True, eq=False)
class Folded(SpectralModel):
    """Expected counts a channel of a source: exposure · fold(model(θ)), θ as the model's.

    Arguments: model: photons cm⁻² s⁻¹ a bin. response. exposure: s.
    Raises: DiffinvError if the model's grid is not the response's.
    """

    model: SpectralModel
    response: Response
    exposure: float

    def __post_init__(self) -> None:
        self.model.grid.check_equal(self.response.grid, f"the model ({type(self.model).__name__})", "the response")

    @property
    def grid(self) -> Grid:
        """Of the photons; the channels are the response's."""
        return self.model.grid

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.model.parameters

    def evaluate(self, theta: Tensor) -> Tensor:
        return self.exposure * self.response.fold(self.model.evaluate(theta))
