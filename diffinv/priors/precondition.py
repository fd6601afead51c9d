"""EDM preconditioning: a network becomes a denoiser (Karras, Aittala, Aila & Laine 2022, *Elucidating the Design Space of
Diffusion-Based Generative Models*, arXiv:2206.00364, table 1 and eq. 7).

`D(x, σ) = c_skip x + c_out F(c_in x, ln σ / 4)` with `c_skip = σ_d²/(σ² + σ_d²)`, `c_out = σ σ_d/√(σ² + σ_d²)`,
`c_in = 1/√(σ² + σ_d²)`. Invariant: σ → 0 is the identity whatever the network, because c_out → 0 and c_skip → 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.linalg import expand
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser


class Preconditioned(Denoiser):
    """Any `nn.Module` F(x (B, C, H, W), noise (B,)) → (B, C, H, W), behind EDM's preconditioning.

    Arguments: network: F. sigma_data: σ_d, standard deviation of the training images, in their unit.
    """

    def __init__(self, network: nn.Module, *, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Image, sigma: Sigma) -> Image:
        total = (sigma.double() ** 2 + self.sigma_data**2).sqrt()
        c_skip = expand(self.sigma_data**2 / total**2, x)
        c_out = expand(sigma.double() * self.sigma_data / total, x)
        output = self.network(expand(1 / total, x) * x, sigma.double().log().to(x.dtype) / 4)
        return c_skip * x + c_out * output.to(x.dtype)


class HighDynamicRange(nn.Module):
    """Input features and a gated output around a network, for images whose peak is far above their rms.

    Features of u = x/√(σ² + σ_d²): u, asinh(0.7 x/σ) (noise-whitened, compressed) and its Laplacian high-pass.
    Output `F = a + b·u` with maps a, b of the network: where a pixel is far above the noise the best D is x itself,
    which b expresses exactly and a bounded a cannot.
    Takes the same arguments as a plain network: it recovers σ from the noise coordinate ln σ / 4.
    """

    def __init__(self, network: nn.Module, *, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        kernel = torch.tensor([[0.0, -0.25, 0.0], [-0.25, 1.0, -0.25], [0.0, -0.25, 0.0]])
        self.register_buffer("laplacian", kernel[None, None], persistent=False)

    def forward(self, u: Tensor, noise: Tensor) -> Tensor:
        sigma = (4 * noise.double()).exp()
        ratio = expand(0.7 * (sigma**2 + self.sigma_data**2).sqrt() / sigma, u)
        compressed = torch.asinh(ratio * u)
        channels = u.shape[1]
        kernel = self.laplacian.to(u.dtype).expand(channels, 1, 3, 3)
        detail = functional.conv2d(functional.pad(compressed, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
        bias, gain = self.network(torch.cat([u, compressed, detail], 1), noise).chunk(2, 1)
        return bias + gain * u


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; without it a convolution falls back on a very slow path."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Autocast(nn.Module):
    """Runs a network under autocast in `dtype`, returning the input's dtype: the only place where low precision enters."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, u: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(u.device.type, dtype=self.dtype):
            return self.network(u, noise).to(u.dtype)
