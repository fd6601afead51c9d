"""A list of objects splits into the same disjoint parts everywhere, and a wrong split is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.engine.shards import Shard, parse_shard

ENTRIES = [Entry(f"galaxy {k}", Path(f"{k}.fits")) for k in range(1000)]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_shards_are_disjoint_complete_stable_and_even(parts: int) -> None:
    shares = [Shard(k, parts).select(ENTRIES) for k in range(parts)]
    assert sorted(e.object_id for share in shares for e in share) == sorted(e.object_id for e in ENTRIES)
    spread = (1000 / parts * (1 - 1 / parts)) ** 0.5
    assert all(abs(len(share) - 1000 / parts) <= 4 * spread for share in shares)
    assert set(Shard(0, parts).select(ENTRIES[::-1])) == set(shares[0])


def test_the_split_is_that_of_the_names_alone() -> None:
    assert [e.object_id for e in ENTRIES[:12] if e in Shard(1, 3).select(ENTRIES)] == ["galaxy 3", "galaxy 8"]


SLURM = {"ID": "7", "MIN": "3", "MAX": "9", "COUNT": "4", "STEP": "2"}


def slurm(**changes: str) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": text for name, text in {**SLURM, **changes}.items()}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/5", {}, "2/5"),
        ("2/5", slurm(), "2/5"),
        ("auto", slurm(), "2/4"),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, "1/2"),
        ("auto", {**slurm(), "RANK": "1", "WORLD_SIZE": "2"}, "5/8"),
    ],
)
def test_a_shard_is_given_or_found(text: str, environment: dict[str, str], expected: str) -> None:
    assert str(parse_shard(text, environment)) == expected


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("5/5", {}, "expected i/n with 0 ≤ i < n"),
        ("-1/5", {}, "expected i/n"),
        ("1", {}, "expected i/n"),
        ("0/0", {}, "expected i/n"),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID nor RANK is set"),
        ("auto", slurm(MAX="11"), "has gaps"),
        ("auto", slurm(ID="99"), "number 48 of SLURM_ARRAY_TASK_COUNT = 4"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "number 2 of WORLD_SIZE = 2"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
    ],
)
def test_a_wrong_shard_is_one_line(text: str, environment: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_shard(text, environment)
    assert "\n" not in str(caught.value)
