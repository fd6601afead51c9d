"""A mixture as a forward operator: maps of amplitudes and parameters → the expected cube.

    x = (ln A_1/A⁰_1, …, u_1, …),   f(x)_i = b + Σ_c A⁰_c exp(x_ic) S_c(u_i),   i a pixel.

With it any prior of maps, a Gaussian field or a diffusion model, any noise and any sampler of the package give posteriors of
physical parameters: `Observation(cube, SpectralMaps(…), noise)` is a likelihood like any other, and a non-linear one.
Invariant: a pixel of the cube depends on the same pixel of the maps alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from diffinv.core.types import Shape
from diffinv.operators.base import Operator
from diffinv.unmixing.mixture import Mixture


@dataclass(frozen=True, eq=False)
class SpectralMaps(Operator):
    """Maps x (B, C + P, H, W), the log amplitudes of C components before the P parameters u, → cube (B, K, H, W).

    Arguments: mixture: of C components and P parameters. amplitude: A⁰ (1|B, C), of each component where x is 0. background: b
        (1|B, K). shape: (H, W). Arithmetic is in the dtype of the background.
    """

    mixture: Mixture
    amplitude: Tensor
    background: Tensor
    shape: tuple[int, int]

    @property
    def in_shape(self) -> Shape:
        return (len(self.mixture.components) + len(self.mixture.names), *self.shape)

    @property
    def out_shape(self) -> Shape:
        return (self.background.shape[-1], *self.shape)

    def apply(self, x: Tensor) -> Tensor:
        count, pixels = len(self.mixture.components), self.shape[0] * self.shape[1]
        rows = lambda values: values[:, None].expand(len(x), pixels, -1).flatten(0, 1)
        logs, u = rearrange(x.to(self.background.dtype), "b p h w -> (b h w) p").tensor_split([count], dim=1)
        mean = self.mixture.mean(rows(self.amplitude) * logs.exp(), u, rows(self.background))
        return rearrange(mean, "(b h w) k -> b k h w", b=len(x), h=self.shape[0])
