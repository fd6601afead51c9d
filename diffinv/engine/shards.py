"""Which part of the objects is this process's: shard i of n holds the objects whose hash leaves i when divided by n.

Invariant: the shards of one n are disjoint and together all objects, on every machine and in any order of the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.engine.names import stable_hash


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `parts`."""

    index: int = 0
    parts: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.parts}"

    def select(self, entries: Sequence[Entry]) -> list[Entry]:
        """The objects of this part, in their order."""
        return [entry for entry in entries if stable_hash(entry.object_id) % self.parts == self.index]


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """A shard from `i/n` with 0 ≤ i < n, or from `auto`: a Slurm array's task, the rank of torchrun or accelerate, or both.

    Arguments: environment: variables, which only `auto` reads.
    Raises: ConfigError if it is neither, or `auto` finds no such variables or a Slurm array that is not evenly spaced.
    """
    if text == "auto":
        return _from_environment(environment)
    index, _, parts = text.partition("/")
    if not (_is_count(index) and _is_count(parts) and int(index) < int(parts)):
        raise ConfigError(f"--shard {text}: expected i/n with 0 ≤ i < n, for example 0/4, or auto.")
    return Shard(int(index), int(parts))


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _from_environment(environment: Mapping[str, str]) -> Shard:
    array, ranks = "SLURM_ARRAY_TASK_ID" in environment, "RANK" in environment
    if not array and not ranks:
        raise ConfigError("--shard auto: neither SLURM_ARRAY_TASK_ID nor RANK is set; give --shard i/n.")
    outer = _slurm_task(environment) if array else Shard()
    inner = _checked("RANK", _number(environment, "RANK"), "WORLD_SIZE", environment) if ranks else Shard()
    return Shard(outer.index * inner.parts + inner.index, outer.parts * inner.parts)


def _slurm_task(environment: Mapping[str, str]) -> Shard:
    """The task's place among those of its array, which may start anywhere and skip evenly."""
    task, first = (_number(environment, f"SLURM_ARRAY_TASK_{name}", 0) for name in ("ID", "MIN"))
    last, parts = (_number(environment, f"SLURM_ARRAY_TASK_{name}", -1) for name in ("MAX", "COUNT"))
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1) or 1
    if last >= 0 and parts > 0 and first + (parts - 1) * step != last:
        raise ConfigError(f"--shard auto: the Slurm array from {first} to {last} has gaps; number its tasks 0-{parts - 1}.")
    return _checked("SLURM_ARRAY_TASK_ID", (task - first) // step, "SLURM_ARRAY_TASK_COUNT", environment)


def _checked(what: str, index: int, name: str, environment: Mapping[str, str]) -> Shard:
    parts = _number(environment, name)
    if not 0 <= index < parts:
        raise ConfigError(f"--shard auto: {what} is number {index} of {name} = {parts}; give --shard i/n.")
    return Shard(index, parts)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not _is_count(text.removeprefix("-")):
        raise ConfigError(f"--shard auto: {name} is {text!r}, not a number; give --shard i/n.")
    return int(text)
