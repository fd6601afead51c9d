"""Blind-spot networks: a pixel of the output sees every pixel of the input but its own.

With noise independent between pixels the noise of a pixel cannot then be copied, and `‖f(y) − y‖²` trains towards
`E[x_i | y_j, j ≠ i]`. Four branches see the half-planes above, below, left and right: the image is rotated, convolved by
kernels that reach upwards only, shifted down by one pixel and rotated back; 1×1 convolutions combine them.
Invariant: ∂f_i/∂y_i = 0 exactly, across channels too, for any weights.

References: Laine, Karras, Lehtinen & Aila, *High-Quality Self-Supervised Deep Image Denoising*, NeurIPS 2019, arXiv:1901.10277.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.checks import ConfigError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.noise.independent import Independent
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import require_identity, whole

_DILATIONS = (1, 2, 4, 8)  # repeated; 3×3 kernels so dilated leave no holes


class BlindSpotNetwork(nn.Module):
    """(B, C, H, W) → (B, C, H, W) for any H and W.

    Nothing is normalised over the image (that would let a pixel see itself): give images of order 1.

    Arguments: channels: C. width: features a branch. depth: 3×3 layers a branch, of dilations 1, 2, 4, 8, 1, ….
    Raises: ConfigError if one of them is not positive.
    """

    def __init__(self, channels: int, *, width: int, depth: int) -> None:
        super().__init__()
        if min(channels, width, depth) < 1:
            raise ConfigError(f"BlindSpotNetwork: channels, width and depth must be ≥ 1, got {channels}, {width} and {depth}.")
        dilations = [_DILATIONS[i % len(_DILATIONS)] for i in range(depth)]
        inputs = [channels] + [width] * (depth - 1)
        self.branch = nn.ModuleList(nn.Conv2d(n, width, 3, dilation=d) for n, d in zip(inputs, dilations, strict=True))
        self.combine = nn.Sequential(
            nn.Conv2d(4 * width, 2 * width, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 1),
        )

    def _above(self, h: Tensor) -> Tensor:
        """Features of the rows strictly above each pixel."""
        for layer in self.branch:
            reach = layer.dilation[0]
            h = functional.silu(layer(functional.pad(h, (reach, reach, 2 * reach, 0))))
        return functional.pad(h, (0, 0, 1, -1))

    def forward(self, x: Image) -> Image:
        turned = [torch.rot90(self._above(torch.rot90(x, k, (-2, -1))), -k, (-2, -1)) for k in range(4)]
        return self.combine(torch.cat(turned, 1))


class BlindSpot(Reconstructor):
    """`f(y, s I) = N(y/s)` with a blind-spot network N.

    Arguments: network: N, such as `BlindSpotNetwork`.
    Raises: UnsupportedError, when called, for another operator than s I, where a datum sees many pixels and none is blind, and
    for correlated noise.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Observation) -> Image:
        scale = require_identity("BlindSpot", observation)
        if not isinstance(observation.noise, Independent):
            raise UnsupportedError(
                f"BlindSpot: {type(observation.noise).__name__} is correlated between pixels, so that neighbours tell the noise "
                "of the blind pixel; use SURE, R2R or a second exposure."
            )
        y = whole(observation).y
        return self.network(y / expand(scale, y))
