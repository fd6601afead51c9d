"""Does a group commute with the instrument, border and interpolation apart? Then it teaches nothing of the sky.

`r = ‖(M T − T M) x‖/‖M T x‖` for M = AᵀGA, G the projection on good data, and test images x that lie far from the border: 0
for shifts and any convolution, for turns and a round PSF. In `identifiability` such a pair may still seem to help, since light
that a border cuts off, or that interpolation spills, is moved as well, and bright images lift it above the noise; a network
that is trained on that learns the border.
x is white where the group moves whole pixels, so that aliasing counts; and smooth where it interpolates, so that the
interpolation does not: Gaussian blobs of `BLOB` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import dot
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Shape
from diffinv.likelihood import Observation
from diffinv.operators.groups import Dilations, Group, OpenShifts, Product, Rotations, Shifts
from diffinv.reconstructors.observed import good_data

BLOB = 1.5
TOLERANCE = 0.01
_DRAWS = 8


def commutator(observation: Observation, group: Group) -> float:
    """r, the rms over draws of the group and the first four rows.

    Arguments: observation: a linear A, and which data are good. group: its shifts are kept below an eighth of the field.
    """
    found = []
    for row in range(min(observation.batch, 4)):
        data = observation.select([row]).to(torch.float64)
        operator, good, shape = data.operator, good_data(data), tuple(data.image_shape)
        rng = Rng.for_draws(row, range(_DRAWS), 1)
        x = _images(shape, rng, smooth=_interpolates(group))
        element = _gentle(group, min(shape[-2:])).draw(rng.spawn(1), shape, x)
        inside = _window(shape, x)
        information = lambda v, a=operator, g=good: a.adjoint(a(v).where(g, 0.0))
        moved = information(element(x))
        difference = (moved - element(information(x))) * inside
        found.append(dot(difference, difference).sum() / dot(moved * inside, moved * inside).sum())
    return float(torch.stack(found).mean().sqrt())


def check_moves(observation: Observation, group: Group) -> None:
    """Raise UnsupportedError if the group commutes with AᵀGA to 1 %."""
    found = commutator(observation, group)
    if found < TOLERANCE:
        raise UnsupportedError(
            f"{type(group).__name__} commutes with {type(observation.operator).__name__}, border apart (to {100 * found:.2g} %), "
            "as shifts do with a convolution and turns with a round PSF: it shows nothing that the data do not; take one that "
            "does not commute, such as dilations for a blur, or leave the term out."
        )


def _gentle(group: Group, side: int) -> Group:
    """The group with shifts that leave the test images far from the border."""
    if isinstance(group, Product):
        return Product(tuple(_gentle(part, side) for part in group.groups))
    if isinstance(group, Shifts | OpenShifts):
        return replace(group, reach=min(group.reach, max(1, side // 8)))
    return group


def _interpolates(group: Group) -> bool:
    parts: Sequence[Group] = group.groups if isinstance(group, Product) else (group,)
    return any(isinstance(part, Rotations | Dilations) for part in parts)


def _images(shape: Shape, rng: Rng, *, smooth: bool) -> Image:
    """Random images in the middle of the field, dark elsewhere: (B, *shape), float64."""
    like = torch.zeros(len(rng), *shape, dtype=torch.float64)
    x = rng.normal(like) * _window(shape, like, 0.2)
    if not smooth:
        return x
    axes = [torch.fft.fftfreq(n, dtype=torch.float64) for n in shape[-2:]]
    blur = torch.exp(-2 * (torch.pi * BLOB) ** 2 * (axes[0][:, None] ** 2 + axes[1] ** 2))
    return torch.fft.ifft2(torch.fft.fft2(x) * blur).real


def _window(shape: Shape, like: Tensor, reach: float = 0.3) -> Tensor:
    """1 within `reach` of the sides of the centre, else 0: (H, W)."""
    axes = [((torch.arange(n) - (n - 1) / 2).abs() <= reach * n).to(like) for n in shape[-2:]]
    return axes[0][:, None] * axes[1]
