"""Operators that come from elsewhere: a callable, an object with `A` and `A_adjoint`, a SciPy `LinearOperator`.

Adapters hold foreign objects, so they are not registered and do not travel through dictionaries. They are shared by all
images of a batch. A function that claims to be linear is taken at its word: check it with its adjoint before use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator, Operator


@dataclass(frozen=True, eq=False)
class CallableOperator(Operator):
    """y = f(x) for any differentiable f; its Jacobian comes from automatic differentiation.

    Arguments: function: f, (B, *in_shape) → (B, *out_shape), row by row. in_shape, out_shape: without the batch axis.
    """

    function: Callable[[Tensor], Tensor]
    in_shape: Shape
    out_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True, eq=False)
class LinearCallable(LinearOperator):
    """y = f(x) for a linear differentiable f; the adjoint is its vjp. Arguments: as in `CallableOperator`."""

    function: Callable[[Tensor], Tensor]
    in_shape: Shape
    out_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        return self.function(x)


class Physics(Protocol):
    """What DeepInverse calls a linear physics: A and its adjoint on batches."""

    def A(self, x: Tensor) -> Tensor:
        """(B, *in_shape) → (B, *out_shape)."""

    def A_adjoint(self, y: Tensor) -> Tensor:
        """(B, *out_shape) → (B, *in_shape)."""


@dataclass(frozen=True, eq=False)
class FromPhysics(LinearOperator):
    """A linear physics with `A` and `A_adjoint` (the protocol of DeepInverse's `LinearPhysics`).

    Arguments: physics: the object. in_shape, out_shape: without the batch axis, which such objects do not tell.
    """

    physics: Physics
    in_shape: Shape
    out_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)


class Matrix(Protocol):
    """What `scipy.sparse.linalg.LinearOperator` offers: products with blocks of real column vectors."""

    shape: tuple[int, int]

    def matmat(self, columns: np.ndarray) -> np.ndarray:
        """A X: (n, B) → (m, B)."""

    def rmatmat(self, columns: np.ndarray) -> np.ndarray:
        """Aᴴ X: (m, B) → (n, B)."""


@dataclass(frozen=True, eq=False)
class FromScipy(LinearOperator):
    """A real `scipy.sparse.linalg.LinearOperator` that acts on the flattened image, one column an image, on the host.

    Arguments: matrix: (m, n), real. in_shape, out_shape: without the batch axis, of n and m elements.
    Raises: ShapeError if the sizes do not agree.
    """

    matrix: Matrix
    in_shape: Shape
    out_shape: Shape

    def __post_init__(self) -> None:
        sizes = (int(np.prod(self.out_shape)), int(np.prod(self.in_shape)))
        if tuple(self.matrix.shape) != sizes:
            raise ShapeError(
                f"FromScipy: the matrix is {tuple(self.matrix.shape)} but the shapes need {sizes}; mend in_shape or out_shape."
            )

    def apply(self, x: Tensor) -> Tensor:
        return _HostProduct.apply(x.flatten(1), self.matrix.matmat, self.matrix.rmatmat).reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return _HostProduct.apply(y.flatten(1), self.matrix.rmatmat, self.matrix.matmat).reshape(-1, *self.in_shape)


class _HostProduct(torch.autograd.Function):
    """Rows times a matrix that lives in NumPy; derivatives of any order are further products."""

    @staticmethod
    def forward(rows: Tensor, product: Callable, transposed: Callable) -> Tensor:
        result = np.ascontiguousarray(product(rows.detach().cpu().numpy().T).T)
        return torch.as_tensor(result).to(dtype=rows.dtype, device=rows.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.product, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _HostProduct.apply(gradient, ctx.transposed, ctx.product), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _HostProduct.apply(tangent, ctx.product, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, rows: Tensor, product: Callable, transposed: Callable) -> tuple[Tensor, int]:
        if in_dims[0] is None:
            return _HostProduct.apply(rows, product, transposed), None
        stacked = rows.movedim(in_dims[0], 0)
        flat = _HostProduct.apply(stacked.flatten(0, 1), product, transposed)
        return flat.unflatten(0, stacked.shape[:2]), 0
