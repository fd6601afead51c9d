"""Starlets: isotropic undecimated wavelets of images, from the B₃ spline.

    c₀ = x,   c_{j+1} = h_j ∗ c_j,   w_j = c_j − c_{j+1},   x = Σ_j w_j + c_J,

h_j the separable taps (1, 4, 6, 4, 1)/16 with holes of 2^j − 1 pixels. Both extensions beyond the border make the smoothing a
symmetric matrix (a torus is diagonal in Fourier modes, half-sample reflection in cosines), so that its adjoint is itself.
Invariant: the scales add up to the image, and ⟨Φ x, u⟩ = ⟨x, Φᵀ u⟩.

References: Starck, Fadili & Murtagh, *The Undecimated Wavelet Decomposition and its Reconstruction*, 2007.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Extension = Callable[[int, int], Tensor]

_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def torus(size: int, reach: int) -> Tensor:
    """Indices of −reach … size + reach − 1 of a periodic axis."""
    return torch.arange(-reach, size + reach) % size


def mirror(size: int, reach: int) -> Tensor:
    """Indices of −reach … size + reach − 1 of an axis that is reflected at its edges, the last pixel repeated."""
    folded = torch.arange(-reach, size + reach) % (2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


@lru_cache(maxsize=128)
def _smoothing(size: int, step: int, extend: Extension, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric matrix of the taps on one axis: (size, size)."""
    indices = extend(size, 2 * step)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for k, tap in enumerate(_TAPS):
        matrix[torch.arange(size), indices[k * step : k * step + size]] += tap
    return matrix.to(device, dtype)


@dataclass(frozen=True)
class Starlet:
    """Details w_0 … w_{J−1}, finest first, with or without the coarse c_J.

    Arguments: scales: J. coarse: whether c_J is kept. extend: `mirror` or `torus`.
    """

    scales: int
    coarse: bool = False
    extend: Extension = mirror

    def smooth(self, x: Tensor, scale: int) -> Tensor:
        """h_j ∗ x, (…, H, W) → (…, H, W)."""
        rows, columns = (_smoothing(n, 2**scale, self.extend, x.dtype, x.device) for n in x.shape[-2:])
        return rows @ x @ columns

    def forward(self, x: Tensor) -> Tensor:
        """Φ x: (B, 1, H, W) → (B, scales (+ 1), H, W)."""
        parts, smooth = [], x
        for scale in range(self.scales):
            next_smooth = self.smooth(smooth, scale)
            parts.append(smooth - next_smooth)
            smooth = next_smooth
        return torch.cat([*parts, smooth] if self.coarse else parts, 1)

    def adjoint(self, u: Tensor) -> Tensor:
        """Φᵀ u: (B, scales (+ 1), H, W) → (B, 1, H, W), by Horner's rule from the coarsest scale."""
        total = u[:, self.scales :] if self.coarse else torch.zeros_like(u[:, :1])
        for scale in reversed(range(self.scales)):
            detail = u[:, scale : scale + 1]
            total = detail + self.smooth(total - detail, scale)
        return total

    def energy(self, variance: Tensor) -> Tensor:
        """ψ_j² ⋆ v: the variance of the details of noise that is independent between pixels, of variance v.

        Arguments: variance: (B, 1, H, W). Returns: (B, scales, H, W); ψ_j is cut off at the image's size where it is wider.
        """
        height, width = variance.shape[-2:]
        found = []
        for kernel in self._kernels():
            reach = kernel.shape[-1] // 2
            rows, columns = (self.extend(size, reach).to(variance.device) for size in (height, width))
            longer = variance.index_select(-2, rows).index_select(-1, columns)
            found.append(_convolve(longer, (kernel**2).to(variance), (height, width)))
        return torch.cat(found, 1)

    def _kernels(self) -> list[Tensor]:
        """ψ_j, (n_j, n_j) with n_j odd, in float64."""
        reach = 2 * (2**self.scales - 1)
        impulse = torch.zeros(1, 1, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
        impulse[..., reach, reach] = 1.0
        details = Starlet(self.scales, extend=torus).forward(impulse)[0]
        widths = [2 * (2 ** (j + 1) - 1) for j in range(self.scales)]
        return [d[reach - w : reach + w + 1, reach - w : reach + w + 1] for d, w in zip(details, widths, strict=True)]


def _convolve(longer: Tensor, kernel: Tensor, shape: tuple[int, int]) -> Tensor:
    """Valid part of the convolution with a symmetric kernel, by FFT: (B, 1, H + n − 1, W + n − 1) → (B, 1, H, W)."""
    size = tuple(longer.shape[-2:])
    product = torch.fft.rfft2(longer) * torch.fft.rfft2(kernel, s=size)
    first = kernel.shape[-1] - 1
    return torch.fft.irfft2(product, s=size)[..., first : first + shape[0], first : first + shape[1]].clamp_min(0)
