"""A trained prior as a reconstructor of images without artefacts: data that are the image and white noise, and no more.

`y = s x + σ z` is `y/s = x + (σ/|s|) z`, and there the denoiser is the answer: `E[x | y] = D(y/s, σ/|s|)`. Nothing else is
D's business: for a blur, a mask or coloured noise D(y, σ) is not E[x | y], and is refused.
Invariant: exact where it is not refused, up to the denoiser's own error.
"""

from __future__ import annotations

from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.types import Image, Sigma
from diffinv.likelihood import Observation
from diffinv.noise.base import Noise
from diffinv.noise.gaussian import Gaussian
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import require_identity, whole

_REMEDY = "use a Posterior with this prior, which takes any noise and any mask."


def white_sigma(owner: str, noise: Noise) -> Sigma:
    """σ (1|B,) in the data's unit, of white Gaussian noise without masked data. Raises UnsupportedError for any other noise."""
    if not isinstance(noise, Gaussian):
        raise UnsupportedError(f"{owner}: {type(noise).__name__} noise is not white Gaussian noise; {_REMEDY}")
    if noise.mask is not None and not bool(noise.mask.all()):
        raise UnsupportedError(f"{owner}: a denoiser needs every pixel measured, but some are masked; {_REMEDY}")
    std = noise.std.flatten(1) if noise.std.ndim > 1 else noise.std[:, None]
    if bool((std != std[:, :1]).any()):
        raise UnsupportedError(f"{owner}: σ differs between the pixels of a row, but a denoiser takes one σ a row; {_REMEDY}")
    return std[:, 0]


class ArtifactFree(Reconstructor):
    """`f(y, s I) = D(y/s, σ/|s|)`, with the σ of each row's own noise.

    Arguments: denoiser: D, in the unit of x.
    Raises: UnsupportedError, when called, for another operator than s I, or noise that is not white Gaussian of one σ a row.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, observation: Observation) -> Image:
        scale: Tensor = require_identity("ArtifactFree", observation)
        sigma = white_sigma("ArtifactFree", observation.noise).to(scale)
        y = whole(observation).y
        return self.denoiser(y / expand(scale, y), (sigma / scale.abs()).expand(y.shape[0]))
