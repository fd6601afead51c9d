"""A prior of small fields applied to a large one, without seams.

The field is covered by overlapping tiles; at *every* noise level the tiles' denoised images are blended with a smooth
window, `D(x) = Σ_k R_kᵀ w D(R_k x) / Σ_k R_kᵀ w`, so that neighbouring tiles are coupled through the sampler's state and
no border is ever cut (Bar-Tal et al., *MultiDiffusion*, 2023, arXiv:2302.08113).
Invariant: a field of exactly one tile gives the prior's own denoiser.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """First pixels of the fewest evenly spread tiles of `size` that cover `length` and overlap by at least `overlap`."""
    if length < size:
        raise ShapeError(f"Tiled: the field has {length} pixels a side but a tile has {size}; pad the field.")
    count = 1 + math.ceil((length - size) / (size - overlap))
    return [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]


class Tiled(Denoiser):
    """The denoiser of a field (C, H, W) ≥ (C, size, size) from that of tiles (C, size, size).

    Arguments: prior: of the tiles. size: pixels a side of a tile. field: (H, W). overlap: least overlap in pixels.
    """

    def __init__(self, prior: Denoiser, *, size: int, field: tuple[int, int], overlap: int) -> None:
        super().__init__()
        self.prior, self.size, self.field = prior, size, field
        rows, columns = (tile_starts(length, size, overlap) for length in field)
        self.corners = [(r, c) for r in rows for c in columns]
        ramp = torch.sin(math.pi * (torch.arange(size) + 0.5) / size) ** 2
        window = ramp[:, None] * ramp[None] + 1e-4
        total = torch.zeros(field)
        for r, c in self.corners:
            total[r : r + size, c : c + size] += window
        self.register_buffer("weights", torch.stack([window / total[r : r + size, c : c + size] for r, c in self.corners]))

    def forward(self, x: Image, sigma: Sigma) -> Image:
        if tuple(x.shape[-2:]) != self.field:
            raise ShapeError(f"Tiled: made for fields {self.field}, got {tuple(x.shape[-2:])}.")
        tiles = torch.stack([x[..., r : r + self.size, c : c + self.size] for r, c in self.corners], 1)
        denoised = self.prior(tiles.flatten(0, 1), sigma.repeat_interleave(len(self.corners)))
        return self.blend(denoised.unflatten(0, (x.shape[0], len(self.corners))))

    def blend(self, tiles: Tensor) -> Tensor:
        """(B, K, C, size, size) → (B, C, H, W), the weighted mean of the tiles."""
        weighted = tiles * self.weights.to(tiles.dtype)[:, None]
        (height, width), size = self.field, self.size
        return sum(
            torch.nn.functional.pad(weighted[:, k], (c, width - c - size, r, height - r - size))
            for k, (r, c) in enumerate(self.corners)
        )
