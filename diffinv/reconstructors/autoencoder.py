"""An autoencoder whose images form a surface of stated dimension: what a few numbers cannot say, such as noise, is lost.

`f(x) = d(e(x))`, e: image → R^k, d: R^k → image. It serves as the network of any reconstructor.
Invariant: the Jacobian of f has rank k at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diffinv.core.checks import ConfigError, check_shape
from diffinv.core.types import Image


class Bottleneck(nn.Module):
    """(B, C, S, S) → (B, k) → (B, C, S, S) by strided convolutions, a linear map each way, and pixel shuffles.

    Arguments: channels: C. size: S in pixels, a multiple of 2^len(widths). latent: k. widths: features a level, coarser by 2
    each.
    Raises: ConfigError if the size does not divide or the latent dimension is not positive; ShapeError for other images.
    """

    def __init__(self, channels: int, size: int, latent: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        factor = 2 ** len(widths)
        if size % factor or latent < 1 or not widths:
            raise ConfigError(
                f"Bottleneck: size {size} must be a multiple of {factor} and latent ≥ 1, got {latent}; pad the image or give "
                "other widths (at least one)."
            )
        self.shape = (channels, size, size)
        coarse, steps = size // factor, list(zip([channels, *widths], widths, strict=False))
        down = [layer for n, m in steps for layer in (nn.Conv2d(n, m, 4, stride=2, padding=1), nn.SiLU())]
        up = [layer for n, m in reversed(steps) for layer in (nn.SiLU(), nn.Conv2d(m, 4 * n, 3, padding=1), nn.PixelShuffle(2))]
        cells = widths[-1] * coarse**2
        self.encoder = nn.Sequential(*down, nn.Flatten(1), nn.Linear(cells, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, cells), nn.Unflatten(1, (widths[-1], coarse, coarse)), *up)

    def encode(self, x: Image) -> Tensor:
        """(B, C, S, S) → (B, k)."""
        check_shape("Bottleneck", x, self.shape)
        return self.encoder(x)

    def decode(self, z: Tensor) -> Image:
        """(B, k) → (B, C, S, S)."""
        return self.decoder(z)

    def forward(self, x: Image) -> Image:
        return self.decode(self.encode(x))
