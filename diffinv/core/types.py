"""Aliases that say what a tensor means; the batch axis is always axis 0."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Image = Tensor  # (B, C, H, W), in the unit of the prior or of the object's BUNIT
Data = Tensor  # (B, *data_shape)
Sigma = Tensor  # (B,), noise level in the unit of the image
Shape = tuple[int, ...]
LinearMap = Callable[[Tensor], Tensor]

__all__ = ["Data", "Image", "LinearMap", "Shape", "Sigma", "Tensor"]
