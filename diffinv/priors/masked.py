"""A denoiser that is told which pixels it sees: E[x | m (x₀ + σ z), m].

EDM's preconditioning on what is shown, with the mask beside it: `D = m c_skip x + c_out F([c_in m x, m], ln σ / 4)`, the factors
of `precondition`. Invariant: what stands where nothing is shown has no say; with all pixels shown it is a denoiser like others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffinv.core.linalg import expand
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser


class MaskAware(Denoiser):
    """Any `nn.Module` F(x (B, 2C, H, W), noise (B,)) → (B, C, H, W), told of masks: what `MaskedAmbient` trains.

    Arguments: network: F. sigma_data: σ_d, standard deviation of the images, in their unit.
    """

    def __init__(self, network: nn.Module, *, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Image, sigma: Sigma, mask: Tensor | None = None) -> Image:
        """mask: (1|B, *image), True where x is shown; None if it is everywhere."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        shown = x.where(mask, 0.0)
        total = (sigma.double() ** 2 + self.sigma_data**2).sqrt()
        c_out = expand(sigma.double() * self.sigma_data / total, x)
        features = torch.cat([expand(1 / total, x) * shown, mask.to(x)], 1)
        output = self.network(features, sigma.double().log().to(x.dtype) / 4).to(x.dtype)
        # where nothing is shown the prior's spread is σ_d whatever σ: the network speaks there in that unit
        return expand(self.sigma_data**2 / total**2, x) * shown + torch.where(mask, c_out, self.sigma_data) * output
