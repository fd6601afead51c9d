"""What reconstructors ask of an observation: clean data of every row, which data are good, and whether A is the identity."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.likelihood import Observation
from diffinv.operators.algebra import Compose, Identity, Scaled
from diffinv.operators.base import LinearOperator, Operator


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
