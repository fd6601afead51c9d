"""Batches of objects: frozen dataclasses whose tensor fields lead with a batch axis of size 1 (shared) or B.

Invariant: `select`, `repeat` and `collate` commute with whatever the object computes, so that a row alone gives what
the row gives in a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError

T = TypeVar("T", bound="Batched")


@dataclass(frozen=True, eq=False)
class Batched:
    """A frozen dataclass of tensors (axis 0 is 1 or B), of other `Batched` objects, of tuples of these, and of constants."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same object with `function` applied to every tensor field, however deep."""
        changes = {f.name: _map_value(getattr(self, f.name), function) for f in dataclasses.fields(self) if f.init}
        return dataclasses.replace(self, **changes)

    def tensors(self) -> list[Tensor]:
        """Every tensor field, depth first."""
        return _find_tensors([getattr(self, f.name) for f in dataclasses.fields(self) if f.init])

    @property
    def batch(self) -> int:
        """B, or 1 if every field is shared."""
        return max([1, *(t.shape[0] for t in self.tensors())])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast as `Tensor.to`; integer and boolean fields keep their dtype."""

        def move(t: Tensor) -> Tensor:
            if t.is_floating_point() or t.is_complex():
                return t.to(*args, **kwargs)
            return t.to(t.new_empty(0, dtype=torch.get_default_dtype()).to(*args, **kwargs).device)

        return self.map(move)

    def select(self, index: Tensor | slice | Sequence[int]) -> Self:
        """The rows `index`; shared fields stay shared."""
        return self.map(lambda t: t if t.shape[0] == 1 else t[index])

    def repeat(self, times: int) -> Self:
        """Each row `times` times in a row (row i becomes rows i·times … (i+1)·times − 1)."""
        return self.map(lambda t: t if t.shape[0] == 1 else t.repeat_interleave(times, 0))


def _find_tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Batched):
            found.extend(value.tensors())
        elif isinstance(value, tuple):
            found.extend(_find_tensors(value))
    return found


def _map_value(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Batched):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_map_value(v, function) for v in value)
    return value


def collate(items: Sequence[T]) -> T:
    """One batch from objects of one type and one set of shapes.

    Arguments:
        items: objects of the same class, each of batch 1 or more; a field that is the same shared tensor in all of
            them stays shared, every other field is concatenated along axis 0.
    Returns: the batch.
    Raises:
        ShapeError: when classes, shapes or constants differ; bucket the objects by signature first.
    """
    return _collate_objects(items, [item.batch for item in items])


def _collate_objects(items: Sequence[T], sizes: list[int]) -> T:
    first = items[0]
    if any(type(item) is not type(first) for item in items):
        raise ShapeError(f"collate: mixed classes {sorted({type(i).__name__ for i in items})}; bucket objects by class first.")
    changes = {
        f.name: _collate_values([getattr(i, f.name) for i in items], sizes, f"{type(first).__name__}.{f.name}")
        for f in dataclasses.fields(first)
        if f.init
    }
    return dataclasses.replace(first, **changes)


def _collate_values(values: list[Any], sizes: list[int], name: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _collate_tensors(values, sizes, name)
    if isinstance(first, Batched):
        return _collate_objects(values, sizes)
    if isinstance(first, tuple) and any(isinstance(v, (Tensor, Batched, tuple)) for v in first):
        if len({len(v) for v in values}) > 1:
            raise ShapeError(f"collate: {name} has {sorted({len(v) for v in values})} parts; bucket objects by signature first.")
        return tuple(_collate_values(list(v), sizes, name) for v in zip(*values, strict=True))
    if any(v != first for v in values):
        raise ShapeError(
            f"collate: {name} differs between the objects ({first!r} and others); bucket objects by signature first."
        )
    return first


def _collate_tensors(values: list[Tensor], sizes: list[int], name: str) -> Tensor:
    first = values[0]
    if any(v.shape[1:] != first.shape[1:] for v in values):
        raise ShapeError(
            f"collate: {name} has shapes {sorted({tuple(v.shape[1:]) for v in values})}; bucket objects by signature first."
        )
    if all(v.shape[0] == 1 for v in values) and all(v is first or torch.equal(v, first) for v in values):
        return first
    return torch.cat([v.expand(n, *v.shape[1:]) for v, n in zip(values, sizes, strict=True)])
