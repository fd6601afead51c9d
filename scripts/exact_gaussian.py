"""The exact Gaussian denoiser and linear operators of the peer benchmark, in torch alone, so that every library runs this code.

D(x, σ) = m + Q [λ/(λ + σ²)] Qᵀ (x − m) for x₀ ~ N(m, Q λ Qᵀ). Each row that goes through it counts as one network call, and
each row of a vector–Jacobian product as another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Tally:
    """Rows that went through the network, forwards and backwards."""

    forward: int = 0
    vjp: int = 0


class _Counted(torch.autograd.Function):
    """The identity, which counts the rows of a tensor and of its gradient."""

    @staticmethod
    def forward(x: Tensor, tally: Tally) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tally], output: Tensor) -> None:
        ctx.tally = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tally.vjp += gradient.shape[0]
        return gradient, None


class GaussianNetwork(nn.Module):
    """E[x₀ | x₀ + σ z = x] of N(m, Q λ Qᵀ), float32, with a tally of its calls.

    Arguments: mean: (n,), in the unit of x. values, vectors: λ (n,), in its square, and Q (n, n). tally: counts the calls.
    work: times that each product with Q is made (and averaged), to cost what a trained network does.
    """

    def __init__(self, mean: Tensor, values: Tensor, vectors: Tensor, tally: Tally, work: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.tally, self.work = tally, work

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """(B, …) of n elements a row, σ () or of 1 or B elements → (B, …)."""
        rows = x.reshape(x.shape[0], -1)
        variance = torch.as_tensor(sigma, dtype=rows.dtype).reshape(-1, 1) ** 2
        u = self._product(rows - self.mean, self.vectors)
        denoised = self.mean + self._product(u * (self.values / (self.values + variance)), self.vectors.mT)
        self.tally.forward += x.shape[0]
        return _Counted.apply(denoised, self.tally).reshape(x.shape)

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        products = [rows @ matrix for _ in range(self.work)]
        return products[0] if self.work == 1 else sum(products) / self.work


@dataclass(frozen=True)
class LinearMap:
    """y = M x on flattened rows: an element-wise product where M is diagonal, a matrix product elsewhere; in the dtype of x.

    Arguments: matrix: M (m, n). in_shape, out_shape: of one image and of its data, without the batch axis.
    """

    matrix: Tensor
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    diagonal: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> LinearMap:
        square = matrix.shape[0] == matrix.shape[1]
        diagonal = matrix.diagonal() if square and torch.equal(matrix, torch.diag(matrix.diagonal())) else None
        return cls(matrix, in_shape, out_shape, diagonal)

    def A(self, x: Tensor) -> Tensor:
        """(B, *in_shape) → (B, *out_shape)."""
        rows = x.reshape(x.shape[0], -1)
        data = rows * self.diagonal.to(x.dtype) if self.diagonal is not None else rows @ self.matrix.mT.to(x.dtype)
        return data.reshape(-1, *self.out_shape)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """(B, *out_shape) → (B, *in_shape)."""
        rows = y.reshape(y.shape[0], -1)
        image = rows * self.diagonal.to(y.dtype) if self.diagonal is not None else rows @ self.matrix.to(y.dtype)
        return image.reshape(-1, *self.in_shape)


@dataclass(frozen=True)
class Problem:
    """y = A x₀ + n with x₀ ~ N(m, Q λ Qᵀ) and n ~ N(0, σ_y²); T observations of the same operator and noise.

    Arguments: network: the exact denoiser. operator: A. y: (T, *out_shape). sigma_y: σ_y, in the unit of y.
    """

    network: GaussianNetwork
    operator: LinearMap
    y: Tensor
    sigma_y: float

    @property
    def tally(self) -> Tally:
        return self.network.tally

    @property
    def centre(self) -> float:
        """The prior's average pixel."""
        return float(self.network.mean.mean())

    @property
    def spread(self) -> float:
        """Root mean square over pixels of the prior's standard deviation."""
        return float(self._variances().mean().sqrt())

    @property
    def widest(self) -> float:
        """Largest standard deviation of a pixel."""
        return float(self._variances().max().sqrt())

    def _variances(self) -> Tensor:
        return (self.network.vectors**2) @ self.network.values

    @classmethod
    def load(cls, path: Path) -> Problem:
        """Read what `save` wrote, as float32."""
        with np.load(path, allow_pickle=False) as file:
            array = {name: torch.as_tensor(file[name]).float() for name in ("mean", "values", "vectors", "matrix", "y")}
            shapes = [tuple(int(n) for n in file[name]) for name in ("in_shape", "out_shape")]
            sigma_y, work = float(file["sigma_y"]), int(file["work"])
        network = GaussianNetwork(array["mean"], array["values"], array["vectors"], Tally(), work)
        operator = LinearMap.of(array["matrix"], *shapes)
        return cls(network, operator, array["y"].reshape(-1, *shapes[1]), sigma_y)

    def repeated(self, draws: int) -> Problem:
        """Every observation `draws` times, the draws of one observation next to each other."""
        return replace(self, y=self.y.repeat_interleave(draws, 0))

    def rescaled(self, scale: float, middle: float) -> Problem:
        """The same problem for u, x = c + s (u − b): a network of the same cost, with the same tally.

        Arguments: scale: s, unit of x. middle: b, the value of u at the prior's average pixel c.
        """
        net, offset = self.network, self.centre - scale * middle
        network = GaussianNetwork((net.mean - offset) / scale, net.values / scale**2, net.vectors, net.tally, net.work)
        data = self.operator.A(torch.full((1, *self.operator.in_shape), offset))
        return replace(self, network=network, y=(self.y - data) / scale, sigma_y=self.sigma_y / scale)

    def solved_in(self, scale: float, middle: float, run: Callable[[Problem], Tensor]) -> Tensor:
        """What `run` draws from the rescaled problem, in the unit of x."""
        return self.centre + scale * (run(self.rescaled(scale, middle)) - middle)


def save(path: Path, arrays: dict[str, Tensor], in_shape: tuple[int, ...], out_shape: tuple[int, ...], sigma_y: float) -> None:
    """Write a problem: `arrays` holds mean, values, vectors, matrix, y and work."""
    stored = {name: value.numpy() for name, value in arrays.items()}
    np.savez(path, in_shape=np.array(in_shape), out_shape=np.array(out_shape), sigma_y=np.array(sigma_y), **stored)
