"""The exact Gaussian denoiser and linear operators of the peer benchmark, in torch alone, so that every library runs this code.

D(x, σ) = m + Q [λ/(λ + σ²)] Qᵀ (x − m) for x₀ ~ N(m, Q λ Qᵀ). Each row that goes through it counts as one network call, and
each row of a vector–Jacobian product as another one.
"""

from __future__ import annotations

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

    Arguments: mean: (n,). values, vectors: λ (n,) and Q (n, n), in the unit of x and its square.
    """

    def __init__(self, mean: Tensor, values: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.tally = Tally()

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """(B, …) of n elements a row, σ () or of 1 or B elements → (B, …)."""
        rows = x.reshape(x.shape[0], -1)
        variance = torch.as_tensor(sigma, dtype=rows.dtype).reshape(-1, 1) ** 2
        u = (rows - self.mean) @ self.vectors
        denoised = self.mean + (u * (self.values / (self.values + variance))) @ self.vectors.mT
        self.tally.forward += x.shape[0]
        return _Counted.apply(denoised, self.tally).reshape(x.shape)


@dataclass(frozen=True)
class LinearMap:
    """y = M x on flattened rows: an element-wise product where M is diagonal, a matrix product elsewhere.

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
        data = rows * self.diagonal if self.diagonal is not None else rows @ self.matrix.mT
        return data.reshape(-1, *self.out_shape)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """(B, *out_shape) → (B, *in_shape)."""
        rows = y.reshape(y.shape[0], -1)
        image = rows * self.diagonal if self.diagonal is not None else rows @ self.matrix
        return image.reshape(-1, *self.in_shape)


@dataclass(frozen=True)
class Problem:
    """y = A x₀ + n with x₀ ~ N(m, Q λ Qᵀ) and n ~ N(0, σ_y²); T observations of the same operator and noise.

    Arguments: network: the exact denoiser. operator: A. y: (T, *out_shape). sigma_y: σ_y.
    """

    network: nn.Module
    operator: LinearMap
    y: Tensor
    sigma_y: float
    tally: Tally

    @classmethod
    def load(cls, path: Path) -> Problem:
        """Read what `save` wrote, as float32."""
        with np.load(path, allow_pickle=False) as file:
            array = {name: torch.as_tensor(file[name]).float() for name in ("mean", "values", "vectors", "matrix", "y")}
            shapes = [tuple(int(n) for n in file[name]) for name in ("in_shape", "out_shape")]
            sigma_y = float(file["sigma_y"])
        network = GaussianNetwork(array["mean"], array["values"], array["vectors"])
        operator = LinearMap.of(array["matrix"], *shapes)
        return cls(network, operator, array["y"].reshape(-1, *shapes[1]), sigma_y, network.tally)

    def repeated(self, draws: int) -> Problem:
        """Every observation `draws` times, the draws of one observation next to each other."""
        return replace(self, y=self.y.repeat_interleave(draws, 0))

    def rescaled(self, scale: float) -> Problem:
        """The same problem for u, x = c + s (u − ½), c the prior's average pixel: s is the unit of x that [0, 1] spans."""
        centre = float(self.network.mean.mean())
        offset = self.operator.A(torch.full((1, *self.operator.in_shape), centre - scale / 2))
        network = _Rescaled(self.network, centre, scale)
        return replace(self, network=network, y=(self.y - offset) / scale, sigma_y=self.sigma_y / scale)


class _Rescaled(nn.Module):
    """A denoiser of x as one of u, x = c + s (u − ½)."""

    def __init__(self, network: nn.Module, centre: float, scale: float) -> None:
        super().__init__()
        self.network, self.centre, self.scale = network, centre, scale

    def forward(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        x = self.centre + self.scale * (u - 0.5)
        return (self.network(x, self.scale * sigma) - self.centre) / self.scale + 0.5


def save(path: Path, arrays: dict[str, Tensor], in_shape: tuple[int, ...], out_shape: tuple[int, ...], sigma_y: float) -> None:
    """Write a problem: `arrays` holds mean, values, vectors, matrix and y, and whatever else is to be kept with them."""
    stored = {name: value.numpy() for name, value in arrays.items()}
    np.savez(path, in_shape=np.array(in_shape), out_shape=np.array(out_shape), sigma_y=np.array(sigma_y), **stored)
