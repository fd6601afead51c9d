"""Designs: everything that is needed to build an untrained reconstructor, as plain numbers that a file can hold."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import nn

from diffinv.core.checks import ConfigError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.reconstructors.autoencoder import Bottleneck
from diffinv.reconstructors.backprojected import (
    BackProjected,
    BackProjection,
    LinearInverse,
    NormalisedConvolution,
    RegularisedLeastSquares,
    plain_unet,
)
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.blind_spot import BlindSpot, BlindSpotNetwork
from diffinv.reconstructors.tweedie import ScoreReconstructor
from diffinv.reconstructors.unrolled import Unrolled


class Design(abc.ABC):
    """What a reconstructor is made of; final classes are frozen dataclasses of numbers."""

    @abc.abstractmethod
    def build(self, shape: Shape) -> Reconstructor:
        """The reconstructor before training, of images (C, H, W). Raises ConfigError where the numbers do not fit them."""


def _unet(shape: Shape, widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Module:
    if len(widths) != len(blocks):
        raise ConfigError(f"network: {len(widths)} widths but {len(blocks)} blocks; give one of each a level.")
    divisor = 2 ** len(widths)
    if any(n % divisor for n in shape[-2:]):
        raise ConfigError(
            f"network: {len(widths)} widths need images whose sides divide by {divisor}, got {shape[-2]} × {shape[-1]}; give "
            "fewer widths, or cut the images."
        )
    return plain_unet(shape[0], widths, blocks)


@register("design", "backprojected")
@dataclass(frozen=True)
class BackProjectedDesign(Design):
    """`BackProjected` with a U-Net; with iterations and damping on `RegularisedLeastSquares`, with filling, a width in pixels,
    on `NormalisedConvolution`."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    residual: bool
    iterations: int | None = None
    damping: float | None = None
    filling: float | None = None

    def build(self, shape: Shape) -> Reconstructor:
        return BackProjected(_unet(shape, self.widths, self.blocks), inverse=self._inverse(), residual=self.residual)

    def _inverse(self) -> LinearInverse:
        if (self.iterations is None) != (self.damping is None):
            raise ConfigError("network: iterations and damping go together; give both, or neither for a back-projection.")
        if self.filling is None:
            return BackProjection() if self.iterations is None else RegularisedLeastSquares(self.iterations, self.damping)
        if self.iterations is not None:
            raise ConfigError(
                f"network: filling {self.filling} is for masks, iterations {self.iterations} and damping {self.damping} for "
                "other operators; give one or the other."
            )
        return NormalisedConvolution(self.filling)


@register("design", "unrolled")
@dataclass(frozen=True)
class UnrolledDesign(Design):
    """`Unrolled` with residual U-Nets, one for all steps or one each."""

    iterations: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    shared: bool

    def build(self, shape: Shape) -> Reconstructor:
        count = 1 if self.shared else self.iterations
        networks = [_unet(shape, self.widths, self.blocks) for _ in range(count)]
        return Unrolled(networks[0] if self.shared else nn.ModuleList(networks), iterations=self.iterations, residual=True)


@register("design", "blind_spot")
@dataclass(frozen=True)
class BlindSpotDesign(Design):
    """`BlindSpot` with a `BlindSpotNetwork`."""

    width: int
    depth: int

    def build(self, shape: Shape) -> Reconstructor:
        return BlindSpot(BlindSpotNetwork(shape[0], width=self.width, depth=self.depth))


@register("design", "score")
@dataclass(frozen=True)
class ScoreDesign(Design):
    """`ScoreReconstructor` with a U-Net."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def build(self, shape: Shape) -> Reconstructor:
        return ScoreReconstructor(_unet(shape, self.widths, self.blocks))


@register("design", "bottleneck")
@dataclass(frozen=True)
class BottleneckDesign(Design):
    """`BackProjected` with a `Bottleneck`."""

    latent: int
    widths: tuple[int, ...]

    def build(self, shape: Shape) -> Reconstructor:
        if shape[-1] != shape[-2]:
            raise ConfigError(f"network: a bottleneck wants square images, got {shape[-2]} × {shape[-1]}; cut them.")
        return BackProjected(Bottleneck(shape[0], shape[-1], self.latent, widths=self.widths))


def initialise(model: nn.Module, seed: int) -> None:
    """Draw the weights of convolutions and linear layers anew: torch's own distribution, from a seed.

    `U(−1/√n, 1/√n)`, n inputs of a unit, weights and biases. Layers that are 0, which start as the identity, stay so.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and bool(part.weight.any()):
            bound = 1 / math.sqrt(part.weight[0].numel())
            with torch.no_grad():
                for field in (part.weight, part.bias):
                    if field is not None:
                        field.uniform_(-bound, bound, generator=generator)
