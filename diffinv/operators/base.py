"""Forward operators: a deterministic map from an image to noiseless data, batched, with per-image parameters.

`apply` maps (B, *in_shape) → (B, *out_shape). `linearize(x)` is the Jacobian at x as a `LinearOperator`, which adds the
adjoint under the real inner product. A linear operator is its own linearization. The default adjoint and the default
linearization come from automatic differentiation, so any differentiable `apply` is a complete operator.
Invariant: ⟨A x, y⟩ = ⟨x, Aᴴ y⟩ to rounding.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from diffinv.core.batched import Batched
from diffinv.core.checks import check_batch, check_shape


class Operator(Batched, abc.ABC):
    """A forward operator; final classes declare `in_shape` and `out_shape` as fields or properties (without batch axis)."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Noiseless data of the images x: (B, *in_shape) → (B, *out_shape)."""

    def linearize(self, x: Tensor) -> LinearOperator:
        """Jacobian of `apply` at x, as a linear operator (jvp forward, vjp adjoint)."""
        from diffinv.operators.algebra import Jacobian

        return Jacobian(self, x)

    def __call__(self, x: Tensor) -> Tensor:
        """`apply` behind a check of the shapes."""
        check_shape(type(self).__name__, x, self.in_shape)
        for tensor in self.tensors():
            check_batch(type(self).__name__, "parameter", tensor.shape[0], x.shape[0])
        return self.apply(x)


class LinearOperator(Operator):
    """A linear forward operator A with its adjoint Aᴴ, and lazy algebra: `.H`, `@`, `+`, scalar `*`."""

    def linearize(self, x: Tensor) -> LinearOperator:
        return self

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᴴ y: (B, *out_shape) → (B, *in_shape); by default the vjp of `apply`."""
        zero = y.new_zeros(y.shape[0], *self.in_shape)
        return torch.func.vjp(self.apply, zero)[1](y)[0]

    @property
    def H(self) -> LinearOperator:
        """The adjoint as an operator."""
        from diffinv.operators.algebra import Adjoint

        return Adjoint(self)

    def __matmul__(self, other: Operator) -> Operator:
        from diffinv.operators.algebra import compose

        return compose(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from diffinv.operators.algebra import Sum

        return Sum((self, other))

    def __mul__(self, scale: float | Tensor) -> LinearOperator:
        from diffinv.operators.algebra import Scaled

        return Scaled.by(scale, self)

    __rmul__ = __mul__
