"""Losses: (model, batch, rng) → (B,), never reduced, with a declared oracle.

A loss names what its batch must hold (`needs`) and the supervised quantity whose gradient it reproduces in expectation.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.rng import Rng
from diffinv.priors.base import Denoiser


@dataclass(frozen=True, eq=False)
class CleanBatch(Batched):
    """Clean images x (B, C, H, W) in the unit of the prior."""

    x: Tensor


class Loss(abc.ABC):
    """An objective a row."""

    @abc.abstractmethod
    def __call__(self, model: Denoiser, batch: Batched, rng: Rng) -> Tensor:
        """The loss of each row: (B,)."""
