"""Likelihoods talk in image space only: log p(y | x), its score and its Fisher information, all as functions of the image.

The data, the operator and the noise never leave this file, so that guidance and samplers know nothing of them.
Invariants: `score` is the gradient of `log_prob`; `fisher(x)` is PSD and equals the score's covariance, and `perturb(x)` draws
from N(0, fisher(x)).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import ShapeError, check_shape
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Shape
from diffinv.noise.base import Noise
from diffinv.operators.algebra import Compose, Identity, Scaled, Sum, Zero, compose
from diffinv.operators.base import LinearOperator, Operator


class Likelihood(Batched, abc.ABC):
    """p(y | x) as a function of the image x alone."""

    image_shape: Shape

    @property
    @abc.abstractmethod
    def quadratic(self) -> bool:
        """Whether log p(y | x) is quadratic in x: linear operator, Gaussian noise. `fisher` is then the same at every x."""

    @abc.abstractmethod
    def log_prob(self, x: Image) -> Tensor:
        """log p(y | x): (B,), float64."""

    @abc.abstractmethod
    def score(self, x: Image) -> Image:
        """∇ₓ log p(y | x): (B, *image)."""

    @abc.abstractmethod
    def fisher(self, x: Image) -> LinearOperator:
        """Fisher information Jᵀ P J (Gauss–Newton for a non-linear operator): image → image, PSD."""

    @abc.abstractmethod
    def perturb(self, x: Image, rng: Rng) -> Image:
        """A draw of N(0, fisher(x)): (B, *image)."""

    @abc.abstractmethod
    def residuals(self, x: Image) -> tuple[Tensor, ...]:
        """Whitened residuals (y − A(x))/√Var, one tensor (B, *data) a data set, exactly 0 where masked."""

    @abc.abstractmethod
    def good(self) -> tuple[Tensor, ...]:
        """Number of good data a row, one tensor (1|B,) a data set."""

    @abc.abstractmethod
    def scaled(self, scale: Tensor) -> Likelihood:
        """The same data as a function of u = x/scale, scale (1|B,) in the unit of x: the flux scale joins the operator."""


@dataclass(frozen=True, eq=False)
class Observation(Likelihood):
    """Data y = A(x) + noise.

    Arguments:
        y: (1|B, *data) in the data's unit. operator: image → data, in the data's unit. noise: p(y | A(x)).
    Raises: ShapeError if y does not have the operator's output shape.
    """

    y: Tensor
    operator: Operator
    noise: Noise

    def __post_init__(self) -> None:
        check_shape("Observation: y", self.y, self.operator.out_shape)

    @property
    def image_shape(self) -> Shape:
        return tuple(self.operator.in_shape)

    @property
    def quadratic(self) -> bool:
        return self.noise.quadratic and isinstance(self.operator, LinearOperator)

    def _y(self, x: Image) -> Tensor:
        return self.y.expand(x.shape[0], *self.y.shape[1:])

    def log_prob(self, x: Image) -> Tensor:
        return self.noise.log_prob(self._y(x), self.operator(x))

    def score(self, x: Image) -> Image:
        return self.operator.linearize(x).adjoint(self.noise.score(self._y(x), self.operator(x)))

    def fisher(self, x: Image) -> LinearOperator:
        jacobian = self.operator.linearize(x)
        return Compose((jacobian.H, self.noise.precision(self.operator(x)), jacobian))

    def perturb(self, x: Image, rng: Rng) -> Image:
        return self.operator.linearize(x).adjoint(self.noise.perturb(self.operator(x), rng))

    def residuals(self, x: Image) -> tuple[Tensor, ...]:
        mean = self.operator(x)
        deviation = self.noise.variance(mean).sqrt()
        good = deviation.isfinite()
        difference = torch.where(good, self._y(x) - mean, 0.0)
        return (difference / torch.where(good, deviation, 1.0),)

    def good(self) -> tuple[Tensor, ...]:
        variance = self.noise.variance(torch.zeros_like(self.y))
        return (variance.isfinite().flatten(1).sum(1),)

    def scaled(self, scale: Tensor) -> Observation:
        return replace(self, operator=compose(self.operator, Scaled(scale, Identity(self.image_shape))))


@dataclass(frozen=True, eq=False)
class Joint(Likelihood):
    """Independent data sets of one image (exposures, bands, instruments): log-probabilities, scores and Fishers add."""

    parts: tuple[Likelihood, ...]

    def __post_init__(self) -> None:
        shapes = {tuple(p.image_shape) for p in self.parts}
        if len(shapes) != 1:
            raise ShapeError(f"Joint: the parts see images of different shapes {sorted(shapes)}; bring them to one grid.")

    @property
    def image_shape(self) -> Shape:
        return self.parts[0].image_shape

    @property
    def quadratic(self) -> bool:
        return all(part.quadratic for part in self.parts)

    def log_prob(self, x: Image) -> Tensor:
        return sum(part.log_prob(x) for part in self.parts)

    def score(self, x: Image) -> Image:
        return sum(part.score(x) for part in self.parts)

    def fisher(self, x: Image) -> LinearOperator:
        return Sum(tuple(part.fisher(x) for part in self.parts))

    def perturb(self, x: Image, rng: Rng) -> Image:
        return sum(part.perturb(x, rng) for part in self.parts)

    def residuals(self, x: Image) -> tuple[Tensor, ...]:
        return tuple(r for part in self.parts for r in part.residuals(x))

    def good(self) -> tuple[Tensor, ...]:
        return tuple(n for part in self.parts for n in part.good())

    def scaled(self, scale: Tensor) -> Joint:
        return Joint(tuple(part.scaled(scale) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Flat(Likelihood):
    """No data: log p = 0. A posterior with it samples the prior."""

    image_shape: Shape
    quadratic = True

    def log_prob(self, x: Image) -> Tensor:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)

    def score(self, x: Image) -> Image:
        return torch.zeros_like(x)

    def fisher(self, x: Image) -> LinearOperator:
        return Zero(self.image_shape, self.image_shape)

    def perturb(self, x: Image, rng: Rng) -> Image:
        return torch.zeros_like(x)

    def residuals(self, x: Image) -> tuple[Tensor, ...]:
        return ()

    def good(self) -> tuple[Tensor, ...]:
        return ()

    def scaled(self, scale: Tensor) -> Flat:
        return self
