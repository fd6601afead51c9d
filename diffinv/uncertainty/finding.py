"""What a diagnostic found: a frozen record with its statistic, the band of its null distribution and a p-value.

A finding prints in one line, becomes a plain dictionary and comes back from it. It never says that a posterior is right: a
p-value that is not small means that *this* diagnostic saw nothing.
Invariant: `type(f).from_dict(json.loads(json.dumps(f.to_dict()))) == f`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from diffinv.core.checks import DiffinvError


@dataclass(frozen=True)
class Record:
    """A frozen dataclass of numbers, strings and tuples of them."""

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, tuples as lists, with the class under "record"."""
        return {"record": type(self).__name__, **{k: _plain(v) for k, v in dataclasses.asdict(self).items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record that `to_dict` described. Raises: DiffinvError for a dictionary of another class."""
        if values.get("record") != cls.__name__:
            raise DiffinvError(f"{cls.__name__}.from_dict: the dictionary is of '{values.get('record')}'; use that class.")
        return cls(**{k: _tuples(v) for k, v in values.items() if k != "record"})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Finding(Record):
    """The outcome of one test of one set of posteriors.

    diagnostic: the test. quantity: of what. statistic: its value. band: where 95 % of its null distribution lie. p_value: the
    null's probability of a statistic as extreme. objects: N. draws: M an object.
    """

    diagnostic: str
    quantity: str
    statistic: float
    band: tuple[float, float]
    p_value: float
    objects: int
    draws: int

    def fires(self, level: float = 0.05) -> bool:
        """Whether p ≤ level: of calibrated posteriors this share does."""
        return self.p_value <= level

    def __str__(self) -> str:
        low, high = self.band
        return (
            f"{self.diagnostic} of {self.quantity}: {self.statistic:.4g} (null {low:.4g} … {high:.4g}), p = {self.p_value:.3g}, "
            f"{self.objects} objects × {self.draws} draws{self.extra()}"
        )

    def extra(self) -> str:
        """What a subclass adds to the line."""
        return ""
