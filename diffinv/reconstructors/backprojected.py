"""One pass: a linear inverse brings the data to the image's grid and scale, and a network mends what that leaves.

`f(y, A) = N(x₀)`, or `x₀ + N(x₀)` with a residual connection, x₀ = B(y, A) linear in y. The network sees nothing but x₀, so
one network serves operators and data shapes of every kind.
Invariants: x₀ is linear in y and in the unit of the image, whatever the scale of A; A = I gives `N(y)` with `BackProjection`.

References: Jin, McCann, Froustey & Unser, *Deep Convolutional Neural Network for Inverse Problems in Imaging*, 2017,
arXiv:1611.03679.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.checks import ConfigError
from diffinv.core.linalg import dot, expand
from diffinv.core.rng import Rng
from diffinv.core.types import Image, LinearMap
from diffinv.likelihood import Observation
from diffinv.operators.base import LinearOperator
from diffinv.priors.unet import UNet
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import good_data, linear, whole

_POWER = 30  # products of the power method, whose value is at most the eigenvalue
_MARGIN = 1.25  # of Chebyshev's interval over it: the mean error for n = 64² is below 0.87 ln n/29 (Kuczyński & Woźniakowski)


def largest_eigenvalue(operator: LinearMap, like: Image, *, constant: LinearMap | None = None) -> Tensor:
    """Largest eigenvalue a row of a PSD map F of images, 1 where it is 0: (B,), float64, by the power method.

    It starts from the same fixed image in every row, 1 + noise, so that a row's value is its own. Derivatives are those of
    vᵀFv at the vector v found, held fixed: exact where v is the leading eigenvector (Hellmann & Feynman).

    Arguments: operator: F. like: an image (B, C, H, W). constant: F without derivatives, by which v is found, if F has any.
    """
    search = operator if constant is None else constant
    with torch.no_grad():
        v = 1 + Rng([0] * like.shape[0]).normal(like)
        for _ in range(_POWER):
            w = search(v)
            size = dot(w, w).sqrt()
            v = expand(1 / torch.where(size > 0, size, 1.0), w) * w
    largest = dot(v, operator(v))
    return torch.where(largest > 0, largest, 1.0)


class LinearInverse(abc.ABC):
    """A rough inverse of A that is linear in the data: observation → image."""

    @abc.abstractmethod
    def __call__(self, observation: Observation) -> Image:
        """(B, *image) in the unit of x. Raises UnsupportedError for an operator that is not linear."""


@dataclass(frozen=True)
class BackProjection(LinearInverse):
    """`x₀ = Aᵀ M y / λ`, λ = λ_max(Aᵀ M A) of each row, M the projection on good data: one step of gradient descent from 0.

    Arguments: largest: λ where it is known, 1 for masks and masked Fourier transforms; None finds it by the power method.
    Raises: ConfigError if it is not positive.
    """

    largest: float | None = None

    def __post_init__(self) -> None:
        if self.largest is not None and not self.largest > 0:
            raise ConfigError(f"BackProjection: largest must be > 0, got {self.largest}; None finds it.")

    def __call__(self, observation: Observation) -> Image:
        data = whole(observation)
        operator, good = _linear(self, data), good_data(data)
        x = operator.adjoint(data.y)
        if self.largest is not None:
            return x / self.largest
        largest = largest_eigenvalue(lambda v: operator.adjoint(operator(v).where(good, 0.0)), x.detach())
        return expand(1 / largest, x) * x


@dataclass(frozen=True)
class RegularisedLeastSquares(LinearInverse):
    """`x₀ ≈ (AᵀWA + δλ I)⁻¹ AᵀWy`, λ = λ_max(AᵀWA), by Chebyshev's iteration.

    W is the precision of the noise if that is Gaussian, else the projection on good data. Unlike conjugate gradients the
    iteration is a fixed polynomial, so that x₀ stays linear in y. Its error falls by (√κ − 1)/(√κ + 1) a step,
    κ = (1.25 + δ)/δ.

    Arguments: iterations: products with AᵀWA. damping: δ > 0, dimensionless; noise along weaker singular vectors than √δ of
    the strongest is suppressed.
    Raises: ConfigError if either is not positive.
    References: Golub & Varga, *Chebyshev semi-iterative methods*, 1961, Numer. Math. 3, 147.
    """

    iterations: int
    damping: float

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.damping > 0:
            raise ConfigError(
                f"RegularisedLeastSquares: iterations and damping must be > 0, got {self.iterations} and {self.damping}; "
                "use BackProjection for no solve at all."
            )

    def __call__(self, observation: Observation) -> Image:
        data = whole(observation)
        operator, weight = _linear(self, data), _weight(data)
        rhs = operator.adjoint(weight(data.y))
        normal = lambda v: operator.adjoint(weight(operator(v)))
        scale = expand(1 / largest_eigenvalue(normal, rhs.detach()), rhs)
        return self._chebyshev(lambda v: scale * normal(v) + self.damping * v, scale * rhs)

    def _chebyshev(self, operator: LinearMap, rhs: Image) -> Image:
        """K⁻¹ b for a K whose spectrum lies between δ and 1.25 + δ."""
        centre, radius = self.damping + _MARGIN / 2, _MARGIN / 2
        ratio = radius / centre
        x, r, d = torch.zeros_like(rhs), rhs, rhs / centre
        for _ in range(self.iterations):
            x, r = x + d, r - operator(d)
            following = 1 / (2 * centre / radius - ratio)
            d, ratio = following * ratio * d + 2 * following / radius * r, following
        return x


@dataclass(frozen=True)
class NormalisedConvolution(LinearInverse):
    """`x₀ = Aᵀ M y / w` where w = Aᵀ M A 1 > 0, and `(k ∗ Aᵀ M y)/(k ∗ w)` where nothing was seen, k a Gaussian: for masks.

    Gaps are filled from their neighbours; 0 farther than 3 widths from any datum. Where AᵀA is diagonal and not negative
    (masks, with a rearrangement of the pixels), what was seen is kept as it is.

    Arguments: width: standard deviation of k, in pixels.
    Raises: ConfigError if it is not positive.
    References: Knutsson & Westin, *Normalized and Differential Convolution*, CVPR 1993.
    """

    width: float

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ConfigError(f"NormalisedConvolution: width must be > 0 pixels, got {self.width}; 1 suits scattered gaps.")

    def __call__(self, observation: Observation) -> Image:
        data = whole(observation)
        operator, good = _linear(self, data), good_data(data)
        x = operator.adjoint(data.y.where(good, 0.0))
        w = operator.adjoint(operator(torch.ones_like(x)).where(good, 0.0))
        near = self._smooth(w)
        filled = self._smooth(x) / near.where(near > 0, 1.0)
        return torch.where(w > 0, x / w.where(w > 0, 1.0), filled)

    def _smooth(self, x: Image) -> Image:
        """k ∗ x along rows, then columns, with nothing outside."""
        reach = math.ceil(3 * self.width)
        axis = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / self.width
        kernel = torch.exp(-0.5 * axis**2).expand(x.shape[1], 1, -1)
        rows = functional.conv2d(x, kernel[:, :, :, None], padding=(reach, 0), groups=x.shape[1])
        return functional.conv2d(rows, kernel[:, :, None], padding=(0, reach), groups=x.shape[1])


def _linear(owner: LinearInverse, data: Observation) -> LinearOperator:
    return linear(type(owner).__name__, data, "use Unrolled with start=None, which follows its Jacobian.")


def _weight(data: Observation) -> LinearMap:
    if data.noise.quadratic:
        return data.noise.precision(torch.zeros_like(data.y))
    good = good_data(data)
    return lambda v: v.where(good, 0.0)


class BackProjected(Reconstructor):
    """`f(y, A) = N(x₀)` or `x₀ + N(x₀)`, x₀ = inverse(y, A).

    Arguments: network: N, image → image. inverse: of A. residual: whether x₀ is added to what the network gives.
    Raises: UnsupportedError, when called, for an operator that is not linear.
    """

    def __init__(self, network: nn.Module, *, inverse: LinearInverse = BackProjection(), residual: bool = False) -> None:
        super().__init__()
        self.network, self.inverse, self.residual = network, inverse, residual

    def forward(self, observation: Observation) -> Image:
        x = self.inverse(observation)
        return x + self.network(x) if self.residual else self.network(x)


class PlainUNet(nn.Module):
    """The U-Net of the priors at one constant noise coordinate: image → image."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Image) -> Image:
        return self.network(x, x.new_zeros(x.shape[0]))


def plain_unet(channels: int, widths: Sequence[int], blocks: Sequence[int]) -> PlainUNet:
    """A U-Net without a noise level; it gives 0 before training, so that with a residual connection it starts at its input.

    Arguments: channels: of the image. widths: channels a level, multiples of 8. blocks: residual blocks a level.
    """
    return PlainUNet(UNet(channels, channels, widths=widths, blocks=blocks))
