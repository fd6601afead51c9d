"""Losses: (model, batch, rng) → (B,), never reduced, with a declared oracle.

An unbiased loss names the supervised quantity whose gradient it reproduces in expectation (`oracle`), and is tested against
it. The others have another minimiser, and are tested by that. What a loss cannot do it refuses before training (`check`).
Data-space losses are means over the good data of a row, in the square of the data's unit.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffinv.core.batched import Batched
from diffinv.core.checks import UnsupportedError, check_shape
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import good_data, whole


@dataclass(frozen=True, eq=False)
class CleanBatch(Batched):
    """Clean images x (B, C, H, W) in the unit of the prior."""

    x: Tensor


@dataclass(frozen=True, eq=False)
class MeasuredBatch(Batched):
    """Measurements, and what else may be known of them.

    Arguments: observation: y, A and the noise of each row. x: the true images (B, *image), for supervised losses and oracles.
    second: another exposure of the same images, with independent noise, and the same operator or another.
    """

    observation: Observation
    x: Tensor | None = None
    second: Observation | None = None

    def __post_init__(self) -> None:
        for data in (self.observation, self.second):
            if data is not None and not isinstance(data, Observation):
                raise UnsupportedError(
                    f"MeasuredBatch: data must be one Observation a row, got {type(data).__name__}; give a second exposure as "
                    "`second`, or stack the exposures in one operator."
                )

    @cached_property
    def data(self) -> Observation:
        """The observation with 0 in place of masked data; one object, so that the terms of a sum can share a pass (`Total`)."""
        return whole(self.observation)

    @cached_property
    def good(self) -> Tensor:
        """True where a datum is good: (B, *data)."""
        return good_data(self.observation)


class Loss(abc.ABC):
    """An objective a row. Losses add and scale: `a * L1 + b * L2`."""

    unbiased: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, model: nn.Module, batch: Batched, rng: Rng) -> Tensor:
        """The loss of each row: (B,)."""

    @property
    def multipliers(self) -> tuple[nn.Parameter, ...]:
        """What the loss is to be maximised over (UNSURE), in an optimiser group of the trainer's own."""
        return ()

    @property
    def differences(self) -> bool:
        """Whether it takes finite differences of the network, which reduced precision drowns."""
        return False

    def check(self, batch: Batched) -> None:
        """Raise UnsupportedError, with the reason and a remedy, where the batch lacks what the loss needs."""
        return None

    def oracle(self, model: nn.Module, batch: Batched, rng: Rng) -> Tensor:
        """The supervised quantity of each row whose gradient the loss has in expectation: (B,)."""
        raise UnsupportedError(f"{type(self).__name__} has no oracle: it is biased, with a minimiser of its own.")

    def __add__(self, other: Loss) -> Total:
        return Total((*_terms(self), *_terms(other)))

    def __mul__(self, weight: float) -> Total:
        return Total(tuple((weight * w, loss) for w, loss in _terms(self)))

    __rmul__ = __mul__


@register("loss", "total")
@dataclass(frozen=True)
class Total(Loss):
    """Σ_k weight_k loss_k, each with random numbers of its own; they share the reconstruction of the batch's data."""

    terms: tuple[tuple[float, Loss], ...]

    @property
    def unbiased(self) -> bool:
        return all(loss.unbiased for _, loss in self.terms)

    @property
    def multipliers(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for _, loss in self.terms for p in loss.multipliers)

    @property
    def differences(self) -> bool:
        return any(loss.differences for _, loss in self.terms)

    def check(self, batch: Batched) -> None:
        for _, loss in self.terms:
            loss.check(batch)

    def __call__(self, model: nn.Module, batch: Batched, rng: Rng) -> Tensor:
        once = _Once(model)
        return sum(w * loss(once, batch, rng.spawn(k)) for k, (w, loss) in enumerate(self.terms))

    def oracle(self, model: nn.Module, batch: Batched, rng: Rng) -> Tensor:
        once = _Once(model)
        return sum(w * loss.oracle(once, batch, rng.spawn(k)) for k, (w, loss) in enumerate(self.terms))


def twice(model: nn.Module, data: Observation, y: Tensor) -> tuple[Image, Image]:
    """Reconstructions of data, and of the same with y in place of its own: one pass of twice the rows, where neither is known."""
    if isinstance(model, _Once):
        return model.twice(data, y)
    both = replace(data.repeat(2), y=torch.stack([data.y, y], 1).flatten(0, 1))
    here, there = model(both).unflatten(0, (-1, 2)).unbind(1)
    return here, there


class _Once(Reconstructor):
    """A model that reconstructs the same observation (the same object) once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.known = model, []

    def forward(self, observation: Observation, *more: Tensor) -> Tensor:
        if more:  # a denoiser's (x, σ)
            return self.model(observation, *more)
        image = self._recall(observation)
        return self._keep(observation, self.model(observation)) if image is None else image

    def twice(self, data: Observation, y: Tensor) -> tuple[Image, Image]:
        """As the function of this name."""
        image = self._recall(data)
        if image is not None:
            return image, self.model(replace(data, y=y))
        here, there = twice(self.model, data, y)
        return self._keep(data, here), there

    def _recall(self, observation: Observation) -> Image | None:
        found = (image for seen, taped, image in self.known if seen is observation and taped == torch.is_grad_enabled())
        return next(found, None)

    def _keep(self, observation: Observation, image: Image) -> Image:
        self.known.append((observation, torch.is_grad_enabled(), image))
        return image

    def score(self, observation: Observation) -> Tensor:
        return self.model.score(observation)


def _terms(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    return loss.terms if isinstance(loss, Total) else ((1.0, loss),)


def mean_good(values: Tensor, good: Tensor) -> Tensor:
    """Mean over the good data of a row, 0 for a row without: (B, *data), (B, *data) → (B,)."""
    return values.where(good, 0.0).flatten(1).sum(1) / good.flatten(1).sum(1).clamp_min(1)


def data_risk(model: nn.Module, observation: Observation, x: Tensor) -> Tensor:
    """`‖A (f(y, A) − x)‖²` over the good data, a datum: (B,). The oracle of most losses of measurements."""
    error = observation.operator(model(observation)) - observation.operator(x)
    return mean_good(error**2, good_data(observation))


def truth(batch: MeasuredBatch, owner: str) -> Tensor:
    """The batch's true images. Raises UnsupportedError where there are none."""
    if batch.x is None:
        raise UnsupportedError(f"{owner}: the batch has no true images x; use a self-supervised loss, or simulate.")
    check_shape(f"{owner}: x", batch.x, batch.observation.image_shape)
    return batch.x
