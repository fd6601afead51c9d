"""Reconstructors: f(y, A) ≈ E[x | y], images from one observation by one pass, trained by the losses of `diffinv.losses`.

A reconstructor sees an `Observation`: data, operator and noise of each row, so that one network serves many operators.
Invariant: rows do not talk to each other, and data under a mask (which may be NaN) never reach the network.
"""

from __future__ import annotations

import abc

from torch import nn

from diffinv.core.types import Image
from diffinv.likelihood import Observation


class Reconstructor(nn.Module, abc.ABC):
    """Images from data."""

    @abc.abstractmethod
    def forward(self, observation: Observation) -> Image:
        """(B, *image) in the unit of x, from B observations."""
