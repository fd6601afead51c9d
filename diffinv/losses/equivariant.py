"""Losses that learn what one operator cannot see: from a group of transforms, or from the operators of other images.

Data consistency alone leaves the null space of A to the network's taste. If the set of images is closed under T_g, then
A T_g x̂ is data of another image of the set, and the network must bring T_g x̂ back (equivariant imaging); if other images
were seen by other operators A', then A' x̂ must lead back to x̂ (multi-operator imaging). All three terms here are biased:
none of them is a risk in expectation, and the gradient passes through x̂ as in the papers. Add the term that handles the
data: `Sure() + EquivariantImaging(…)` under noise, `MeasurementConsistency()` without.
Invariant: data under a mask have no influence on a value or a gradient. The noise that is drawn anew is held fixed in the
gradient, ∂(mean + n)/∂mean = 1, which for noise that depends on its mean differs from differentiating the draw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError, UnsupportedError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, mean_good
from diffinv.operators.groups import Group
from diffinv.reconstructors.base import Reconstructor


@register("loss", "measurement_consistency")
@dataclass(frozen=True)
class MeasurementConsistency(Loss):
    """`‖A f(y, A) − y‖²`, mean over the good data: (B,), in the data's unit squared.

    Its minimisers reproduce y, noise and all (f = y where A = I), and are free in the null space of A. For noise of
    noticeable level use Sure, Recorrupted or Splitting instead.
    """

    def __call__(self, model: Reconstructor, batch: MeasuredBatch, rng: Rng) -> Tensor:
        data = batch.data
        return mean_good((data.operator(model(data)) - data.y) ** 2, batch.good)


@register("loss", "equivariant_imaging")
@dataclass(frozen=True)
class EquivariantImaging(Loss):
    """`‖T_g x̂ − f(A T_g x̂ + n, A)‖²`, x̂ = f(y, A), mean over the pixels: (B,), in the image's unit squared.

    Arguments:
        group: draws T_g, one a row and call. noisy: True draws n from the observation's own noise model, as real data have
            it (robust EI); False sets n = 0, for data of negligible noise.
    The term alone: f = 0 minimises it. It adds information only where T_g moves the null space of A
    (`identifiability.check_group_helps`), and zero loss says that the reconstructions span a set that is closed under the
    group and on which A is one-to-one, not that this is the true set: two pixels of which one is seen and that a flip
    exchanges are tied together as x₂ = x₁ or as x₂ = −x₁.
    References: *Equivariant Imaging: Learning Beyond the Range Space*, Chen, Tachella & Davies, 2021, arXiv:2103.14756;
    *Robust Equivariant Imaging*, the same, 2022, arXiv:2111.12855.
    """

    group: Group
    noisy: bool

    def check(self, batch: MeasuredBatch) -> None:
        """Raise UnsupportedError if the group does not act on images of the batch's shape."""
        shape, y = batch.observation.image_shape, batch.observation.y
        try:
            self.group.draw(Rng([0]), shape, y)
        except ShapeError as error:
            raise UnsupportedError(f"EquivariantImaging: {error}") from error

    def __call__(self, model: Reconstructor, batch: MeasuredBatch, rng: Rng) -> Tensor:
        observation = batch.data
        x = model(observation)
        turned = self.group.draw(rng, observation.image_shape, x)(x)
        return _pixel_mean((model(_measured(observation, turned, rng, self.noisy)) - turned) ** 2)


@register("loss", "multi_operator_imaging")
@dataclass(frozen=True)
class MultiOperatorImaging(Loss):
    """`‖f(A' x̂ + n, A') − x̂‖²`, x̂ = f(y, A), A' of another row of the batch, mean over the pixels: (B,).

    Every row takes the operator and the noise model of the row a common distance further on, drawn anew each call, so
    that no row meets its own and all others equally often. Rows talk to each other here, and nowhere else among the losses.

    Arguments: noisy: True draws n from the noise model of the row that A' comes from; False sets n = 0.
    The term alone: f = 0 minimises it. E_i[A_iᵀA_i] must span the images (`identifiability`, without a group).
    References: *Unsupervised Learning From Incomplete Measurements for Inverse Problems*, Tachella, Chen & Davies, 2022,
    arXiv:2201.12151.
    """

    noisy: bool

    def check(self, batch: MeasuredBatch) -> None:
        """Raise UnsupportedError where every row has the same operator."""
        _check_rows(batch.observation)
        operator = batch.observation.operator
        if all(torch.equal(t, t[:1].expand_as(t)) for t in operator.tensors()):
            raise UnsupportedError(
                "MultiOperatorImaging: all rows have one and the same operator, so that there is nothing to swap; "
                "use EquivariantImaging, or mix data of several operators."
            )

    def __call__(self, model: Reconstructor, batch: MeasuredBatch, rng: Rng) -> Tensor:
        observation = batch.data
        _check_rows(observation)
        x = model(observation)
        index = _another(len(x), rng)
        other = replace(observation, operator=observation.operator.select(index), noise=observation.noise.select(index))
        return _pixel_mean((model(_measured(other, x, rng, self.noisy)) - x) ** 2)


def _measured(observation: Observation, x: Image, rng: Rng, noisy: bool) -> Observation:
    """The same instrument pointed at other images: y = A x, or A x + n with n held fixed in the gradient."""
    mean = observation.operator(x)
    if noisy:
        mean = mean + (observation.noise.sample(mean.detach(), rng) - mean.detach())
    return replace(observation, y=mean)


def _another(batch: int, rng: Rng) -> Tensor:
    """Row i → row i + k, k uniform on 1 … B − 1, from the first row's stream."""
    chance = rng.uniform(torch.empty(len(rng), 1, dtype=torch.float64, device=rng.keys.device))[0, 0]
    offset = 1 + min(int((batch - 1) * chance), batch - 2)
    return (torch.arange(batch) + offset) % batch


def _check_rows(observation: Observation) -> None:
    if observation.operator.batch < 2:
        raise UnsupportedError(
            "MultiOperatorImaging: the batch has one operator, so that there is nothing to swap; use EquivariantImaging, "
            "or batches of two rows or more with operators of their own."
        )


def _pixel_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
