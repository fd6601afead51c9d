"""From the score of the data, s(y) = ∇ log p(y), to an estimate of the image (Noise2Score), for A = s I.

Differentiating p(y) = ∫ p(y | m) p(m) dm under the integral gives, pixel by pixel, a posterior mean of the noise's natural
parameter, which is turned back into a mean m:
Gaussian, `E[m | y] = y + Σ s(y)`; the posterior mean itself.
Poisson counts k = g (y + b), λ = g (m + b), p continued between whole counts by the gamma function:
`E[log λ | y] = ψ(k + 1) + s/g`, so λ̂ = exp of it: the posterior's geometric mean, below E[λ | y] by about Var[λ | y]/2E[λ | y].
The paper writes k + ½ for exp ψ(k + 1).
Gamma, L looks: `E[1/m | y] = ((L − 1)/y − s)/L`, so m̂ = L y/((L − 1) − y s): the posterior's harmonic mean, below E[m | y] too.
Invariant: only good data are estimated; a masked datum has no score.

References: Kim & Ye, *Noise2Score*, NeurIPS 2021, arXiv:2106.07009; Efron, *Tweedie's Formula and Selection Bias*, 2011.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.noise.base import Noise
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gamma import Gamma
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.independent import good_values, over
from diffinv.noise.poisson import Poisson
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import good_data, require_identity, whole


@singledispatch
def posterior_mean(noise: Noise, y: Tensor, score: Tensor) -> Tensor:
    """m̂ (B, *data) in the data's unit from y and s(y), both 0 where masked; what it gives there has no meaning.

    Raises: UnsupportedError for noise without such a formula.
    """
    raise UnsupportedError(
        f"ScoreReconstructor: {type(noise).__name__} has no closed formula from the score of the data to the mean; it holds for "
        "Gaussian of known covariance, Poisson and Gamma."
    )


@posterior_mean.register
def _(noise: Gaussian, y: Tensor, score: Tensor) -> Tensor:
    return y + noise.at(noise.std, y) ** 2 * score


@posterior_mean.register
def _(noise: CorrelatedGaussian, y: Tensor, score: Tensor) -> Tensor:
    std = good_values(over(noise.std, y), noise.mask)
    torus = tuple(noise.spectrum.shape[-2:])
    field = torch.fft.ifft2(noise.spectrum.to(y.dtype) * torch.fft.fft2(std * score, s=torus)).real
    return y + std * field[..., : y.shape[-2], : y.shape[-1]]


@posterior_mean.register
def _(noise: Poisson, y: Tensor, score: Tensor) -> Tensor:
    gain, background = noise.at(noise.gain, y), noise.at(noise.background, y)
    counts = (gain * (y + background)).clamp_min(0)
    return (torch.digamma(counts + 1) + score / gain).exp() / gain - background


@posterior_mean.register
def _(noise: Gamma, y: Tensor, score: Tensor) -> Tensor:
    looks = over(noise.looks, y)
    return looks * y / (looks - 1 - y * score)


class ScoreReconstructor(Reconstructor):
    """`f(y, s I) = m̂(y, N(y))/s`, with N(y) ≈ ∇ log p(y); 0 where the data are masked, for no datum speaks of it there.

    Arguments: network: N, the score of the data in their inverse unit, image → image.
    Raises: UnsupportedError, when called, for another operator than s I, or noise that is not Gaussian, Poisson or Gamma.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def score(self, observation: Observation) -> Tensor:
        """N(y), what `Noise2Score` trains: (B, *data), in the data's inverse unit."""
        data = whole(observation)
        return self.network(data.y).where(good_data(data), 0.0)

    def forward(self, observation: Observation) -> Image:
        scale = require_identity("ScoreReconstructor", observation)
        data = whole(observation)
        good = good_data(data)
        mean = posterior_mean(data.noise, data.y, self.score(data))
        return (mean / expand(scale, mean)).where(good, 0.0)
