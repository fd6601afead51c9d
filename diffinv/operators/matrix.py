"""A linear operator that is a table of numbers: for small images the fastest product, whatever the instrument is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError
from diffinv.core.linalg import dense
from diffinv.core.registry import register
from diffinv.core.types import Shape
from diffinv.operators.base import LinearOperator


@register("operator", "dense_matrix")
@dataclass(frozen=True, eq=False)
class DenseMatrix(LinearOperator):
    """y = M x of the flattened image, reshaped to the data.

    Arguments: matrix: M, (1|B, m, n). in_shape: of the image, n values. out_shape: of the data, m values.
    Raises: ShapeError if the three do not agree.
    """

    matrix: Tensor
    in_shape: Shape
    out_shape: Shape

    def __post_init__(self) -> None:
        wanted = (math.prod(self.out_shape), math.prod(self.in_shape))
        if self.matrix.ndim != 3 or tuple(self.matrix.shape[1:]) != wanted:
            raise ShapeError(
                f"DenseMatrix: matrix must be (1|B, {wanted[0]}, {wanted[1]}) for images {tuple(self.in_shape)} and data "
                f"{tuple(self.out_shape)}, got {tuple(self.matrix.shape)}."
            )

    @classmethod
    def of(cls, operator: LinearOperator, like: Tensor) -> DenseMatrix:
        """The table of an operator with one row of parameters, in the dtype and on the device of `like`."""
        table = dense(operator, like.new_zeros(1, *operator.in_shape))
        return cls(table[None], tuple(operator.in_shape), tuple(operator.out_shape))

    def apply(self, x: Tensor) -> Tensor:
        return _times(self.matrix, x).unflatten(1, tuple(self.out_shape))

    def adjoint(self, y: Tensor) -> Tensor:
        return _times(self.matrix.mT, y).unflatten(1, tuple(self.in_shape))


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """(1|B, m, n) times the rows of v: (B, m). One table for all rows is one product of matrices."""
    flat = v.flatten(1)
    return flat @ matrix[0].mT if matrix.shape[0] == 1 else torch.einsum("bmn,bn->bm", matrix, flat)
