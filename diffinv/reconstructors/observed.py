"""What reconstructors ask of an observation: clean data of every row, which data are good, and whether A is the identity."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import expand
from diffinv.likelihood import Observation
from diffinv.noise.independent import Independent
from diffinv.operators.algebra import Compose, Diagonal, Identity, Scaled, compose
from diffinv.operators.base import LinearOperator, Operator
from diffinv.operators.sampling import Mask


def good_data(observation: Observation) -> Tensor:
    """True where a datum is good: (B, *data)."""
    shape = (observation.batch, *observation.y.shape[1:])
    return observation.noise.variance(observation.y.new_zeros(shape)).isfinite()


def clean_data(observation: Observation) -> Tensor:
    """The data with 0 in place of what is masked: (B, *data)."""
    good = good_data(observation)
    return observation.y.expand(good.shape).where(good, 0.0)


def whole(observation: Observation) -> Observation:
    """The observation with clean data of its own for every row: y (B, *data)."""
    return replace(observation, y=clean_data(observation))


def linear(owner: str, observation: Observation, remedy: str) -> LinearOperator:
    """The operator A of an observation. Raises UnsupportedError if it is not linear."""
    operator = observation.operator
    if not isinstance(operator, LinearOperator):
        raise UnsupportedError(
            f"{owner}: {type(operator).__name__} is not linear, so it has no adjoint that brings data to the image; {remedy}"
        )
    return operator


@singledispatch
def identity_scale(operator: Operator) -> Tensor | None:
    """s (1|B,) of an operator A = s I, or None of any other."""
    return None


@identity_scale.register
def _(operator: Identity) -> Tensor:
    return torch.ones(1, dtype=torch.float64)


@identity_scale.register
def _(operator: Scaled) -> Tensor | None:
    inner = identity_scale(operator.base)
    return None if inner is None else operator.scale * inner.to(operator.scale)


@identity_scale.register
def _(operator: Compose) -> Tensor | None:
    scale: Tensor | None = torch.ones(1, dtype=torch.float64)
    for part in operator.operators:
        inner = identity_scale(part)
        scale = None if scale is None or inner is None else inner * scale.to(inner.device)
    return scale


def require_identity(owner: str, observation: Observation) -> Tensor:
    """s (1|B,) of A = s I, in the dtype and on the device of y. Raises UnsupportedError for any other operator."""
    scale = identity_scale(observation.operator)
    if scale is None:
        raise UnsupportedError(
            f"{owner}: {type(observation.operator).__name__} is not the identity, so a pixel of the data is not one "
            "of the image; use BackProjected or Unrolled."
        )
    return scale.to(observation.y)


def hidden(observation: Observation, keep: Tensor) -> Observation:
    """An observation of the data `keep` (B, *data) alone: 0 elsewhere, in data and operator, and masked in the noise.

    Raises: UnsupportedError for noise that is correlated between data.
    """
    noise = observation.noise
    if not isinstance(noise, Independent):
        raise UnsupportedError(
            f"splitting: {type(noise).__name__} is correlated between data, so that what is hidden can be guessed from the "
            "noise of its neighbours; use SURE, R2R or a second exposure."
        )
    good = good_data(observation)
    operator = compose(Diagonal(keep.to(observation.y)), observation.operator)
    return Observation(clean_data(observation).where(keep, 0.0), operator, replace(noise, mask=keep & good))


@singledispatch
def diagonal(operator: Operator) -> Tensor | None:
    """a (1|B, *image) of an operator A = diag(a), or None of any other."""
    return None


@diagonal.register
def _(operator: Identity) -> Tensor:
    return torch.ones(1, *operator.in_shape, dtype=torch.float64)


@diagonal.register
def _(operator: Mask) -> Tensor:
    return operator.mask.double()


@diagonal.register
def _(operator: Diagonal) -> Tensor:
    return operator.d


@diagonal.register
def _(operator: Scaled) -> Tensor | None:
    inner = diagonal(operator.base)
    return None if inner is None else expand(operator.scale, inner) * inner.to(operator.scale)


@diagonal.register
def _(operator: Compose) -> Tensor | None:
    found: Tensor | None = diagonal(operator.operators[0])
    for part in operator.operators[1:]:
        inner = diagonal(part)
        found = None if found is None or inner is None else found * inner.to(found.device)
    return found


def require_diagonal(owner: str, observation: Observation) -> Tensor:
    """a (1|B, *data) of A = diag(a), in the dtype and on the device of y. Raises UnsupportedError for any other operator."""
    found = diagonal(observation.operator)
    if found is None:
        raise UnsupportedError(
            f"{owner}: {type(observation.operator).__name__} mixes pixels, so that no pixel of the image belongs to a datum; "
            "use SplittingAverage."
        )
    return found.to(observation.y)
