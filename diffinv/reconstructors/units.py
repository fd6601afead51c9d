"""A network that wants values of order 1, on data in a unit of their own.

`f(y, A) = s g(y/s, A)`, with the noise of y/s: for a linear A the whole problem may be measured in units of s.
Invariant: f of data in another unit, with s in that unit, is the same image in that unit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.linalg import expand
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.noise.units import in_units
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import linear


def observation_in_units(observation: Observation, scale: Tensor) -> Observation:
    """The observation of x/s: y/s and its noise, by the same operator.

    Arguments: scale: s (1|B,) > 0, in the unit of the image. Raises: UnsupportedError for an operator that is not linear.
    """
    linear("scale", observation, "its data cannot be measured in other units; rescale them yourself.")
    y = observation.y
    return replace(observation, y=y / expand(scale.to(y), y), noise=in_units(observation.noise, scale))


class InUnits(Reconstructor):
    """`f(y, A) = s g(y/s, A)`.

    Arguments: model: g. scale: s > 0, in the unit of the image. Raises: DiffinvError if it is not positive.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise DiffinvError(f"InUnits: scale must be finite and > 0, got {scale}; give the rms of the images.")
        self.model = model
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float64), persistent=False)

    def forward(self, observation: Observation) -> Image:
        x = self.model(observation_in_units(observation, self.scale))
        return expand(self.scale.to(x), x) * x
