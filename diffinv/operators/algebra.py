"""Lazy algebra of operators: adjoint, composition, sum, stack, block diagonal, scaling, diagonal, identity, zero, Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator, Operator


@register("operator", "adjoint")
@dataclass(frozen=True, eq=False)
class Adjoint(LinearOperator):
    """Aᴴ as an operator; its adjoint is A."""

    base: LinearOperator

    @property
    def in_shape(self) -> Shape:
        return self.base.out_shape

    @property
    def out_shape(self) -> Shape:
        return self.base.in_shape

    @property
    def H(self) -> LinearOperator:
        return self.base

    def apply(self, x: Tensor) -> Tensor:
        return self.base.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.base.apply(y)


@register("operator", "jacobian")
@dataclass(frozen=True, eq=False)
class Jacobian(LinearOperator):
    """∂A/∂x at `point`, of any differentiable operator: jvp forward, vjp adjoint."""

    base: Operator
    point: Tensor

    @property
    def in_shape(self) -> Shape:
        return self.base.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.base.out_shape

    def apply(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.base.apply, (self.point.expand_as(x).contiguous(),), (x,))[1]

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.func.vjp(self.base.apply, self.point.expand(y.shape[0], *self.point.shape[1:]))[1](y)[0]


def compose(outer: Operator, inner: Operator) -> Operator:
    """outer ∘ inner: linear if both are, else non-linear."""
    if tuple(outer.in_shape) != tuple(inner.out_shape):
        raise ShapeError(
            f"{type(outer).__name__} @ {type(inner).__name__}: the left takes {tuple(outer.in_shape)} "
            f"but the right gives {tuple(inner.out_shape)}."
        )
    linear = isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator)
    parts = (*_parts(outer), *_parts(inner))
    return Compose(parts) if linear else Chain(parts)


def _parts(operator: Operator) -> tuple[Operator, ...]:
    return operator.operators if isinstance(operator, _Pipeline) else (operator,)


@dataclass(frozen=True, eq=False)
class _Pipeline(Operator):
    """A₁ ∘ … ∘ Aₙ, the last applied first."""

    operators: tuple[Operator, ...]

    @property
    def in_shape(self) -> Shape:
        return self.operators[-1].in_shape

    @property
    def out_shape(self) -> Shape:
        return self.operators[0].out_shape

    def apply(self, x: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            x = operator.apply(x)
        return x


@register("operator", "compose")
@dataclass(frozen=True, eq=False)
class Compose(_Pipeline, LinearOperator):
    """A₁A₂…Aₙ of linear operators, the last applied first."""

    operators: tuple[LinearOperator, ...]

    def adjoint(self, y: Tensor) -> Tensor:
        for operator in self.operators:
            y = operator.adjoint(y)
        return y


@register("operator", "chain")
@dataclass(frozen=True, eq=False)
class Chain(_Pipeline):
    """A₁ ∘ … ∘ Aₙ with at least one non-linear part; its linearization is the chain rule."""

    def linearize(self, x: Tensor) -> LinearOperator:
        parts: list[LinearOperator] = []
        for operator in reversed(self.operators):
            parts.append(operator.linearize(x))
            x = operator.apply(x)
        return Compose(tuple(reversed(parts)))


@register("operator", "sum")
@dataclass(frozen=True, eq=False)
class Sum(LinearOperator):
    """A₁ + … + Aₙ of linear operators between the same shapes."""

    operators: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        shapes = {(tuple(o.in_shape), tuple(o.out_shape)) for o in self.operators}
        if len(shapes) != 1:
            raise ShapeError(f"Sum: the operators have different shapes {sorted(shapes)}.")

    @property
    def in_shape(self) -> Shape:
        return self.operators[0].in_shape

    @property
    def out_shape(self) -> Shape:
        return self.operators[0].out_shape

    def apply(self, x: Tensor) -> Tensor:
        return sum(operator.apply(x) for operator in self.operators)

    def adjoint(self, y: Tensor) -> Tensor:
        return sum(operator.adjoint(y) for operator in self.operators)


@register("operator", "scaled")
@dataclass(frozen=True, eq=False)
class Scaled(LinearOperator):
    """s A with a real factor s a row, (1|B,): the flux scale of an object is part of its operator."""

    scale: Tensor
    base: LinearOperator

    @classmethod
    def by(cls, scale: float | Tensor, base: LinearOperator) -> Scaled:
        """s A from a number (stored in float64) or a (1|B,) tensor."""
        return cls(torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else torch.float64).reshape(-1), base)

    @property
    def in_shape(self) -> Shape:
        return self.base.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.base.out_shape

    def _times(self, v: Tensor) -> Tensor:
        return v * self.scale.to(v.dtype).reshape(-1, *[1] * (v.ndim - 1))

    def apply(self, x: Tensor) -> Tensor:
        return self._times(self.base.apply(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._times(self.base.adjoint(y))


@register("operator", "diagonal")
@dataclass(frozen=True, eq=False)
class Diagonal(LinearOperator):
    """x ↦ d x, elementwise.

    Arguments: d: (1|B, *shape), real; `shape` is the image's, so that broadcasting is explicit.
    """

    d: Tensor

    @property
    def in_shape(self) -> Shape:
        return tuple(self.d.shape[1:])

    @property
    def out_shape(self) -> Shape:
        return tuple(self.d.shape[1:])

    def apply(self, x: Tensor) -> Tensor:
        return self.d * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.d * y


@register("operator", "identity")
@dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """x ↦ x."""

    in_shape: Shape

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y


@register("operator", "zero")
@dataclass(frozen=True, eq=False)
class Zero(LinearOperator):
    """x ↦ 0."""

    in_shape: Shape
    out_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.new_zeros(y.shape[0], *self.in_shape)


@register("operator", "stack")
@dataclass(frozen=True, eq=False)
class Stack(LinearOperator):
    """x ↦ (A₁x, …, Aₙx), flattened and concatenated: several linear looks at one image. Out: (B, Σ mᵢ).

    For several data sets with noises of their own prefer `Joint`, which never concatenates.
    """

    operators: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        shapes = {tuple(o.in_shape) for o in self.operators}
        if len(shapes) != 1:
            raise ShapeError(f"Stack: the operators take images of different shapes {sorted(shapes)}; bring them to one grid.")

    @property
    def in_shape(self) -> Shape:
        return self.operators[0].in_shape

    @property
    def out_shape(self) -> Shape:
        return (sum(_size(o.out_shape) for o in self.operators),)

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([o.apply(x).flatten(1) for o in self.operators], 1)

    def adjoint(self, y: Tensor) -> Tensor:
        parts = y.split([_size(o.out_shape) for o in self.operators], 1)
        return sum(o.adjoint(p.reshape(-1, *o.out_shape)) for o, p in zip(self.operators, parts, strict=True))


@register("operator", "block_diagonal")
@dataclass(frozen=True, eq=False)
class BlockDiagonal(LinearOperator):
    """(x₁, …, xₙ) ↦ (A₁x₁, …, Aₙxₙ) along channels: an operator a band. All parts map (cᵢ, H, W) → (kᵢ, H', W')."""

    operators: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        shapes = {(tuple(o.in_shape[1:]), tuple(o.out_shape[1:])) for o in self.operators}
        if len(shapes) != 1:
            raise ShapeError(
                f"BlockDiagonal: the bands have different sizes {sorted(shapes)}; bring them to one grid or use Joint."
            )

    @property
    def in_shape(self) -> Shape:
        return (sum(o.in_shape[0] for o in self.operators), *self.operators[0].in_shape[1:])

    @property
    def out_shape(self) -> Shape:
        return (sum(o.out_shape[0] for o in self.operators), *self.operators[0].out_shape[1:])

    def apply(self, x: Tensor) -> Tensor:
        parts = x.split([o.in_shape[0] for o in self.operators], 1)
        return torch.cat([o.apply(p) for o, p in zip(self.operators, parts, strict=True)], 1)

    def adjoint(self, y: Tensor) -> Tensor:
        parts = y.split([o.out_shape[0] for o in self.operators], 1)
        return torch.cat([o.adjoint(p) for o, p in zip(self.operators, parts, strict=True)], 1)


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
