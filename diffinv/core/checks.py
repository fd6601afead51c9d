"""Errors that teach at the door: what was given, what was expected, and the remedy, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class DiffinvError(ValueError):
    """Root of the errors that a user can mend; its text is one line."""


class ShapeError(DiffinvError):
    """A tensor or an image does not have the shape that the object needs."""


class UnsupportedError(DiffinvError):
    """A pair of method and problem that has no meaning; the text says why."""


class ConfigError(DiffinvError):
    """A configuration file or a command line that cannot be used."""


class InputError(DiffinvError):
    """An input file that cannot be used; the text names the file, the cause and the remedy."""


def shape_text(shape: Sequence[int], batch: str = "B") -> str:
    """`(B, 3, 64, 64)` as text."""
    return f"({', '.join([batch, *map(str, shape)])})"


def check_shape(owner: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ShapeError unless `tensor` is (B, *expected)."""
    if tuple(tensor.shape[1:]) != tuple(expected):
        raise ShapeError(f"{owner} expects {shape_text(expected)}; got {tuple(tensor.shape)}.")


def check_batch(owner: str, field: str, given: int, batch: int) -> None:
    """Raise ShapeError unless a field of batch `given` serves images of batch `batch` (1 is shared)."""
    if given not in (1, batch):
        raise ShapeError(
            f"{owner}: {field} has batch {given} but the images have batch {batch}; "
            f"give one {field} (1, …) or one per image ({batch}, …)."
        )


def check_positive(owner: str, field: str, value: Tensor, remedy: str) -> None:
    """Raise DiffinvError unless every element is finite and > 0; a tensor on the meta device has no values to check."""
    if value.is_meta:
        return
    if not bool(((value > 0) & value.isfinite()).all()):
        worst = value[~((value > 0) & value.isfinite())].flatten()[0].item()
        raise DiffinvError(f"{owner}: {field} must be finite and > 0, got {worst}; {remedy}")


def check_weights(owner: str, state: Mapping[str, Tensor]) -> None:
    """Raise InputError unless every number of a file's weights is finite."""
    for name, weight in state.items():
        if not bool(weight.isfinite().all()):
            raise InputError(f"{owner}: the weights {name!r} hold NaN or infinite values; train it again, or fetch a whole copy.")
