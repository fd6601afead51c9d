"""What a corner plot draws of one pixel: densities of its parameters and regions of their pairs, in physical units.

u ~ N(m, V): the density of θ_p(u_p) is φ(u_p; m_p, V_pp)/|dθ_p/du_p|, and the regions of 68.3 % and 95.4 % of a pair are
ellipses in u, (u − m)ᵀ V⁻¹ (u − m) = −2 ln(1 − mass), carried along the axes.
Invariant: every curve is closed form; no draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.unmixing.mixture import Coordinates

MASSES = (0.6827, 0.9545)
_REACH = 3.5  # standard deviations


@dataclass(frozen=True, eq=False)
class Corner:
    """Of one pixel. names: of P parameters, with units. values, density: (P, n) curves. regions: of pairs (i, j), i < j, a
    closed curve (n, 2) of (θ_i, θ_j) for each of `MASSES`."""

    names: tuple[str, ...]
    values: np.ndarray
    density: np.ndarray
    regions: Mapping[tuple[int, int], tuple[np.ndarray, ...]]


def corner(coordinates: Coordinates, mean: Tensor, covariance: Tensor, *, points: int = 81) -> Corner:
    """Arguments: mean (P,), covariance (P, P) of u."""
    std = covariance.diagonal().sqrt()
    grid = torch.linspace(-_REACH, _REACH, points).to(mean)[:, None]
    u = mean + grid * std
    theta = coordinates.physical(u)
    slope = (coordinates.physical(u + 1e-5 * std) - coordinates.physical(u - 1e-5 * std)) / (2e-5 * std)
    density = torch.exp(-(grid**2) / 2) / (math.sqrt(2 * math.pi) * std * slope.abs())
    names = tuple(f"{p.name}, {p.unit}" if p.unit else p.name for p in coordinates.parameters)
    pairs = [(i, j) for j in range(len(names)) for i in range(j)]
    regions = {pair: _regions(coordinates, mean, covariance, pair, points) for pair in pairs}
    return Corner(names, theta.T.numpy(), density.T.numpy(), regions)


def _regions(
    coordinates: Coordinates, mean: Tensor, covariance: Tensor, pair: tuple[int, int], points: int
) -> tuple[np.ndarray, ...]:
    index = torch.tensor(pair)
    root = torch.linalg.cholesky(covariance[index][:, index])
    angle = torch.linspace(0, 2 * math.pi, points).to(mean)
    circle = torch.stack([angle.cos(), angle.sin()], 1) @ root.mT
    found = []
    for mass in MASSES:
        u = mean.expand(points, -1).clone()
        u[:, index] += math.sqrt(-2 * math.log(1 - mass)) * circle
        found.append(coordinates.physical(u)[:, index].numpy())
    return tuple(found)
